"""The public functions: the verbs in order, and the checks where one of them refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from frs_kernels import backends, checks, native
from frs_kernels.autograd import Call, imitation
from frs_kernels.levels import accumulate_dtype, split_levels
from frs_kernels.losses import LOSSES
from frs_kernels.ops import VERBS
from frs_kernels.options import Options, Table, Weight, make_table, make_table_once

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from frs_kernels.options import Keywords

Levels = Sequence[Tensor]


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
    feat_loss: str = "mse",
    cls_loss: str = "bce",
    temperature: float = 1.0,
    beta: float = 1.0,
    normalizer: str = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    mask: Levels | Richness | None = None,
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
            Probabilities, and a softmax with a background class, have the same shapes: `frs_kernels.check` tells.
        feat_weight, cls_weight: a number, zero or more, or a 0-dim tensor, which is read on the device: changing it
            neither recompiles nor synchronises, and what it holds is not looked at. Weights are not trained.
        feat_loss: "mse"; "l1" or "smooth_l1" in its place leave the square of eq. 4.
        cls_loss: "bce", or "kl" for the Bernoulli KL(teacher || student): the same gradient, 0 where they agree.
        temperature: divides the logits inside `cls`, which is then multiplied by its square.
        beta: of "smooth_l1": below it half the square of a difference over beta, above it the difference less beta / 2.
        normalizer: "mass" divides a level by M_l, as the paper does; "mass_channels" by C * M_l; "total_mass" by
            sum_l M_l, so that a level on which the teacher sees little weighs little (docs/math.md).
        eps: added to the denominator. A level whose denominator is 0 adds 0 to the loss and to the gradient.
        level_weights: w_l, 1 each by default.
        mask: used as S instead of the richness score: a list of (N, H, W) or (N, 1, H, W) tensors, floating-point or
            bool, or what `richness_mask` returns. What it holds is not looked at; a negative number pushes away.
        process_group: M_l is averaged over its ranks, so that averaged gradients are those of the joint batch (whose
            eps would be that of a rank times their number).
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
    checks.check_given(student_feats, teacher_feats, student_logits, teacher_logits, scores)
    # Class entries first: their teacher is what `score` has just read.
    pairs = []
    if student_logits is not None and teacher_logits is not None:
        pairs.append(_Pair("cls_weight", cls_loss, cls_weight, student_logits, teacher_logits))
    if student_feats is not None and teacher_feats is not None:
        pairs.append(_Pair("feat_weight", feat_loss, feat_weight, student_feats, teacher_feats))

    def check() -> None:
        checks.check_pyramid(student_feats, teacher_feats, student_logits, teacher_logits, scores)
        checks.check_level_weights(options.level_weights, len(pairs[0].teacher))

    return _distill(pairs, options, check, scores, teacher_logits, process_group, return_terms)


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
    mask: Levels | Richness,
    *,
    loss: str = "mse",
    weight: Weight = 1.0,
    temperature: float = 1.0,
    beta: float = 1.0,
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
        mask: as in `fsr_loss`; M_l is the sum of a level's.
        loss: "mse", "l1" or "smooth_l1" on any features; "bce" or "kl" on logits.
        weight: multiplies the loss; a number or a 0-dim tensor.

    The other arguments, what is returned and what is raised are as for `fsr_loss`.
    """

    checks.check_option("loss", loss, tuple(LOSSES))
    scores = plain_mask(mask)
    options = Options.of(
        temperature=temperature, beta=beta, normalizer=normalizer, eps=eps, level_weights=level_weights,
        grad_mode=grad_mode, backend=backend,
    )  # fmt: skip
    pairs = [_Pair("weight", loss, weight, student, teacher)]

    def check() -> None:
        checks.check_imitation(student, teacher, scores, takes_logits=LOSSES[loss].takes_logits)
        checks.check_level_weights(options.level_weights, len(pairs[0].teacher))

    result = _distill(pairs, options, check, scores, None, process_group, False)
    assert isinstance(result, Tensor)
    return result


class _Pair(NamedTuple):
    """A term: a student and the teacher it imitates."""

    weight_name: str
    loss: str
    weight: Weight
    student: Levels
    teacher: Levels


def _distill(
    pairs: Sequence[_Pair],
    options: Options,
    check: Callable[[], None],
    mask: Levels | None,
    teacher_logits: Levels | None,
    process_group: ProcessGroup | None,
    return_terms: bool,
) -> Tensor | FSRTerms:
    """Imitate each pair.

    `check` says in the user's words what is wrong with the arguments. On small levels it takes as long as all the rest,
    so where a native operator checks all of it as well, it runs only if something was refused.
    """
    checks.check_transforms()
    if process_group is not None:
        checks.check_group(process_group)
    levels = len(pairs[0].teacher) if type(pairs[0].teacher) in (list, tuple) else -1
    plain = True
    for pair in pairs:
        for given in (pair.student, pair.teacher):
            plain = plain and type(given) in (list, tuple) and len(given) == levels
    rare = mask is not None or process_group is not None or options.level_weights is not None
    if rare or not plain or is_compiling():
        check()
        return _imitate_pairs(pairs, options, None, mask, teacher_logits, process_group, return_terms)
    try:
        return _imitate_pairs(pairs, options, check, mask, teacher_logits, process_group, return_terms)
    except Exception:
        check()
        raise


