"""The CPU image as it is used: built from the Dockerfile, run on a read-only root without network."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from jobs import __version__
from tests.conftest import ROOT
from tests.image.podman import HARDENED, IMAGE, STORE, Desk, podman, why_not

pytestmark = pytest.mark.slow

DEMO = "/opt/lorajob/examples/demo.yaml"
DATA = "/opt/lorajob/examples/demo/data"


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    """Skips where there is no image, unless LORAJOB_REQUIRE (`image,...`) says that it must be."""
    if reason := why_not():
        if "image" in os.environ.get("LORAJOB_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_stopped_in_training_it_ends_with_20_and_the_next_start_makes_all_of_it(desk: Desk) -> None:
    often = {
        "LORAJOB__CHECKPOINTS__EVERY_STEPS": "10",
        "LORAJOB__TRAIN__MAX_STEPS": "40",
        "LORAJOB__VERIFY__PROMPTS": "[]",  # so few steps do not teach what the demo's expect
    }
    with desk.start("run", DEMO, env=often) as running:
        running.wait_for(lambda event: event["event"] == "checkpoint")
        code, seconds = running.terminate()
        assert code == 20, running.told()
        assert seconds < 10
        assert "safe: " in running.told()
    result = desk.do("run", DEMO, env=often)
    assert result.code == 0, result.err
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [event["event"] for event in events if event["event"] in ("resumed", "run_done")] == [
        "resumed", "run_done",
    ]  # fmt: skip
    published = desk.work / "published" / "demo"
    manifest = json.loads((published / "manifest.json").read_text())
    assert {entry["path"].split("/")[0] for entry in manifest["files"]} == {
        "adapter", "merged", "gguf", "report", "README.md",
    }  # fmt: skip
    assert all((published / entry["path"]).stat().st_uid == 1000 for entry in manifest["files"])
    assert {path.name for path in desk.work.iterdir()} == {"runs", "published"}


def test_environment_variables_alone_are_a_whole_run(desk: Desk) -> None:
    env = {
        "LORAJOB__NAME": "bare",
        "LORAJOB__MODEL__BASE": "/opt/lorajob/examples/demo/base",
        "LORAJOB__MODEL__MAX_SEQ_LENGTH": "256",
        "LORAJOB__DATA__TRAIN": f"{DATA}/persona.jsonl",
        "LORAJOB__TRAIN__MAX_STEPS": "2",
        "LORAJOB__EXPORT__GGUF": "[q8_0]",
        "LORAJOB__PUBLISH": "[/work/out]",
    }
    result = desk.do(env=env)
    assert result.code == 0, result.err
    assert (desk.work / "out" / "gguf" / "bare-Q8_0.gguf").is_file()
    assert (desk.work / "runs" / "bare" / "manifest.json").is_file()


def test_a_mounted_spec_is_run_from_where_it_is_mounted(desk: Desk) -> None:
    spec = desk.folder / "spec.yaml"
    spec.write_text("name: [")
    result = desk.do(options=("-v", f"{spec}:/etc/lorajob/spec.yaml:ro"))
    assert result.code == 2, result.err
    assert "/etc/lorajob/spec.yaml" in result.err


def test_check_takes_less_than_two_seconds(desk: Desk) -> None:
    # Less the start of a container, which is podman's; the quickest of three, on a busy machine.
    took = []
    for _ in range(3):
        start = time.monotonic()
        assert desk.do("--version").code == 0
        bare = time.monotonic() - start
        start = time.monotonic()
        result = desk.do("check", DEMO)
        took.append(time.monotonic() - start - bare)
        assert result.code == 0, result.err
    assert min(took) < 2, took


@pytest.mark.parametrize("wait", [0.0, 0.05, 1.0])
def test_stopped_before_there_is_anything_to_keep_it_ends_with_143(desk: Desk, wait: float) -> None:
    with desk.start("run", "-") as running:  # it waits for a spec
        while podman("top", running.name, "pid").code:
            assert running.process.poll() is None, running.told()
        time.sleep(wait)
        code, seconds = running.terminate()
    assert code == 143, running.told()
    assert seconds < 5


def test_what_was_not_given_is_told_with_what_to_do(desk: Desk) -> None:
    bare = ["run", "--rm", *HARDENED]
    nothing = podman(*bare, IMAGE)
    assert nothing.code == 4
    assert "was not given 2 things" in nothing.err
    for folder in ("/work", "/cache"):
        assert f"user 1000 cannot write to {folder}" in nothing.err
        assert f"mount a volume at {folder} that user 1000 may write to" in nothing.err

    small = desk.do(options=("--shm-size", "1m"))
    assert small.code == 5
    assert "/dev/shm has 1 MiB free" in small.err
    assert "--shm-size" in small.err

    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=1777", "lorajob-test", str(desk.work)],
        check=True,
    )
    try:
        full = desk.do()
    finally:
        subprocess.run(["umount", "-l", str(desk.work)], check=True)
    assert full.code == 5
    assert "the disk of /work/runs, for runs, is full" in full.err

    gpu = desk.do(env={"LORAJOB_IMAGE": "cuda"})
    assert gpu.code == 4
    assert "NVIDIA driver" in gpu.err
    assert "use the CPU image" in gpu.err


def test_a_user_chosen_by_the_cluster_can_use_it(desk: Desk) -> None:
    os.chown(desk.work, 123456, 0)
    os.chown(desk.cache, 123456, 0)
    result = desk.do("check", DEMO, options=("--user", "123456:0"))
    assert result.code == 0, result.err


def test_it_holds_no_tools_and_nothing_else_can_be_written_to() -> None:
    look = """
