"""The losses along rows: `pkd_loss` and `cwd_loss`, which compare maps after each row of them is normalised."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from frs_kernels import backends, checks
from frs_kernels.autograd import late_term, load, once, save
from frs_kernels.levels import Levels
from frs_kernels.ops import VERBS
from frs_kernels.options import Options
from frs_kernels.pairs import Found, Pair, distill
from frs_kernels.results import RowTerms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from frs_kernels.options import Backend, RowOptions, Weight

EPS = 1e-6
"""That of PKD's authors."""


@overload
def pkd_loss(
    student_feats: Levels,
    teacher_feats: Levels,
    *,
    eps: float = ...,
    return_terms: Literal[False] = ...,
    **options: Unpack[RowOptions],
) -> Tensor: ...


@overload
def pkd_loss(
    student_feats: Levels,
    teacher_feats: Levels,
    *,
    eps: float = ...,
    return_terms: Literal[True],
    **options: Unpack[RowOptions],
) -> RowTerms: ...


@overload
def pkd_loss(
    student_feats: Levels,
    teacher_feats: Levels,
    *,
    eps: float = ...,
    return_terms: bool,
    **options: Unpack[RowOptions],
) -> Tensor | RowTerms: ...


def pkd_loss(
    student_feats: Levels,
    teacher_feats: Levels,
    *,
    weight: Weight = 1.0,
    eps: float = EPS,
    level_weights: Sequence[float] | None = None,
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | RowTerms:
    """PKD: features compared by correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039, eq. 5).

        u    = (s - mean s) / (std s + eps)             mean, std: of a channel, over n = N H W numbers; v: as u, of t
        loss = weight * sum_l w_l / (2 n_l C_l) sum (u - v)^2

    That is 1 - r, r Pearson's correlation, averaged over the channels, but for eps and n / (n - 1). The magnitude of
    the features and of single channels has no say, so student and teacher may be detectors of different kinds.

    Args:
        student_feats, teacher_feats: lists of (N, C, H, W), one tensor per level, of any floating-point dtypes and
            strides. All of the batch is one statistic; other processes' batches are not looked at.
        weight: multiplies the loss; a number, zero or more, or a 0-dim tensor, which is read on the device.
        eps: added to the standard deviations. A channel whose deviation and eps are 0 is 0 after normalisation.
        level_weights: w_l, 1 each by default.
        backend: as in `fsr_loss`.
        return_terms: return `RowTerms` instead of the loss.

    Returns:
        The loss, a scalar, fp32 (fp64 if an input is fp64). A level of one number a channel, or of none, adds 0. The
        student's tensors alone receive a gradient; it is computed in the backward pass, so that fp16 does not
        underflow before a loss scale, and differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: as `fsr_loss`.
    """
    checks.check_number("eps", eps, positive=False)
    return _align("pkd", student_feats, teacher_feats, weight, level_weights, backend, return_terms, eps=eps)


@overload
def cwd_loss(
    student: Levels,
    teacher: Levels,
    *,
    temperature: float = ...,
    return_terms: Literal[False] = ...,
    **options: Unpack[RowOptions],
) -> Tensor: ...


@overload
def cwd_loss(
    student: Levels,
    teacher: Levels,
    *,
    temperature: float = ...,
    return_terms: Literal[True],
    **options: Unpack[RowOptions],
) -> RowTerms: ...


@overload
def cwd_loss(
    student: Levels,
    teacher: Levels,
    *,
    temperature: float = ...,
    return_terms: bool,
    **options: Unpack[RowOptions],
) -> Tensor | RowTerms: ...


def cwd_loss(
    student: Levels,
    teacher: Levels,
    *,
    weight: Weight = 1.0,
    temperature: float = 1.0,
    level_weights: Sequence[float] | None = None,
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | RowTerms:
    """CWD: where each channel looks, as distributions over positions (Shu et al., ICCV 2021, arXiv 2011.13256).

        p    = softmax(s / tau),  q = softmax(t / tau)          of a channel of an image, over its H W positions
        loss = weight * sum_l w_l tau^2 / (N_l C_l) sum q (log q - log p)

    Args:
        student, teacher: lists of (N, C, H, W), features or class logits, one tensor per level, of any floating-point
            dtypes and strides.
        temperature: tau; mmrazor's configurations take 1.

    The other arguments, what is returned and what is raised are as for `pkd_loss`. A level of one position, or of none,
    adds 0.
    """
    checks.check_number("temperature", temperature, positive=True)
    return _align("cwd", student, teacher, weight, level_weights, backend, return_terms, temperature=temperature)


def _align(
    loss: str,
    student: Levels,
    teacher: Levels,
    weight: Weight,
    level_weights: Sequence[float] | None,
    backend: Backend,
    return_terms: bool,
    temperature: float = 1.0,
    eps: float = 0.0,
) -> Tensor | RowTerms:
    checks.check_transforms()
    names = ("student_feats", "teacher_feats") if loss == "pkd" else ("student", "teacher")
    for name, levels in zip(names, (student, teacher), strict=True):
        checks.check_levels(name, levels)
    checks.check_pair(names[0], student, names[1], teacher, checks.ADAPT)
    checks.check_level_weights(level_weights, len(teacher))
    checks.check_weight("weight", weight, teacher[0].device)
    checks.check_option("backend", backend, ("auto", *backends.BACKENDS))
    weights = None if level_weights is None else tuple(level_weights)
    options = Options(temperature=temperature, level_weights=weights, backend=backend)
    checks.check_learns([(student, teacher)])
    terms = _aligned(Pair("weight", loss, weight, student, teacher), options, eps)
    return terms if return_terms else terms.loss


def distill_rows(
    aligned: Sequence[Pair],
    pairs: Sequence[Pair],
    options: Options,
    check: Callable[[], None],
    mask: Levels | None,
    teacher_logits: Levels | None,
    process_group: ProcessGroup | None,
    return_terms: bool,
) -> Tensor | Found:
    """`frs_kernels.pairs.distill` of the pairs, which may be none, and losses along rows of those that are aligned."""
    checks.check_transforms()
    if process_group is not None:
        checks.check_group(process_group)
    check()
    checks.check_learns([(pair.student, pair.teacher) for pair in (*aligned, *pairs)])
    for pair in aligned:
        checks.check_weight(pair.weight_name, pair.weight, pair.teacher[0].device)
    terms = {pair.weight_name: _aligned(pair, options, EPS) for pair in aligned}
    loss = functools.reduce(operator.add, (term.loss for term in terms.values()))
    masked = None
    if pairs:
        masked = distill(pairs, options, check, mask, teacher_logits, process_group, return_terms, learns=True)
        loss = loss + (masked if isinstance(masked, Tensor) else masked.loss)
    if not return_terms:
        return loss
    parts = {name: (term.value, term.per_level) for name, term in terms.items()}
    if isinstance(masked, Found):
        return masked._replace(loss=loss, parts={**masked.parts, **parts})
    return Found(loss, parts, [], loss.new_zeros(len(aligned[0].teacher)))


def _aligned(pair: Pair, options: Options, eps: float) -> RowTerms:
    weight, weights = pair.weight, options.level_weights
    number, factor = (1.0, weight.detach()) if isinstance(weight, Tensor) else (float(weight), None)
    scale = [1.0] * len(pair.teacher) if weights is None else [float(w) for w in weights]
    chosen = backends.choose(options.backend, pair.teacher[0].device.type)
    call = (chosen, pair.loss, list(pair.teacher), scale, number, factor, float(options.temperature), float(eps))
    return RowTerms(*Alignment.apply(call, *pair.student))  # type: ignore[no-untyped-call]


class Alignment(torch.autograd.Function):
    """A loss along rows: the weighted loss, its value without weight, and the levels' values without gradient.

    The gradient is computed in the backward pass, from student, teacher and five numbers a row: computed in the
    forward pass it would read as much, and stay until the backward pass.
    """

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:  # as that of Imitation
        ctx, (backend, loss, teacher, scale, weight, factor, temperature, eps), *student = given
        total, values, rows = VERBS[backend].moments(student, teacher, loss, scale, weight, factor, temperature, eps)
        save(ctx, rows=[rows], factor=[factor], student=student, teacher=teacher)
        ctx.backend, ctx.loss, ctx.weight, ctx.temperature = backend, loss, weight, temperature
        ctx.set_materialize_grads(False)
        levels = values[1:].clone()
        ctx.mark_non_differentiable(levels)
        return total, values[0].clone(), levels

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, value_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        saved = load(ctx)
        student, teacher, (rows,) = saved["student"], saved["teacher"], saved["rows"]
        term = late_term(0, ctx.weight, saved["factor"][0], loss_grad, value_grad)
        if term is None:
            return (None, *(None for _ in student))
        with torch.no_grad():
            grads = VERBS[ctx.backend].moments_backward(
                list(student), list(teacher), rows, ctx.loss, term.weight, term.factor, ctx.temperature
            )
        if torch.is_grad_enabled() and not is_compiling():
            grads = [once(g) for g in grads]
        return (None, *(g if want else None for g, want in zip(grads, ctx.needs_input_grad[1:], strict=True)))
