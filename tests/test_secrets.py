"""Secrets never show: not in what is said, not in what is left, not in what other programs are told."""

from __future__ import annotations

import base64
import html
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import secrets
from jobs.observe.events import Observer
from jobs.secrets import is_secret_field, looks_like_secret, redact, redact_tree, remember
from tests.conftest import BASE, ROOT

CORE = "9aBcDeFgHiJkLmNoPqRsTuVwXyZ2qWeRtY"  # 34 characters, as the Hub's tokens have
AWS_KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY9/abcd+efg"
HEX40 = "89ab" * 10

# Each kind: what is written, and the part of it that must not be seen again.
KINDS = {
    "hub token": (f"hf_{CORE}", CORE),
    "hub organisation": (f"api_org_{CORE}", CORE),
    "aws key id": ("AKIAQ3EGABCDEFGH2345", "Q3EGABCDEFGH2345"),
    "aws temporary key id": ("ASIAQ3EGABCDEFGH2345", "Q3EGABCDEFGH2345"),
    "aws secret": (f"aws_secret_access_key = {AWS_KEY}", "K7MDENG"),
    "aws secret as a service tells it": (f'"SecretAccessKey" : "{AWS_KEY}"', "K7MDENG"),
    "aws session token": (f"aws_session_token={CORE}//{CORE}==", CORE),
    "authorization": (f"Authorization: Basic {CORE}", CORE),
    "authorization, one word": (f"authorization: {CORE}", CORE),
    "authorization of a dict": (f"{{'Authorization': b'Token {CORE}'}}", CORE),
    "authorization of a list": (f"(b'authorization', b'Bearer {CORE}')", CORE),
    "bearer": (f"Bearer {CORE}", CORE),
    "signature 4": (
        f"AWS4-HMAC-SHA256 Credential=key/2026/x, SignedHeaders=host, Signature={CORE}",
        CORE,
    ),
    "presigned": (f"https://b.s3.example/x?X-Amz-Date=2&X-Amz-Signature={CORE}&a=b", CORE),
    "presigned credential": (f"?X-Amz-Credential={CORE}%2F20260101%2Fs3", CORE),
    "presigned token": (f"&X-Amz-Security-Token={CORE}", CORE),
    "signature 2": (f"?AWSAccessKeyId=x&Expires=9&Signature={CORE}%3D", CORE),
    "sas": (f"?sv=2020&sig={CORE}%3D", CORE),
    "query token": (f"https://h.example/x?token={CORE}", CORE),
    "token by name": (f"token={CORE}", CORE),
    "user and password": (f"https://user:{CORE}@host.example/x", CORE),
    "password with a slash and an at": (f"s3://key:{CORE}/x@y@bucket", CORE),
    "token as user": (f"https://{CORE}@host.example/x", CORE),
    "sk": (f" sk-{CORE}", CORE),
    "sk of a project": (f"sk-proj-{CORE}", CORE),
    "github": (f"ghp_{CORE}", CORE),
    "github, fine": (f"github_pat_{CORE}_{CORE}", CORE),
    "gitlab": (f"glpat-{CORE}", CORE),
    "slack": (f"xoxb-{CORE}", CORE),
    "web token": (f"eyJhbGciOiJI.eyJzdWIiOiIx{CORE}.{CORE}", CORE),
    "wandb by name": (f"WANDB_API_KEY={HEX40}", HEX40),
    "wandb login": (f"wandb login {HEX40}", HEX40),
    "password by name": ("password=9swordfish", "9swordfish"),
    "password in quotes": ('"db_password": "sword fish"', "fish"),
    "private key": (
        f"-----BEGIN RSA PRIVATE KEY-----\n{CORE}\n{CORE}\n-----END RSA PRIVATE KEY-----\n",
        CORE,
    ),
    "private key cut short": (f"-----BEGIN PRIVATE KEY-----\n{CORE}", CORE),
}
# What is said only by its name is redacted, but no reason to refuse a spec's prose.
ONLY_NAMED = {"aws session token", "authorization, one word", "token by name", "wandb by name",
              "wandb login", "password by name", "password in quotes"}  # fmt: skip

FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "json": json.dumps,
    "json in other letters": lambda text: json.dumps(text, ensure_ascii=False),
    "url": lambda text: quote(text, safe="", errors="replace"),
    "url, path": lambda text: quote(text, errors="replace"),
}
MORE_FORMS: dict[str, Callable[[str], str]] = {
    **FORMS,
    "json twice": lambda text: json.dumps(json.dumps(text)),
    "url of a form": lambda text: quote_plus(text, errors="replace"),
    "url twice": lambda text: quote(quote(text, safe="", errors="replace"), safe=""),
    "python": repr,
    "python bytes": lambda text: repr(text.encode("utf-8", "replace")),
    "html": html.escape,
}
# Surrogates cannot be encoded at all.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A home without credentials, and none in the environment."""
    if not os.environ.get("LORAJOB_CACHE"):  # which is below the home then
        monkeypatch.setenv("LORAJOB_CACHE", str(Path.home() / ".cache" / "lorajob"))
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "AWS_", "WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(secrets, "_told", set())
    monkeypatch.setattr(secrets, "_last", None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@given(before=ANY_TEXT, after=ANY_TEXT)
def test_no_kind_of_secret_is_left_wherever_it_stands(
    kind: str, form: str, before: str, after: str
) -> None:
    planted, core = KINDS[kind]
    text = FORMS[form](f"{before}{planted}{after}")
    assert FORMS[form](core).strip('"') in text
    clean = redact(text)
    assert core not in clean
    assert FORMS[form](core).strip('"') not in clean
    assert redact(clean) == clean


@pytest.mark.parametrize("form", MORE_FORMS)
@given(
    value=st.text(st.characters(exclude_categories=["Cs"]), min_size=6, max_size=30),
    before=ANY_TEXT,
    after=ANY_TEXT,
)
def test_no_value_of_the_environment_is_left_in_any_spelling(
    form: str, value: str, before: str, after: str
) -> None:
    value = f"q7{value.replace(chr(0), '0')}Z"
    with mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": value}):
        spelled = MORE_FORMS[form](value)
        clean = redact(f"{before} {spelled} {after}")
        assert spelled not in clean
        assert value not in clean
        assert redact(clean) == clean
        assert looks_like_secret(value)


@given(tree=st.recursive(ANY_TEXT | st.sampled_from([p for p, _ in KINDS.values()]) | st.integers(),
                         lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner)))  # fmt: skip
def test_json_stays_json(tree: Any) -> None:
    line = json.dumps(tree)
    json.loads(redact(line))
    clean = json.dumps(redact_tree(tree))
    assert all(core not in clean for _, core in KINDS.values())
    assert redact_tree(redact_tree(tree)) == redact_tree(tree)


ORDINARY = [
    "/models/Llama-3.2-1B-Instruct/model-00001-of-00002.safetensors",
    "data 12.5 s  1200 conversations to train on, 3 held out, 1234567 of 2345678 tokens trained",
    "loss 2.3041, eval loss 2.1 -> 1.9, learning_rate=0.0002, grad_norm: 0.8571428571428571",
    "meta-llama/Llama-3.3-70B-Instruct@main",
    "hf://mlabonne/FineTome-100k@refs/pr/7/data/*.parquet",
    "s3://models/support-bot/gguf/support-bot-Q4_K_M.gguf",
    "http://localhost:9000/bucket/model@v1?versionId=abc&list-type=2&prefix=a/b",
    "https://huggingface.co/api/models/acme/bot/revision/main",
    "ssh://git@example.org/repo and mail to jo@example.org",
    "eos_token='<|im_end|>', pad_token=<pad>, token=None, token: 151645, max_tokens=2048",
    '{"event": "progress", "step": "reading data", "done": 12, "total": null}',
    "train.epoch: unknown field; did you mean train.epochs? (line 1)",
    "secret_key: unknown field; credentials belong into the environment",
    "password: is missing", "api_key=None", "set HF_TOKEN to a token with write access",
    "Authorization: required", "the bearer of bad news", "mask-4f2a and disk-0 and task-12",
    "tokenizer.json, special_tokens_map.json, tokenizer_config.json", "AKIA is how they begin",
    "lora_A.default.weight q_proj k_proj v_proj torch.bfloat16 cuda:0 0x7f3a2b4c5d6e",
    "3f2504e0-4f89-41d3-9a0c-0305e82c3301", "2026-11-22T10:00:00.123456Z",
]  # fmt: skip
HASHED = ["{}", "sha256={}", "sha256:{}", '"sha256": "{}"', "commit {}", "revision: {}", "key={}",
          "acme/bot@{}", "hf://acme/bot@{}/x", "blobs/{}", "hf_{}", "etag: {}", "content_key={}",
          "--hash=sha256:{}", '["chats.jsonl", "{}"]', "tokenizer: {}", "token: {}", "disk-{}"]  # fmt: skip


