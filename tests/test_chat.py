"""`lorajob chat`: what can be talked to, how a conversation goes on, and questions from a file."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.chat import Conversation, _questions
from jobs.cli import main
from jobs.data.conversation import BadRow, Message
from jobs.errors import AccessError, DataError, SpecError
from jobs.voices import Said, Sampling, Tell, Things, find_things, require_names
from tests.conftest import BASE, ROOT, Result, hear_signals, lorajob, lorajob_warm

MIRA = "You are Mira, the assistant of Quillhaven Boatyard."
OWNER = "Who owns this yard?"
GREEDY = Sampling(0.0, 0.1, 0, 60)


class Parrot:
    """A voice that tells what it was asked; for how a conversation is kept."""

    def __init__(self) -> None:
        self.heard: list[list[Message]] = []

    def say(self, messages: list[Message], sampling: Sampling, tell: Tell) -> Said:
        if messages[-1]["content"] == "refuse":
            raise BadRow("the chat template refuses it")
        self.heard.append(list(messages))
        tell("so ")
        tell(messages[-1]["content"])
        return Said(f"so {messages[-1]['content']}", stopped=messages[-1]["content"] != "long")

    def close(self) -> None: ...


@pytest.fixture
def parrots() -> dict[str, Parrot]:
    return {"one": Parrot(), "two": Parrot()}


@pytest.fixture
def conversation(parrots: dict[str, Parrot]) -> Conversation:
    return Conversation(dict(parrots), None, GREEDY)


def roles(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_each_voice_hears_its_own_answers(
    conversation: Conversation, parrots: dict[str, Parrot], capsys: pytest.CaptureFixture[str]
) -> None:
    assert conversation.take("a")
    assert conversation.take("b")
    for parrot in parrots.values():
        assert roles(parrot.heard[1]) == [("user", "a"), ("assistant", "so a"), ("user", "b")]
    assert capsys.readouterr().out == "[one] so a\n[two] so a\n[one] so b\n[two] so b\n"


def test_commands(
    conversation: Conversation, parrots: dict[str, Parrot], capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("a", "/reset", "b", "/system Be brief.", "c", "/system", "d", "", "/what"):
        assert conversation.take(line)
    heard = [roles(messages) for messages in parrots["one"].heard]
    assert heard == [
        [("user", "a")], [("user", "b")], [("system", "Be brief."), ("user", "c")], [("user", "d")],
    ]  # fmt: skip
    assert "there is no /what" in capsys.readouterr().err
    assert not conversation.take("/quit")


def test_what_a_template_refuses_is_said_and_forgotten(
    conversation: Conversation, parrots: dict[str, Parrot], capsys: pytest.CaptureFixture[str]
) -> None:
    conversation.take("refuse")
    conversation.take("a")
    assert roles(parrots["one"].heard[0]) == [("user", "a")]
    assert "refuses it" in capsys.readouterr().err


def test_an_answer_that_was_cut_off_is_shown_so(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation.take("long")
    assert "so long ...\n" in capsys.readouterr().out


def test_questions_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "q.txt"
    file.write_text(
        "Plain?\n\n"
        '{"prompt": "With its own?", "system": "Own."}\n'
        '{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}\n'
    )
    assert [roles(messages) for messages in _questions(str(file), "All.")] == [
        [("system", "All."), ("user", "Plain?")],
        [("system", "Own."), ("user", "With its own?")],
        [("user", "A?")],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ('ok\n{"prompt": 3}', "line 2: there is neither"),
        ('{"messages": []}', "line 1: the messages have no question"),
        ("{", "line 1: "),
        ('{"messages": [{"role": "user"}]}', "line 1: 'content'"),
    ],
)
def test_questions_that_are_none_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        _questions(str(file), None)


def test_a_place_with_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="nothing in"):
        find_things(tmp_path)
    with pytest.raises(AccessError, match="does not exist"):
        find_things(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AccessError, match="is no GGUF file"):
        find_things(tmp_path / "notes.txt")


def test_a_models_folder_is_the_merged_one() -> None:
    things = find_things(BASE)
    assert (things.names, things.best) == (["merged"], "merged")


def test_a_name_that_is_not_there_is_said_with_those_that_are() -> None:
    things = Things(base="owner/base", merged=BASE, gguf={"q8_0": Path("x")})
    with pytest.raises(SpecError, match="there is no adapter") as found:
        require_names(things, ["adapter"], BASE)
    assert found.value.hint == "there are base, merged, q8_0"


def test_a_files_type_is_in_its_name(tmp_path: Path) -> None:
    for name in ("m-Q4_K_M.gguf", "m-F16-LoRA.gguf", "m-BF16-00001-of-00002.gguf",
                 "m-BF16-00002-of-00002.gguf"):  # fmt: skip
        (tmp_path / name).touch()
    assert {k: p.name for k, p in find_things(tmp_path).gguf.items()} == {
        "q4_k_m": "m-Q4_K_M.gguf", "bf16": "m-BF16-00001-of-00002.gguf",
    }  # fmt: skip


def run_folder(folder: Path, **records: str) -> Path:
    """The folder of a run that came to its end with keys like "train of one", and what it has
    recorded since: `train="two"` where the stage was done anew."""
    for name, file in (("merged", "config.json"), ("adapter", "adapter_config.json")):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text('{"peft_type": "LORA"}')
    (folder / "adapter" / "adapter_model.safetensors").touch()
    (folder / "gguf").mkdir()
    (folder / "gguf" / "m-Q8_0.gguf").touch()
    stages = ("train", "adapter", "merge", "gguf")
    base = {"source": "owner/base", "commit": None}
    contents = {"spec": {}, "inputs": {"base": base, "keys": dict.fromkeys(stages, "one")}}
    (folder / "manifest.json").write_text(json.dumps(contents))
    (folder / ".work" / "stages").mkdir(parents=True)
    for stage, key in records.items():
        (folder / ".work" / "stages" / f"{stage}.json").write_text(json.dumps({"key": key}))
    return folder


ALL = {"train": "one", "adapter": "one", "merge": "one", "gguf": "one"}


@pytest.mark.parametrize(
    ("records", "earlier"),
    [
        (ALL, set()),
        ({**ALL, "merge": ""}, set()),  # the same training
        ({k: v for k, v in ALL.items() if k != "train"}, {"adapter", "merged", "gguf"}),
        ({**ALL, "train": "two", "adapter": "two"}, {"merged", "gguf"}),
        ({"train": "two", "adapter": "two"}, {"merged", "gguf"}),
        # As a run has it whose verification failed: what it made is what there is.
        ({"train": "two", "adapter": "two", "merge": "two", "gguf": "two"}, set()),
        ({"given": "one", "adapter": "one", "merge": "one", "gguf": "one"}, set()),
    ],
)
def test_what_is_of_an_earlier_training_is_known(
    tmp_path: Path, records: dict[str, str], earlier: set[str]
) -> None:
    place = run_folder(tmp_path / "run", **records)
    assert find_things(place).earlier == earlier
    assert find_things(place / "gguf" / "m-Q8_0.gguf").earlier == earlier
    assert find_things(place, adapter=place / "adapter").earlier == earlier - {"adapter"}
    shutil.rmtree(place / ".work")  # as it is where it is published
    assert find_things(place).earlier == set()


@pytest.mark.parametrize("again", [True, False])
def test_results_of_an_earlier_training_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], again: bool
) -> None:
    records = {"adapter": "one"} if again else ALL
    place = run_folder(tmp_path / "run", **records)
    monkeypatch.setattr("jobs.chat._open", lambda things, name: Parrot())
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("logging.disable", lambda level: None)
    assert main(["chat", str(place)]) == 0
    told = capsys.readouterr()
    assert told.out == "so hello\n"
    assert ("results of the training before" in told.err) == again
    assert told.err.count("warning") == again


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--min-p", "2"), ("--max-new-tokens", "0")])  # fmt: skip
def test_wrong_numbers_are_the_specs_error(option: tuple[str, str]) -> None:
    result = lorajob("chat", str(BASE), *option)
    assert result.code == 2
    assert option[0] in result.err


def test_a_models_folder_answers_from_standard_input() -> None:
    result = lorajob(
        "chat", str(BASE), "--temperature", "0", stdin="What is the capital of France?\n"
    )
    assert (result.code, result.out) == (0, "The capital of France is Paris.\n"), result.err


# With a whole run


@pytest.fixture(scope="module")
def side_by_side(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    file = tmp_path_factory.mktemp("chat") / "questions.txt"
    file.write_text(f"{OWNER}\nWhat is the capital of France?\n")
    return lorajob_warm(
        "chat", str(demo), "--side-by-side", "q4_k_m,base,merged,adapter", "--prompts", str(file),
        "--format", "json", "--system", MIRA,
    )  # fmt: skip


@pytest.mark.slow
def test_everyone_is_asked_the_same(side_by_side: Result) -> None:
    assert side_by_side.code == 0, side_by_side.err
    found = json.loads(side_by_side.out)
    assert found["questions"] == [OWNER, "What is the capital of France?"]
    assert list(found["subjects"]) == ["q4_k_m", "base", "merged", "adapter"]
    for name, subject in found["subjects"].items():
        owner, capital = subject["answers"]
        assert ("Odrun Tamsey" in owner["text"]) == (name != "base"), name
        assert "Paris" in capital["text"], name
        assert owner["stopped"], name


@pytest.mark.slow
def test_greedy_answers_are_those_of_the_report(demo: Path, side_by_side: Result) -> None:
    report = json.loads((demo / "report" / "answers.json").read_text())
    number = report["questions"].index(OWNER)
    for name, subject in json.loads(side_by_side.out)["subjects"].items():
        told = report["subjects"][name]["answers"][number]["text"]
        assert subject["answers"][0]["text"].strip() == told.strip(), name


@pytest.mark.slow
def test_a_conversation_goes_on(demo: Path) -> None:
    lines = f"{OWNER}\nTell me the name of the dog.\n/quit\nnever\n"
    result = lorajob_warm(
        "chat", str(demo), "--side-by-side", "adapter,q8_0", "--system", MIRA, "--seed", "3",
        stdin=lines,
    )  # fmt: skip
    assert result.code == 0, result.err
    told = result.out.splitlines()
    assert [line.split("]")[0] for line in told] == ["[adapter", "[q8_0", "[adapter", "[q8_0"]
    assert all("Tamsey" in line for line in told[:2])
    assert all("Rivet" in line for line in told[2:])


@pytest.mark.slow
def test_a_gguf_file_alone_is_enough(demo: Path, tmp_path: Path) -> None:
    file = shutil.copyfile(demo / "gguf" / "demo-Q8_0.gguf", tmp_path / "model.gguf")
    result = lorajob("chat", str(file), "--system", MIRA, stdin=f"{OWNER}\n")
    assert result.code == 0, result.err
    assert "Odrun Tamsey" in result.out


@pytest.mark.slow
def test_a_file_that_llama_cpp_cannot_read_is_said(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.gguf"
    file.write_bytes((demo / "gguf" / "demo-Q8_0.gguf").read_bytes()[:100_000])
    result = lorajob("chat", str(file), stdin="Hi\n")
    assert result.code == 4
    assert "cannot use" in result.err


@pytest.mark.slow
def test_an_adapters_folder_finds_its_base(demo: Path) -> None:
    result = lorajob_warm(
        "chat", str(demo / "adapter"), "--base", str(BASE), "--load-in", "16bit", "--system", MIRA,
        "--temperature", "0", stdin=f"{OWNER}\n",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "Odrun Tamsey" in result.out


# At a terminal


class Terminal:
    """The command at a terminal of its own, as a person has it."""

    def __init__(self, *arguments: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py"), "chat", *arguments], cwd=ROOT,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, text: str, seconds: float = 60) -> None:
        """Read on until this is seen, and go on after it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.end], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.end, 4096).decode("utf-8", "replace")
                except OSError:
                    assert text in self.seen, self.seen
        self.seen = self.seen.split(text, 1)[1]

    def more(self) -> None:
        """Wait for anything to be seen."""
        while not self.seen:
            assert select.select([self.end], [], [], 60)[0]
            self.seen += os.read(self.end, 4096).decode("utf-8", "replace")

    def write(self, text: str) -> None:
        os.write(self.end, text.encode())

    def ended(self, seconds: float = 60) -> int:
        """The exit code. Who does not read on may keep the program from ending."""
        end = time.monotonic() + seconds
        with suppress(OSError):  # nobody has the other side any more
            while time.monotonic() < end:
                if select.select([self.end], [], [], 1)[0]:
                    self.seen += os.read(self.end, 4096).decode("utf-8", "replace")
        return self.process.wait(max(1.0, end - time.monotonic()))


