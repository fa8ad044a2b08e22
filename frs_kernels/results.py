"""What the public functions return beside a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FSRTerms(NamedTuple):
    """The loss and what it is made of. L levels; `loss`, `feat` and `cls` carry gradient, the rest does not.

        loss = feat_weight * feat + cls_weight * cls

    loss, feat, cls: 0-dim; a term that was not asked for is 0
    feat_per_level, cls_per_level: (L,), sums to feat and to cls
    mask: (N, H, W) a level: the scores S_p, or the mask given; empty where no term has one ("pkd", "cwd")
    mass: (L,), M_l = sum_p mask_p; then zeros
    """

    loss: Tensor
    feat: Tensor
    cls: Tensor
    feat_per_level: Tensor
    cls_per_level: Tensor
    mask: list[Tensor]
    mass: Tensor


class ImitationTerms(NamedTuple):
    """One term under any mask, and what it is made of. L levels; `loss` and `value` carry gradient, the rest does not.

        loss = weight * value

    loss, value: 0-dim
    per_level: (L,), sums to value
    mask: (N, H, W) a level
    mass: (L,), M_l = sum_p mask_p
    """

    loss: Tensor
    value: Tensor
    per_level: Tensor
    mask: list[Tensor]
    mass: Tensor


class RowTerms(NamedTuple):
    """A loss along rows and what it is made of. L levels; `loss` and `value` carry gradient, `per_level` does not.

        loss = weight * value

    loss, value: 0-dim
    per_level: (L,), sums to value
    """

    loss: Tensor
    value: Tensor
    per_level: Tensor


class Richness(NamedTuple):
    """Where the teacher sees objects.

    scores: (N, H, W) a level, in [0, 1]
    mass: (L,), the sum of a level's
    """

    scores: list[Tensor]
    mass: Tensor
