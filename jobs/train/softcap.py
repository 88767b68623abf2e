"""Soft-capped attention (Gemma 2) over conversations that are laid end to end.

Scores s become c tanh(s / c) before the softmax (Gemma Team 2024, section 2). Flash kernels know no such
thing. Conversations of like length are taken together, each padded to the longest of them; and scores,
which cost the square of a length, are made again in the backward pass instead of kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from jobs.train.memory import SCORES

# Conversations shorter than this are taken together; then each doubling of the length by itself.
SHORT = 64


@dataclass(frozen=True)
class Bucket:
    """Conversations of like length: `rows` of up to `length` tokens."""

    rows: int
    length: int
    tokens: torch.Tensor
    """Where each of their tokens is in what is laid end to end, int64 (n,)."""
    places: torch.Tensor
    """Where each is in (rows, length) as one row, int64 (n,)."""

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """(all tokens, heads, width) -> (rows, heads, length, width), zeros where there is no token."""
        out = values.new_zeros(self.rows * self.length, *values.shape[1:])
        out[self.places] = values[self.tokens]
        return out.view(self.rows, self.length, *values.shape[1:]).transpose(1, 2)

    def together(self, *values: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Each padded, as if it had so many heads, those that share one below each other:
        (rows, heads, its heads / heads * length, width)."""
        return [self.padded(x).reshape(self.rows, heads, -1, x.shape[2]) for x in values]

    def put_back(self, padded: torch.Tensor, out: torch.Tensor) -> None:
        """The tokens of (rows, heads, length, width), however heads are grouped, to their places in
        `out`, (all tokens, heads, width)."""
        whole = padded.reshape(self.rows, out.shape[1], self.length, out.shape[2]).transpose(1, 2)
        out[self.tokens] = whole.reshape(-1, *out.shape[1:])[self.places]


_LAST: list[tuple[torch.Tensor, int, list[Bucket]]] = []  # every layer asks for the same


def buckets(bounds: torch.Tensor, most: int) -> list[Bucket]:
    """The conversations that begin at `bounds`, int (conversations + 1,), by length: in each bucket one,
    or as many as have up to `most` scores a head."""
    for last, as_many, found in _LAST:
        if last is bounds and as_many == most:
            return found
    ends = bounds.tolist()
    by_size: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(ends):
        if end > start:
            size = max(SHORT, 1 << (end - start - 1).bit_length())
            by_size.setdefault(size, []).append((start, end - start))
    found = []
    for size, each in sorted(by_size.items()):
        count = max(1, most // size**2)
        found += [_bucket(each[i : i + count], bounds) for i in range(0, len(each), count)]
    _LAST[:] = [(bounds, most, found)]
    return found


def _bucket(each: list[tuple[int, int]], bounds: torch.Tensor) -> Bucket:
    length = max(size for _, size in each)
    tokens = torch.cat([torch.arange(start, start + size) for start, size in each])
    places = torch.cat(
        [torch.arange(row * length, row * length + size) for row, (_, size) in enumerate(each)]
    )
    return Bucket(len(each), length, tokens.to(bounds.device), places.to(bounds.device))


class SoftCapped(torch.autograd.Function):
    """query (tokens, heads, width), key and value (tokens, fewer heads, width), and where conversations
    begin -> (tokens, heads, width). Causal, each token within its conversation and `window`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        bounds: torch.Tensor, scale: float, window: int | None, softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for bucket, heads, shared in _pieces(bounds, query, key):
            values = query[:, heads], key[:, shared], value[:, shared]
            q, k, v = bucket.together(*values, heads=shared.stop - shared.start)
            bucket.put_back(_there(q, k, v, scale, window, softcap), out[:, heads])
            del q, k, v
        ctx.save_for_backward(query, key, value, out)
        ctx.told = bounds, scale, window, softcap
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, out = ctx.saved_tensors
        bounds, scale, window, softcap = ctx.told
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        for bucket, heads, shared in _pieces(bounds, query, key):
            q, k, v, y, dy = bucket.together(
                query[:, heads], key[:, shared], value[:, shared], out[:, heads], gradient[:, heads],
                heads=shared.stop - shared.start,
            )  # fmt: skip
            of_q, of_k, of_v = _back(q, k, v, y, dy, scale, window, softcap)
            bucket.put_back(of_q, of_query[:, heads])
            bucket.put_back(of_k, of_key[:, shared])
            bucket.put_back(of_v, of_value[:, shared])
            del q, k, v, y, dy, of_q, of_k, of_v
        return of_query, of_key, of_value, None, None, None, None


def _pieces(
    bounds: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> Iterator[tuple[Bucket, slice, slice]]:
    """What is done at a time: a bucket, the heads of queries, and the heads of keys that these share;
    of conversations with too many scores fewer heads, but whole heads of keys."""
    groups = query.shape[1] // key.shape[1]
    for bucket in buckets(bounds, SCORES // query.shape[1]):
        count = max(1, min(key.shape[1], SCORES // (groups * bucket.rows * bucket.length**2)))
        for first in range(0, key.shape[1], count):
            last = min(first + count, key.shape[1])
            yield bucket, slice(first * groups, last * groups), slice(first, last)


# Functions of their own, so that nothing of one piece is held while the next is at work. All is
# (rows, heads, tokens, width), with several heads' queries below each other for one of keys.


def _there(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    scale: float, window: int | None, softcap: float,
) -> torch.Tensor:  # fmt: skip
    weights, _ = _weights(q, k, scale, window, softcap)
    return weights.to(v.dtype) @ v


def _back(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, dy: torch.Tensor,
    scale: float, window: int | None, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v, from what came out and its gradient: where there is no token that is
    zero, and so is what it gives to keys and values."""
    weights, capped = _weights(q, k, scale, window, softcap)
    dv = weights.to(v.dtype).transpose(-1, -2) @ dy
    # Through the softmax (Dao et al. 2022, appendix B.2), then tanh' = 1 - tanh^2.
    inner = (dy.float() * y.float()).sum(-1, keepdim=True)
    ds = (dy @ v.transpose(-1, -2)).float().sub_(inner).mul_(weights)
    ds = ds.mul_(capped.square_().neg_().add_(1)).mul_(scale).to(k.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, dv


def _weights(
    q: torch.Tensor, k: torch.Tensor, scale: float, window: int | None, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of what is seen, and tanh of the scores, in 32 bit: (..., queries, length)."""
    length = k.shape[2]
    every = torch.ones(length, length, dtype=torch.bool, device=k.device)
    unseen = every.triu(1)
    if window is not None and length > window:
        unseen |= every.tril(-window)
    capped = (q @ k.transpose(-1, -2)).float().mul_(scale / softcap).tanh_()
    scores = capped * softcap
    scores.view(*k.shape[:2], -1, length, length).masked_fill_(unseen, float("-inf"))
    return torch.softmax(scores, -1), capped
