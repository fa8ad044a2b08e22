"""What distils one kind of head: `masked_imitation_loss` with the loss, the groups and the defaults of a paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from frs_kernels import checks
from frs_kernels.functional import imitate_one
from frs_kernels.levels import Levels, accumulate_dtype
from frs_kernels.options import Backend, GradMode, Normalizer, Options, Weight
from frs_kernels.pairs import Pair
from frs_kernels.results import ImitationTerms, Richness

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from frs_kernels.options import GroupOptions, TermOptions


@overload
def quality_focal_distillation(
    student_logits: Levels,
    teacher_logits: Levels,
    mask: Levels | Richness | None = ...,
    *,
    detach: bool = ...,
    weight: Weight = ...,
    return_terms: Literal[False] = ...,
    **options: Unpack[TermOptions],
) -> Tensor: ...


@overload
def quality_focal_distillation(
    student_logits: Levels,
    teacher_logits: Levels,
    mask: Levels | Richness | None = ...,
    *,
    detach: bool = ...,
    weight: Weight = ...,
    return_terms: Literal[True],
    **options: Unpack[TermOptions],
) -> ImitationTerms: ...


@overload
def quality_focal_distillation(
    student_logits: Levels,
    teacher_logits: Levels,
    mask: Levels | Richness | None = ...,
    *,
    detach: bool = ...,
    weight: Weight = ...,
    return_terms: bool,
    **options: Unpack[TermOptions],
) -> Tensor | ImitationTerms: ...


def quality_focal_distillation(
    student_logits: Levels,
    teacher_logits: Levels,
    mask: Levels | Richness | None = None,
    *,
    beta: float = 1.0,
    detach: bool = False,
    weight: Weight = 1.0,
    temperature: float = 1.0,
    normalizer: Normalizer = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    process_group: ProcessGroup | None = None,
    grad_mode: GradMode = "auto",
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | ImitationTerms:
    """The quality focal loss with the teacher's probabilities as targets, under any mask or none.

        d     = sigmoid(x_pk) - sigmoid(z_pk)
        loss  = weight * sum_l w_l / M_l sum_p mask_p sum_k |d|^beta BCE(x_pk, sigmoid(z_pk))

    The loss of Li et al., *Generalized Focal Loss*, NeurIPS 2020, whose target is a class's quality; CrossKD (Wang et
    al., CVPR 2024) distils with it, the target being the teacher's probability. Other than bce it is 0 where student
    and teacher agree. This is `masked_imitation_loss` with loss="qfl", or "qfl_detached".

    Args:
        student_logits, teacher_logits: lists of (N, K, H, W) class logits, before the sigmoid, one tensor per level.
        mask: as in `fsr_loss`. Without one every position counts 1, and M_l is their number, N H W.
        beta: the exponent, zero or more. 0 makes bce of it. Below 1 the gradient without `detach` grows without bound
            as d goes to 0; where d is 0 it is 0.
        detach: the gradient takes |d|^beta for a constant. By default it is differentiated, too.
        weight: multiplies the loss; a number or a 0-dim tensor.
        return_terms: return `ImitationTerms` instead of the loss.

    The other arguments, the tensors' dtypes and strides, what is returned and what is raised are as for `fsr_loss`:
    normalizer="total_mass" divides every level by the number of positions of all.
    """
    checks.check_flag("detach", detach)
    options = Options.of(
        temperature=temperature, beta=beta, normalizer=normalizer, eps=eps, level_weights=level_weights,
        grad_mode=grad_mode, backend=backend,
    )  # fmt: skip
    names = ("student_logits", "teacher_logits")
    if mask is None:
        checks.check_levels(names[0], student_logits)
        checks.check_levels(names[1], teacher_logits)
        mask = _everywhere(student_logits, teacher_logits)
    pair = Pair("weight", "qfl_detached" if detach else "qfl", weight, student_logits, teacher_logits)
    return imitate_one(names, pair, options, mask, process_group, return_terms)


@overload
def localization_distillation(
    student_reg: Levels,
    teacher_reg: Levels,
    mask: Levels | Richness | None = ...,
    *,
    sides: int = ...,
    weight: Weight = ...,
    return_terms: Literal[False] = ...,
    **options: Unpack[GroupOptions],
) -> Tensor: ...


@overload
def localization_distillation(
    student_reg: Levels,
    teacher_reg: Levels,
    mask: Levels | Richness | None = ...,
    *,
    sides: int = ...,
    weight: Weight = ...,
    return_terms: Literal[True],
    **options: Unpack[GroupOptions],
) -> ImitationTerms: ...


@overload
def localization_distillation(
    student_reg: Levels,
    teacher_reg: Levels,
    mask: Levels | Richness | None = ...,
    *,
    sides: int = ...,
    weight: Weight = ...,
    return_terms: bool,
    **options: Unpack[GroupOptions],
) -> Tensor | ImitationTerms: ...


def localization_distillation(
    student_reg: Levels,
    teacher_reg: Levels,
    mask: Levels | Richness | None = None,
    *,
    sides: int = 4,
    weight: Weight = 1.0,
    temperature: float = 10.0,
    normalizer: Normalizer = "mass_channels",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    process_group: ProcessGroup | None = None,
    grad_mode: GradMode = "auto",
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | ImitationTerms:
    """LD (Zheng et al., *Localization Distillation*, CVPR 2022): where a box's sides are, as distributions over bins.

        q, p  = softmax of a side's C / sides bins, of teacher_reg / temperature and student_reg / temperature
        loss  = weight * sum_l w_l / (C M_l) sum_p mask_p sum_sides temperature^2 KL(q || p)

    For heads that predict each side as a distribution, as GFL's does. This is `masked_imitation_loss` with
    loss="softmax_kl". normalizer="mass_channels" makes a level's loss the mean over the positions that the mask weighs,
    the sides and the bins, which is mmdetection's LDHead, whose denominator is that of all levels.

    Args:
        student_reg, teacher_reg: lists of (N, C, H, W) logits before the softmax, one tensor per level, a side's bins
            neighbours among the channels: C = sides * bins.
        mask: as in `fsr_loss`. Without one every position counts 1, and M_l is their number, N H W.
        sides: how many distributions a position has.
        weight: multiplies the loss; a number or a 0-dim tensor.
        return_terms: return `ImitationTerms` instead of the loss.

    The other arguments, the tensors' dtypes and strides, what is returned and what is raised are as for `fsr_loss`.
    ValueError also where sides does not divide C, or levels differ in C.
    """
    options = Options.of(
        temperature=temperature, normalizer=normalizer, eps=eps, level_weights=level_weights, grad_mode=grad_mode,
        backend=backend,
    )  # fmt: skip
    names = ("student_reg", "teacher_reg")
    checks.check_levels(names[0], student_reg)
    checks.check_levels(names[1], teacher_reg)
    checks.check_sides(sides, names[0], student_reg)
    if mask is None:
        mask = _everywhere(student_reg, teacher_reg)
    pair = Pair("weight", "softmax_kl", weight, student_reg, teacher_reg, student_reg[0].shape[1] // sides)
    return imitate_one(names, pair, options, mask, process_group, return_terms)


def _everywhere(student: Levels, teacher: Levels) -> list[Tensor]:
    """A mask of ones, (N, H, W) a level."""
    dtype = accumulate_dtype(*student, *teacher)
    return [z.new_ones((z.shape[0], *z.shape[2:]), dtype=dtype) for z in teacher]