import importlib.util, json, os, shutil, sys
modules = "pip pytest moto mypy ruff hypothesis unsloth unsloth_zoo cmake ninja triton"
programs = "pip pip3 gcc cc c++ cmake ninja ruff pytest make git curl wget"
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
writable = []
for top, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev")]
    writable += [top] if os.access(top, os.W_OK) else []
    writable += [p for f in files if os.access(p := os.path.join(top, f), os.W_OK) and not os.path.islink(p)]
print(json.dumps({
    "modules": [n for n in modules.split() if there(n)],
    "programs": [n for n in programs.split() if shutil.which(n)],
    "writable": sorted(set(writable)),
    "stale": [t for t, _, f in os.walk("/opt/lorajob/jobs") if any(n.endswith(".py") for n in f) and not t.endswith("__pycache__") and "__pycache__" not in os.listdir(t)],
}))
"""
    # Its own folders, on a root that may be written to: what the file modes alone allow.
    result = podman(
        "run", "--rm", "--user", "1000:1000", "--cap-drop", "ALL", "--network", "none",
        "--entrypoint", "python", IMAGE, "-c", look,
    )  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["modules"] == []
    assert found["programs"] == []
    assert [p for p in found["writable"] if not p.startswith(("/tmp", "/var/tmp", "/run/lock"))] == [
        "/cache", "/work",
    ]  # fmt: skip
    assert found["stale"] == []


def test_its_labels_user_and_entrypoint() -> None:
    config = json.loads(podman("image", "inspect", IMAGE).out)[0]["Config"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels["title"] == "lorajob"
    assert labels["version"] == __version__
    assert labels["variant"] == "cpu"
    assert labels["licenses"] == "Apache-2.0"
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"][0].endswith("python"), "a shell would not pass signals on"
    assert config["Cmd"] == ["run"]


def test_what_is_not_new_is_built_in_less_than_ten_seconds() -> None:
    took = []
    for _ in range(3):  # the first may have something to do
        start = time.monotonic()
        subprocess.run([str(ROOT / ".ci" / "image"), str(STORE)], check=True, capture_output=True)
        took.append(time.monotonic() - start)
    assert min(took) < 10, took
