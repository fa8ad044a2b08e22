"""The public functions: checks, the choice of a backend, and the three verbs in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from frs_kernels import backends, checks
from frs_kernels.levels import accumulate_dtype, split_levels
from frs_kernels.ops import VERBS, Plan, Term, imitation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Levels = Sequence[Tensor]
Weight = float | Tensor

_ADAPT = "bring the student's to the teacher's with frs_kernels.FeatureAdapter"
_CLASSES = "both heads must have the same anchors and classes"


class FSRTerms(NamedTuple):
    """The loss and what it is made of. L levels; `loss`, `feat` and `cls` carry gradient, the rest does not.

    loss = feat_weight * feat + cls_weight * cls. A term that was not asked for is 0.
    """

    loss: Tensor  # ()
    feat: Tensor  # ()
    cls: Tensor  # ()
    feat_per_level: Tensor  # (L,), sums to feat
    cls_per_level: Tensor  # (L,), sums to cls
    mask: list[Tensor]  # (N, H, W) a level: the scores S_p, or the mask given
    mass: Tensor  # (L,), M_l


class Richness(NamedTuple):
    """Where the teacher sees objects."""

    scores: list[Tensor]  # (N, H, W) a level, in [0, 1]
    mass: Tensor  # (L,)


@overload
def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    feat_weight: Weight = ...,
    cls_weight: Weight = ...,
    cls_loss: str = ...,
    temperature: float = ...,
    normalizer: str = ...,
    eps: float = ...,
    level_weights: Sequence[float] | None = ...,
    mask: Levels | None = ...,
    process_group: ProcessGroup | None = ...,
    grad_mode: str = ...,
    backend: str = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    feat_weight: Weight = ...,
    cls_weight: Weight = ...,
    cls_loss: str = ...,
    temperature: float = ...,
    normalizer: str = ...,
    eps: float = ...,
    level_weights: Sequence[float] | None = ...,
    mask: Levels | None = ...,
    process_group: ProcessGroup | None = ...,
    grad_mode: str = ...,
    backend: str = ...,
    return_terms: Literal[True],
) -> FSRTerms: ...


@overload
def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    feat_weight: Weight = ...,
    cls_weight: Weight = ...,
    cls_loss: str = ...,
    temperature: float = ...,
    normalizer: str = ...,
    eps: float = ...,
    level_weights: Sequence[float] | None = ...,
    mask: Levels | None = ...,
    process_group: ProcessGroup | None = ...,
    grad_mode: str = ...,
    backend: str = ...,
    return_terms: bool,
) -> Tensor | FSRTerms: ...


def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    feat_weight: Weight = 1.0,
    cls_weight: Weight = 1.0,
    cls_loss: str = "bce",
    temperature: float = 1.0,
    normalizer: str = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    mask: Levels | None = None,
    process_group: ProcessGroup | None = None,
    grad_mode: str = "auto",
    backend: str = "auto",
    return_terms: bool = False,
) -> Tensor | FSRTerms:
    """The Feature-Richness Score distillation loss (Du et al., NeurIPS 2021, arXiv 2111.00674, eq. 4 to 6).

        S_p   = max_k sigmoid(z_pk)                     p: a position (n, h, w), k: a class logit of the teacher
        M_l   = sum_p S_p                               p over the whole batch of level l
        feat  = sum_l w_l / M_l sum_p S_p sum_c (s_pc - t_pc)^2
        cls   = sum_l w_l / M_l sum_p S_p sum_k BCE(x_pk, sigmoid(z_pk))
        loss  = feat_weight * feat + cls_weight * cls

    Args:
        student_feats, teacher_feats: lists of (N, C, H, W), one tensor a level; None for both leaves `feat` out.
        student_logits, teacher_logits: lists of (N, K, H, W), class logits before the sigmoid, anchors folded into K
            as the head emits them. Without student_logits `cls` is left out; teacher_logits make the mask.
        feat_weight, cls_weight: a number, or a 0-dim tensor, which is read on the device: changing it neither
            recompiles nor synchronises.
        cls_loss: "bce", or "kl" for the Bernoulli KL(teacher || student): the same gradient, 0 where they agree.
        temperature: divides the logits inside `cls`, which is then multiplied by its square.
        normalizer: "mass" divides a level by M_l, "mass_channels" by C * M_l.
        eps: added to the denominator. A level whose denominator is 0 adds 0 to the loss and to the gradient.
        level_weights: w_l, 1 each by default.
        mask: a list of (N, H, W) floating-point tensors, used as S instead of the richness score.
        process_group: M_l is averaged over its ranks, so that averaged gradients are those of the joint batch (whose
            eps would be that of a rank times their number).
        grad_mode: "forward" computes the gradient in the forward pass (less traffic, one backward per graph),
            "backward" in the backward pass (fp16 does not underflow before the loss scale; any number of backwards),
            "auto": backward for fp16 and fp64 students, forward for fp32 and bf16. With return_terms and a weight
            that is a tensor or (nearly) 0, the gradient of `feat` or `cls` alone could not be had from a stored
            one: that term is computed in the backward pass.
        backend: "cuda", "triton", "cpu", "torch" or "auto" (`python -m frs_kernels` says which are here).
        return_terms: return `FSRTerms` instead of the loss.

    Tensors are fp32, fp64, bf16 or fp16, in any mix and of any strides; contiguous and channels_last run natively.

    Returns:
        The loss, a scalar, fp32 (fp64 if an input is fp64). Only the student's tensors receive a gradient, in their own
        dtype and strides, and it is differentiable once.

    Raises:
        TypeError: an argument is not a (list of) floating-point tensor(s).
        ValueError: lengths, shapes or devices differ, a list is empty, an option is unknown.
        RuntimeError: the backend is not on this machine.
    """
    checks.check_option("cls_loss", cls_loss, checks.CLS_LOSSES)
    if student_feats is None and student_logits is None:
        raise ValueError("nothing to imitate: give student_feats with teacher_feats, or student_logits, or both")
    if (student_feats is None) != (teacher_feats is None):
        missing = "student_feats" if student_feats is None else "teacher_feats"
        raise ValueError(f"{missing} is missing: give both student_feats and teacher_feats, or None for both")
    if teacher_logits is None and (mask is None or student_logits is not None):
        raise ValueError("teacher_logits is missing: it makes the mask (or give mask=) and is what cls imitates")
    pairs = []
    if student_feats is not None and teacher_feats is not None:
        checks.check_levels("student_feats", student_feats)
        checks.check_levels("teacher_feats", teacher_feats)
        checks.check_pair("student_feats", student_feats, "teacher_feats", teacher_feats, _ADAPT)
        pairs.append(_Pair("feat_weight", "mse", feat_weight, student_feats, teacher_feats))
    if teacher_logits is not None:
        checks.check_levels("teacher_logits", teacher_logits)
        if pairs:
            checks.check_positions("teacher_feats", pairs[0].teacher, "teacher_logits", teacher_logits)
    if student_logits is not None and teacher_logits is not None:
        checks.check_levels("student_logits", student_logits)
        checks.check_pair("student_logits", student_logits, "teacher_logits", teacher_logits, _CLASSES)
        pairs.append(_Pair("cls_weight", cls_loss, cls_weight, student_logits, teacher_logits))
    if mask is not None:
        name = "teacher_feats" if student_feats is not None else "teacher_logits"
        checks.check_levels("mask", mask, dims=3)
        checks.check_positions("mask", mask, name, pairs[0].teacher)
    return _distill(
        pairs, mask, teacher_logits, temperature, normalizer, eps, level_weights, process_group, grad_mode, backend,
        return_terms,
    )  # fmt: skip


def richness_mask(teacher_logits: Levels, *, backend: str = "auto") -> Richness:
    """Where to imitate: S_p = max_k sigmoid(z_pk) and each level's mass M_l = sum_p S_p (arXiv 2111.00674, eq. 3).

    Args:
        teacher_logits: list of (N, K, H, W) class logits, one tensor a level.
        backend: as in `fsr_loss`.

    Returns:
        scores, a list of (N, H, W), and mass (L,), fp32 (fp64 for fp64 logits), detached.

    Raises:
        TypeError, ValueError, RuntimeError: as `fsr_loss`.
    """
    checks.check_levels("teacher_logits", teacher_logits)
    checks.check_option("backend", backend, ("auto", *backends.BACKENDS))
    chosen = backends.choose(backend, teacher_logits[0].device.type)
    with torch.no_grad():
        scores, mass = VERBS[chosen].score(teacher_logits)
    return Richness(split_levels(scores, teacher_logits), mass)


def masked_imitation_loss(
    student: Levels,
    teacher: Levels,
    mask: Levels,
    *,
    loss: str = "mse",
    weight: Weight = 1.0,
    temperature: float = 1.0,
    normalizer: str = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    process_group: ProcessGroup | None = None,
    grad_mode: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """One imitation term under any mask: weight * sum_l w_l / M_l sum_p mask_p sum_c value(student_pc, teacher_pc).

    Args:
        student, teacher: lists of (N, C, H, W), one tensor a level.
        mask: list of (N, H, W) floating-point tensors; M_l is the sum of a level's.
        loss: "mse" on any features; "bce" or "kl" on logits.
        weight: multiplies the loss; a number or a 0-dim tensor.

    The other arguments, what is returned and what is raised are as for `fsr_loss`.
    """
    checks.check_option("loss", loss, checks.LOSSES)
    checks.check_levels("student", student)
    checks.check_levels("teacher", teacher)
    checks.check_pair("student", student, "teacher", teacher, _ADAPT if loss == "mse" else _CLASSES)
    checks.check_levels("mask", mask, dims=3)
    checks.check_positions("mask", mask, "teacher", teacher)
    pairs = [_Pair("weight", loss, weight, student, teacher)]
    result = _distill(
        pairs, mask, None, temperature, normalizer, eps, level_weights, process_group, grad_mode, backend, False
    )
    assert isinstance(result, Tensor)
    return result


class _Pair(NamedTuple):
    """A student and the teacher it imitates."""

    weight_name: str
    loss: str
    weight: Weight
    student: Levels
    teacher: Levels


def _distill(
    pairs: list[_Pair],
    mask: Levels | None,
    teacher_logits: Levels | None,
    temperature: float,
    normalizer: str,
    eps: float,
    level_weights: Sequence[float] | None,
    process_group: ProcessGroup | None,
    grad_mode: str,
    backend: str,
    return_terms: bool,
) -> Tensor | FSRTerms:
    """Score, then imitate each pair; the levels have been checked, the options have not."""
    like = pairs[0].teacher
    device = like[0].device
    checks.check_option("normalizer", normalizer, checks.NORMALIZERS)
    checks.check_option("grad_mode", grad_mode, checks.GRAD_MODES)
    checks.check_option("backend", backend, ("auto", *backends.BACKENDS))
    checks.check_number("temperature", temperature, positive=True)
    checks.check_number("eps", eps, positive=False)
    checks.check_level_weights(level_weights, len(like))
    for pair in pairs:
        checks.check_weight(pair.weight_name, pair.weight, device)
    chosen = backends.choose(backend, device.type)

    with torch.no_grad():
        if mask is not None:
            scores, mass = _given_scores(mask)
        else:
            assert teacher_logits is not None
            scores, mass = VERBS[chosen].score(teacher_logits)
        if process_group is not None:
            mass = _average(mass, process_group)

    terms: list[Term] = []
    tensors: list[Tensor | None] = []
    for pair in pairs:
        number, factor = (1.0, pair.weight.detach()) if isinstance(pair.weight, Tensor) else (float(pair.weight), None)
        mode = _grad_mode(pair, grad_mode, return_terms)
        terms.append(Term(pair.loss, number, float(temperature), len(like), mode))
        norm = _denominator(mass, pair.student, normalizer, eps, level_weights)
        # Dynamo takes no tensor twice in one autograd.Function: the mass of both terms, a model as its own teacher.
        compiling = torch.compiler.is_compiling()
        norm = norm.detach() if compiling else norm
        teacher = [t.detach() if compiling or t.requires_grad else t for t in pair.teacher]
        tensors += [norm, factor, *pair.student, *teacher]
    loss, *values = imitation(Plan(chosen, tuple(terms), return_terms), scores, *tensors)
    if not return_terms:
        return loss
    found = {pair.weight_name: values[2 * i : 2 * i + 2] for i, pair in enumerate(pairs)}
    zero = [mass.new_zeros(()), mass.new_zeros(len(like))]
    feat, feat_per_level = found.get("feat_weight", zero)
    cls, cls_per_level = found.get("cls_weight", zero)
    return FSRTerms(loss, feat, cls, feat_per_level, cls_per_level, split_levels(scores, like), mass)


def _grad_mode(pair: _Pair, grad_mode: str, return_terms: bool) -> str:
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in pair.student)):
        return "none"
    if grad_mode == "auto":
        # fp16: 2 w S (s - t) / M is far below its range until the loss scale multiplies it. fp64: nobody trains in it,
        # and torch.autograd.gradcheck goes backward twice through one graph.
        late = (torch.float16, torch.float64)
        grad_mode = "backward" if any(x.dtype in late for x in pair.student) else "forward"
    if return_terms and (isinstance(pair.weight, Tensor) or abs(pair.weight) < 1e-30):
        return "backward"  # dividing the stored gradient by this weight would not give that of the term alone
    return grad_mode


def _given_scores(mask: Levels) -> tuple[Tensor, Tensor]:
    """Scores and mass, as `score` returns them, of a mask that the caller made."""
    dtype = accumulate_dtype(*mask)
    levels = [m.to(dtype).flatten() for m in mask]
    return torch.cat(levels), torch.stack([m.sum() for m in levels])


def _average(mass: Tensor, group: ProcessGroup) -> Tensor:
    mass = mass.clone()
    torch.distributed.all_reduce(mass, group=group)
    return mass / torch.distributed.get_world_size(group)


def _denominator(
    mass: Tensor, like: Levels, normalizer: str, eps: float, level_weights: Sequence[float] | None
) -> Tensor:
    """norm_l = (M_l * C_l + eps) / w_l, infinite where w_l is 0; the mass itself by default, which costs nothing."""
    if normalizer == "mass" and level_weights is None and eps == 0:
        return mass
    weights = [1.0] * len(like) if level_weights is None else level_weights
    channels = [float(x.shape[1]) if normalizer == "mass_channels" else 1.0 for x in like]
    scale = [c / w if w else 0.0 for c, w in zip(channels, weights, strict=True)]
    offset = [eps / w if w else float("inf") for w in weights]
    if all(s == scale[0] for s in scale) and all(o == offset[0] for o in offset):
        mass = mass if scale[0] == 1.0 else mass * scale[0]
        return mass if offset[0] == 0.0 else mass + offset[0]
    return mass * _numbers(scale, mass) + _numbers(offset, mass)


def _numbers(values: list[float], like: Tensor) -> Tensor:
    """A (L,) tensor of host numbers, made by fills: copying it to the device would make the host wait."""
    return torch.stack([torch.full((), v, dtype=like.dtype, device=like.device) for v in values])
