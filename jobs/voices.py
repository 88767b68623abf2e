"""What can be talked to: a model in transformers, with an adapter or without, or a GGUF file."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, Protocol

from jobs.data.conversation import Message
from jobs.data.template import DEFAULT_DATE, ChatTemplate
from jobs.data.tokenizer import ChatTokenizer, load_tokenizer
from jobs.errors import AccessError, SpecError
from jobs.export.adapter import CONFIG, read_config
from jobs.stages import RECORDS
from jobs.store.manifest import NAME as MANIFEST

LoadIn = Literal["4bit", "8bit", "16bit"]
Tell = Callable[[str], None]

CONTEXT = 8192  # tokens of a conversation with a GGUF file

# `NAME-Q4_K_M.gguf`, and the first part of one that was split.
_KIND = re.compile(r"-([A-Za-z0-9_]+)(-00001-of-\d+)?\.gguf$")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class Sampling:
    temperature: float
    min_p: float
    seed: int
    max_new_tokens: int


@dataclass(frozen=True)
class Said:
    text: str
    stopped: bool  # by itself


class Voice(Protocol):
    def say(self, messages: list[Message], sampling: Sampling, tell: Tell) -> Said:
        """The answer, told in pieces as it comes. Ctrl-C ends it. Raises BadRow for a conversation
        that the chat template does not take."""
        ...

    def close(self) -> None: ...


@contextmanager
def _first_ctrl_c(do: Callable[[], None]) -> Iterator[None]:
    """Within, the first Ctrl-C calls `do`, wherever the program is; the next one raises as ever.

    An exception that may come between any two steps would lose what has just been heard.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:  # a background job's is ignored
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        do()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class Things:
    """What a place has to talk to, by name; nothing is loaded before it is asked for."""

    base: str | None = None
    load_in: LoadIn = "16bit"
    today: date | None = None
    adapter: Path | None = None
    merged: Path | None = None
    gguf: dict[str, Path] = field(default_factory=dict)
    s3: dict[str, Any] = field(default_factory=dict)
    earlier: frozenset[str] = frozenset()
    """Names of what an earlier training of the same run made, and a later one has not yet replaced."""
    _tuned: Any = None  # base and adapter are one model
    _tokenizer: ChatTokenizer | None = None
    _users: int = 0

    @property
    def names(self) -> list[str]:
        found = ["base"] if self.base else []
        found += ["adapter"] if self.base and self.adapter else []
        found += ["merged"] if self.merged else []
        return [*found, *self.gguf]

    @property
    def best(self) -> str:
        """What one talks to who does not say: what was made last."""
        order = ["merged", "adapter", *self.gguf, "base"]
        return next(name for name in order if name in self.names)

    def open(self, name: str) -> Voice:
        if name in self.gguf:
            return GgufVoice(self.gguf[name], self.today)
        if name == "merged":
            assert self.merged is not None
            from jobs.train.engine_transformers import load_model
            from jobs.train.runtime import device_name

            model = load_model(self.merged, "16bit", device_name())
            return TorchVoice(model, load_tokenizer(self.merged, today=self.today))
        return self._of_base(with_adapter=name == "adapter")

    def _of_base(self, with_adapter: bool) -> Voice:
        if self._tuned is None:
            self._load_base()
        self._users += 1
        assert self._tokenizer is not None
        return TorchVoice(self._tuned, self._tokenizer, with_adapter, self._close_base)

    def _load_base(self) -> None:
        from peft import PeftModel

        from jobs.base_model import open_base
        from jobs.spec import S3
        from jobs.store.connect import Connections
        from jobs.train.engine_transformers import load_model
        from jobs.train.runtime import device_name

        assert self.base is not None
        folder = open_base(self.base, Connections(S3.model_validate(self.s3))).whole()
        model: Any = load_model(folder, self.load_in, device_name())
        template = "auto"
        if self.adapter:
            from jobs.export.adapter import require_same_base

            require_same_base(self.adapter, folder)
            model = PeftModel.from_pretrained(model, str(self.adapter))
            own = self.adapter / "chat_template.jinja"
            template = str(own) if own.is_file() else "auto"
        model.eval()
        self._tuned, self._tokenizer = model, load_tokenizer(folder, template, self.today)

    def _close_base(self) -> None:
        self._users -= 1
        if not self._users:
            self._tuned = None


