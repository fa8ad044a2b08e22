"""Heads whose logits are softmaxes over groups, and softmax_kl of them written out number by number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from truth import lay_out

from frs_kernels import masked_imitation_loss

SIZES = ((2, 7, 9), (1, 1, 1))


class Heads(NamedTuple):
    x: list[Tensor]
    z: list[Tensor]
    mask: list[Tensor]


class Expected(NamedTuple):
    loss: float
    grads: list[Tensor]
    sizes: list[float]  # the largest of what is subtracted in each of them


def heads(
    rng: torch.Generator, device: str, channels: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous",
    teacher_dtype: torch.dtype | None = None, teacher_layout: str | None = None, spread: float = 3.0,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
) -> Heads:  # fmt: skip
    def make(n: int, h: int, w: int, kind: torch.dtype, how: str) -> Tensor:
        return lay_out((torch.randn(n, channels, h, w, generator=rng) * spread).to(device, kind), how)

    x = [make(*size, dtype, layout).requires_grad_() for size in sizes]
    z = [make(*size, teacher_dtype or dtype, teacher_layout or layout) for size in sizes]
    mask_dtype = torch.float64 if torch.float64 in (dtype, teacher_dtype) else torch.float32
    return Heads(x, z, [torch.rand(size, generator=rng).to(device, mask_dtype) for size in sizes])


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    return [v - top - math.log(math.fsum(math.exp(u - top) for u in values)) for v in values]


def written_out(of: Heads, group: int, tau: float = 1.0, joint: bool = False, per_channel: bool = False) -> Expected:
    """The loss and its gradient as plain loops over Python's floats, which are fp64, p and q exactly as defined."""
    masses = [m.double().sum().item() for m in of.mask]
    loss, grads, sizes = 0.0, [], []
    for level, (x, z, mask) in enumerate(zip(of.x, of.z, of.mask, strict=True)):
        mass = sum(masses) if joint else masses[level]
        mass *= x.shape[1] if per_channel else 1
        size = group or x.shape[1]
        grad, largest = torch.zeros(x.shape, dtype=torch.float64), 0.0
        for b, g, i, j in torch.cartesian_prod(
            *(torch.arange(n) for n in (x.shape[0], x.shape[1] // size, *x.shape[2:]))
        ).tolist():
            channels = slice(g * size, (g + 1) * size)
            log_p, log_q = (
                log_softmax([v / tau for v in levels[b, channels, i, j].detach().tolist()]) for levels in (x, z)
            )
            share = mask[b, i, j].item() / mass if mass else 0.0
            loss += share * tau**2 * math.fsum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
            slope = [share * tau * (math.exp(p) - math.exp(q)) for p, q in zip(log_p, log_q, strict=True)]
            grad[b, channels, i, j] = torch.tensor(slope, dtype=torch.float64)
            largest = max(largest, share * tau * math.exp(max(*log_p, *log_q)))
        grads.append(grad)
        sizes.append(largest)
    return Expected(loss, grads, sizes)


def loss_of(of: Heads, group: int, **options: Any) -> Any:
    return masked_imitation_loss(of.x, of.z, of.mask, loss="softmax_kl", group_size=group or None, **options)


def assert_is(loss: Tensor, of: Heads, expected: Expected, factor: float = 1.0) -> None:
    dtype = of.x[0].dtype
    working = torch.float64 if torch.float64 in (dtype, of.z[0].dtype) else torch.float32
    assert loss.dtype == working
    eps = torch.finfo(working).eps
    assert abs(loss.item() - factor * expected.loss) <= 16 * eps * factor * abs(expected.loss) + 1e-18
    for grad, x, right, size in zip(torch.autograd.grad(loss, of.x), of.x, *expected[1:], strict=True):
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(x).stride()
        error = (grad.cpu().double() - factor * right).abs().max()
        assert error <= factor * (torch.finfo(dtype).eps * right.abs().max() + 16 * eps * size)
