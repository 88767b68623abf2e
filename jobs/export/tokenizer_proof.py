"""Before anything is trained: whether llama.cpp splits text into the tokens that will be trained.

A vocabulary alone makes a GGUF file, without any weights, so what the verification would find hours
later is known in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jobs.base_model import copy_tokenizer
from jobs.data.conversation import BadRow
from jobs.data.tokenizer import ChatTokenizer
from jobs.errors import SpecError, VerificationError
from jobs.export.gguf import settle_for_converter
from jobs.export.llama import client
from jobs.export.llama.build import tools_key
from jobs.export.sentencepiece_files import (
    missing_bytes,
    read_tokenizer,
    shown_name,
    spells_in_bytes,
)
from jobs.export.verify_gguf import begins_with_bos
from jobs.store.cache import cache_folder
from jobs.store.hashing import key_of, sha256_of

# What any conversation may hold: a base whose tokens for it differ cannot be exported.
ORDINARY = [
    "Hello! Where's  the 12345-metre jetty?\n\n\t- isn't it 3.14 km north, i.e. at 07:45 (p. 9)?",
    " It's there; they'll've signposted it.\n```python\nif x[0] != y_1:\n    return {'a': 1e-4}  # \\o/\n"
    "```\nCafé, naïve, Übergrößenträger; £5 or 7 €. ",
    "Please summarise: \"The committee's unprecedented recommendations, published on Wednesday, "
    "strengthen international cooperation; nevertheless, several economists questioned whether "
    'manufacturers would voluntarily disclose environmental liabilities throughout 2024-25."',
    "1. Economists doubt it.\n2. Disclosure stays voluntary.\n   * See https://example.org/a?b=c&d=%20.\n",
]
# Further scripts: nobody has to use them.
FURTHER = [
    "Где находится причал? 桟橋はどこですか。码头在哪里？ 부두가 어디에 있나요? أين الرصيف؟ Πού είναι;",
    "Здесь 🚢, 这里👩🏽‍🚀, ここ ½ ≠ ∞, \u13a0\U0001d54f.",
]
HINT = "leave it out, or name another base: the adapter and the merged model need no llama.cpp"


def require_possible(base: Path) -> None:
    """Raises SpecError where tokenizer.json alone says that no GGUF file can hold the tokenizer."""
    if reason := impossible(read_tokenizer(base)):
        raise SpecError(reason, HINT)


def require_same_tokens(
    base: Path, tokenizer: ChatTokenizer, tools: Path, tell: Callable[[str], None]
) -> None:
    """Raises SpecError where llama.cpp would read conversations otherwise than the tokenizer does.

    `tell` hears of scripts whose tokens differ, where ordinary text's do not. It takes seconds, and
    what was found once is not looked for again.
    """
    texts = {"ordinary": _rendered(tokenizer, ORDINARY), "further": _rendered(tokenizer, FURTHER)}
    known = cache_folder() / "tokenizers" / _key(base, tokenizer, list(texts.values()))
    if known.is_file():
        return
    with suppress(OSError):  # a cache that cannot be written costs seconds
        known.parent.mkdir(parents=True, exist_ok=True)
    ids = ids_in_llama_cpp(base, tokenizer, tools, list(texts.values()))
    differing = [
        name
        for (name, text), found in zip(texts.items(), ids, strict=True)
        if found != tokenizer.ids_of(text)
    ]
    if "ordinary" in differing:
        raise SpecError(
            "llama.cpp splits ordinary text into other tokens than the tokenizer in "
            f"{base}, so a GGUF file would not know what was trained",
            HINT,
        )
    if differing:
        tell(
            "llama.cpp splits text in some scripts into other tokens than the tokenizer: "
            "conversations that hold such text would fail the verification of the GGUF files"
        )
        return
    with suppress(OSError):
        known.touch()


def impossible(tokenizer: dict[str, Any]) -> str | None:
    """Why no GGUF file can hold this tokenizer, as far as tokenizer.json itself says it."""
    kind = tokenizer.get("model", {}).get("type")
    if kind != "BPE":
        return (
            f"the base's tokenizer is of the kind {kind}, and llama.cpp's converter has only BPE for "
            "models like it: text would be split otherwise than it was trained"
        )
    if spells_in_bytes(tokenizer) and (missing := missing_bytes(tokenizer)):
        return (
            f"the base's tokenizer spells unknown characters in bytes but lacks {len(missing)} of 256 "
            f"tokens for them, {missing[0]} first, and llama.cpp needs them all"
        )
    return None


def _rendered(tokenizer: ChatTokenizer, contents: list[str]) -> str:
    """The contents as a conversation; one under another where the template refuses that."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    try:
        return tokenizer.template.render(messages)
    except BadRow:
        return "\n".join(contents)


def _key(base: Path, tokenizer: ChatTokenizer, texts: list[str]) -> str:
    files = [base / "tokenizer.json", base / "tokenizer.model", base / "tokenizer_config.json"]
    code = [sha256_of(path) for path in sorted(Path(__file__).parent.glob("*gguf*.py"))]
    code += [sha256_of(Path(__file__).with_name("sentencepiece_files.py"))]
    said = [sha256_of(path) if path.is_file() else None for path in [*files, base / "config.json"]]
    return key_of([tools_key(), code, said, tokenizer.template.source, texts])


def ids_in_llama_cpp(
    base: Path, tokenizer: ChatTokenizer, tools: Path, texts: list[str]
) -> list[list[int]]:
    """The texts' tokens in llama.cpp, by a GGUF file that would be made of the base."""
    with TemporaryDirectory(prefix="lorajob-") as name:
        folder, log = Path(name) / "merged", Path(name) / "log"
        folder.mkdir()
        copy_tokenizer(base, tokenizer, folder)
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
        settle_for_converter(folder, begins_with_bos(tokenizer, texts))
        file = folder.with_suffix(".gguf")
        try:
            client.convert_vocabulary(tools, folder, file, log, shown_name("model", folder))
            return client.tokenize(tools, file, texts, log)
        except VerificationError as error:
            said = error.message.strip().splitlines()[-1]
            raise SpecError(f"llama.cpp cannot take the base's tokenizer: {said}", HINT) from None
