"""Whole runs whose base and data come from a bucket or the Hub, and whose results go there."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jobs.cli import _ending
from jobs.observe.events import Observer
from jobs.run import Outcome, _publish
from jobs.spec import Spec
from jobs.store.cache import cache_folder
from jobs.store.hashing import file_entries, sha256_of
from jobs.store.lease import Lease
from jobs.store.local import LocalStore
from tests.conftest import BASE, ROOT, Result, lorajob, lorajob_warm
from tests.servers.faults import running_proxy
from tests.servers.fixtures import moto  # noqa: F401
from tests.servers.hub import Hub
from tests.servers.hub_fixtures import TOKEN, hub  # noqa: F401
from tests.servers.s3 import S3Server

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(40)
]  # fmt: skip

Start = Callable[..., Result]


def spec(path: Path, base: str, data: Any, publish: list[Any], **more: Any) -> Path:
    """The shortest run that makes an adapter and merged weights."""
    path.write_text(
        yaml.safe_dump(
            {
                "name": "remote",
                "model": {"base": base, "max_seq_length": 128},
                "data": data,
                "train": {"max_steps": 2, "batch_size": 2},
                "verify": {"prompts": [{"ask": "What is 1?"}], "max_new_tokens": 24},
                "publish": publish,
                **more,
            }
        )
    )
    return path


def begin(
    start: Start, command: str, spec: Path, work: Path, cache: Path, env: dict[str, str]
) -> Result:
    cache.mkdir(exist_ok=True)
    for name in ("llama.cpp", "tokenizers"):  # or it would be built, and proven, anew
        if not (cache / name).exists():
            (cache_folder() / name).mkdir(parents=True, exist_ok=True)
            (cache / name).symlink_to(cache_folder() / name)
    env = {**env, "LORAJOB_CACHE": str(cache)}
    return start(command, str(spec), "--work", str(work), cwd=ROOT, stdin="", **env)


def go(command: str, spec: Path, work: Path, cache: Path, **env: str) -> Result:
    return begin(lorajob_warm, command, spec, work, cache, env)


def go_cold(command: str, spec: Path, work: Path, cache: Path, **env: str) -> Result:
    return begin(lorajob, command, spec, work, cache, env)


def events_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def trained(result: Result) -> bool:
    assert result.code == 0, result.err + result.out[-3000:]
    begun = {e["stage"] for e in events_of(result) if e["event"] == "stage_start"}
    already = [e for e in events_of(result) if e["event"] == "already_published"]
    assert ("train" in begun) != bool(already)
    assert begun == set() or not already
    return "train" in begun


@pytest.fixture
def bucket(moto: S3Server, tmp_path: Path) -> str:
    """A bucket that holds the demo's base and forty rows."""
    name = moto.new_bucket()
    client = moto.client()
    for path in BASE.iterdir():
        client.upload_file(str(path), name, f"models/demo/{path.name}")
    client.put_object(Bucket=name, Key="models/demo/pytorch_model.bin", Body=b"never fetched")
    body = "\n".join(map(json.dumps, ROWS)).encode()
    client.put_object(Bucket=name, Key="data/chats.jsonl", Body=body)
    return name


