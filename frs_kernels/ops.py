"""The operators behind every backend: one schema, one fake implementation, one implementation for each backend.

The `torch` backend's verbs are plain functions that a compiler can look into. Signatures, shapes and formulas are those
of `frs_kernels.reference`. The operators know nothing of autograd: `frs_kernels.autograd` calls them.

    score    teacher logits                                  -> scores (P,), mass (L,)
    imitate  student, teacher, scores, norm, table           -> total (), values (T + E,), gradients
    distill  student, teacher, logits, table                 -> scores, mass, total, values, gradients
    scale_   gradients, factor                               -> in place
    moments  student, teacher, a loss along rows             -> total (), values (1 + L,), rows (R, 5)
    moments_backward  student, teacher, rows                 -> gradients

The table has a row an entry and a row a term. Coefficients are formed inside the kernels from its numbers: formed
outside, they take ten tiny launches a step (docs/design-notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frs_kernels import native, reference
from frs_kernels.levels import accumulate_dtype, entry_columns, positions
from frs_kernels.row_losses import NUMBERS, row_loss

_TABLE = (
    "int[] level, int[] term, float[] scale, float[] eps, str[] loss, float[] weight, Tensor?[] factor,"
    " float[] temperature, float[] beta, bool[] want_grad, bool want_loss, bool joint=False"
)
SCHEMAS = (
    "score(Tensor[] logits) -> (Tensor scores, Tensor mass)",
    f"imitate(Tensor[] student, Tensor[] teacher, Tensor scores, Tensor norm, {_TABLE})"
    " -> (Tensor total, Tensor values, Tensor[] grads)",
    f"distill(Tensor[] student, Tensor[] teacher, Tensor[] logits, {_TABLE})"
    " -> (Tensor scores, Tensor mass, Tensor total, Tensor values, Tensor[] grads)",
    "scale_(Tensor(a!)[] grads, Tensor factor) -> ()",
    "moments(Tensor[] student, Tensor[] teacher, str loss, float[] scale, float weight, Tensor? factor,"
    " float temperature, float eps) -> (Tensor total, Tensor values, Tensor rows)",
    "moments_backward(Tensor[] student, Tensor[] teacher, Tensor rows, str loss, float weight, Tensor? factor,"
    " float temperature) -> Tensor[]",
)


class Verbs(NamedTuple):
    """The verbs of one backend; signatures as in `frs_kernels.reference`."""

    score: Callable[..., tuple[Tensor, Tensor]]
    imitate: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]
    distill: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]]
    scale_: Callable[..., None]
    moments: Callable[..., tuple[Tensor, Tensor, Tensor]]
    moments_backward: Callable[..., list[Tensor]]


def _check_tensors(*levels: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
    """All are there, on one device, and levels are (N, C, H, W): a call with one meta tensor comes here, however
    malformed.
    """
    lists = (*levels, others)
    if not all(levels) or any(t is None for tensors in lists for t in tensors):
        raise RuntimeError("a list of tensors is empty, or a tensor is None")
    devices = {t.device for tensors in lists for t in tensors}
    if len(devices) > 1:
        raise RuntimeError(f"tensors are on {' and '.join(sorted(map(str, devices)))}; one device is needed")
    for t in (t for tensors in levels for t in tensors):
        if t.dim() != 4:
            raise RuntimeError(f"a level is {tuple(t.shape)}; it must be (N, C, H, W)")


def _score_fake(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check_tensors(logits)
    dtype = accumulate_dtype(*logits)
    total = sum(positions(z) for z in logits)
    return logits[0].new_empty(total, dtype=dtype), logits[0].new_empty(len(logits), dtype=dtype)


def _imitate_fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scores: Tensor,
    norm: Tensor,
    level: Sequence[int],
    term: Sequence[int],
    scale: Sequence[float],
    eps: Sequence[float],
    loss: Sequence[str],
    weight: Sequence[float],
    factor: Sequence[Tensor | None],
    temperature: Sequence[float],
    beta: Sequence[float],
    want_grad: Sequence[bool],
    want_loss: bool,
    joint: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check_tensors(student, teacher, others=(scores, norm))
    _, term, _, _ = entry_columns(len(student), len(loss), level, term, scale, eps)
    if len(term) != len(student) or not all(0 <= t < len(want_grad) for t in term):
        raise RuntimeError(
            f"term needs an element an entry, {len(student)}, each the number of one of {len(want_grad)} terms"
        )
    dtype = accumulate_dtype(*student, *teacher)
    total = student[0].new_empty(() if want_loss else 0, dtype=dtype)
    values = student[0].new_empty(len(loss) + len(student) if want_loss else 0, dtype=dtype)
    return total, values, [torch.empty_like(x) for x, t in zip(student, term, strict=True) if want_grad[t]]


def _distill_fake(
    student: Sequence[Tensor], teacher: Sequence[Tensor], logits: Sequence[Tensor], *table: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    scores, mass = _score_fake(reference.logits_of(teacher, logits, table))
    return scores, mass, *_imitate_fake(student, teacher, scores, mass, *table)


def _scale_fake(grads: Sequence[Tensor], factor: Tensor) -> None:
    return None


def _moments_fake(
    student: Sequence[Tensor], teacher: Sequence[Tensor], loss: str, scale: Sequence[float], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tensors(student, teacher)
    dtype = accumulate_dtype(*student, *teacher)
    rows = sum(row_loss(loss).count(s) for s in student)
    shapes = ((), (1 + len(student),), (rows, NUMBERS))
    total, values, numbers = (student[0].new_empty(shape, dtype=dtype) for shape in shapes)
    return total, values, numbers


def _moments_backward_fake(student: Sequence[Tensor], teacher: Sequence[Tensor], rows: Tensor, *_: Any) -> list[Tensor]:
    _check_tensors(student, teacher, others=(rows,))
    return [torch.empty_like(s) for s in student]


def _triton_verbs() -> Verbs:
    """Triton's verbs, which import Triton when they are first called."""

    def score(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        from frs_kernels.triton.score import score

        return score(logits)

    def imitate(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        from frs_kernels.triton.imitate import imitate

        return imitate(*arguments)

    def distill(
        student: Sequence[Tensor], teacher: Sequence[Tensor], logits: Sequence[Tensor], *table: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        scores, mass = score(reference.logits_of(teacher, logits, table))
        return scores, mass, *imitate(student, teacher, scores, mass, *table)

    def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
        from frs_kernels.triton.scale import scale_

        scale_(grads, factor)

    def moments(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        from frs_kernels.triton.moments import moments

        return moments(*arguments)

    def moments_backward(*arguments: Any) -> list[Tensor]:
        from frs_kernels.triton.moments import moments_backward

        return moments_backward(*arguments)

    return Verbs(score, imitate, distill, scale_, moments, moments_backward)


def _define(namespace: str, library: torch.library.Library, verbs: Verbs | None) -> Verbs:
    """The operators of a namespace; without `verbs` a compiled library has implemented them."""
    fakes = Verbs(_score_fake, _imitate_fake, _distill_fake, _scale_fake, _moments_fake, _moments_backward_fake)
    for index, schema in enumerate(SCHEMAS):
        name = schema.partition("(")[0]
        library.define(schema)
        if verbs is not None:
            for key in ("CPU", "CUDA"):
                library.impl(name, verbs[index], key)
        torch.library.register_fake(f"{namespace}::{name}", fakes[index], lib=library)
    operators = getattr(torch.ops, namespace)
    return Verbs(*(getattr(operators, name).default for name in Verbs._fields))


VERBS = {
    "torch": Verbs(
        reference.score, reference.imitate, reference.distill, reference.scale_, reference.moments,
        reference.moments_backward,
    )
}  # fmt: skip

# They stay as long as these objects.
_triton_library = torch.library.Library("frs_triton", "DEF")
VERBS["triton"] = _define("frs_triton", _triton_library, _triton_verbs())

if native.WHY_NOT["cpu"] is None:
    # The dispatcher tells cpu and cuda apart by the tensors.
    _native_library = torch.library.Library("frs_kernels", "FRAGMENT")
    VERBS["cpu"] = VERBS["cuda"] = _define("frs_kernels", _native_library, None)