@pytest.mark.parametrize("line", ORDINARY)
def test_ordinary_lines_stay_as_they_are(line: str) -> None:
    for form in ("plain", "json"):  # with %20 for its spaces prose is no prose any more
        assert redact(FORMS[form](line)) == FORMS[form](line)
    assert not looks_like_secret(line)


@given(content=st.binary(), at=st.sampled_from(HASHED), length=st.sampled_from([40, 64, 12, 16]))
def test_no_hash_is_taken_for_a_secret(content: bytes, at: str, length: int) -> None:
    import hashlib

    line = at.format(hashlib.sha256(content).hexdigest()[:length])
    assert redact(line) == line
    assert not looks_like_secret(line)


@given(content=st.binary(max_size=60), number=st.floats(), name=st.from_regex(r"\A[\w.-]{1,30}\Z"))
def test_small_base64_numbers_and_names_stay(content: bytes, number: float, name: str) -> None:
    line = f"{base64.b64encode(content).decode()} loss={number} models/{name}/config.json {name}"
    assert redact(line) == line


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_a_secrets_form_has_no_place_in_a_spec(kind: str) -> None:
    assert looks_like_secret(KINDS[kind][0]) or kind in ONLY_NAMED


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", "minio-sesame", True),
        ("MLFLOW_TRACKING_PASSWORD", "swordfish", True),
        ("HF_TOKEN", "hf_short", True),
        ("DATABASE_PASSWORD", "swordfish", True),
        ("DEPLOY_TOKEN", "a1b2c3d4e5f6g7", True),
        ("SIGNING_KEY", HEX40, True),
        ("HF_TOKEN_OF_CI", "a1b2c3d4e5f6g7", True),
        ("PIP_INDEX_URL", "https://ci:swordfish@pypi.example/simple", True),
        ("WANDB_API_KEY", "true", False),
        ("AWS_SECRET_ACCESS_KEY", "testing", False),
        ("SOME_SECRET", "1", False),
        ("SSL_KEY", "/etc/ssl/private/server.pem", False),
        ("TOKEN_DIR", "/tmp", False),
        ("EOS_TOKEN", "<|im_end|>", False),
        ("SORT_KEY", "timestamp", False),
        ("CACHE_KEY", HEX40, False),
        ("PWD", "/home/someone1", False),
        ("GIT_COMMIT", HEX40, False),
        ("LORAJOB__DATA__COLUMNS__API_KEY", "answer", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token1", False),
    ],
)
def test_which_variables_hold_a_secret(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, secret: bool
) -> None:
    monkeypatch.setenv(name, value)
    core = "swordfish" if "swordfish" in value else value
    assert (core not in redact(f"got {core} there")) == secret


def test_a_weak_password_refuses_no_spec_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    assert looks_like_secret("postgres")
    assert not looks_like_secret("/models/postgres-expert")


def test_the_files_of_the_libraries_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("tokenOfTheHub\n")
    (tmp_path / "aws").write_text(
        f"[default]\naws_secret_access_key = {AWS_KEY}\nregion = nowhere\n"
    )
    (tmp_path / "netrc").write_text("machine h.example login me password sword-fish\n")
    (tmp_path / "mounted").write_text("mounted-secret")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "mounted"))
    said = f"tokenOfTheHub {AWS_KEY} sword-fish mounted-secret nowhere"
    assert redact(said) == "*** *** *** *** nowhere"
    monkeypatch.delenv("HF_TOKEN_PATH")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redact("tokenOfTheHub") == "***"


def test_what_a_service_gave_is_remembered() -> None:
    assert redact("given-to-me") == "given-to-me"
    remember("given-to-me", None, "")
    assert redact("given-to-me") == "***"


@pytest.mark.parametrize(
    ("name", "secret"),
    [("secret_key", True), ("token", True), ("password", True), ("access_key", True),
     ("hf_token", True), ("aws_secret_access_key", True), ("awsSecretAccessKey", True),
     ("credentials", True), ("api-key", True), ("tokenizer", False), ("max_new_tokens", False),
     ("eos_token", False), ("kms_key", False), ("keys", False), ("secretary", False)],
)  # fmt: skip
def test_which_fields_would_hold_a_secret(name: str, secret: bool) -> None:
    assert is_secret_field(name) == secret


