"""What the launchers refuse before a launch: a kernel would read outside its tensors, or compute something else.

The operators can be called without the public functions, whose own checks are in `frs_kernels.checks`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frs_kernels.levels import accumulate_dtype, positions
from frs_kernels.losses import LOSSES, Grouped, group_size
from frs_kernels.row_losses import NUMBERS, ROW_LOSSES

if TYPE_CHECKING:
    from frs_kernels.triton.terms import Table

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def check_tensors(verb: str, argument: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    """(N, C, H, W) with C at least 1, floating point, all on one device.

    Raises:
        RuntimeError
    """
    for number, x in enumerate(tensors):
        if x.dim() != 4 or x.shape[1] == 0 or x.dtype not in FLOATS or x.device != device:
            raise RuntimeError(
                f"{verb}: {argument}[{number}] must be (N, C, H, W) with C at least 1, float32, float64, bfloat16 or"
                f" float16, on {device}; got {tuple(x.shape)}, {x.dtype}, on {x.device}"
            )


def check_score(logits: Sequence[Tensor]) -> list[int]:
    """Where each level's scores begin, and last their number.

    Raises:
        RuntimeError
    """
    require(len(logits) > 0, "score: logits is empty; it needs (N, C, H, W) tensors, one a level")
    check_tensors("score", "logits", logits, logits[0].device)
    return [0, *itertools.accumulate(map(positions, logits))]


def check_imitate(
    student: Sequence[Tensor], teacher: Sequence[Tensor], scores: Tensor, norm: Tensor, table: Table
) -> list[int]:
    """Where each level's scores begin, and last their number.

    Raises:
        RuntimeError
    """
    require(len(student) > 0, "imitate: student is empty; it needs at least one entry")
    check_tensors("imitate", "student", student, scores.device)
    check_tensors("imitate", "teacher", teacher, scores.device)
    require(
        [x.shape for x in student] == [z.shape for z in teacher],
        "imitate: student and teacher must have the same shape in every entry",
    )
    check_table(len(student), scores.device, table)
    for x, t in zip(student, table.term, strict=True):
        if isinstance(LOSSES[table.loss[t]], Grouped):
            group_size(table.beta[t], x.shape[1])
    for name, given in (("scores", scores), ("norm", norm)):
        fits = given.dim() == 1 and given.is_contiguous() and given.dtype in (torch.float32, torch.float64)
        require(fits, f"imitate: {name} must be 1-dim, contiguous, and float32 or float64")
    require(norm.dtype == scores.dtype, "imitate: scores and norm must have one dtype")
    require(norm.device == scores.device, "imitate: scores and norm must be on one device")
    sizes: dict[int, tuple[int, int, int]] = {}
    for x, number in zip(student, table.level, strict=True):
        n, _, h, w = x.shape
        require(
            sizes.setdefault(number, (n, h, w)) == (n, h, w),
            f"imitate: the entries of level {number} differ in N, H or W: {sizes[number]} and {(n, h, w)}",
        )
    require(
        set(sizes) == set(range(len(sizes))),
        f"imitate: there are entries of levels {sorted(sizes)}; levels are numbered from 0 without a gap",
    )
    first_positions = [0, *itertools.accumulate(math.prod(sizes[number]) for number in range(len(sizes)))]
    require(
        scores.numel() == first_positions[-1] and norm.numel() == len(sizes),
        f"imitate: scores must hold one number a position, norm one a level: {first_positions[-1]} and {len(sizes)},"
        f" got {scores.numel()} and {norm.numel()}",
    )
    return first_positions


def check_table(entries: int, device: torch.device, table: Table) -> None:
    """Its columns are complete, and what they hold is in range.

    Raises:
        RuntimeError
    """
    terms = len(table.loss)
    require(terms > 0, "imitate: loss is empty; it needs a name a term")
    for name in ("level", "term", "scale", "eps"):
        require(len(getattr(table, name)) == entries, f"imitate: {name} must have an element an entry: {entries}")
    for name in ("weight", "factor", "temperature", "beta", "want_grad"):
        require(len(getattr(table, name)) == terms, f"imitate: {name} must have an element a term: {terms}")
    for term in table.term:
        require(0 <= term < terms, f"imitate: there is no term {term}")
    for term in range(terms):
        require(term in table.term, f"imitate: term {term} has no entry")
    for name in table.loss:
        require(name in LOSSES, f"imitate: loss {name!r} is unknown; the valid ones are {', '.join(map(repr, LOSSES))}")
    for factor in table.factor:
        check_factor("imitate", factor, device)
    for number in table.temperature:
        check_temperature("imitate", number)
    for number in table.beta:
        require(0 <= number < math.inf, f"imitate: beta must be zero or more and finite, got {number}")


def check_factor(verb: str, factor: Tensor | None, device: torch.device) -> None:
    if factor is not None:
        fits = factor.dim() == 0 and factor.dtype in FLOATS and factor.device == device
        require(fits, f"{verb}: a factor must be None, or 0-dim, floating point and on {device}")


def check_temperature(verb: str, temperature: float) -> None:
    require(0 < temperature < math.inf, f"{verb}: temperature must be positive and finite, got {temperature}")


def check_aligned(
    verb: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    loss: str,
    factor: Tensor | None,
    temperature: float,
) -> None:
    """What both verbs of the losses along rows need: levels of the same shapes, and a loss.

    Raises:
        RuntimeError
    """
    valid = ", ".join(map(repr, ROW_LOSSES))
    require(loss in ROW_LOSSES, f"{verb}: loss {loss!r} is unknown; the valid ones are {valid}")
    require(len(student) > 0, f"{verb}: student is empty; it needs (N, C, H, W) tensors, one a level")
    check_tensors(verb, "student", student, student[0].device)
    check_tensors(verb, "teacher", teacher, student[0].device)
    require(
        [x.shape for x in student] == [z.shape for z in teacher],
        f"{verb}: student and teacher must have the same shape in every level",
    )
    check_temperature(verb, temperature)
    check_factor(verb, factor, student[0].device)


def check_moments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    loss: str,
    scale: Sequence[float],
    factor: Tensor | None,
    temperature: float,
    eps: float,
) -> None:
    """Levels of the same shapes, a scale each, and a loss.

    Raises:
        RuntimeError
    """
    check_aligned("moments", student, teacher, loss, factor, temperature)
    require(len(scale) == len(student), f"moments: scale must have an element a level: {len(student)}")
    require(0 <= eps < math.inf, f"moments: eps must be zero or more and finite, got {eps}")


def check_moments_backward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    rows: Tensor,
    loss: str,
    factor: Tensor | None,
    temperature: float,
) -> None:
    """Levels of the same shapes, and what `moments` returned for them.

    Raises:
        RuntimeError
    """
    check_aligned("moments_backward", student, teacher, loss, factor, temperature)
    shape = (sum(map(ROW_LOSSES[loss].count, student)), NUMBERS)
    dtype, device = accumulate_dtype(*student, *teacher), student[0].device
    require(
        rows.shape == shape and rows.is_contiguous() and rows.dtype == dtype and rows.device == device,
        f"moments_backward: rows must be what moments returned for these tensors: {shape}, contiguous, {dtype}, on"
        f" {device}; got {tuple(rows.shape)}, {rows.dtype}, on {rows.device}",
    )


def check_scale(grads: Sequence[Tensor], factor: Tensor) -> None:
    """A 0-dim factor, and gradients beside it.

    Raises:
        RuntimeError
    """
    fits = factor.dim() == 0 and factor.dtype in FLOATS
    require(fits, f"scale_: factor must be 0-dim and floating point, got {tuple(factor.shape)}, {factor.dtype}")
    for number, grad in enumerate(grads):
        fits = grad.dtype in FLOATS and grad.device == factor.device
        require(fits, f"scale_: grads[{number}] must be floating point and on {factor.device}, as factor is")