def find_things(
    place: Path, base: str | None = None, adapter: Path | None = None, load_in: LoadIn | None = None
) -> Things:
    """What there is at a place. Raises AccessError where there is nothing."""
    if place.is_file() and place.suffix == ".gguf":
        things = Things(base, load_in or "16bit", adapter=adapter)
        things.gguf[_kind(place) or "gguf"] = place
        things.earlier = _earlier(place.parent, _manifest(place.parent))
        return things
    if not place.is_dir():
        what = "is no GGUF file" if place.is_file() else "does not exist"
        raise AccessError(f"{place} {what}", "name a run's folder, a model's folder or a GGUF file")
    run = _manifest(place)
    model = run.get("spec", {}).get("model", {})
    things = Things(
        load_in=load_in or model.get("load_in") or "16bit",
        today=date.fromisoformat(model["template_date"]) if model.get("template_date") else None,
        s3=run.get("spec", {}).get("s3") or {},
    )
    if (place / CONFIG).is_file():
        things.adapter = place
    elif (place / "adapter" / CONFIG).is_file():
        things.adapter = place / "adapter"
    if (place / "merged" / "config.json").is_file():
        things.merged = place / "merged"
    elif (place / "config.json").is_file():
        things.merged = place
    for file in [*sorted(place.glob("*.gguf")), *sorted((place / "gguf").glob("*.gguf"))]:
        if kind := _kind(file):
            things.gguf[kind] = file
    things.earlier = _earlier(place, run)
    if adapter:
        things.adapter, things.earlier = adapter, things.earlier - {"adapter"}
    things.base = base or _base_of(run)
    if things.adapter:
        config = read_config(things.adapter)
        things.base = things.base or _named(config)
    if not things.names:
        raise AccessError(
            f"there is nothing in {place} to talk to",
            "name a run's folder, a model's folder or a GGUF file"
            + ("; or say the adapter's base with --base" if things.adapter else ""),
        )
    return things


def require_names(things: Things, names: list[str], place: Path) -> None:
    for name in names:
        if name not in things.names:
            raise SpecError(
                f"there is no {name} in {place}",
                f"there are {', '.join(things.names)}"
                + ("; --base says which base" if name == "base" else ""),
            )


