"""pkd and cwd as they are published, and how near to them in fp64 a result must be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from cases import ulp
from torch import Tensor
from truth import lay_out

from frs_kernels import cwd_loss, pkd_loss
from frs_kernels.levels import accumulate_dtype

SIZES = ((2, 5, 8, 12), (2, 17, 3, 7), (2, 1, 1, 2))
Levels = list[Tensor]


def pkd(s: Levels, t: Levels, eps: float = 1e-6) -> Tensor:
    """Features standardised a channel, over the batch and all positions; half their mean squared difference."""

    def norm(v: Tensor) -> Tensor:
        flat = v.transpose(0, 1).flatten(1)
        return (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + eps)

    return sum((F.mse_loss(norm(a), norm(b)) / 2 for a, b in zip(s, t, strict=True)), s[0].new_zeros(()))


def cwd(s: Levels, t: Levels, temperature: float = 1.0) -> Tensor:
    """KL of the channels' softmax over positions, averaged over images and channels."""
    loss = s[0].new_zeros(())
    for a, b in zip(s, t, strict=True):
        logs = [F.log_softmax(v.flatten(2).flatten(0, 1) / temperature, dim=1) for v in (a, b)]
        kl = F.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
        loss = loss + kl * temperature**2 / (a.shape[0] * a.shape[1])
    return loss


def pkd_swing(s: Tensor) -> float:
    flat = s.double().transpose(0, 1).flatten(1)
    deviation = flat.std(1, keepdim=True) + 1e-6
    return ((flat - flat.mean(1, keepdim=True)).abs() / deviation**2).max().item() / flat.numel()


def pkd_condition(*tensors: Tensor) -> float:
    """By how much the published form enlarges a rounding of a mean: fp64 itself, which is the truth, is off by that."""
    worst = 1.0
    for v in tensors:
        flat = v.detach().double().transpose(0, 1).flatten(1)
        if flat.shape[1] > 1:
            worst = max(worst, (flat.mean(1).abs() / (flat.std(1) + 1e-6)).max().item())
    return worst


def cwd_swing(s: Tensor, temperature: float = 1.0) -> float:
    return temperature * (s.double() / temperature).flatten(2).softmax(2).max().item() / (s.shape[0] * s.shape[1])


class Loss(NamedTuple):
    name: str
    published: Callable[..., Tensor]
    ours: Callable[..., Any]
    swing: Callable[[Tensor], float]  # the size of the two numbers that a gradient is the difference of
    unit: float = 1.0  # the size of the numbers that a level's value is the difference of


PKD = Loss("pkd", pkd, pkd_loss, pkd_swing)
CWD = Loss("cwd", cwd, cwd_loss, cwd_swing)
TAU4 = Loss(
    "cwd", partial(cwd, temperature=4.0), partial(cwd_loss, temperature=4.0), partial(cwd_swing, temperature=4.0), 16.0
)


def levels(
    rng: torch.Generator,
    sizes: Sequence[tuple[int, ...]] = SIZES,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
    *,
    mean: float = 0.3,
    spread: float = 2.0,
    apart: float = 1.0,
    teacher_dtype: torch.dtype | None = None,
) -> tuple[Levels, Levels]:
    """Student and teacher, which differ by `apart` of their spread."""
    s = [mean + spread * torch.randn(size, generator=rng, dtype=torch.float64) for size in sizes]
    t = [v + apart * spread * torch.randn(v.shape, generator=rng, dtype=torch.float64) for v in s]
    student = [lay_out(v.to(device, dtype), layout).detach().requires_grad_() for v in s]
    return student, [lay_out(v.to(device, teacher_dtype or dtype), layout) for v in t]


def gradients(loss: Tensor, student: Levels) -> Levels:
    return list(torch.autograd.grad(loss, student))


def in_dtype(loss: Loss, s: Levels, t: Levels, dtype: torch.dtype) -> tuple[Tensor, Levels]:
    wide = [v.detach().cpu().to(dtype).requires_grad_() for v in s]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = loss.published(wide, [v.detach().cpu().to(dtype) for v in t])
    return value.detach(), gradients(value, wide)


def value_bound(loss: Loss, right: Tensor, near: Tensor, levels: int, rounding: float) -> float:
    """How far from `right` in fp64 a value may be whose published form in the same dtype is `near`."""
    return 2 * abs(near - right).item() + 2 * rounding * (abs(right.item()) + loss.unit * levels / 8)


def assert_right(loss: Loss, s: Levels, t: Levels, backend: str, roundings: int = 8) -> None:
    """Within twice the error of the published form in the same dtype (fp32 for 16 bits), and a few roundings."""
    working = accumulate_dtype(*s, *t)
    eps = torch.finfo(working).eps
    if working == torch.float64:  # the truth is rounded to fp64, too
        eps *= 4 * (pkd_condition(*s, *t) if loss.name == "pkd" else 1)
    right, grads = in_dtype(loss, s, t, torch.float64)
    near, near_grads = in_dtype(loss, s, t, working)
    got = loss.ours(s, t, backend=backend)
    assert got.dtype == working
    assert got.shape == ()
    assert abs(got.item() - right.item()) <= value_bound(loss, right, near, len(s), roundings * eps)
    for mine, x, r, e in zip(gradients(got, s), s, grads, near_grads, strict=True):
        assert mine.dtype == x.dtype
        assert mine.stride() == torch.empty_like(x).stride()
        swing = max(r.abs().max().item(), loss.swing(x.detach().cpu()))
        allowed = 2 * (e.double() - r).abs().max().item() + roundings * eps * swing
        off = (mine.cpu().double() - r).abs() - ulp(r, x.dtype)
        assert off.max().item() <= allowed
