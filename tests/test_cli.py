"""What a user sees who gave something wrong: one message, one exit code, nothing half-done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.errors import DataError
from jobs.observe.events import Observer
from jobs.observe.stall import Stalled, StallWatch
from jobs.spec_source import load_spec
from tests.conftest import BASE, ROOT, Result, lorajob

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}


class Desk:
    """A folder with a base, data and a spec that are right, to be spoiled one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.base.mkdir()
        for path in BASE.iterdir():
            if path.suffix == ".safetensors":
                (self.base / path.name).symlink_to(path)
            else:
                shutil.copyfile(path, self.base / path.name)
        self.data = folder / "chats.jsonl"
        self.rows(ROW)
        self.work = folder / "runs"
        self.tree: dict[str, Any] = {
            "name": "t",
            "model": {"base": "base"},
            "data": {"train": "chats.jsonl"},
        }

    def rows(self, *rows: Any) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, **fields: Any) -> None:
        path = self.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def do(self, command: str, *arguments: str, **env: str) -> Result:
        (self.folder / "spec.yaml").write_text(json.dumps(self.tree))
        return lorajob(
            command, "spec.yaml", "--work", str(self.work), *arguments, cwd=self.folder, **env
        )

    def made(self) -> list[str]:
        """What lies in the work folder but for the log."""
        return sorted(
            path.relative_to(self.work).as_posix()
            for path in self.work.rglob("*")
            if path.is_file() and path.name != "run.jsonl"
        )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def assert_told(result: Result, code: int, *said: str) -> None:
    """The exit code, and one message that says these things and a way out."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    assert lines[0].startswith("lorajob: ")
    assert [line for line in lines if line.startswith("lorajob: ")] == lines[:1]
    assert lines[-1].startswith("  -> ")
    assert len(lines[-1]) > len("  -> ") + 5
    for text in said:
        assert text in result.err


def unknown_field(desk: Desk) -> None:
    desk.tree["train"] = {"epoch": 3}


def wrong_type(desk: Desk) -> None:
    desk.tree["train"] = {"epochs": "three"}


def name_with_slashes(desk: Desk) -> None:
    desk.tree["name"] = "../elsewhere"


def data_missing(desk: Desk) -> None:
    desk.data.unlink()


def data_empty(desk: Desk) -> None:
    desk.data.write_text("\n")


def data_a_folder(desk: Desk) -> None:
    data_missing(desk)
    desk.data.mkdir()


def data_binary(desk: Desk) -> None:
    desk.data.write_bytes(bytes(range(256)))


def data_broken_at_line_3(desk: Desk) -> None:
    desk.rows(ROW, ROW)
    desk.data.write_text(desk.data.read_text() + '{"messages": [\n')


def data_nested_too_deep(desk: Desk) -> None:
    desk.data.write_text("[" * 100_000)


def data_with_a_number_without_end(desk: Desk) -> None:
    desk.data.write_text("9" * 5000)


def row_without_assistant(desk: Desk) -> None:
    desk.rows(ROW, {"messages": [{"role": "user", "content": "Hi"}]})


def base_missing(desk: Desk) -> None:
    desk.tree["model"]["base"] = "nowhere"


def base_a_file(desk: Desk) -> None:
    desk.tree["model"]["base"] = "chats.jsonl"


def base_with_a_name_too_long(desk: Desk) -> None:
    desk.tree["model"]["base"] = "a" * 5000


def base_on_the_network(desk: Desk) -> None:
    desk.tree["model"]["base"] = "s3://bucket/base"


def config_missing(desk: Desk) -> None:
    (desk.base / "config.json").unlink()


def config_broken(desk: Desk) -> None:
    (desk.base / "config.json").write_text('{"architectures": [')


def config_a_list(desk: Desk) -> None:
    (desk.base / "config.json").write_text("[]")


def config_of_bert(desk: Desk) -> None:
    desk.config(architectures=["BertForMaskedLM"])


def config_without_architectures(desk: Desk) -> None:
    desk.config(architectures=[5])


def quantized_already(desk: Desk) -> None:
    desk.config(quantization_config={"quant_method": "awq"})


def weights_missing(desk: Desk) -> None:
    (desk.base / "model.safetensors").unlink()


def weights_pickled(desk: Desk) -> None:
    weights_missing(desk)
    (desk.base / "pytorch_model.bin").write_bytes(b"x")


def weights_cut_short(desk: Desk) -> None:
    weights_missing(desk)
    whole = (BASE / "model.safetensors").read_bytes()
    (desk.base / "model.safetensors").write_bytes(whole[:-1])


def weights_only_pointed_to(desk: Desk) -> None:
    weights_missing(desk)
    (desk.base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def weights_a_dangling_link(desk: Desk) -> None:
    weights_missing(desk)
    (desk.base / "model.safetensors").symlink_to("nowhere")


def weights_of_which_one_is_missing(desk: Desk) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (desk.base / "model.safetensors.index.json").write_text(json.dumps(index))


def weights_index_broken(desk: Desk) -> None:
    (desk.base / "model.safetensors.index.json").write_text("[]")


def tokenizer_missing(desk: Desk) -> None:
    (desk.base / "tokenizer.json").unlink()


def tokenizer_config_broken(desk: Desk) -> None:
    (desk.base / "tokenizer_config.json").write_text("{")


def template_missing(desk: Desk) -> None:
    (desk.base / "chat_template.jinja").unlink()


def template_file_missing(desk: Desk) -> None:
    desk.tree["model"]["chat_template"] = "nowhere.jinja"


def work_below_a_file(desk: Desk) -> None:
    (desk.folder / "somefile").write_text("")
    desk.work = desk.folder / "somefile" / "runs"


def publish_below_a_file(desk: Desk) -> None:
    (desk.folder / "somefile").write_text("")
    desk.tree["publish"] = ["somefile/out"]


def publish_to_an_unknown_place(desk: Desk) -> None:
    desk.tree["publish"] = ["ftp://server/out"]


Spoil = Callable[[Desk], None]
WRONG: list[tuple[Spoil, int, tuple[str, ...]]] = [
    (unknown_field, 2, ("train.epoch: unknown field; did you mean train.epochs?", "line 1")),
    (wrong_type, 2, ("train.epochs:", "'three'")),
    (name_with_slashes, 2, ("name:", "../elsewhere")),
    (data_missing, 4, ("there is no data file at chats.jsonl",)),
    (data_empty, 3, ("chats.jsonl is empty",)),
    (data_a_folder, 4, ("chats.jsonl has no data file", "no files")),
    (data_binary, 3, ("chats.jsonl, line 2", "not UTF-8 text")),
    (data_broken_at_line_3, 3, ("chats.jsonl, line 3", "no valid JSON")),
    (data_nested_too_deep, 3, ("chats.jsonl, line 1",)),
    (data_with_a_number_without_end, 3, ("chats.jsonl, line 1",)),
    (row_without_assistant, 3, ("chats.jsonl, line 2", "no assistant turn")),
    (base_missing, 4, ("model.base", "nowhere does not exist")),
    (base_a_file, 4, ("model.base", "chats.jsonl is a file")),
    (base_with_a_name_too_long, 4, ("model.base", "too long")),
    (base_on_the_network, 4, ("model.base", "s3://bucket/base")),
    (config_missing, 4, ("model.base", "no config.json")),
    (config_broken, 4, ("model.base", "config.json cannot be read")),
    (config_a_list, 4, ("model.base", "config.json cannot be read")),
    (config_of_bert, 4, ("model.base", "BertForMaskedLM")),
    (config_without_architectures, 4, ("model.base", "[5]")),
    (quantized_already, 4, ("model.base", "quantized already")),
    (weights_missing, 4, ("model.base", "no *.safetensors")),
    (weights_pickled, 4, ("model.base", "pickled")),
    (weights_cut_short, 4, ("model.base", "model.safetensors", "7873023 bytes of 7873024")),
    (weights_only_pointed_to, 4, ("model.base", "model.safetensors")),
    (weights_a_dangling_link, 4, ("model.base", "model.safetensors")),
    (weights_of_which_one_is_missing, 4, ("model.base", "model-2.safetensors")),
    (weights_index_broken, 4, ("model.base", "model.safetensors.index.json")),
    (tokenizer_missing, 4, ("no tokenizer.json",)),
    (tokenizer_config_broken, 4, ("tokenizer_config.json cannot be read",)),
    (template_missing, 4, ("no chat template", "model.chat_template")),
    (template_file_missing, 4, ("nowhere.jinja",)),
    (work_below_a_file, 4, ("somefile/runs/t cannot be written",)),
    (publish_below_a_file, 4, ("somefile/out cannot be written",)),
    (publish_to_an_unknown_place, 2, ("publish", "ftp://")),
]


@pytest.mark.parametrize(
    ("spoil", "code", "said"), WRONG, ids=[spoil.__name__ for spoil, _, _ in WRONG]
)
def test_what_is_wrong_is_told_once_and_leaves_nothing(
    desk: Desk, spoil: Spoil, code: int, said: tuple[str, ...]
) -> None:
    spoil(desk)
    for command in ("check", "run"):
        result = desk.do(command)
        assert_told(result, code, *said)
        assert not (desk.work.is_dir() and desk.made())


def test_a_run_that_fails_notes_why_in_its_log(desk: Desk) -> None:
    data_empty(desk)
    result = desk.do("run")
    events = [
        json.loads(line) for line in (desk.work / "t/logs/run.jsonl").read_text().splitlines()
    ]
    assert events[-1]["event"] == "run_failed"
    assert events[-1]["code"] == 3 == result.code
    assert "chats.jsonl is empty" in events[-1]["error"]
    assert events[-1]["what_to_do"]


def test_a_spec_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert_told(lorajob("check", "nowhere.yaml", cwd=tmp_path), 4, "no spec at nowhere.yaml")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("chek", "my.yaml"), "did you mean `lorajob check my.yaml`? The commands are run, check,"),
        (("frobnicate",), "-> The commands are run, check,"),
    ],
)
def test_a_word_that_is_no_command_and_no_file_is_told_as_that(
    tmp_path: Path, arguments: tuple[str, ...], hint: str
) -> None:
    ended = tmp_path / "ended"
    result = lorajob(*arguments, cwd=tmp_path, LORAJOB_TERMINATION_LOG=str(ended))
    said = f"there is no command and no file called {arguments[0]}"
    assert_told(result, 4, said, hint)
    assert json.loads(ended.read_text())["message"] == said


@pytest.mark.parametrize("name", ["chek", "some.yaml"])
def test_a_file_is_read_as_a_spec_whatever_its_name_and_a_path_is_a_path(
    tmp_path: Path, name: str
) -> None:
    assert_told(lorajob("nowhere/my.yaml", cwd=tmp_path), 4, "no spec at nowhere/my.yaml")
    (tmp_path / name).write_text("name: t\n")
    assert_told(lorajob(name, cwd=tmp_path), 2, f"{name} has 2 mistakes", "model: is missing")


def test_an_option_of_export_is_told_by_its_name_with_the_value(desk: Desk) -> None:
    desk.rows(ROW)
    (desk.folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 8, "lora_alpha": 8}
    (desk.folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    (desk.folder / "adapter/adapter_model.safetensors").write_bytes(b"")
    result = lorajob(
        "export", "--adapter", "adapter", "--out", "out", "--gguf", "q8_0,q5km", cwd=desk.folder
    )
    assert_told(result, 2, "--gguf: unknown value 'q5km'; did you mean q5_k_m? Known are f32,")


def test_a_missing_compiler_is_told_before_anything_is_trained(desk: Desk, tmp_path: Path) -> None:
    desk.tree["export"] = {"gguf": ["q8_0"]}
    without = {"PATH": str(tmp_path), "CXX": "", "LORAJOB_LLAMA_CPP": "",
               "LORAJOB_CACHE": str(tmp_path / "cache")}  # fmt: skip
    for command in ("check", "run"):
        assert_told(desk.do(command, **without), 4, "no C++ compiler", "export.gguf")
    assert not desk.work.exists()


def test_a_python_too_old_is_told_in_words() -> None:
    code = (
        "import sys; sys.version_info = (3, 9, 1, 'final', 0); "
        "exec(compile(open('entrypoint.py').read(), 'entrypoint.py', 'exec'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert "lorajob needs Python 3.11 or newer; this is 3.9" in done.stderr
    assert "-> run it with a newer interpreter" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_spec_can_come_from_standard_input_and_the_environment_alone(desk: Desk) -> None:
    piped = lorajob(
        "check", "-", "--work", str(desk.work), cwd=desk.folder, stdin=json.dumps(desk.tree)
    )
    assert piped.code == 0, piped.err
    environment = lorajob(
        "check", "--work", str(desk.work), cwd=desk.folder, LORAJOB_SPEC="", LORAJOB__NAME="t",
        LORAJOB__MODEL__BASE="base", LORAJOB__DATA__TRAIN="chats.jsonl",
    )  # fmt: skip
    assert environment.code == 0, environment.err
    free = re.compile(r"\d+ GiB free")
    assert free.sub("", piped.out) == free.sub("", environment.out)


def test_check_tells_scripts_what_it_found(desk: Desk) -> None:
    result = desk.do("check", "--format", "json")
    found = json.loads(result.out)
    assert found["data"]["rows"] == 1
    (row,) = found["rows"]
    assert row["place"] == "chats.jsonl, line 1"
    (span,) = row["trained"]
    assert span["text"] == "Ahoy<|im_end|>"
    assert row["input_ids"][span["start"] : span["end"]] == span["ids"]


def test_check_shows_as_many_rows_as_asked_for_with_what_is_refused(desk: Desk) -> None:
    desk.rows(ROW, {"messages": [{"role": "user", "content": "alone"}]}, *[ROW] * 9)
    desk.tree["data"]["skip_bad_rows"] = 0.5
    found = json.loads(desk.do("check", "--format", "json", "--rows", "3").out)
    assert [row["place"][-6:] for row in found["rows"]] == ["line 1", "line 2", "line 3"]
    assert "no assistant turn" in found["rows"][1]["refused"]
    assert found["data"]["bad_rows"] == 1
    assert "1 of 11 conversations cannot be used and are skipped" in found["warnings"]


def test_run_takes_the_data_that_check_labelled(desk: Desk) -> None:
    desk.do("check")
    again = desk.do("check", "--format", "json")
    assert again.code == 0
    record = desk.work / "t" / ".work" / "stages" / "data.json"
    before = record.stat().st_mtime_ns
    desk.do("check")
    assert record.stat().st_mtime_ns == before
    desk.rows(ROW, ROW)
    desk.do("check")
    assert record.stat().st_mtime_ns != before


def test_the_schema_is_json() -> None:
    schema = json.loads(lorajob("schema").out)
    assert schema["required"] == ["name", "model", "data"]


def test_the_wrong_is_told_without_torch_or_transformers(desk: Desk) -> None:
    unknown_field(desk)
    (desk.folder / "spec.yaml").write_text(json.dumps(desk.tree))
    heavy = ("torch", "transformers", "datasets", "peft", "numpy")
    code = (
        "import sys; from jobs.cli import main; code = main(['check', 'spec.yaml']); "
        f"print(code, sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=desk.folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "2 []\n", done.stderr


@pytest.mark.parametrize("command", ["schema", "check"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error_message(
    desk: Desk, command: str, unbuffered: str
) -> None:
    desk.do("check")  # writes the spec
    arguments = {"schema": ["schema"], "check": ["check", "spec.yaml", "--format", "json"]}[command]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, str(ROOT / "entrypoint.py"), *arguments], check=False,
            cwd=desk.folder, stdout=closed, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode != 0


def test_an_unknown_option_shows_the_usage() -> None:
    result = lorajob("run", "--nonsense")
    assert result.code == 2
    assert "usage: lorajob" in result.err
    assert "Traceback" not in result.err


def test_help_names_every_exit_code() -> None:
    text = lorajob("--help").out
    for code in ("0 done", "2 the spec", "3 the data", "4 not there", "5 does not fit",
                 "6 the result", "10 a service", "20 stopped", "1 a bug"):  # fmt: skip
        assert code in text


def examples_of(text: str) -> list[str]:
    """What a help tells to type, without notes, pipes and what the environment is set to."""
    lines = re.findall(r"^  (?:\S.*?\W)??(lorajob [^|>)\n]+)", text, re.MULTILINE)
    return [re.split(r"\s{2,}|\s*&&", line)[0] for line in lines]


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_a_help_says_what_it_does_with_examples_that_are_right(command: str) -> None:
    result = lorajob(*[command] * bool(command), "--help")
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 110
    examples = examples_of(result.out.partition("\n\n")[2])
    assert examples
    assert command in " ".join(examples)
    for example in examples:
        words = shlex.split(example)[1:]
        arguments = cli._parser().parse_args(cli._with_command(words))
        assert callable(arguments.do), example


def test_the_list_of_commands_says_what_each_does() -> None:
    text = " ".join(lorajob("--help").out.split())
    for name, (_, description, _) in cli.COMMANDS.items():
        first = description.partition("\n")[0]
        assert first.endswith(".")
        assert f"{name} {first}" in text


def raise_zero_division(*arguments: object) -> None:
    raise ZeroDivisionError("division by zero")


def test_a_bug_is_told_as_one_with_its_traceback_and_in_the_log(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    desk.do("check")  # writes the spec
    monkeypatch.chdir(desk.folder)
    monkeypatch.setattr("jobs.run.data_stage", raise_zero_division)
    assert cli.main(["run", "spec.yaml", "--work", str(desk.work), "--log", "json"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "lorajob: this is a bug in lorajob: ZeroDivisionError: division by zero"
    assert "Traceback (most recent call last):" in said
    events = [
        json.loads(line) for line in (desk.work / "t/logs/run.jsonl").read_text().splitlines()
    ]
    assert events[-1]["event"] == "run_failed"
    assert events[-1]["code"] == 1
    assert "raise_zero_division" in events[-1]["traceback"]


def test_a_broken_pipe_inside_is_a_bug_and_not_a_reader_that_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("jobs.spec.json_schema", broken)
    assert cli.main(["schema"]) == 1
    assert capfd.readouterr().err.startswith("lorajob: this is a bug in lorajob: BrokenPipeError")


def test_an_error_on_purpose_has_its_own_code_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> None:
        raise DataError("row 7 is wrong", "mend it")

    monkeypatch.setattr("jobs.spec.json_schema", wrong)
    assert cli.main(["schema"]) == 3
    assert capfd.readouterr().err == "lorajob: the data is wrong\nrow 7 is wrong\n  -> mend it\n"


def test_neither_a_bug_nor_an_error_tells_a_secret(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open/sesame")

    def wrong() -> None:
        raise DataError("no access with open/sesame", "never say open%2Fsesame")

    def broken() -> None:
        raise ZeroDivisionError("open/sesame divided by 0")

    monkeypatch.setattr("jobs.spec.json_schema", wrong)
    assert cli.main(["schema"]) == 3
    assert capfd.readouterr().err == (
        "lorajob: the data is wrong\nno access with ***\n  -> never say ***\n"
    )
    monkeypatch.setattr("jobs.spec.json_schema", broken)
    assert cli.main(["schema"]) == 1
    said = capfd.readouterr().err
    assert "ZeroDivisionError: *** divided by 0" in said
    assert "Traceback (most recent call last):" in said
    assert "sesame" not in said.replace('open/sesame divided by 0")', "")  # the code's own line


def test_hooks_are_set_for_the_process_and_not_for_a_caller() -> None:
    before = sys.stdout, sys.stderr, sys.excepthook
    assert cli.main(["schema"]) == 0
    assert (sys.stdout, sys.stderr, sys.excepthook) == before


@pytest.mark.slow
def test_a_run_that_is_interrupted_says_so_and_leaves_nothing_half(desk: Desk) -> None:
    desk.rows(*[ROW] * 4)
    desk.tree["train"] = {"max_steps": 100_000}
    (desk.folder / "spec.yaml").write_text(json.dumps(desk.tree))
    with subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), "run", "spec.yaml", "--work", str(desk.work)],
        cwd=desk.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A test run in the background of a shell is started with the signal ignored, and so would
        # the job be.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "stage_start" and event["stage"] == "train":
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 20  # the prepared data are there
    assert "Traceback" not in said
    assert "stopped by SIGINT in the stage train" in said
    assert "safe: the output of the stage data" in said
    assert (desk.work / "t/.work/stages/data.json").exists()
    assert not (desk.work / "t/.work/stages/train.json").exists()
    assert not (desk.work / "t/.work/train").exists()
    assert list((desk.work / "t").glob(".building-*")) == []


def test_a_run_that_gets_nowhere_is_told_as_failed_in_the_log_too(desk: Desk) -> None:
    desk.do("check")  # writes the spec
    spec = load_spec(str(desk.folder / "spec.yaml"), {})
    with Observer("json") as observer:
        observer.keep_in(desk.folder / "run.jsonl")
        watch = cli._stall_watch(spec, desk.folder, observer)
        assert isinstance(watch, StallWatch)
        watch._tell(Stalled("no progress for 5 seconds", "start it again"))
    last = json.loads((desk.folder / "run.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["code"]) == ("run_failed", 10)
    assert last["error"] == "no progress for 5 seconds"


def test_an_option_is_named_whole() -> None:
    result = lorajob("check", "--row", "3", "my.yaml")
    assert result.code == 2
    assert "--row" in result.err
