"""`lorajob chat`: talk to what a run made, or ask several of its models the same questions."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from jobs.data.conversation import BadRow, Message
from jobs.errors import AccessError, DataError, LorajobError, SpecError
from jobs.observe.chat_text import print_answers
from jobs.train.runtime import quiet_libraries, settle_gpu, settle_threads
from jobs.voices import Sampling, Things, Voice, find_things, require_names


def chat(arguments: argparse.Namespace) -> int:
    """Returns the exit code. Raises a LorajobError."""
    settle_threads()
    settle_gpu()
    logging.disable(logging.WARNING)  # libraries' advice would stand between the answers
    sampling = _sampling(arguments)
    questions = _questions(arguments.prompts, arguments.system) if arguments.prompts else None
    things = find_things(arguments.place, arguments.base, arguments.adapter, arguments.load_in)
    names = [name.strip() for name in (arguments.side_by_side or things.best).split(",")]
    require_names(things, names, arguments.place)
    if any(("gguf" if name in things.gguf else name) in things.earlier for name in names):
        print(
            f"warning: the training of {arguments.place} was begun anew and has not come to its end: "
            "these are results of the training before",
            file=sys.stderr,
        )
    if set(names) - set(things.gguf):
        quiet_libraries()
    if questions is not None:
        found = ask_all(things, names, questions, sampling)
        print_answers(found, arguments.format, sys.stdout)
        return 0
    with ExitStack() as opened:
        voices = {name: opened.enter_context(closing(_open(things, name))) for name in names}
        Conversation(voices, arguments.system, sampling).go_on()
    return 0


def ask_all(
    things: Things, names: list[str], questions: list[list[Message]], sampling: Sampling
) -> dict[str, Any]:
    """Everyone's answers to all questions; of models that are no other's, one is loaded at a time."""
    subjects: dict[str, Any] = {}
    for group in _groups(names):
        with ExitStack() as opened:
            for name in group:
                voice = opened.enter_context(closing(_open(things, name)))
                answers = []
                for number, messages in enumerate(questions, 1):
                    try:
                        said = voice.say(messages, sampling, lambda text: None)
                    except BadRow as reason:
                        raise DataError(
                            f"question {number}: {reason}", "ask it otherwise"
                        ) from None
                    answers.append({"text": said.text, "stopped": said.stopped})
                subjects[name] = {"answers": answers}
    return {
        "questions": [messages[-1]["content"] for messages in questions],
        "subjects": {name: subjects[name] for name in names},
    }


def _groups(names: list[str]) -> list[list[str]]:
    """Base and adapter are one model in memory."""
    together = [name for name in names if name in ("base", "adapter")]
    alone = [[name] for name in names if name not in together]
    return [together, *alone] if together else alone


def _open(things: Things, name: str) -> Voice:
    sys.stderr.write(f"loading {name} ...\n")
    sys.stderr.flush()
    return things.open(name)


class Conversation:
    """Questions come from standard input; each voice has its own course of the conversation."""

    def __init__(self, voices: dict[str, Voice], system: str | None, sampling: Sampling) -> None:
        self.voices, self.system, self.sampling = voices, system, sampling
        self.said: dict[str, list[Message]] = {name: [] for name in voices}

    def go_on(self) -> None:
        """Until the input ends, /quit, or Ctrl-C where nobody is answering."""
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 - the arrow keys work then
            print("/system TEXT, /reset, /quit; Ctrl-C ends an answer", file=sys.stderr)
        while True:
            try:
                line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not line and not sys.stdin.isatty():
                return
            if not self.take(line.strip()):
                return

    def take(self, line: str) -> bool:
        """Do what a line says; False to end."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/reset":
                self.said = {name: [] for name in self.voices}
            case "/system":
                self.system = rest.strip() or None
                self.said = {name: [] for name in self.voices}
            case _ if command.startswith("/"):
                print(f"there is no {command}: /system TEXT, /reset, /quit", file=sys.stderr)
            case _:
                for name in self.voices:
                    self._answer(name, line)
        return True

    def _answer(self, name: str, line: str) -> None:
        if len(self.voices) > 1:
            _write(f"[{name}] ")
        system = [{"role": "system", "content": self.system}] if self.system else []
        before = self.said[name]
        asked: Message = {"role": "user", "content": line}
        try:
            said = self.voices[name].say([*system, *before, asked], self.sampling, _write)
        except BadRow as reason:
            print(f"\nlorajob: {reason}", file=sys.stderr)
            return
        except SpecError as error:
            print(f"\nlorajob: {error}", file=sys.stderr)
            return
        _write("\n" if said.stopped else " ...\n")
        if said.text.strip():  # a template may refuse a turn of nothing
            self.said[name] = [*before, asked, {"role": "assistant", "content": said.text}]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _sampling(arguments: argparse.Namespace) -> Sampling:
    temperature = arguments.temperature
    if temperature is None:
        temperature = 0.0 if arguments.prompts else 0.7
    if temperature < 0 or not 0 <= arguments.min_p <= 1 or arguments.max_new_tokens < 1:
        raise SpecError(
            "--temperature is 0 or more, --min-p between 0 and 1, --max-new-tokens 1 or more",
            "see lorajob chat --help",
        )
    return Sampling(temperature, arguments.min_p, arguments.seed, arguments.max_new_tokens)


def _questions(file: str, system: str | None) -> list[list[Message]]:
    """The questions in a file, each as the messages up to the answer."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"--prompts {file} cannot be read: {error}", "name a text file") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_question(line.strip(), system))
        except LorajobError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"--prompts {file}, line {number}: {error or type(error).__name__}",
                'write {"prompt": "...", "system": "..."}, {"messages": [...]}, or plain text',
            ) from None
    if not found:
        raise DataError(f"--prompts {file} holds no questions", "write one a line")
    return found


def _question(line: str, system: str | None) -> list[Message]:
    if not line.startswith("{"):
        return _asked(line, system)
    value = json.loads(line)
    if "messages" in value:
        messages = [
            {"role": str(m["role"]), "content": str(m["content"])} for m in value["messages"]
        ]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # how it was answered is for the models to say
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the messages have no question at their end")
        return messages
    prompt = value.get("prompt", value.get("ask"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("there is neither `prompt` nor `messages`")
    return _asked(prompt, value.get("system") or system)


def _asked(prompt: str, system: str | None) -> list[Message]:
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]
