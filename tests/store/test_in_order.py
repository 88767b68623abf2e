"""A file that arrives in any order is hashed while it does, and gone on with only where it is whole."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.store.s3 import in_order
from jobs.store.s3.in_order import InOrder, hashed_so_far

EVERY = 10_000
CONTENT = random.Random(5).randbytes(123_456)


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def sha256(count: int) -> str:
    return hashlib.sha256(CONTENT[:count]).hexdigest()


MARKS = [(at, sha256(at)) for at in (*range(EVERY, len(CONTENT), EVERY), len(CONTENT))]


@pytest.mark.parametrize("lent", [0, 2, 100])
@pytest.mark.parametrize("begin", [0, 3 * EVERY])
def test_pieces_in_any_order_from_many_threads(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, lent: int, begin: int
) -> None:
    monkeypatch.setattr(in_order, "LENT", lent)
    monkeypatch.setattr(in_order, "PIECE", 1000)
    reached: list[tuple[int, str]] = []
    os.pwrite(descriptor, CONTENT[:begin], 0)
    hash = InOrder(
        descriptor, len(CONTENT), begin, hashlib.sha256(CONTENT[:begin]), EVERY, lambda *a: reached.append(a)
    )  # fmt: skip

    def receive(start: int) -> None:
        at, end, draw = start, min(start + 7777, len(CONTENT)), random.Random(start)
        buffer = memoryview(bytearray(1000))
        while at < end:  # as a network gives them: of any length
            count = min(draw.randint(1, 1000), end - at)
            buffer[:count] = CONTENT[at : at + count]
            os.pwrite(descriptor, buffer[:count], at)
            buffer = hash.wrote(at, count, buffer)
            at += count

    starts = list(range(begin, len(CONTENT), 7777))
    random.Random(1).shuffle(starts)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(receive, starts))
    assert hash.digest() == sha256(len(CONTENT))
    assert reached == [mark for mark in MARKS if mark[0] > begin]


def test_a_file_that_became_shorter_is_noticed(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_order, "LENT", 0)
    hash = InOrder(descriptor, 100, 0, hashlib.sha256(), EVERY, lambda at, said: None)
    hash.wrote(0, 100, memoryview(bytearray(100)))
    with pytest.raises(OSError, match="shorter"):
        hash.digest()


def test_closing_ends_it_before_the_end(descriptor: int) -> None:
    hash = InOrder(descriptor, 100, 0, hashlib.sha256(), EVERY, lambda at, said: None)
    hash.close()
    assert not hash._thread.is_alive()


@pytest.mark.parametrize(
    ("damage", "whole"),
    [
        (None, len(CONTENT)),
        (0, 0),
        (EVERY - 1, 0),
        (EVERY, EVERY),
        (5 * EVERY + 1, 5 * EVERY),
        (len(CONTENT) - 1, 12 * EVERY),
    ],
)
def test_what_is_damaged_on_the_disk_is_not_gone_on_with(
    descriptor: int, damage: int | None, whole: int
) -> None:
    os.pwrite(descriptor, CONTENT, 0)
    if damage is not None:
        os.pwrite(descriptor, bytes([CONTENT[damage] ^ 1]), damage)
    at, hash = hashed_so_far(descriptor, MARKS)
    assert at == whole
    assert hash.hexdigest() == sha256(whole)


def test_a_file_that_is_shorter_than_noted_is_good_to_its_last_mark(descriptor: int) -> None:
    os.pwrite(descriptor, CONTENT[: 2 * EVERY + 5], 0)
    at, hash = hashed_so_far(descriptor, MARKS)
    assert (at, hash.hexdigest()) == (2 * EVERY, sha256(2 * EVERY))