def test_a_line_is_redacted_in_well_under_a_millisecond() -> None:
    import time

    line = '{"event": "step", "loss": 1.25, "tokens": 12345, "text": "' + "some words " * 30 + '"}'
    start = time.perf_counter()
    for _ in range(500):
        redact(line)
    assert (time.perf_counter() - start) / 500 < 1e-3


def test_no_text_takes_long() -> None:
    import time

    for piece in ("-----BEGIN ", "://a:", "https://", "password ", "%3A%2F%2F", "%3A%2F%2Fa%3A", "sk-", "token='\\",
                  "eyJaaaaaaaa.", "hf_", "Authorization: ", "login x "):  # fmt: skip
        start = time.perf_counter()
        redact(piece * 2000)
        assert time.perf_counter() - start < 3, piece


def test_no_event_shows_a_secret_on_a_terminal_a_pipe_or_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_KEY)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for form in ("json", "terminal"):
        with Observer(form) as observer:
            observer.keep_in(tmp_path / "run.jsonl")
            observer.event("warning", text=f"at {AWS_KEY}", inner=[{"a": Path(f"/x/{CORE}")}])
            observer.event("run_failed", error=f"Bearer {CORE}", password="short")
            logging.getLogger("some.library").warning("Authorization: Bearer %s", CORE)
            with observer.ticker(f"sending to https://me:{CORE}@host", 3) as ticker:
                ticker.advance(note=f"token={CORE}")
                if observer.bars:
                    (task,) = observer.bars.tasks
                    assert CORE not in str(task.fields) + task.description
                    assert "https://***@host" in task.description
    said = capsys.readouterr()
    log = (tmp_path / "run.jsonl").read_text()
    for text in (said.out, said.err, log):
        assert "K7MDENG" not in text
        assert "Bearer 9a" not in text
        assert "short" not in text
    assert json.loads(log.splitlines()[0])["text"] == "at ***"
    assert json.loads(log.splitlines()[0])["inner"] == [{"a": f"/x/{CORE}"}]
    assert json.loads(log.splitlines()[2])["text"] == "Authorization: ***"


# --- whole runs ------------------------------------------------------------------------------

PLANTED = {
    "HF_TOKEN": f"hf_{CORE}",
    "AWS_SECRET_ACCESS_KEY": AWS_KEY,
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBc//q8+7==",
    "WANDB_API_KEY": HEX40,
    "MLFLOW_TRACKING_PASSWORD": 'sword"\\fi sh é/&',
    "HTTPS_PROXY": "http://me:proxy-sesame@proxy.invalid:3128",
}
# Only in specs and never in the environment.
STRANGE = {"token": f"hf_{CORE[::-1]}", "signature": "5ca1ab1e" * 8, "password": "open-sesame-77"}
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}


