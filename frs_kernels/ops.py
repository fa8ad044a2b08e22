"""The three operators behind every backend, and the autograd function outside them.

An operator has one schema, one fake implementation and one implementation for each backend but `torch`, whose verbs
are plain functions that a compiler can look into. The operators know nothing of autograd: `Imitation` calls them
forward and backward.

    score    teacher logits                         -> scores (P,), mass (L,)
    imitate  student, teacher, scores, norm, ...    -> total, per_level (L,), gradients
    scale_   gradients, factor                      -> in place

`norm` is the denominator of each level, `weight` and `factor` multiply the loss: the kernels form the coefficient
weight * factor * S_p / norm_l themselves. Formed outside, it takes ten tiny launches a step (docs/design-notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frs_kernels import native, reference
from frs_kernels.levels import accumulate_dtype, positions

SCHEMAS = (
    "score(Tensor[] logits) -> (Tensor scores, Tensor mass)",
    "imitate(Tensor[] student, Tensor[] teacher, Tensor scores, Tensor norm, Tensor? factor, float weight,"
    " str loss, float temperature, bool want_loss, bool want_grad) -> (Tensor total, Tensor per_level, Tensor[] grads)",
    "scale_(Tensor(a!)[] grads, Tensor factor) -> ()",
)


class Verbs(NamedTuple):
    """The three verbs of one backend; signatures as in `frs_kernels.reference`."""

    score: Callable[..., tuple[Tensor, Tensor]]
    imitate: Callable[..., tuple[Tensor, Tensor, list[Tensor]]]
    scale_: Callable[..., None]


def _score_fake(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(*logits)
    total = sum(positions(z) for z in logits)
    return logits[0].new_empty(total, dtype=dtype), logits[0].new_empty(len(logits), dtype=dtype)


def _imitate_fake(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scores: Tensor,
    norm: Tensor,
    factor: Tensor | None,
    weight: float,
    loss: str,
    temperature: float,
    want_loss: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulate_dtype(*student, *teacher)
    total = student[0].new_empty(() if want_loss else 0, dtype=dtype)
    per_level = student[0].new_empty(len(student) if want_loss else 0, dtype=dtype)
    return total, per_level, [torch.empty_like(x) for x in student] if want_grad else []


def _scale_fake(grads: Sequence[Tensor], factor: Tensor) -> None:
    return None


def _triton_score(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from frs_kernels.triton.score import score

    _check_levels("score", logits)
    if _one_dtype(logits):
        return score(logits)
    parts = [score([z]) for z in logits]
    return torch.cat([scores for scores, _ in parts]), torch.cat([mass for _, mass in parts])


def _triton_imitate(
    student: Sequence[Tensor], teacher: Sequence[Tensor], scores: Tensor, norm: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    from frs_kernels.triton.imitate import imitate

    _check_levels("imitate", student)
    if [x.shape for x in student] != [z.shape for z in teacher]:
        raise ValueError("imitate: student and teacher must have the same shape at every level")
    if scores.numel() != sum(positions(x) for x in student) or norm.numel() != len(student):
        raise ValueError("imitate: scores must hold one number a position, norm one a level")
    if _one_dtype(student) and _one_dtype(teacher):
        return imitate(student, teacher, scores, norm, *rest)
    masks = scores.split([positions(x) for x in student])
    parts = [
        imitate([x], [z], mask, n, *rest) for x, z, mask, n in zip(student, teacher, masks, norm.split(1), strict=True)
    ]
    return (
        torch.stack([total for total, _, _ in parts]).sum(0),
        torch.cat([per_level for _, per_level, _ in parts]),
        [grad for _, _, grads in parts for grad in grads],
    )


def _triton_scale(grads: Sequence[Tensor], factor: Tensor) -> None:
    from frs_kernels.triton.scale import scale_

    scale_(grads, factor)


def _check_levels(verb: str, levels: Sequence[Tensor]) -> None:
    if not levels or any(x.dim() != 4 or x.shape[1] == 0 for x in levels):
        raise ValueError(f"{verb}: needs (N, C, H, W) tensors, one a level, with C at least 1")


def _one_dtype(levels: Sequence[Tensor]) -> bool:
    return all(x.dtype == levels[0].dtype for x in levels)


def _fakes(namespace: str, library: torch.library.Library) -> Verbs:
    """Give the operators of a namespace their fake implementations; they stay as long as the library object."""
    fakes: dict[str, Callable[..., Any]] = {"score": _score_fake, "imitate": _imitate_fake, "scale_": _scale_fake}
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    ops = getattr(torch.ops, namespace)
    return Verbs(ops.score.default, ops.imitate.default, ops.scale_.default)


def _define(namespace: str, verbs: Verbs, library: torch.library.Library) -> Verbs:
    for schema, implementation in zip(SCHEMAS, verbs, strict=True):
        name = schema.partition("(")[0]
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, implementation, key)
    return _fakes(namespace, library)


VERBS = {"torch": Verbs(reference.score, reference.imitate, reference.scale_)}

_triton_library = torch.library.Library("frs_triton", "DEF")
VERBS["triton"] = _define("frs_triton", Verbs(_triton_score, _triton_imitate, _triton_scale), _triton_library)

if native.WHY_NOT["cpu"] is None:
    # csrc/ops.cpp has declared the same schemas; the dispatcher tells cpu and cuda apart by the tensors.
    _native_library = torch.library.Library("frs_kernels", "FRAGMENT")
    VERBS["cpu"] = VERBS["cuda"] = _fakes("frs_kernels", _native_library)


class Term(NamedTuple):
    """What of one imitation term is known on the host."""

    loss: str
    weight: float
    temperature: float
    levels: int
    grad: str  # "none", "forward" or "backward": where the gradient is computed


class Plan(NamedTuple):
    """What of a call is known on the host."""

    backend: str
    terms: tuple[Term, ...]
    want_values: bool


class Imitation(torch.autograd.Function):
    """The weighted sum of imitation terms over one set of scores.

    Inputs after the plan: scores, then for each term norm, weight (0-dim, times the plan's; or None), the student's
    levels, the teacher's levels. Outputs: the loss and, with `want_values`, for each term its unweighted value and
    its values per level (these without gradient).

    A term's gradient is computed "forward", kept, and scaled in place by the upstream gradient, which is possible
    once; or "backward" from the inputs, with the upstream gradient in the kernel's coefficient.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, scores: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        rest = list(inputs)
        losses: list[Tensor] = []
        values: list[Tensor] = []
        saved: list[Tensor | None] = []
        for term in plan.terms:
            norm, weight, levels = rest[0], rest[1], rest[2 : 2 + 2 * term.levels]
            rest = rest[2 + 2 * term.levels :]
            loss, per_level, grads = VERBS[plan.backend].imitate(
                levels[: term.levels], levels[term.levels :], scores, norm, weight, term.weight,
                term.loss, term.temperature, True, term.grad == "forward",
            )  # fmt: skip
            losses.append(loss)
            if plan.want_values:
                values += [per_level.sum(), per_level]
            if term.grad == "forward":
                saved += grads
            elif term.grad == "backward":
                saved += [scores, norm, weight, *levels]
        ctx.plan = plan
        ctx.spent = False
        _save(ctx, saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*values[1::2])
        return (losses[0] if len(losses) == 1 else losses[0] + losses[1], *values)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *value_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = Imitation.gradients(ctx, loss_grad, *value_grads)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return tuple(None if g is None else _once(g) for g in results)
        return tuple(results)

    @staticmethod
    def gradients(ctx: Any, loss_grad: Tensor | None, *value_grads: Tensor | None) -> list[Tensor | None]:
        plan: Plan = ctx.plan
        if ctx.spent:
            raise RuntimeError(
                "frs_kernels: the gradient was computed in the forward pass and has been handed out; pass "
                "grad_mode='backward' to go backward through the same graph more than once"
            )
        verbs = VERBS[plan.backend]
        saved = _saved(ctx)
        to_scale: list[tuple[Tensor, list[Tensor]]] = []
        results: list[Tensor | None] = [None, None]
        for index, term in enumerate(plan.terms):
            value_grad = value_grads[2 * index] if plan.want_values else None
            grads: Sequence[Tensor | None] = [None] * term.levels
            factor = loss_grad
            if term.grad == "forward":
                kept, saved = saved[: term.levels], saved[term.levels :]
                ctx.spent = True
                if value_grad is not None:
                    # By a tensor: a GPU divides by a number as a product with its reciprocal, and weight * value, the
                    # usual use, would not come out as a factor of exactly 1, which scale_ does nothing for.
                    factor = _add(factor, value_grad / torch.full_like(value_grad, term.weight))
                if factor is not None:
                    grads = kept
                    if to_scale and to_scale[-1][0] is factor:
                        to_scale[-1][1].extend(kept)
                    else:
                        to_scale.append((factor, list(kept)))
            elif term.grad == "backward":
                scores, norm, weight, *levels = saved[: 3 + 2 * term.levels]
                saved = saved[3 + 2 * term.levels :]
                number = term.weight
                if factor is not None and weight is not None:
                    factor = factor * weight
                if value_grad is not None:
                    factor = _add(None if factor is None else factor * number, value_grad)
                    number = 1.0
                if factor is not None:
                    _, _, grads = verbs.imitate(
                        levels[: term.levels], levels[term.levels :], scores, norm, factor, number,
                        term.loss, term.temperature, False, True,
                    )  # fmt: skip
            wanted = ctx.needs_input_grad[len(results) + 2 : len(results) + 2 + term.levels]
            results += [None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True))]
            results += [None] * term.levels
        for factor, kept in to_scale:
            verbs.scale_(kept, factor)
        return results


class _Once(torch.autograd.Function):
    """The identity, whose own gradient is an error.

    `once_differentiable` raises only where the upstream gradient requires a gradient itself; a gradient penalty beside
    another loss would lose its gradient without a word.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("frs_kernels: the loss is differentiable once; its gradient has no gradient")


def _save(ctx: Any, tensors: list[Tensor | None]) -> None:
    """save_for_backward, which refuses the tensors of a teacher run in inference_mode; those nobody can change."""
    ctx.inference = {}
    if not torch.compiler.is_compiling():
        ctx.inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference else t for i, t in enumerate(tensors)))


def _saved(ctx: Any) -> list[Any]:
    return [ctx.inference.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def _once(grad: Tensor) -> Tensor:
    result: Tensor = _Once.apply(grad.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return result


def imitation(plan: Plan, scores: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """`Imitation.apply`, typed."""
    outputs: tuple[Tensor, ...] = Imitation.apply(plan, scores, *inputs)  # type: ignore[no-untyped-call]
    return outputs


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
