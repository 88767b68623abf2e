"""The pages of documentation, taken apart: headings, links, code in lines and in blocks."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from docs.generate import slug
from tests.conftest import ROOT

FENCE = re.compile(r"(\s*)(```+|~~~+)\s*(\S*)\s*(.*)")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
CODE = re.compile(r"(`+)(.+?)\1")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the name behind it, and the line that it begins on."""

    page: Path
    line: int
    language: str
    name: str
    text: str
    after: str  # the first line of text behind it

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass
class Page:
    path: Path
    prose: list[tuple[int, str]] = field(default_factory=list)  # lines outside of blocks
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def anchors(self) -> set[str]:
        found: set[str] = set()
        seen: Counter[str] = Counter()
        for _, line in self.prose:
            if re.match(r"#{1,6} ", line):
                text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#"))
                anchor = slug(text)
                found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
                seen[anchor] += 1
        return found

    @property
    def links(self) -> list[tuple[int, str]]:
        return [
            (number, found[1])
            for number, line in self.prose
            for found in LINK.finditer(CODE.sub("", line))
        ]

    @property
    def codes(self) -> list[tuple[int, str]]:
        """What stands in `backticks`, with its line."""
        return [
            (number, found[2].strip())
            for number, line in self.prose
            for found in CODE.finditer(line)
        ]

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")


def read_page(path: Path) -> Page:
    page = Page(path)
    lines = path.read_text("utf-8").splitlines()
    at = 0
    while at < len(lines):
        opened = FENCE.fullmatch(lines[at])
        if not opened:
            page.prose.append((at + 1, lines[at]))
            at += 1
            continue
        indent, fence, language, name = opened.groups()
        end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == fence)
        text = "\n".join(line.removeprefix(indent) for line in lines[at + 1 : end]) + "\n"
        after = next((line for line in lines[end + 1 :] if line.strip()), "")
        page.blocks.append(Block(path, at + 1, language, name, text, after))
        at = end + 1
    return page


PAGES = [read_page(path) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]


def commands(text: str) -> list[list[str]]:
    """The words of each command in a block for a shell, lines that go on joined."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|\||\||;)\s", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a text over several lines
                continue
            if words:
                found.append(words)
    return found