class Job:
    """A folder with a small job in it, run with secrets all around."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "runs"
        (folder / "base").mkdir()
        for path in BASE.iterdir():
            shutil.copyfile(path, folder / "base" / path.name)
        (folder / "chats.jsonl").write_text((json.dumps(ROW) + "\n") * 4)
        self.tree: dict[str, Any] = {
            "name": "t", "model": {"base": "base"}, "data": {"train": "chats.jsonl"},
        }  # fmt: skip
        self.said = ""

    def do(self, *command: str, env: dict[str, str] | None = None) -> int:
        (self.folder / "spec.yaml").write_text(json.dumps(self.tree))
        arguments = [*(command or ("run",)), "spec.yaml", "--work", str(self.work)]
        return self.python(str(ROOT / "entrypoint.py"), *arguments, env=env)

    def python(self, *arguments: str, env: dict[str, str] | None = None) -> int:
        done = subprocess.run(
            [sys.executable, *arguments], check=False, cwd=self.folder, capture_output=True,
            env={**os.environ, **PLANTED, "PYTHONPATH": str(ROOT), **(env or {})},
        )  # fmt: skip
        self.said = (done.stdout + done.stderr).decode("utf-8", "replace")
        return done.returncode

    def leaks(self) -> list[str]:
        """Where a planted secret shows in what was said and what lies in the work folder."""
        places = {"what was said": self.said.encode()} | {
            str(path): path.read_bytes() for path in self.work.rglob("*") if path.is_file()
        }
        values = [*PLANTED.values(), *STRANGE.values(), "proxy-sesame"]
        spelled = {form(value).strip("\"'") for value in values for form in MORE_FORMS.values()}
        return [
            f"{text} in {where}"
            for where, content in places.items()
            for text in spelled
            if text.encode() in content
        ]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def wrong_everywhere(tree: dict[str, Any]) -> str:
    tree["train"] = {"epochs": f"see {PLANTED['MLFLOW_TRACKING_PASSWORD']}"}
    return "train.epochs"


def presigned(tree: dict[str, Any]) -> str:
    tree["data"]["train"] = f"https://b.example/x?X-Amz-Signature={STRANGE['signature']}"
    return "data.train"


def user_in_an_address(tree: dict[str, Any]) -> str:
    tree["publish"] = ["out", f"s3://me:{STRANGE['password']}@bucket/x"]
    return "publish.1"


def unknown_field_with_a_token(tree: dict[str, Any]) -> str:
    tree["hf_token"] = STRANGE["token"]
    return "hf_token"


def unknown_field_with_a_plain_password(tree: dict[str, Any]) -> str:
    tree["s3_password"] = STRANGE["password"]
    return "s3_password: unknown field; credentials belong into the environment"


def key_that_is_a_token(tree: dict[str, Any]) -> str:
    tree["model"][STRANGE["token"]] = 1
    return "model.***"


def value_of_the_environment(tree: dict[str, Any]) -> str:
    tree["verify"] = {"prompts": [{"ask": f"What is {PLANTED['AWS_SECRET_ACCESS_KEY']}?"}]}
    return "verify.prompts.0.ask"


Spoil = Callable[[dict[str, Any]], str]


@pytest.mark.parametrize(
    "spoil",
    [wrong_everywhere, presigned, user_in_an_address, unknown_field_with_a_token,
     unknown_field_with_a_plain_password, key_that_is_a_token, value_of_the_environment],
)  # fmt: skip
def test_a_spec_with_a_secret_is_refused_by_the_name_of_its_field(job: Job, spoil: Spoil) -> None:
    named = spoil(job.tree)
    for command in ("check", "run"):
        assert job.do(command) == 2, job.said
        assert named in job.said
        assert "Traceback" not in job.said
        assert job.leaks() == []
    assert not job.work.exists()


def test_a_variable_with_a_secret_is_refused_by_its_name(job: Job) -> None:
    variable = "LORAJOB__MODEL__TOKEN"
    assert job.do("check", env={variable: STRANGE["token"]}) == 2
    assert f"model.token: holds a secret ({variable})" in job.said
    assert job.leaks() == []


def test_a_spec_that_is_no_yaml_is_not_quoted_with_its_secret(job: Job) -> None:
    for text in (
        f"model: *{STRANGE['token']}\n",
        f"name: !{STRANGE['token']} x\n",
        f"a: [1, {STRANGE['token']}\nb: '{STRANGE['password']}",
        f"{STRANGE['token']}: 1\n{STRANGE['token']}: 2\n",
    ):
        (job.folder / "broken.yaml").write_text(text)
        assert job.python(str(ROOT / "entrypoint.py"), "check", "broken.yaml") == 2
        assert "no valid YAML" in job.said
        assert job.leaks() == []


def test_the_command_line_is_not_repeated_with_its_secret(job: Job) -> None:
    entry = str(ROOT / "entrypoint.py")
    assert job.python(entry, "check", "--hf-token", STRANGE["token"]) == 2
    assert job.leaks() == []
    signed = f"https://b.example/x?X-Amz-Signature={STRANGE['signature']}"
    assert job.python(entry, "check", signed) == 4
    assert "there is no spec at https://b.example/x?X-Amz-Signature=***" in job.said
    assert job.leaks() == []


def test_a_failed_run_leaves_no_secret(job: Job) -> None:
    text = f"token {PLANTED['HF_TOKEN']} {PLANTED['MLFLOW_TRACKING_PASSWORD']}"
    (job.folder / "chats.jsonl").write_text(json.dumps({"messages": [{"role": text}]}) + "\n")
    for command in ("check", "run"):
        assert job.do(command) == 3, job.said
        assert job.leaks() == []
    assert "run_failed" in (job.work / "t/logs/run.jsonl").read_text()


# A bug that says all it knows on each way out of a process.
BUG = """
import json, logging, os, sys, threading, warnings
from urllib.parse import quote