def _manifest(place: Path) -> dict[str, Any]:
    for folder in (place, place.resolve().parent):
        try:
            found = json.loads((folder / MANIFEST).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(found.get("spec"), dict):
            return found
    return {}


def _earlier(place: Path, run: dict[str, Any]) -> frozenset[str]:
    """What is of an earlier training than the run's newest; nothing where this is no run's own folder.

    A stage's record is removed when the stage begins anew, and what it made stays until the new one
    is whole; the manifest is of the last start that came to its end.
    """
    before = run.get("inputs", {}).get("keys")
    if not isinstance(before, dict):
        return frozenset()
    for folder in (place, place.resolve().parent):
        if (folder / RECORDS).is_dir():
            break
    else:
        return frozenset()

    def key_of(stage: str) -> str | None:
        try:
            return str(json.loads((folder / RECORDS / f"{stage}.json").read_text("utf-8"))["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    trained = {key_of("train"), key_of("given")} - {None}
    if before.get("train") in trained:
        return frozenset()
    made_by = {"adapter": "adapter", "merged": "merge", "gguf": "gguf"}
    return frozenset(
        name
        for name, stage in made_by.items()
        if not trained or key_of(stage) in (None, before.get(stage))
    )


def _base_of(run: dict[str, Any]) -> str | None:
    """The base of a run, pinned to the revision that it had."""
    base = run.get("inputs", {}).get("base") or {}
    return _named({"base_model_name_or_path": base.get("source"), "revision": base.get("commit")})


def _named(config: dict[str, Any]) -> str | None:
    name, commit = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return f"{name.partition('@')[0]}@{commit}" if commit else name


def _kind(file: Path) -> str | None:
    """The type in a GGUF file's name; None for adapters and for later parts of a file."""
    if file.name.lower().endswith("-lora.gguf") or _LATER_PART.search(file.name):
        return None
    found = _KIND.search(file.name)
    return found[1].lower() if found else file.stem.lower()


class TorchVoice:
    def __init__(
        self,
        model: Any,
        tokenizer: ChatTokenizer,
        with_adapter: bool = True,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._tokenizer, self._closed = model, tokenizer, closed
        self._with_adapter = with_adapter

    def say(self, messages: list[Message], sampling: Sampling, tell: Tell) -> Said:
        import torch
        from transformers import GenerationConfig

        tokenizer, model = self._tokenizer, self._model
        prompt = tokenizer.template.render(messages, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.ids_of(prompt)], device=model.device)
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {
                "do_sample": True, "temperature": sampling.temperature, "min_p": sampling.min_p,
                "top_k": 0, "top_p": 1.0,
            }  # fmt: skip
        config = GenerationConfig(
            **drawn,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(tokenizer.stop_ids),
            pad_token_id=tokenizer.pad_id,
        )
        torch.manual_seed(sampling.seed)
        listener = _Listener(tokenizer, tell)
        bare = not self._with_adapter and hasattr(model, "disable_adapter")
        # After Ctrl-C what was said so far is the answer.
        without = model.disable_adapter() if bare else nullcontext()
        interrupt = _first_ctrl_c(listener.interrupt)
        with suppress(KeyboardInterrupt), interrupt, torch.no_grad(), without:
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                streamer=listener,
            )  # fmt: skip
        return listener.said()

    def close(self) -> None:
        self._model = None
        self._closed()
        gc.collect()


class _Listener:
    """Hears transformers' tokens as they come; the first that it hears is the prompt."""

    def __init__(self, tokenizer: ChatTokenizer, tell: Tell) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] | None = None
        self._told = ""
        self._stopped = False
        self._listening = self._interrupted = False

    def interrupt(self) -> None:
        """At once, but not in the middle of a piece: that would be lost, or told twice."""
        self._interrupted = True
        if not self._listening:
            raise KeyboardInterrupt

    def put(self, value: Any) -> None:
        self._listening = True
        self._take(value)
        self._listening = False
        if self._interrupted:
            raise KeyboardInterrupt

    def _take(self, value: Any) -> None:
        if self._ids is None:
            self._ids = []
            return
        for token in value.reshape(-1).tolist():
            if token in self._tokenizer.stop_ids:
                self._stopped = True
            else:
                self._ids.append(token)
        text = self._tokenizer.text_of(self._ids)
        if not text.endswith("\ufffd"):  # else the rest of a character has yet to come
            self._tell(text[len(self._told) :])
            self._told = text

    def end(self) -> None:
        """As transformers calls it."""

    def said(self) -> Said:
        text = self._tokenizer.text_of(self._ids or [])
        self._tell(text[len(self._told) :])
        return Said(text, self._stopped)


class GgufVoice:
    """A GGUF file in a process of its own, with the chat template that is in it."""

    def __init__(self, file: Path, today: date | None) -> None:
        from jobs.export.llama.build import ensure_tools
        from jobs.observe.events import Observer

        if not file.is_file():
            raise AccessError(f"{file} does not exist", "name a GGUF file")
        with Observer("auto", sys.stderr, quiet=True) as observer:
            tools = ensure_tools(observer)
        read_fd, write_fd = os.pipe()
        worker = Path(__file__).parent / "export" / "llama" / "talker.py"
        self._file = file
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - see close
        self._process = subprocess.Popen(
            [sys.executable, str(worker), str(tools), str(write_fd)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors,
            pass_fds=(write_fd,), text=True,
        )  # fmt: skip
        os.close(write_fd)
        self._answers = os.fdopen(read_fd)
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        self._send({"model": str(file), "context": CONTEXT, "threads": threads})
        about = self._hear()
        if not about.get("template"):
            self.close()
            raise AccessError(f"{file} has no chat template", "talk to one that was made for chat")
        self._template = ChatTemplate(
            about["template"], about["special_tokens"], file.name, today or DEFAULT_DATE
        )

    def say(self, messages: list[Message], sampling: Sampling, tell: Tell) -> Said:
        prompt = self._template.render(messages, add_generation_prompt=True)
        sent = interrupted = False

        def end() -> None:
            with suppress(OSError):  # it is gone, which `_hear` will say better
                os.write(self._stdin.fileno(), b'{"end": true}\n')

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            if sent:  # else it would stand in the middle of the question
                end()

        text = ""
        with _first_ctrl_c(interrupt):
            self._send(
                {"prompt": prompt, "temperature": sampling.temperature, "min_p": sampling.min_p,
                 "seed": sampling.seed, "max_new_tokens": sampling.max_new_tokens}
            )  # fmt: skip
            sent = True
            if interrupted:
                end()
            while not (heard := self._hear()).get("done"):
                text += heard["text"]
                tell(heard["text"])
        if heard["too_long"]:
            raise SpecError(
                f"the conversation is longer than {CONTEXT} tokens", "begin anew: /reset"
            )
        return Said(text, heard["stopped"])

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._answers.close()
        self._errors.close()

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _send(self, request: dict[str, Any]) -> None:
        self._stdin.write(json.dumps(request) + "\n")
        self._stdin.flush()

    def _hear(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            heard: dict[str, Any] = json.loads(line)
            return heard
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        raise AccessError(
            f"llama.cpp cannot use {self._file}" + (f": {said[-1]}" if said else ""),
            "see that the file is whole, and made for a llama.cpp no newer than this one",
        )
