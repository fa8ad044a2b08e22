"""The three verbs in plain PyTorch: the definition that every other backend is compared with.

    score     S_p = max_k sigmoid(z_pk),  M_l = sum_p S_p
    imitate   loss_l = sum_p share_p sum_c value(x_pc, z_pc),  share_p = S_p / norm_l
    scale_    gradient *= factor

Run in fp64 this file is the truth of the tests. `torch.compile` may fuse it (`backend="torch"`).
docs/math.md derives the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from frs_kernels.levels import accumulate_dtype, split_levels


def score(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of all levels, flat, level after level, each (N, H, W) row-major; and their sums.

    Args:
        logits: teacher class logits, one (N, K, H, W) tensor a level.

    Returns:
        scores (P,) and mass (L,), fp32, or fp64 if a level is fp64.
    """
    dtype = accumulate_dtype(*logits)
    levels = [torch.sigmoid(z.amax(1).to(dtype)).flatten() for z in logits]
    return torch.cat(levels), torch.stack([s.sum() for s in levels])


def imitate(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scores: Tensor,
    norm: Tensor,
    factor: Tensor | None,
    weight: float,
    loss: str,
    temperature: float,
    want_loss: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The masked imitation loss of all levels and its gradient.

        share_p     = S_p / norm_l                        0 where norm_l is 0
        per_level_l = sum_p share_p sum_c value(student_pc, teacher_pc)
        total       = weight * factor * sum_l per_level_l
        grads_l     = d total / d student_l = weight * factor * share_p * slope(student, teacher)

    Dividing the score, not the sum, keeps a level whose mass is subnormal right: S_p <= M_l.

    Args:
        student, teacher: one (N, C, H, W) tensor a level.
        scores: (P,) as `score` lays them out.
        norm: (L,) the denominators.
        factor: 0-dim, or None for 1.
        weight: a number on the host, times factor.
        loss: "mse", "bce" or "kl".
        temperature: divides the logits; the loss is multiplied by its square. Unused by "mse".

    Returns:
        total (0-dim), per_level (L,), both empty without want_loss; the gradients in the student's
        dtypes and strides, an empty list without want_grad.
    """
    dtype = accumulate_dtype(*student, *teacher)
    upstream = weight if factor is None else weight * factor.to(dtype)
    values, grads = [], []
    for s, t, mask, n in zip(student, teacher, split_levels(scores, student), norm, strict=True):
        share = torch.where(n == 0, 0.0, mask / n).to(dtype)
        value, slope = pointwise(s.to(dtype), t.to(dtype), loss, temperature)
        if want_loss:
            values.append((share * value.sum(1)).sum())
        if want_grad:
            grad = slope * (upstream * share).unsqueeze(1)
            same = grad.dtype == s.dtype and grad.stride() == s.stride()
            grads.append(grad if same else torch.empty_like(s).copy_(grad))
    if not want_loss:
        return scores.new_empty(0), scores.new_empty(0), grads
    per_level = torch.stack(values)
    return upstream * per_level.sum(), per_level, grads


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by the 0-dim factor, in place."""
    for grad in grads:
        grad.mul_(factor.to(accumulate_dtype(grad)))


def pointwise(x: Tensor, z: Tensor, loss: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss of the student's x against the teacher's z, and its derivative by x, element by element.

    bce is softplus(x) - x sigmoid(z), kl is bce(x, z) - bce(z, z), and the derivative of both sigmoid(x) - sigmoid(z).
    Mirrored, so that the student is on the positive side, none of them cancels where logits saturate:
    with miss = sigmoid(-z), or sigmoid(z) where x < 0,

        bce = softplus(-|x|) + |x| miss        derivative = sign(x) (miss - sigmoid(-|x|))
    """
    if loss == "mse":
        return (x - z).square(), 2 * (x - z)
    if temperature != 1:
        value, slope = pointwise(x / temperature, z / temperature, loss, 1.0)
        return value * temperature**2, slope * temperature
    positive, near = x >= 0, -x.abs()
    miss = torch.sigmoid(torch.where(positive, -z, z))
    value = F.softplus(near) - near * miss
    if loss == "kl":
        near_z = -z.abs()
        value = value - (F.softplus(near_z) - near_z * torch.sigmoid(near_z))
    slope = miss - torch.sigmoid(near)
    return value, torch.where(positive, slope, -slope)
