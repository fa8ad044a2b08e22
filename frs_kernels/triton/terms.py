"""What the kernels of `imitate` share: a call's table, its terms and rows as they reach a kernel, shares and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.triton import levels as lv
from frs_kernels.triton.levels import number_of, pick, size_of
from frs_kernels.triton.slots import sum_entry


class Rows(NamedTuple):
    """What is known of an entry beside its tensors, an element an entry, encoded by `odd` and `halves`."""

    levels: tuple[int, ...]
    first_positions: tuple[int, ...]  # in the flat scores
    places: tuple[int, ...]  # of its value; Triton keeps the name `values` for itself
    scales: tuple[tuple[int, ...], ...]
    eps: tuple[tuple[int, ...], ...]


class Terms(NamedTuple):
    """What is known of a term: `numbers_of`, and its factor."""

    numbers: tuple[tuple[int, ...], ...]
    factors: tuple[Tensor | None, ...]


class Table(NamedTuple):
    """The columns of a call, as `frs_kernels.reference.imitate` describes them."""

    level: Sequence[int]
    term: Sequence[int]
    scale: Sequence[float]
    eps: Sequence[float]
    loss: Sequence[str]
    weight: Sequence[float]
    factor: Sequence[Tensor | None]
    temperature: Sequence[float]
    beta: Sequence[float]
    want_grad: Sequence[bool]
    norms: int = 1  # as many levels are added up for every entry's norm

    def rows(self, order: Iterable[int], first_positions: Sequence[int]) -> Rows:
        """Those of some entries."""
        order = list(order)
        return Rows(
            lv.odd(self.level[e] for e in order),
            lv.odd(first_positions[self.level[e]] for e in order),
            lv.odd(len(self.loss) + e for e in order),
            *(tuple(zip(*(lv.halves(numbers[e]) for e in order), strict=True)) for numbers in (self.scale, self.eps)),
        )

    def terms(self) -> Terms:
        return Terms(tuple(map(numbers_of, self.weight, self.temperature, self.beta)), tuple(self.factor))


def numbers_of(weight: float, temperature: float, beta: float) -> tuple[int, ...]:
    """The numbers of a term, encoded. An inverse beta is finite, so that 0 times it is 0."""
    numbers = (weight, temperature, 1 / temperature, beta, min(1 / beta, 1e38) if beta else 0.0)
    return tuple(half for number in numbers for half in lv.halves(number))


@triton.jit
def shares(scores_at, mask, norm_at, eps, scale, NORMS: tl.constexpr, ACC: tl.constexpr):
    """scale S_p / (norm + eps) of a program's positions, 0 where there is no position and where the divisor is 0."""
    norm = tl.load(norm_at)
    for i in tl.static_range(1, NORMS):
        norm += tl.load(norm_at + i)
    denominator = norm + eps.to(norm.dtype)
    share = tl.where(denominator == 0, 0.0, tl.load(scores_at, mask=mask, other=0.0) / denominator)
    return share.to(ACC) * scale.to(ACC)


@triton.jit
def upstream_of(terms, TERM: tl.constexpr, ACC: tl.constexpr):
    """weight * factor"""
    upstream = number_of(terms.numbers[TERM][0], terms.numbers[TERM][1]).to(ACC)
    if terms.factors[TERM] is not None:
        upstream *= tl.load(terms.factors[TERM]).to(ACC)
    return upstream


@triton.jit
def store_values(values_ptr, slots_ptr, sizes, rows, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    """The value of each entry of a segment, stored; their sum."""
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    total = tl.zeros((), tl.float64)
    for entry in range(SEGMENT.first, SEGMENT.last):
        value = sum_entry(slots_ptr, sizes.starts, entry, SEGMENT)
        tl.store(values_ptr + size_of(pick(rows.places, entry, SEGMENT)), value.to(values_ptr.dtype.element_ty))
        total += value
    return total
