"""What every backend needs to know of a list of levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Levels = Sequence[Tensor]


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums and scores: fp64 as soon as one tensor is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def positions(level: Tensor) -> int:
    """N * H * W of an (N, C, H, W) level."""
    n, _, h, w = level.shape
    return n * h * w


def split_levels(scores: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views (N, H, W) of the flat scores, shaped as the (N, C, H, W) levels in `like`."""
    parts = scores.split([positions(level) for level in like])
    return [part.view(x.shape[0], *x.shape[2:]) for part, x in zip(parts, like, strict=True)]


def entry_columns(
    entries: int,
    terms: int,
    level: Sequence[int],
    term: Sequence[int],
    scale: Sequence[float],
    eps: Sequence[float],
) -> tuple[Sequence[int], Sequence[int], Sequence[float], Sequence[float]]:
    """The entries' columns in full. Empty ones are the usual: every term's levels in turn, a scale of 1, an eps of 0.

    Raises:
        RuntimeError: the entries are no whole number of levels a term.
    """
    if not level and not term:
        levels = levels_in_turn(entries, terms)
        level = [e % levels for e in range(entries)]
        term = [e // levels for e in range(entries)]
    return level, term, scale or [1.0] * entries, eps or [0.0] * entries


def levels_in_turn(entries: int, terms: int) -> int:
    """How many levels each term has, where level and term are not given."""
    levels, rest = divmod(entries, max(terms, 1))
    if rest:
        raise RuntimeError(f"without level and term, {entries} entries must be the same levels for {terms} terms")
    return levels


def level_slices(entries: Sequence[Tensor], level: Sequence[int], total: int) -> list[slice]:
    """Where each level's scores lie in the flat buffer of `total`, given entries of those levels.

    Raises:
        RuntimeError: a level has no entry, its entries differ in size, or the sizes do not add up to `total`.
    """
    sizes: dict[int, int] = {}
    for x, number in zip(entries, level, strict=True):
        if sizes.setdefault(number, positions(x)) != positions(x):
            raise RuntimeError(f"the entries of level {number} have {sizes[number]} and {positions(x)} positions")
    slices, first = [], 0
    for number in range(max(level) + 1):
        if number not in sizes:
            raise RuntimeError(f"level {number} has no entry; levels are numbered from 0 without a gap")
        slices.append(slice(first, first + sizes[number]))
        first += sizes[number]
    if first != total:
        raise RuntimeError(f"the levels have {first} positions, scores hold {total}")
    return slices


def require_entries(term: Sequence[int], terms: int) -> None:
    """Raise RuntimeError where a term has no entry."""
    for number in range(terms):
        if number not in term:
            raise RuntimeError(f"term {number} has no entry")
