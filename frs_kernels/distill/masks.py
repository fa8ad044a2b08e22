"""Where to imitate: masks (N, H, W) a level, made of tensors alone, for `mask=` of `fsr_loss` or of `Distiller`.

Every function takes and returns lists, one tensor per level, and is differentiated through by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frs_kernels.functional import richness_mask

Levels = Sequence[Tensor]


@torch.no_grad()
def richness(teacher_logits: Levels) -> list[Tensor]:
    """S_p = max_k sigmoid(z_pk) of logits (N, K, H, W): the paper's mask (arXiv 2111.00674, eq. 3)."""
    return richness_mask(teacher_logits).scores


@torch.no_grad()
def ones(like: Levels) -> list[Tensor]:
    """Everywhere alike; `like` are tensors (N, C, H, W)."""
    return [torch.ones_like(x[:, 0], dtype=torch.float32) for x in like]


@torch.no_grad()
def threshold(scores: Levels, above: float) -> list[Tensor]:
    """The scores (N, H, W) that are above a number, and 0 elsewhere."""
    return [s * (s > above) for s in scores]


@torch.no_grad()
def top_k(scores: Levels, k: int) -> list[Tensor]:
    """An image's k largest scores of all levels, and 0 elsewhere; scores that equal the smallest of them are kept, too.

    For heads of which only the best positions are supervised (RT-DETR: its 300 queries).

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    flat = torch.cat([s.flatten(1) for s in scores], 1)
    if k >= flat.shape[1]:
        return list(scores)
    least = flat.topk(k, dim=1).values[:, -1]
    return [s * (s >= least[:, None, None]) for s in scores]


@torch.no_grad()
def centerness(scores: Levels, logits: Levels) -> list[Tensor]:
    """The scores (N, H, W) times sigmoid(centerness), logits (N, 1, H, W), or (N, A, H, W) of which the largest counts:
    what FCOS and ATSS rank their boxes by."""
    return [s * c.sigmoid().amax(1) for s, c in zip(scores, logits, strict=True)]


@torch.no_grad()
def boxes(boxes: Sequence[Tensor], like: Levels, strides: Sequence[int]) -> list[Tensor]:
    """1 where a cell meets one of its image's boxes, else 0.

    Args:
        boxes: (G, 4) an image, x0, y0, x1, y1 in pixels.
        like: tensors (N, C, H, W), one a level.
        strides: pixels between the cells of a level: cell (h, w) covers the pixels [w * stride, (w + 1) * stride) by
            [h * stride, (h + 1) * stride).

    Raises:
        ValueError: boxes are not one tensor an image.
    """
    if any(len(boxes) != x.shape[0] for x in like):
        raise ValueError(f"boxes are of {len(boxes)} images, the levels of {like[0].shape[0]}")
    return [
        torch.stack([_meets(corners.to(x.device, torch.float32) / stride, x.shape[2], x.shape[3]) for corners in boxes])
        for x, stride in zip(like, strides, strict=True)
    ]


@torch.no_grad()
def decoupled(objects: Levels, object_weight: float, background_weight: float) -> list[Tensor]:
    """Objects and background, each a mean of its own: a M / sum M + b (1 - M) / sum(1 - M), 0 where a sum is 0.

    For DeFeat (Guo et al., *Distilling Object Detectors via Decoupled Features*, CVPR 2021), in one pass over the
    features: give it with normalizer="none", since each part is divided by its own mass already.

    Args:
        objects: M, the masks (N, H, W) of `boxes`, in [0, 1].
        object_weight, background_weight: a and b.
    """
    return [object_weight * _mean(m) + background_weight * _mean(1 - m) for m in objects]


def _mean(mask: Tensor) -> Tensor:
    mass = mask.sum()
    return torch.where(mass == 0, 0.0, mask / mass)


def _meets(cells: Tensor, height: int, width: int) -> Tensor:
    x0, y0, x1, y1 = cells[:, :, None].unbind(1)
    w, h = (torch.arange(size, device=cells.device) for size in (width, height))
    columns, rows = (w < x1) & (w + 1 > x0), (h < y1) & (h + 1 > y0)
    return (rows[:, :, None] & columns[:, None, :]).any(0).float()