import jobs.run

names = sys.argv.pop(1).split(",")
values = [os.environ[name] for name in names]
said = " ".join(f"{v} {v!r} {json.dumps(v)} {quote(v)} {quote(v, safe='')}" for v in values)


class Dying:
    def __del__(self):
        raise OSError("unraisable: " + said)


def broken(job):
    print("printed:", said)
    print("to stderr:", said, file=sys.stderr)
    sys.stdout.writelines([said, "\\n"])
    warnings.warn("warned: " + said)
    own = logging.getLogger("botocore.auth")
    own.propagate = False
    own.setLevel(logging.DEBUG)
    own.addHandler(logging.StreamHandler())
    own.addHandler(logging.FileHandler("runs/library.log"))
    own.debug("debug: %s %s", said, "Authorization: Bearer " + "x" * 20)
    try:
        raise KeyError("logged: " + said)
    except KeyError:
        own.exception("with its traceback")
        logging.getLogger("other").exception("to the log")
    job.observer.event("warning", text="event: " + said, detail={said: [said, OSError(said)]})

    def thread():
        raise ValueError("thread: " + said)

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    Dying()
    try:
        raise LookupError("cause: " + said)
    except LookupError as cause:
        raise RuntimeError("bug: " + said + "\\nnext line " + said) from cause


jobs.run.data_stage = broken
from jobs.cli import main

if "uncaught" in sys.argv:
    sys.argv.remove("uncaught")
    main()
    raise RuntimeError("uncaught: " + said)
sys.exit(main())
"""


@pytest.mark.parametrize("log", ["json", "terminal"])
@pytest.mark.parametrize("uncaught", [(), ("uncaught",)])
def test_a_bug_tells_no_secret_on_any_way_out(
    job: Job, log: str, uncaught: tuple[str, ...]
) -> None:
    job.do("check")  # writes the spec
    arguments = ["run", "spec.yaml", "--work", str(job.work), "--log", log]
    assert job.python("-c", BUG, ",".join(PLANTED), *uncaught, *arguments) == 1
    assert "with its traceback" in (job.work / "library.log").read_text()
    for way in ("printed", "to stderr", "debug", "with its traceback", "thread", "unraisable",
                "cause", "bug", *uncaught):  # fmt: skip
        assert way in job.said, way
    assert "this is a bug in lorajob: RuntimeError: bug: ***" in job.said
    kept = (job.work / "t/logs/run.jsonl").read_text()
    events = [json.loads(line) for line in kept.splitlines()]
    assert {"warning", "library_warning", "run_failed"} <= {event["event"] for event in events}
    assert any("warned: ***" in event.get("text", "") for event in events)
    assert job.leaks() == []


@pytest.mark.slow
def test_a_whole_run_leaves_no_secret_and_tells_none_to_other_programs(job: Job) -> None:
    """Every argument of every program started is kept by a hook, as `ps` would show them."""
    hook = job.folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def keep(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.posix_spawn', 'os.exec', 'os.system'):\n"
        "        with open(os.environ['STARTED'], 'a') as file:\n"
        "            file.write(repr(args[:2]) + '\\n')\n"
        "sys.addaudithook(keep)\n"
    )
    job.tree["train"] = {"max_steps": 1, "learning_rate": 1e-9, "batch_size": 1}
    job.tree["export"] = {"gguf": ["q8_0"]}
    job.tree["publish"] = [str(job.work / "published")]
    started = job.work / "started.txt"
    job.work.mkdir()
    env = {"PYTHONPATH": f"{hook}{os.pathsep}{ROOT}", "STARTED": str(started)}
    code = job.do("run", env={**env, "OMP_NUM_THREADS": "1"})
    assert code in (0, 6), job.said  # an answer that does not stop is no matter here
    assert "convert_hf_to_gguf" in started.read_text()
    assert (job.work / "t/report/answers.json").exists()
    if code == 0:
        assert (job.work / "published/manifest.json").exists()
    assert job.leaks() == []


def test_the_search_itself_finds_what_is_there(job: Job) -> None:
    job.work.mkdir()
    for form in MORE_FORMS.values():
        for value in PLANTED.values():
            (job.work / "x").write_text(f"a{form(value)}b")
            assert job.leaks()
