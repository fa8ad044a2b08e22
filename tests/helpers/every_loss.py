"""Every public loss called alike, so that a test may go over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from torch import Tensor
from truth import Levels, Pyramid

from frs_kernels import (
    cwd_loss,
    fsr_loss,
    localization_distillation,
    masked_imitation_loss,
    pkd_loss,
    quality_focal_distillation,
    richness_mask,
)


class Every(NamedTuple):
    """A loss of student levels that stand for some of a pyramid's, on a backend."""

    parts: str  # of the pyramid: s, x or both
    call: Callable[[Levels, Pyramid, str], Tensor]

    def student(self, p: Pyramid) -> Levels:
        return [v for part in self.parts for v in getattr(p, part)]


def both(**options: str) -> Every:
    def call(student: Levels, p: Pyramid, backend: str) -> Tensor:
        k = len(p.t or [])
        return fsr_loss(student[:k], p.t, student[k:], p.z, backend=backend, **options)  # type: ignore[call-overload]

    return Every("sx", call)


# classes of the pyramid: a multiple of 8, four sides of a box in bins
EVERY = {
    "fsr_loss": both(),
    "fsr_loss backward": both(grad_mode="backward"),
    "pkd and cwd": both(feat_loss="pkd", cls_loss="cwd"),
    "masked_imitation_loss": Every(
        "s", lambda s, p, backend: masked_imitation_loss(s, p.t, richness_mask(p.z, backend=backend), backend=backend)
    ),
    "pkd_loss": Every("s", lambda s, p, backend: pkd_loss(s, p.t, backend=backend)),
    "cwd_loss": Every("s", lambda s, p, backend: cwd_loss(s, p.t, temperature=2.0, backend=backend)),
    "quality_focal_distillation": Every(
        "x", lambda x, p, backend: quality_focal_distillation(x, p.z, richness_mask(p.z), beta=1.5, backend=backend)
    ),
    "localization_distillation": Every(
        "x", lambda x, p, backend: localization_distillation(x, p.z, richness_mask(p.z), backend=backend)
    ),
}
every_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