def _imitate_pairs(
    pairs: Sequence[_Pair],
    options: Options,
    check: Callable[[], None] | None,
    mask: Levels | None,
    teacher_logits: Levels | None,
    process_group: ProcessGroup | None,
    return_terms: bool,
) -> Tensor | FSRTerms:
    """`check` is None where it has run."""
    like = pairs[0].teacher
    device = like[0].device
    backend = backends.choose(options.backend, device.type)
    if check is not None and backend not in native.LIBRARIES:
        check()
    student: list[Tensor] = []
    teacher: list[Tensor] = []
    weight: list[float] = []
    factor: list[Tensor | None] = []
    modes: list[str] = []
    for pair in pairs:
        checks.check_weight(pair.weight_name, pair.weight, device)
        if isinstance(pair.weight, Tensor):
            weight.append(1.0)
            factor.append(pair.weight.detach())
        else:
            weight.append(float(pair.weight))
            factor.append(None)
        modes.append(_grad_mode(pair, options.grad_mode, return_terms))
        student += pair.student
        teacher += pair.teacher
    if torch.is_grad_enabled() and all(mode == "none" for mode in modes):
        checks.check_learns([(pair.student, pair.teacher) for pair in pairs])
    scores = norm = None
    if mask is not None:
        scores, norm = _given_scores(mask)
    elif process_group is not None and teacher_logits is not None:
        with torch.no_grad():
            scores, norm = VERBS[backend].score(teacher_logits)
    if process_group is not None and norm is not None:
        norm = _average(norm, process_group)
    logits = teacher_logits if scores is None and teacher_logits is not None else ()
    table = _table_of(pairs, options)
    call = Call(backend, table, teacher, logits, scores, norm, weight, factor, modes, return_terms)
    loss, *found = imitation(call, student)
    if not return_terms:
        return loss
    terms, (values, *made) = found[: len(pairs)], found[len(pairs) :]
    scores, norm = made or (scores, norm)
    assert scores is not None
    assert norm is not None
    parts = {pair.weight_name: part for pair, *part in zip(pairs, terms, values.split(len(like)), strict=True)}
    zero = [norm.new_zeros(()), norm.new_zeros(len(like))]
    feat, feat_per_level = parts.get("feat_weight", zero)
    cls, cls_per_level = parts.get("cls_weight", zero)
    return FSRTerms(loss, feat, cls, feat_per_level, cls_per_level, split_levels(scores, like), norm)


def _table_of(pairs: Sequence[_Pair], options: Options) -> Table:
    losses = tuple(pair.loss for pair in pairs)
    channels: tuple[int, ...] = ()
    if options.normalizer == "mass_channels":
        channels = tuple(z.shape[1] for pair in pairs for z in pair.teacher)
    make = make_table if is_compiling() else make_table_once  # Dynamo knows no cache
    return make(options, losses, len(pairs[0].teacher), channels)


def _grad_mode(pair: _Pair, grad_mode: str, return_terms: bool) -> str:
    wanted = late = False
    for x in pair.student:
        wanted = wanted or x.requires_grad
        # 2 w S (s - t) / M is far below the range of fp16 until the loss scale multiplies it.
        late = late or x.dtype == torch.float16
    if not wanted or not torch.is_grad_enabled():
        return "none"
    if return_terms and (isinstance(pair.weight, Tensor) or abs(pair.weight) < 1e-30):
        return "backward"  # dividing the stored gradient by this weight would not give that of the term alone
    if grad_mode == "auto":
        return "backward" if late else "forward"
    return grad_mode


def plain_mask(mask: Any) -> Any:
    """A list of (N, H, W) floating-point tensors, where it is one of the other forms; else what it is."""
    if isinstance(mask, Richness):
        return mask.scores
    if mask is None or isinstance(mask, Tensor) or not isinstance(mask, Sequence):
        return mask
    return [_plain_level(m) if isinstance(m, Tensor) else m for m in mask]


def _plain_level(mask: Tensor) -> Tensor:
    mask = mask.squeeze(1) if mask.dim() == 4 else mask
    return mask.float() if mask.dtype == torch.bool else mask


def _given_scores(mask: Levels) -> tuple[Tensor, Tensor]:
    """Scores and mass, as `score` returns them, of a mask that the caller made."""
    dtype = accumulate_dtype(*mask)
    levels = [m.detach().to(dtype).flatten() for m in mask]
    return torch.cat(levels), torch.stack([m.sum() for m in levels])


def _average(mass: Tensor, group: ProcessGroup) -> Tensor:
    mass = mass.clone()
    torch.distributed.all_reduce(mass, group=group)
    return mass / torch.distributed.get_world_size(group)
