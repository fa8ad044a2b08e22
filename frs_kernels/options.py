"""The options of the loss, in one place: their types, their defaults, their checks, and the table that they make."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from torch import Tensor
from torch.compiler import is_compiling

from frs_kernels import backends, checks
from frs_kernels.losses import CLS_LOSSES, FEAT_LOSSES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Weight = float | Tensor


class LossOptions(TypedDict, total=False):
    """The keywords that `fsr_loss` and `FSRLoss` share; `fsr_loss` says what they mean."""

    feat_loss: str
    cls_loss: str
    temperature: float
    beta: float
    normalizer: str
    eps: float
    level_weights: Sequence[float] | None
    grad_mode: str
    backend: str


class Keywords(LossOptions, total=False):
    """Those, and the ones that are tensors or live with the process."""

    feat_weight: Weight
    cls_weight: Weight
    process_group: ProcessGroup | None


class Options(NamedTuple):
    """`LossOptions`, checked."""

    feat_loss: str = "mse"
    cls_loss: str = "bce"
    temperature: float = 1.0
    beta: float = 1.0
    normalizer: str = "mass"
    eps: float = 0.0
    level_weights: tuple[float, ...] | None = None
    grad_mode: str = "auto"
    backend: str = "auto"

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
    weights = options.get("level_weights")
    checks.check_level_weights(weights, None)
    found = Options(**{**options, "level_weights": None if weights is None else tuple(weights)})
    checks.check_option("feat_loss", found.feat_loss, FEAT_LOSSES)
    checks.check_option("cls_loss", found.cls_loss, CLS_LOSSES)
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
    """What of the table of entries follows from the options: `frs_kernels.reference.imitate` names its columns."""

    level: tuple[int, ...]
    term: tuple[int, ...]
    scale: tuple[float, ...]
    eps: tuple[float, ...]
    loss: tuple[str, ...]
    temperature: tuple[float, ...]
    beta: tuple[float, ...]
    joint: bool
    entries: tuple[range, ...]  # of each term


def make_table(options: Options, losses: tuple[str, ...], levels: int, channels: tuple[int, ...]) -> Table:
    """A term a loss, with an entry a level each. `channels`: of every entry, where the normalizer asks for them.

    A level's denominator (M_l C_l + eps) / w_l becomes scale = w_l / C_l and eps / C_l, numbers of the host: formed on
    the device they would take a launch each.
    """
    weights = options.level_weights or (1.0,) * levels
    counts = [float(c) for c in channels] or [1.0] * (levels * len(losses))
    entries = range(levels * len(losses))
    return Table(
        tuple(e % levels for e in entries),
        tuple(e // levels for e in entries),
        tuple(float(weights[e % levels]) / counts[e] for e in entries),
        tuple(options.eps / counts[e] for e in entries),
        losses,
        (float(options.temperature),) * len(losses),
        (float(options.beta),) * len(losses),
        options.normalizer == "total_mass",
        tuple(range(t * levels, (t + 1) * levels) for t in range(len(losses))),
    )


make_table_once = functools.lru_cache(maxsize=256)(make_table)
