"""Keyword sets for `fsr_loss`, by detector."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict, cast

from frs_kernels.options import Normalizer


class Preset(TypedDict, total=False):
    feat_weight: float
    cls_weight: float
    normalizer: Normalizer
    eps: float


# The first four are the weights of the authors' released configurations, for student and teacher on COCO; the paper's
# own code takes Faster R-CNN's mask and head term from the RPN's objectness. "ultralytics" is that library's built-in
# feature loss: its gain of 6, C * M as the denominator, no head term (give no student_logits: a weight of 0 still costs
# the pass over them); it multiplies by the batch size besides.
_PRESETS: dict[str, Preset] = {
    "retinanet": {"feat_weight": 0.005, "cls_weight": 0.02},
    "gfl": {"feat_weight": 0.1, "cls_weight": 0.05},
    "fcos": {"feat_weight": 0.01, "cls_weight": 0.05},
    "faster_rcnn": {"feat_weight": 0.002, "cls_weight": 0.1},
    "ultralytics": {"feat_weight": 6.0, "cls_weight": 0.0, "normalizer": "mass_channels", "eps": 1e-9},
}
# A change by one caller would be everybody's.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {name: cast("Preset", MappingProxyType(preset)) for name, preset in _PRESETS.items()}
)
