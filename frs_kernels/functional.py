"""The public functions: the verbs in order, and the checks where one of them refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from frs_kernels import backends, checks
from frs_kernels.levels import Levels, accumulate_dtype, split_levels
from frs_kernels.losses import LOSSES, Grouped
from frs_kernels.ops import VERBS
from frs_kernels.options import (
    AnyLoss,
    Backend,
    ClsLoss,
    FeatLoss,
    GradMode,
    Head,
    Normalizer,
    Options,
    Weight,
)
from frs_kernels.pairs import Pair, distill, plain_mask
from frs_kernels.results import FSRTerms, ImitationTerms, Richness
from frs_kernels.row_losses import ROW_LOSSES
from frs_kernels.rows import distill_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from frs_kernels.options import Keywords, TermOptions


@overload
def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    mask: Levels | Richness | None = ...,
    return_terms: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> Tensor: ...


@overload
def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    mask: Levels | Richness | None = ...,
    return_terms: Literal[True],
    **options: Unpack[Keywords],
) -> FSRTerms: ...


@overload
def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    mask: Levels | Richness | None = ...,
    return_terms: bool,
    **options: Unpack[Keywords],
) -> Tensor | FSRTerms: ...


def fsr_loss(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    feat_weight: Weight = 1.0,
    cls_weight: Weight = 1.0,
    feat_loss: FeatLoss = "mse",
    cls_loss: ClsLoss = "bce",
    temperature: float = 1.0,
    beta: float = 1.0,
    normalizer: Normalizer = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    mask: Levels | Richness | None = None,
    process_group: ProcessGroup | None = None,
    grad_mode: GradMode = "auto",
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | FSRTerms:
    """The Feature-Richness Score distillation loss (Du et al., NeurIPS 2021, arXiv 2111.00674, eq. 4 to 6).

        S_p   = max_k sigmoid(z_pk)                     p: a position (n, h, w), k: a class logit of the teacher
        M_l   = sum_p S_p                               p over the whole batch of level l
        feat  = sum_l w_l / M_l sum_p S_p sum_c (s_pc - t_pc)^2
        cls   = sum_l w_l / M_l sum_p S_p sum_k BCE(x_pk, sigmoid(z_pk))
        loss  = feat_weight * feat + cls_weight * cls

    Args:
        student_feats, teacher_feats: lists of (N, C, H, W), one tensor per level; None for both leaves `feat` out.
        student_logits, teacher_logits: lists of (N, K, H, W), class logits before the sigmoid, anchors folded into K
            as the head emits them. Without student_logits `cls` is left out; teacher_logits make the mask.
            Probabilities, and a softmax with a background class, have the same shapes: `frs_kernels.check` tells. Of a
            softmax's logits give cls_loss="softmax_kl" and mask=richness_mask(teacher_logits, head="softmax").
        feat_weight, cls_weight: a number, zero or more, or a 0-dim tensor, which is read on the device: changing it
            neither recompiles nor synchronises, and what it holds is not looked at. Weights are not trained.
        feat_loss: "mse"; "l1" or "smooth_l1" in its place leave the square of eq. 4; "pkd" or "cwd" are `pkd_loss` and
            `cwd_loss`, which know neither mask nor denominator.
        cls_loss: "bce"; "kl", the Bernoulli KL(teacher || student): the same gradient, 0 where they agree; "qfl", the
            quality focal loss, bce times |sigmoid(x) - sigmoid(z)|^beta; "qfl_detached", the same value, whose
            gradient takes that factor for a constant; "softmax_kl", KL(teacher || student) of the softmax over all
            classes; or "cwd", as above.
        temperature: divides the logits inside `cls`, which is then multiplied by its square; also that of "cwd".
        beta: of "smooth_l1": below it half the square of a difference over beta, above it the difference less beta / 2;
            of "qfl" and "qfl_detached" the exponent: 0 makes bce of them, 1 and 2 are the fastest.
        normalizer: "mass" divides a level by M_l, as the paper does; "mass_channels" by C * M_l; "total_mass" by
            sum_l M_l, so that a level on which the teacher sees little weighs little (docs/math.md); "none" by 1, for
            a mask that is normalised already.
        eps: added to the denominator. A level whose denominator is 0 adds 0 to the loss and to the gradient.
        level_weights: w_l, 1 each by default.
        mask: used as S instead of the richness score: a list of (N, H, W) or (N, 1, H, W) tensors, floating-point or
            bool, or what `richness_mask` returns. What it holds is not looked at; a negative number pushes away.
        process_group: M_l is averaged over its ranks, so that averaged gradients are those of the joint batch (whose
            eps would be that of a rank times their number). Without any effect where the normalizer is "none".
        grad_mode: "forward" computes the gradient in the forward pass (less traffic), "backward" in the backward pass
            (fp16 does not underflow before the loss scale), "auto": backward for fp16 students, forward for the rest.
            With return_terms and a weight that is a tensor or (nearly) 0, the gradient of `feat` or `cls` alone could
            not be had from a stored one: that term is computed in the backward pass.
        backend: "cuda", "triton", "cpu", "torch" or "auto" (`python -m frs_kernels` says which are here).
        return_terms: return `FSRTerms` instead of the loss.

    Tensors are fp32, fp64, bf16 or fp16, in any mix and of any strides; contiguous and channels_last run natively.

    Returns:
        The loss, a scalar, fp32 (fp64 if an input is fp64). Only the student's tensors receive a gradient, in their own
        dtype and strides, and it is differentiable once.

    Raises:
        TypeError: an argument is not a (list of) floating-point tensor(s), or a process_group not one.
        ValueError: lengths, shapes or devices differ, a list is empty, an option is unknown or out of range; a weight
            requires a gradient; gradients are enabled and the teacher's tensors require one, the student's do not.
        RuntimeError: the backend is not on this machine, or a transform of torch.func is active.
    Where gradients are enabled and no tensor of the student's requires one, a warning says so.
    """
    options = Options.of(
        feat_loss=feat_loss, cls_loss=cls_loss, temperature=temperature, beta=beta, normalizer=normalizer, eps=eps,
        level_weights=level_weights, grad_mode=grad_mode, backend=backend,
    )  # fmt: skip
    scores = plain_mask(mask)
    masked = feat_loss not in ROW_LOSSES
    checks.check_given(student_feats, teacher_feats, student_logits, teacher_logits, scores, masked)
    # Class entries first: their teacher is what `score` has just read.
    every = []
    if student_logits is not None and teacher_logits is not None:
        every.append(Pair("cls_weight", cls_loss, cls_weight, student_logits, teacher_logits))
    if student_feats is not None and teacher_feats is not None:
        every.append(Pair("feat_weight", feat_loss, feat_weight, student_feats, teacher_feats))
    pairs = [pair for pair in every if pair.loss not in ROW_LOSSES]

    def check() -> None:
        checks.check_pyramid(student_feats, teacher_feats, student_logits, teacher_logits, scores)
        checks.check_level_weights(options.level_weights, len(every[0].teacher))

    if len(pairs) == len(every):
        found = distill(pairs, options, check, scores, teacher_logits, process_group, return_terms)
    else:
        aligned = [pair for pair in every if pair.loss in ROW_LOSSES]
        found = distill_rows(aligned, pairs, options, check, scores, teacher_logits, process_group, return_terms)
    if isinstance(found, Tensor):
        return found
    feat, feat_per_level = found.part("feat_weight")
    cls, cls_per_level = found.part("cls_weight")
    return FSRTerms(found.loss, feat, cls, feat_per_level, cls_per_level, found.mask, found.mass)


def richness_mask(
    teacher_logits: Levels,
    *,
    head: Head = "sigmoid",
    background: int | None = -1,
    backend: Backend = "auto",
) -> Richness:
    """Where to imitate: S_p = max_k sigmoid(z_pk) and each level's mass M_l = sum_p S_p (arXiv 2111.00674, eq. 3).

    Args:
        teacher_logits: list of (N, K, H, W) class logits, one tensor per level.
        head: "sigmoid", a probability a class; or "softmax", one distribution over all K, where S_p is the probability
            that p is not background, 1 - softmax(z_p)[background], or without such a class max_k softmax(z_p)[k].
        background: of a softmax, which logit is the background's, counted from the end where negative; None: there is
            none.
        backend: as in `fsr_loss`. A softmax is computed in plain PyTorch, whatever the backend.

    Returns:
        scores, a list of (N, H, W), and mass (L,), fp32 (fp64 for fp64 logits), detached.

    Raises:
        TypeError, ValueError, RuntimeError: as `fsr_loss`; ValueError: a level has no such logit, or no other.
    """
    checks.check_levels("teacher_logits", teacher_logits)
    checks.check_option("head", head, checks.HEADS)
    checks.check_option("backend", backend, ("auto", *backends.BACKENDS))
    chosen = backends.choose(backend, teacher_logits[0].device.type)
    with torch.no_grad():
        if head == "softmax":
            checks.check_background(background, teacher_logits)
            return _softmax_richness(teacher_logits, background)
        scores, mass = VERBS[chosen].score(teacher_logits)
    return Richness(split_levels(scores, teacher_logits), mass)


def _softmax_richness(teacher_logits: Levels, background: int | None) -> Richness:
    dtype = accumulate_dtype(*teacher_logits)
    scores = []
    for given in teacher_logits:
        z = given.to(dtype)
        if background is None:
            scores.append((z.amax(1) - z.logsumexp(1)).exp())
        else:
            # A small score keeps its digits, which a difference from 1 would lose.
            at = background % z.shape[1]
            others = torch.cat([z[:, :at], z[:, at + 1 :]], 1)
            scores.append(torch.sigmoid(others.logsumexp(1) - z[:, at]))
    return Richness(scores, torch.stack([s.sum() for s in scores]))


@overload
def masked_imitation_loss(
    student: Levels,
    teacher: Levels,
    mask: Levels | Richness,
    *,
    loss: AnyLoss = ...,
    group_size: int | None = ...,
    weight: Weight = ...,
    return_terms: Literal[False] = ...,
    **options: Unpack[TermOptions],
) -> Tensor: ...


@overload
def masked_imitation_loss(
    student: Levels,
    teacher: Levels,
    mask: Levels | Richness,
    *,
    loss: AnyLoss = ...,
    group_size: int | None = ...,
    weight: Weight = ...,
    return_terms: Literal[True],
    **options: Unpack[TermOptions],
) -> ImitationTerms: ...


@overload
def masked_imitation_loss(
    student: Levels,
    teacher: Levels,
    mask: Levels | Richness,
    *,
    loss: AnyLoss = ...,
    group_size: int | None = ...,
    weight: Weight = ...,
    return_terms: bool,
    **options: Unpack[TermOptions],
) -> Tensor | ImitationTerms: ...


def masked_imitation_loss(
    student: Levels,
    teacher: Levels,
    mask: Levels | Richness,
    *,
    loss: AnyLoss = "mse",
    group_size: int | None = None,
    weight: Weight = 1.0,
    temperature: float = 1.0,
    beta: float = 1.0,
    normalizer: Normalizer = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    process_group: ProcessGroup | None = None,
    grad_mode: GradMode = "auto",
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | ImitationTerms:
    """One imitation term under any mask: weight * sum_l w_l / M_l sum_p mask_p sum_c value(student_pc, teacher_pc).

    Args:
        student, teacher: lists of (N, C, H, W), one tensor per level.
        mask: as in `fsr_loss`; M_l is the sum of a level's.
        loss: "mse", "l1" or "smooth_l1" on any features; "bce", "kl", "qfl" or "qfl_detached" on logits; "softmax_kl",
            whose value is one of each group of channels, tau^2 KL(softmax(teacher / tau) || softmax(student / tau)).
        group_size: of "softmax_kl", how many neighbouring channels share a softmax; all of them by default.
        weight: multiplies the loss; a number or a 0-dim tensor.
        return_terms: return `ImitationTerms` instead of the loss.

    The other arguments, what is returned and what is raised are as for `fsr_loss`.
    """
    checks.check_option("loss", loss, tuple(LOSSES))
    if group_size is not None:
        checks.check_count("group_size", group_size)
        if not isinstance(LOSSES[loss], Grouped):
            raise ValueError(f"group_size={group_size!r} is of loss='softmax_kl', not of loss={loss!r}")
    options = Options.of(
        temperature=temperature, beta=beta, normalizer=normalizer, eps=eps, level_weights=level_weights,
        grad_mode=grad_mode, backend=backend,
    )  # fmt: skip
    pair = Pair("weight", loss, weight, student, teacher, group_size or 0)
    return imitate_one(("student", "teacher"), pair, options, mask, process_group, return_terms)


def imitate_one(
    names: tuple[str, str],
    pair: Pair,
    options: Options,
    mask: Levels | Richness,
    process_group: ProcessGroup | None,
    return_terms: bool,
) -> Tensor | ImitationTerms:
    """One term under any mask; `names`: what the user calls its student and teacher."""
    scores = plain_mask(mask)

    def check() -> None:
        checks.check_imitation(names, pair.student, pair.teacher, scores, takes_logits=LOSSES[pair.loss].takes_logits)
        checks.check_level_weights(options.level_weights, len(pair.teacher))
        if pair.group_size:
            checks.check_group_size(pair.group_size, names[0], pair.student)

    found = distill([pair], options, check, scores, None, process_group, return_terms)
    if isinstance(found, Tensor):
        return found
    return ImitationTerms(found.loss, *found.part("weight"), found.mask, found.mass)
