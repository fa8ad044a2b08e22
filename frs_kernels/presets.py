"""Keyword sets for `fsr_loss`, by detector."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypedDict, cast

from frs_kernels.options import FeatLoss, Normalizer


class ReadOnly(dict[str, Any]):
    """A dict that refuses changes, which would be everybody's; a copy of it is a plain one."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("presets are read-only; change a copy: dict(PRESETS[...])")

    __setitem__ = __delitem__ = pop = popitem = clear = update = setdefault = _refuse

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __ior__(self, other: Any) -> Any:  # type: ignore[misc]  # d |= {...} makes another d
        return {**self, **other}

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class Preset(TypedDict, total=False):
    feat_weight: float
    cls_weight: float
    feat_loss: FeatLoss
    temperature: float
    normalizer: Normalizer
    eps: float


# The first four are the weights of the authors' released configurations, for student and teacher on COCO; the paper's
# own code takes Faster R-CNN's mask and head term from the RPN's objectness. "ultralytics" is that library's built-in
# feature loss: its gain of 6, C * M as the denominator, no head term (give no student_logits: a weight of 0 still costs
# the pass over them); it multiplies by the batch size besides. "pkd" and "cwd" are mmrazor's configurations for FPN
# features: PKD's of Faster R-CNN (of RetinaNet: 10), both for the first four levels; CWD's for all five.
_PRESETS: dict[str, Preset] = {
    "retinanet": {"feat_weight": 0.005, "cls_weight": 0.02},
    "gfl": {"feat_weight": 0.1, "cls_weight": 0.05},
    "fcos": {"feat_weight": 0.01, "cls_weight": 0.05},
    "faster_rcnn": {"feat_weight": 0.002, "cls_weight": 0.1},
    "ultralytics": {"feat_weight": 6.0, "cls_weight": 0.0, "normalizer": "mass_channels", "eps": 1e-9},
    "pkd": {"feat_weight": 6.0, "cls_weight": 0.0, "feat_loss": "pkd"},
    "cwd": {"feat_weight": 10.0, "cls_weight": 0.0, "feat_loss": "cwd", "temperature": 1.0},
}
PRESETS: Mapping[str, Preset] = ReadOnly({name: cast("Preset", ReadOnly(preset)) for name, preset in _PRESETS.items()})