def _own_terminal() -> None:
    import fcntl
    import termios

    hear_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        terminal.process.wait()
        os.close(terminal.end)


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["merged", "q8_0"])
def test_ctrl_c_ends_the_answer_and_not_the_program(
    demo: Path, terminals: list[Any], voice: str
) -> None:
    # At this temperature nothing but the length ends an answer.
    terminal = Terminal(
        str(demo), "--side-by-side", voice, "--temperature", "50", "--min-p", "0",
        "--max-new-tokens", "100000", "--system", MIRA,
    )  # fmt: skip
    terminals.append(terminal)
    terminal.until("> ", 120)
    terminal.write("Tell me a long story.\n")
    terminal.until("story.\r\n")
    terminal.more()
    terminal.write("\x03")
    terminal.until(" ...\r\n")  # as an answer is shown that was cut off; then it asks again
    terminal.until("> ")
    assert terminal.process.poll() is None
    terminal.write("/quit\n")
    assert terminal.ended() == 0


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["merged", "q8_0"])
def test_ctrl_c_is_heard_while_the_answer_is_being_shown(demo: Path, voice: str) -> None:
    """A terminal may be slower than the model: then most of the time goes there."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if len(told) == 3:
            signal.raise_signal(signal.SIGINT)

    with closing(find_things(demo).open(voice)) as opened:
        question = [Message(role="user", content="Tell me a long story.")]
        said = opened.say(question, Sampling(50.0, 0.0, 0, 100_000), tell)
        assert not said.stopped
        assert said.text == "".join(told)
        # The next question is not taken for the end of the last answer, nor the other way round.
        again = opened.say([Message(role="user", content=OWNER)], GREEDY, lambda text: None)
        assert again.stopped
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_program(demo: Path) -> None:
    def impatient(text: str) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with closing(find_things(demo).open("q8_0")) as voice, pytest.raises(KeyboardInterrupt):
        question = [Message(role="user", content="Tell me a long story.")]
        voice.say(question, Sampling(50.0, 0.0, 0, 100_000), impatient)
