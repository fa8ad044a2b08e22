"""What people use instead of `frs_kernels`, written as they would write it. Levels are lists of (N, C, H, W)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Levels = Sequence[Tensor]


def authors_form(s: Levels, t: Levels, x: Levels, z: Levels, feat_weight: float, cls_weight: float) -> Tensor:
    """The released code's steps: sigmoids first, then the masked losses, level by level (fp32 only)."""
    feat = cls = s[0].new_zeros(())
    for s_l, t_l, x_l, z_l in zip(s, t, x, z, strict=True):
        q, p = torch.sigmoid(z_l), torch.sigmoid(x_l)
        mask = q.max(dim=1).values
        mass = mask.sum()
        feat = feat + ((s_l - t_l) ** 2 * mask.unsqueeze(1)).sum() / mass
        cls = cls + (F.binary_cross_entropy(p, q, reduction="none") * mask.unsqueeze(1)).sum() / mass
    return feat_weight * feat + cls_weight * cls


def logits_form(s: Levels, t: Levels, x: Levels, z: Levels, feat_weight: float, cls_weight: float) -> Tensor:
    """The same loss by someone who minds precision and speed: BCE from logits, one sigmoid a position for the mask."""
    feat = cls = s[0].new_zeros((), dtype=torch.float32)
    for s_l, t_l, x_l, z_l in zip(s, t, x, z, strict=True):
        x_l, z_l = x_l.float(), z_l.float()
        mask = torch.sigmoid(z_l.amax(1))
        mass = mask.sum()
        feat = feat + (mask * (s_l.float() - t_l.float()).square().sum(1)).sum() / mass
        bce = F.binary_cross_entropy_with_logits(x_l, torch.sigmoid(z_l), reduction="none")
        cls = cls + (mask * bce.sum(1)).sum() / mass
    return feat_weight * feat + cls_weight * cls
