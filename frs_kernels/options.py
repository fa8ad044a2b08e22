"""The options of the loss, in one place: their types, their defaults, their checks, and the table that they make."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from torch import Tensor
from torch.compiler import is_compiling

from frs_kernels import backends, checks
from frs_kernels.losses import CLS_LOSSES, FEAT_LOSSES, LOSSES, Grouped
from frs_kernels.row_losses import ROW_LOSSES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Weight = float | Tensor
FeatLoss = Literal["mse", "l1", "smooth_l1", "pkd", "cwd"]
ClsLoss = Literal["bce", "kl", "qfl", "qfl_detached", "softmax_kl", "cwd"]
AnyLoss = Literal["mse", "l1", "smooth_l1", "bce", "kl", "qfl", "qfl_detached", "softmax_kl"]
Normalizer = Literal["mass", "mass_channels", "total_mass", "none"]
Head = Literal["sigmoid", "softmax"]
GradMode = Literal["auto", "forward", "backward"]
Backend = Literal["auto", "cuda", "triton", "cpu", "torch"]


class CommonOptions(TypedDict, total=False):
    """The keywords of every loss; `fsr_loss` says what they mean."""

    temperature: float
    normalizer: Normalizer
    eps: float
    level_weights: Sequence[float] | None
    grad_mode: GradMode
    backend: Backend


class LossOptions(CommonOptions, total=False):
    """Those that `fsr_loss` and `FSRLoss` share."""

    beta: float
    feat_loss: FeatLoss
    cls_loss: ClsLoss


class GroupOptions(CommonOptions, total=False):
    """Those of `localization_distillation`."""

    process_group: ProcessGroup | None


class TermOptions(GroupOptions, total=False):
    """Those of `masked_imitation_loss` and of `quality_focal_distillation`."""

    beta: float


class RowOptions(TypedDict, total=False):
    """Those of `pkd_loss` and `cwd_loss` beside the loss's own."""

    weight: Weight
    level_weights: Sequence[float] | None
    backend: Backend


class Keywords(LossOptions, total=False):
    """All of `fsr_loss`."""

    feat_weight: Weight
    cls_weight: Weight
    process_group: ProcessGroup | None


class Options(NamedTuple):
    """`LossOptions`, checked."""

    feat_loss: FeatLoss = "mse"
    cls_loss: ClsLoss = "bce"
    temperature: float = 1.0
    beta: float = 1.0
    normalizer: Normalizer = "mass"
    eps: float = 0.0
    level_weights: tuple[float, ...] | None = None
    grad_mode: GradMode = "auto"
    backend: Backend = "auto"

    @staticmethod
    def of(**options: Unpack[LossOptions]) -> Options:
        """The options, checked.

        Raises:
            TypeError, ValueError: an option is unknown or out of range.
        """
        # Dynamo knows no cache, and (True, 1.0) == (1.0, 1.0)
        if not is_compiling() and options.get("level_weights") is None:
            try:
                return _checked_once(**options)
            except TypeError:
                pass  # refused; or without a hash, which is to be refused in our words
        return _checked(**options)


def _checked(**options: Any) -> Options:
    if unknown := options.keys() - set(Options._fields):
        raise TypeError(f"unknown: {', '.join(sorted(unknown))}; the options are {', '.join(Options._fields)}")
    weights = options.get("level_weights")
    checks.check_level_weights(weights, None)
    found = Options(**{**options, "level_weights": None if weights is None else tuple(weights)})
    checks.check_option("feat_loss", found.feat_loss, (*FEAT_LOSSES, *ROW_LOSSES))
    checks.check_option("cls_loss", found.cls_loss, (*CLS_LOSSES, "cwd"))
    checks.check_option("normalizer", found.normalizer, checks.NORMALIZERS)
    checks.check_option("grad_mode", found.grad_mode, checks.GRAD_MODES)
    checks.check_option("backend", found.backend, ("auto", *backends.BACKENDS))
    checks.check_number("temperature", found.temperature, positive=True)
    checks.check_number("beta", found.beta, positive=False)
    checks.check_number("eps", found.eps, positive=False)
    return found


# typed: True is no number here, though it equals 1.0
_checked_once = functools.lru_cache(maxsize=256, typed=True)(_checked)


class Table(NamedTuple):
    """What of the table of entries follows from the options: `frs_kernels.reference.imitate` names its columns.

    The entries are every term's levels in turn, so that level and term are left empty.
    """

    scale: tuple[float, ...]  # empty where each is 1
    eps: tuple[float, ...]  # empty where each is 0
    loss: tuple[str, ...]
    temperature: tuple[float, ...]
    beta: tuple[float, ...]
    joint: bool
    entries: tuple[range, ...]  # of each term


def make_table(
    options: Options, losses: tuple[str, ...], groups: tuple[int, ...], levels: int, channels: tuple[int, ...]
) -> Table:
    """A term a loss, with an entry a level each.

    `groups`: of every term, how many channels a group has, 0 for all; read where the loss is one of groups.
    `channels`: of every entry, where the normalizer asks for them.

    A level's denominator (M_l C_l + eps) / w_l becomes scale = w_l / C_l and eps / C_l, numbers of the host: formed on
    the device they would take a launch each.
    """
    weights = options.level_weights or (1.0,) * levels
    counts = [float(c) for c in channels] or [1.0] * (levels * len(losses))
    entries = range(levels * len(losses))
    scale = tuple(float(weights[e % levels]) / counts[e] for e in entries)
    return Table(
        () if all(number == 1 for number in scale) else scale,
        tuple(options.eps / counts[e] for e in entries) if options.eps else (),
        losses,
        (float(options.temperature),) * len(losses),
        tuple(
            float(group if isinstance(LOSSES[loss], Grouped) else options.beta)
            for loss, group in zip(losses, groups, strict=True)
        ),
        options.normalizer == "total_mass",
        tuple(range(t * levels, (t + 1) * levels) for t in range(len(losses))),
    )


make_table_once = functools.lru_cache(maxsize=256)(make_table)