def test_from_a_bucket_to_a_bucket(moto: S3Server, bucket: str, tmp_path: Path) -> None:
    file = spec(
        tmp_path / "spec.yaml",
        f"s3://{bucket}/models/demo",
        {"train": f"s3://{bucket}/data/*.jsonl", "eval": 0.1},
        [f"s3://{bucket}/runs/remote"],
    )
    with running_proxy(moto.endpoint, rate=0.1, seed=3) as proxy:
        proxy.stall_s = 0.2
        env = {**moto.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        checked = go("check", file, tmp_path / "work", tmp_path / "cache", **env)
        assert checked.code == 0, checked.err
        assert not any(
            r.target.endswith("model.safetensors") and r.method == "GET" for r in proxy.log
        )
        # Nothing in common with the run below that gives the same bytes, as Python's hashes' seed.
        done = go_cold("run", file, tmp_path / "work", tmp_path / "cache", **env)
        assert done.code == 0, done.err + done.out[-3000:]
        assert proxy.injected
        keys = {
            entry["Key"].removeprefix("runs/remote/")
            for entry in moto.client().list_objects_v2(Bucket=bucket, Prefix="runs/")["Contents"]
        }
        manifest = json.loads((tmp_path / "work" / "remote" / "manifest.json").read_text())
        assert keys == {file["path"] for file in manifest["files"]} | {"manifest.json"}
        assert manifest["inputs"]["data"][0]["files"][0][0] == "chats.jsonl"
        config = json.loads((tmp_path / "work/remote/adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == f"s3://{bucket}/models/demo"
        assert str(tmp_path) not in json.dumps(config)

        # Again on another machine, with nothing there but a manifest lost: the same results, and
        # nothing of them is sent.
        moto.client().delete_object(Bucket=bucket, Key="runs/remote/manifest.json")
        before = len(proxy.log)
        again = go("run", file, tmp_path / "other", tmp_path / "other-cache", **env)
        assert again.code == 0, again.err
        sent = next(event for event in events_of(again) if event["event"] == "published")
        weights = "merged/model.safetensors"
        assert sha256_of(tmp_path / "other/remote" / weights) == sha256_of(tmp_path / "work/remote" / weights)  # fmt: skip
        assert sent["kept"] >= len(manifest["files"]) - 3  # not: timings, and what lists them
        sent_again = [r.target for r in proxy.log[before:] if r.method in ("PUT", "POST")]
        assert not [target for target in sent_again if "/runs/remote/merged/model" in target]
    assert "never fetched" not in [p.name for p in (tmp_path / "cache").rglob("*.bin")]


def test_what_went_ahead_of_a_run_that_is_found_wrong_is_given_back(
    moto: S3Server, bucket: str, tmp_path: Path
) -> None:
    file = spec(
        tmp_path / "spec.yaml", str(BASE), {"train": f"s3://{bucket}/data/chats.jsonl"},
        [f"s3://{bucket}/out"], export={"gguf": ["f32"]},
        verify={"prompts": [{"ask": "What is 1?", "expect": "Nobody says this."}], "max_new_tokens": 24},
    )  # fmt: skip
    with running_proxy(moto.endpoint, rate=0) as proxy:
        env = {**moto.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        done = go("run", file, tmp_path / "work", tmp_path / "cache", **env)
        assert done.code == 6, done.err
        ahead = [r.target for r in proxy.log if r.method == "PUT" and "partNumber" in r.target]
    assert [target.partition("?")[0] for target in ahead] == [
        f"/{bucket}/out/gguf/remote-F32.gguf"
    ] * 2
    client = moto.client()
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    there = client.list_objects_v2(Bucket=bucket, Prefix="out/").get("Contents", [])
    keys = [entry["Key"].removeprefix("out/") for entry in there]
    assert [key for key in keys if not key.startswith(("checkpoints/", "lease"))] == []


def test_a_bad_row_in_a_bucket_is_named_as_people_know_it(
    moto: S3Server,
    bucket: str,
    tmp_path: Path,
) -> None:
    bad = json.dumps({"messages": [{"role": "user", "content": "no answer"}]})
    body = "\n".join([*map(json.dumps, ROWS), bad]).encode()
    moto.client().put_object(Bucket=bucket, Key="data/bad.jsonl", Body=body)
    file = spec(tmp_path / "spec.yaml", str(BASE), {"train": f"s3://{bucket}/data/bad.jsonl"}, [])
    result = go("check", file, tmp_path / "work", tmp_path / "cache", **moto.environment())
    assert result.code == 3
    assert f"s3://{bucket}/data/bad.jsonl, line 41" in result.err


def test_from_the_hub_to_the_hub_pinned_to_commits(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("acme/base", "model", {p.name: p for p in BASE.iterdir()})
    hub.add_repo(
        "acme/chats",
        "dataset",
        {
            "README.md": (
                b"---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: s/*.jsonl\n"
                b"  - split: test\n    path: t/*.jsonl\n- config_name: large\n  data_files: s/*.jsonl\n---\n"
            ),
            "s/a.jsonl": "\n".join(map(json.dumps, ROWS[:30])).encode(),
            "t/b.jsonl": "\n".join(map(json.dumps, ROWS[30:])).encode(),
        },
        private=True,
    )
    source = {"source": "hf://acme/chats", "config": "small"}
    file = spec(
        tmp_path / "spec.yaml",
        "acme/base",
        {"train": source, "eval": [{**source, "split": "test"}]},
        [{"hub": "acme/tuned", "adapter": "acme/tuned-lora"}, str(tmp_path / "published")],
    )
    env = {**hub.environment(token=TOKEN, home=tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = go("run", file, tmp_path / "work", tmp_path / "cache", **env)
    assert done.code == 0, done.err + done.out[-3000:]
    manifest = json.loads((tmp_path / "work" / "remote" / "manifest.json").read_text())
    assert manifest["inputs"]["base"]["commit"] == hub.commits("acme/base")[0].oid
    assert [len(d["files"]) for d in manifest["inputs"]["data"]] == [1, 1]
    assert [d["files"][0][0] for d in manifest["inputs"]["data"]] == ["s/a.jsonl", "t/b.jsonl"]
    assert manifest["data"]["train_rows"] == 30
    assert manifest["data"]["eval_rows"] == 10
    config = json.loads((tmp_path / "work/remote/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/base"
    assert config["revision"] == manifest["inputs"]["base"]["commit"]
    main, adapter = hub.files("acme/tuned"), hub.files("acme/tuned-lora")
    assert {"manifest.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(main)
    assert {"manifest.json", "adapter_config.json", "adapter_model.safetensors"} <= set(adapter)
    assert not any(path.startswith("adapter/") for path in main)
    assert main["model.safetensors"].sha256 == sha256_of(tmp_path / "work/remote/merged/model.safetensors")  # fmt: skip
    assert (tmp_path / "published" / "manifest.json").is_file()
    commits = [len(hub.commits(name)) for name in ("acme/tuned", "acme/tuned-lora")]
    again = go("run", file, tmp_path / "other", tmp_path / "cache", **env)
    assert again.code == 0, again.err
    assert "already_published" in {event["event"] for event in events_of(again)}
    assert commits == [len(hub.commits(name)) for name in ("acme/tuned", "acme/tuned-lora")]
    wrong = go("check", spec(tmp_path / "wrong.yaml", "acme/base", {"train": "hf://acme/chats"}, []), tmp_path / "work", tmp_path / "cache", **env)  # fmt: skip
    assert wrong.code == 2
    assert "small" in wrong.err
    assert "large" in wrong.err


def test_one_target_fails_the_others_are_served_and_the_next_start_sends_what_is_missing(
    moto: S3Server,
    bucket: str,
    tmp_path: Path,
) -> None:
    file = spec(
        tmp_path / "spec.yaml",
        str(BASE),
        {"train": f"s3://{bucket}/data/chats.jsonl"},
        [f"s3://{bucket}/one", str(tmp_path / "two")],
    )
    with running_proxy(moto.endpoint, rate=0) as proxy:
        env = {**moto.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        proxy.fail("expired", match=r"PUT .*/one/merged", times=99)
        failed = go("run", file, tmp_path / "work", tmp_path / "cache", **env)
    assert failed.code == 10
    assert f"s3://{bucket}/one" in failed.err
    assert "expired" in failed.err
    assert (tmp_path / "two" / "manifest.json").is_file()
    there = [
        e["Key"] for e in moto.client().list_objects_v2(Bucket=bucket, Prefix="one")["Contents"]
    ]
    assert "one/manifest.json" not in there
    done = go("run", file, tmp_path / "work", tmp_path / "cache", **moto.environment())
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    assert {e["stage"] for e in events if e["event"] == "stage_skipped"} >= {"train", "merge"}
    sent = {e["target"]: e["sent"] for e in events if e["event"] == "published"}
    assert 0 < sent[f"s3://{bucket}/one"] < len(there) + sent[f"s3://{bucket}/one"]
    assert sent[str(tmp_path / "two")] == 0


def test_what_was_published_is_not_trained_again_on_an_empty_disk(
    moto: S3Server,
    bucket: str,
    tmp_path: Path,
) -> None:
    """A run that was ended between its publication and its exit, and whose disk is lost."""
    base, data = f"s3://{bucket}/models/demo", {"train": f"s3://{bucket}/data/chats.jsonl"}
    targets = [f"s3://{bucket}/one", str(tmp_path / "two")]
    more: dict[str, Any] = {"checkpoints": {"every_steps": 1}}
    file = spec(tmp_path / "spec.yaml", base, data, targets, **more)
    client, cache = moto.client(), tmp_path / "cache"

    def there() -> dict[str, str]:
        found = client.list_objects_v2(Bucket=bucket, Prefix="one/")["Contents"]
        return {e["Key"]: e["ETag"] for e in found if not e["Key"].endswith("lease.json")}

    def start(number: int, file: Path = file) -> Result:
        return go("run", file, tmp_path / f"work{number}", cache, **moto.environment())

    with running_proxy(moto.endpoint, rate=0) as proxy:
        # What is left to do after the publication never happens.
        proxy.fail("expired", match=r"DELETE .*/one/checkpoints", times=99)
        env = {**moto.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        ended = go("run", file, tmp_path / "work0", cache, **env)
    assert ended.code not in (0, 1), ended.err
    assert any("/checkpoints/" in key for key in there())
    published = {key: tag for key, tag in there().items() if "/checkpoints/" not in key}
    assert "one/manifest.json" in published

    again = start(1)
    assert not trained(again)
    [said] = [event for event in events_of(again) if event["event"] == "already_published"]
    assert all(target in said["where"] for target in targets)
    [done] = [event for event in events_of(again) if event["event"] == "run_done"]
    assert done["manifest"] == f"s3://{bucket}/one/manifest.json"
    assert there() == published  # nothing is sent, and the checkpoints are gone
    assert not (tmp_path / "work1" / "remote" / "merged").exists()

    # The same, with nothing changed but what shapes no result.
    same = spec(
        tmp_path / "same.yaml", base, data, targets, checkpoints={"keep": 1}, limits={"retry_minutes": 1}
    )  # fmt: skip
    assert not trained(start(2, same))

    # One of the targets has lost its manifest, or a file: it is served again.
    (tmp_path / "two" / "manifest.json").unlink()
    assert trained(start(3))
    assert (tmp_path / "two" / "manifest.json").is_file()
    client.delete_object(Bucket=bucket, Key="one/adapter/adapter_model.safetensors")
    assert trained(start(4))
    assert there().keys() == published.keys()


@pytest.mark.parametrize("change", ["learning_rate", "data", "base"])
def test_a_run_that_would_give_something_else_is_not_taken_for_done(
    moto: S3Server, bucket: str, tmp_path: Path, change: str
) -> None:
    base, data = f"s3://{bucket}/models/demo", {"train": f"s3://{bucket}/data/chats.jsonl"}
    targets = [str(tmp_path / "published")]
    client, train = moto.client(), {"max_steps": 2, "batch_size": 2}
    file = spec(tmp_path / "spec.yaml", base, data, targets)
    env = moto.environment()
    assert trained(go("run", file, tmp_path / "work0", tmp_path / "cache", **env))
    if change == "learning_rate":
        file = spec(tmp_path / "spec.yaml", base, data, targets, train={**train, "learning_rate": 1e-3})  # fmt: skip
    elif change == "data":  # under the same name
        body = "\n".join(map(json.dumps, ROWS[:30])).encode()
        client.put_object(Bucket=bucket, Key="data/chats.jsonl", Body=body)
    else:
        config = json.loads((BASE / "config.json").read_text())
        body = json.dumps({**config, "rms_norm_eps": 2e-6}).encode()
        client.put_object(Bucket=bucket, Key="models/demo/config.json", Body=body)
    before = (tmp_path / "published" / "manifest.json").read_bytes()
    assert trained(go("run", file, tmp_path / "work1", tmp_path / "cache", **env))
    assert (tmp_path / "published" / "manifest.json").read_bytes() != before
    assert not trained(go("run", file, tmp_path / "work2", tmp_path / "cache", **env))


def test_check_leaves_nothing_behind(moto: S3Server, bucket: str, hub: Hub, tmp_path: Path) -> None:
    file = spec(
        tmp_path / "spec.yaml",
        str(BASE),
        {"train": f"s3://{bucket}/data/chats.jsonl"},
        [f"s3://{bucket}/one", {"hub": "acme/new"}, str(tmp_path / "two")],
    )
    env = {**moto.environment(), **hub.environment(token=TOKEN, home=tmp_path / "hf")}
    result = go("check", file, tmp_path / "work", tmp_path / "cache", **env)
    assert result.code == 0, result.err
    assert "can be written" in result.out
    assert "Contents" not in moto.client().list_objects_v2(Bucket=bucket, Prefix="one")
    assert not (tmp_path / "two").exists()
    assert not hub.seen(r"POST /api/models/acme/new/commit")


def test_what_will_not_work_is_known_before_anything_is_trained(
    moto: S3Server,
    bucket: str,
    hub: Hub,
    tmp_path: Path,
) -> None:
    hub.add_token("hf_" + "r" * 30, "ada", role="read")
    hub.add_repo("acme/gated", "model", {p.name: p for p in BASE.iterdir()}, gated="auto")
    rows = f"s3://{bucket}/data/chats.jsonl"
    env = {**moto.environment(), **hub.environment(token="hf_" + "r" * 30, home=tmp_path / "hf")}
    for base, data, publish, words in (
        (str(BASE), rows, ["s3://no-such-bucket-here/x"], ["no such bucket"]),
        (str(BASE), f"s3://{bucket}/nothing/", [], ["nothing at"]),
        (f"s3://{bucket}/data", rows, [], ["no config.json"]),
        ("acme/gated", rows, [], ["acme/gated", "access"]),
        ("acme/missing", rows, [], ["acme/missing"]),
        (str(BASE), rows, [{"hub": "acme/new"}], ["write"]),
    ):
        file = spec(tmp_path / "spec.yaml", base, {"train": data}, publish)
        result = go("run", file, tmp_path / "work", tmp_path / "cache", **env)
        assert result.code == 4, (base, data, publish, result.err)
        assert all(word in result.err for word in words), result.err
        assert "stage_start" not in result.out


FILES = [{"path": "adapter/a", "size": 2**20, "sha256": ""}]


def ending(outcome: Outcome, publish: list[Any], exported: bool = False) -> str:
    tree = {"name": "a", "model": {"base": str(BASE)}, "data": {"train": "x"}, "publish": publish}
    return "\n".join(_ending(outcome, Spec.model_validate(tree), Path("runs/a"), exported))


def test_a_run_ends_with_where_everything_is_and_what_comes_next() -> None:
    done = Outcome({"files": FILES}, "runs/a/manifest.json")
    told = ending(done, ["s3://bucket/x", "out"])
    assert "everything is in [bold]runs/a[/bold]" in told
    assert "adapter/    1 files       1.0 MiB" in told
    assert "published to [bold]s3://bucket/x[/bold]" in told
    assert "next: lorajob chat runs/a; how it went is in runs/a/report/report.html" in told
    assert "nothing is published" not in told
    assert "nothing is published: --publish" in ending(done, [], exported=True)


def test_one_that_had_nothing_to_do_names_the_places_and_not_its_folder() -> None:
    before = Outcome({"files": FILES}, "s3://bucket/x/manifest.json", here=False)
    told = ending(before, ["s3://bucket/x", {"hub": "acme/a"}])
    assert "runs/a" not in told
    assert "MiB" not in told
    assert "published to [bold]s3://bucket/x[/bold]" in told
    assert "published to [bold]hub://acme/a[/bold]" in told
    assert "lorajob chat out;" in ending(before, ["s3://bucket/x", "out"])


def test_what_a_publication_removes_is_told(tmp_path: Path) -> None:
    def publish(numbers: range) -> list[dict[str, Any]]:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        for number in numbers:
            (folder / "gguf").mkdir(parents=True, exist_ok=True)
            (folder / "gguf" / f"m-{number}.gguf").write_text(str(number))
        files = file_entries(folder)
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
        stream = io.StringIO()
        with Observer("json", stream) as observer:
            targets = [LocalStore(tmp_path / "out")]
            job = SimpleNamespace(
                folder=folder, observer=observer, ready=SimpleNamespace(targets=targets)
            )
            _publish(job, Lease(), files)  # type: ignore[arg-type]
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    assert [event["event"] for event in publish(range(8))] == ["published"]
    assert [event["event"] for event in publish(range(8))] == ["published"]
    [warning, _] = publish(range(1))
    assert warning["event"] == "warning"
    assert f"{tmp_path / 'out'} had 7 files of an earlier manifest" in warning["text"]
    assert "gguf/m-1.gguf, gguf/m-2.gguf" in warning["text"]
    assert warning["text"].endswith("gguf/m-5.gguf and 2 more")
    [warning, _] = publish(range(7, 8))
    assert warning["text"].endswith("removed: gguf/m-0.gguf")
