"""Whether a training fits a GPU, by reckoning alone: the plan it would take, and what to change
where there is none. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jobs.errors import DoesNotFitError
from jobs.spec import GpuName, Spec
from jobs.train.cards import CARDS, Card, known
from jobs.train.engines import Name
from jobs.train.fit import ENOUGH, MARGIN, Plan, find_plan
from jobs.train.memory import CONTEXT, GIB, Estimate, holds_unpacked, reckon
from jobs.train.memory import unpacked as as_unpacked
from jobs.train.shape import Shape

STEP = 256  # lengths that are proposed are multiples of this
SMALL_RANK = 8


@dataclass(frozen=True)
class Room:
    """A training whose longest row has `longest` tokens, on a card."""

    spec: Spec
    shape: Shape
    engine: Name
    longest: int
    card: Card

    @property
    def free(self) -> int:
        """What torch's allocator can have."""
        limit = self.spec.limits.gpu_memory_gib
        whole = min(self.card.bytes, int(limit * GIB)) if limit else self.card.bytes
        return whole - self.card.used - CONTEXT

    @property
    def most(self) -> int:
        """The most tokens that a step can have."""
        return self.longest * self.spec.train.batch_size

    def takes(self, plan: Plan, unpacked: bool = False) -> Estimate:
        spec = as_unpacked(self.spec) if unpacked else self.spec
        return reckon(self.shape, spec, plan, self.longest, self.engine, self.card.bytes)

    @cached_property
    def unpacked(self) -> bool:
        """Whether the run would hold a 4-bit base unpacked."""
        return holds_unpacked(
            self.shape, self.spec, self.most, self.longest, self.free, self.engine, self.card.bytes
        )

    @cached_property
    def plan(self) -> Plan:
        """What the run would choose, were the card as reckoned."""
        return find_plan(
            self.most,
            self.longest,
            self.free,
            lambda plan: self.takes(plan, self.unpacked).allocated,
        )

    @property
    def largest(self) -> Plan:
        """What it would choose with all the memory there is."""
        return Plan(min(self.most, max(ENOUGH, self.longest)))

    @property
    def least(self) -> Estimate:
        """What it takes one row at a time, with activations made again."""
        return self.takes(Plan(self.longest, checkpointing=True))

    @property
    def fits(self) -> bool:
        return self.least.allocated <= MARGIN * self.free

    @property
    def hopeless(self) -> bool:
        """Whether it cannot fit, even with nothing to spare."""
        return self.least.allocated > self.free

    def other(self, spec: Spec | None = None, longest: int = 0, card: Card | None = None) -> Room:
        return Room(
            spec or self.spec, self.shape, self.engine, longest or self.longest, card or self.card
        )


def smallest_card(room: Room, plan: Plan | None = None) -> GpuName | None:
    """The smallest of the known cards on which it fits, with this plan or any."""
    unlimited = _with(room.spec, "limits", gpu_memory_gib=None)
    for name in sorted(CARDS, key=lambda name: CARDS[name][0]):
        there = room.other(unlimited, card=known(name))
        taken = there.takes(plan) if plan else there.least
        if taken.allocated <= MARGIN * there.free:
            return name
    return None


def does_not_fit(room: Room) -> DoesNotFitError:
    """The error that says by how much, and what would fit."""
    least, limit = room.least, room.spec.limits.gpu_memory_gib
    whole = f"limits.gpu_memory_gib: {limit:g}" if limit else f"{room.card.bytes / GIB:.1f} GiB"
    parts = ", ".join(f"{name} {_gib(count)}" for name, count in _by_size(least))
    return DoesNotFitError(
        f"it takes about {_gib(least.total)} of the GPU's memory at the least, with one row of "
        f"{room.longest} tokens at a time and activations made again, and {room.card.name} has "
        f"{_gib(room.free + CONTEXT)} for it ({whole}"
        + (f", {_gib(room.card.used)} in use" if room.card.used else "")
        + f"): {parts}",
        "; or ".join(ways(room)) or "take a smaller base model",
    )


def ways(room: Room) -> list[str]:
    """Changes with which it fits: each by itself; where none is enough, all that are needed."""
    found = [text for text, spec in _changes(room.spec) if room.other(spec).fits]
    if length := _length(room):
        found.append(f"set {length}")
    if not found:
        texts: list[str] = []
        for text, changed in _all_changes(room.spec):
            texts.append(text)
            smaller = room.other(changed)
            rest = None if smaller.fits else _length(smaller)
            if smaller.fits or rest:
                found.append(" and ".join([*texts, *([rest] if rest else [])]))
                break
    if card := smallest_card(room):
        larger = known(card).bytes > room.card.bytes
        limit = f"allow {_gib(room.least.allocated / MARGIN + CONTEXT)} (limits.gpu_memory_gib)"
        found.append(f"take a GPU with more memory: {card} is enough" if larger else limit)
    return found


def _changes(spec: Spec) -> Iterator[tuple[str, Spec]]:
    if spec.model.load_in != "4bit":
        yield "set model.load_in: 4bit", _with(spec, "model", load_in="4bit")
    if spec.lora.modules_to_save:
        yield "leave out lora.modules_to_save", _with(spec, "lora", modules_to_save=[])
    if spec.train.optimizer == "adamw":
        changed = _with(spec, "train", optimizer="adamw_8bit")
        yield "set train.optimizer: adamw_8bit", changed
    if spec.lora.rank > SMALL_RANK:
        yield f"set lora.rank: {SMALL_RANK}", _with(spec, "lora", rank=SMALL_RANK)


def _all_changes(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """The same, each on top of those before."""
    done: set[str] = set()
    while left := [(text, changed) for text, changed in _changes(spec) if text not in done]:
        text, spec = left[0]
        done.add(text)
        yield text, spec


def _length(room: Room) -> str | None:
    """The greatest length with which it fits, if shorter than the longest row."""
    for length in range((room.longest - 1) // STEP * STEP, 0, -STEP):
        if room.other(longest=length).fits:
            return f"model.max_seq_length: {length}"
    return None


def _with(spec: Spec, section: str, **changes: Any) -> Spec:
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=changes)})


def _by_size(estimate: Estimate) -> list[tuple[str, int]]:
    parts = [(name, count) for name, count in estimate.as_json().items() if name != "total"]
    return sorted(parts, key=lambda part: -part[1])


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
