"""The losses along rows in plain PyTorch: each row of a student against the teacher's, both normalised first.

    pkd   a row: a channel over N, H, W.  value = mean (u - v)^2 / 2,  u = (s - mean s) / (std s + eps),  v: as u, of t
    cwd   a row: a channel of an image over H, W.  value = tau^2 KL(softmax(t / tau) || softmax(s / tau))

A level's value is the mean over its rows, its gradient by s affine in what the row's numbers tell of each s and t:

    gradient = a f(s - s0) - b f(t - t0) + c                    f(d) = d (pkd), exp(d / tau) (cwd)

so that a first pass over s and t finds (s0, t0, a, b, c) of every row, and a second one the gradient. Nothing else is
kept. docs/math.md derives the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 5
"""Of a row: s0, t0, a, b, c."""


class Rows(NamedTuple):
    """A loss: `of(s, t, scale, temperature, eps)` is scale * value, 0-dim, and the rows' numbers, (rows, 5).

    s and t are one level, (N, C, H, W) in the dtype that is computed in. A level without positions is 0.
    """

    of: Callable[[Tensor, Tensor, float, float, float], tuple[Tensor, Tensor]]
    per_image: bool  # a row is a channel of an image, else a channel of all
    exponential: bool  # f

    def count(self, level: Tensor) -> int:
        """How many rows an (N, C, H, W) level has."""
        return level.shape[0] * level.shape[1] if self.per_image else level.shape[1]


def pkd(s: Tensor, t: Tensor, scale: float, _: float, eps: float) -> tuple[Tensor, Tensor]:
    """Sums of what is left of the means as they are rounded: far from 0 nothing cancels.

    With n numbers a row, m = 1 / (n C), the sums S = sum (s - mean s)^2 and X = sum (s - mean s) (t - mean t), the
    deviations sigma = sqrt(S / (n - 1)) of s and rho of t, and p = 1 / (sigma + eps), q = 1 / (rho + eps),

        value = m / 2 (p^2 S + q^2 T - 2 p q X)        a = m p (eps p^2 + p q X / ((n - 1) sigma))        b = m p q

    Where a deviation and eps are both 0, p or q is 0; a row of one number is 0. The value is formed as

        m / 2 ((n - 1) (p sigma - q rho)^2 + 2 p q (sqrt(S T) - X))

    in which nothing cancels where p and q are far apart, and both parts are 0 where student and teacher agree.
    """
    n, channels = s.numel() // s.shape[1], s.shape[1]
    if n < 2:
        return s.sum() * 0, s.new_zeros(channels, NUMBERS)
    means, sums = (torch.cat(parts, 1) for parts in zip(*(_sums(x, z) for x, z in _blocks(s, t)), strict=True))
    d_sum, e_sum, dd, ee, de = sums
    square_s, square_t = (dd - d_sum * d_sum / n).clamp_min(0), (ee - e_sum * e_sum / n).clamp_min(0)
    most = torch.where(square_s == square_t, square_s, square_s.sqrt() * square_t.sqrt())
    product = (de - d_sum * e_sum / n).clamp(-most, most)
    sigma, rho = ((square / (n - 1)).sqrt() for square in (square_s, square_t))
    p, q = (torch.where(deviation + eps == 0, 0.0, 1 / (deviation + eps)) for deviation in (sigma, rho))
    share = scale / (n * channels)
    length_s, length_t = (torch.where(v == 0, 0.0, v / (v + eps)) for v in (sigma, rho))
    values = (n - 1) * (length_s - length_t).square() + 2 * p * q * (most - product)
    value = values.sum() * (share / 2)
    pull = torch.where(sigma == 0, 0.0, p * q * product / ((n - 1) * sigma))
    a, b = share * p * (eps * p * p + pull), share * p * q
    c = b * (e_sum / n) - a * (d_sum / n)
    numbers = [*means.double(), a, b, c]
    return value.to(s.dtype), torch.stack(numbers, 1).to(s.dtype)


def _sums(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The channels' means (2, C), and the sums (5, C) of d, e, d^2, e^2 and d e, what is left of s and of t."""
    over = (0, 2, 3)
    means = [v.mean(over, keepdim=True) for v in (s, t)]
    d, e = s - means[0], t - means[1]
    sums = [d.sum(over), e.sum(over), *((x * y).sum(over) for x, y in ((d, d), (e, e), (d, e)))]
    return torch.stack([v.flatten() for v in means]), torch.stack(sums).double()


def _blocks(s: Tensor, t: Tensor) -> list[tuple[Tensor, ...]]:
    """Some channels of both at a time: what is computed on the way stays in a CPU's caches.

    A compiler cuts by itself; a GPU has no use for it.
    """
    if torch.compiler.is_compiling() or s.device.type != "cpu":
        return [(s, t)]
    channels = max(16, (1 << 17) * s.shape[1] // s.numel())  # 64 bytes where channels are inner
    return list(zip(s.split(channels, 1), t.split(channels, 1), strict=True))


def cwd(s: Tensor, t: Tensor, scale: float, temperature: float, _: float) -> tuple[Tensor, Tensor]:
    """With the sums Z of exp((s - max s) / tau), and Z' of t's: a = scale tau / (N C) / Z, b with Z'."""
    rows = s.shape[0] * s.shape[1]
    if s.numel() == 0:
        return s.sum(), s.new_zeros(rows, NUMBERS)
    parts = zip(*(_weights(x, z, temperature) for x, z in _blocks(s, t)), strict=True)
    most_s, most_t, total_s, total_t, apart = (torch.cat(part, 1) for part in parts)
    kl = apart / total_t + total_s.log() - total_t.log()
    share = scale / rows
    a, b = (share * temperature / total for total in (total_s, total_t))
    numbers = [most_s, most_t, a, b, torch.zeros_like(a)]
    return (kl.sum() * (share * temperature**2)).to(s.dtype), torch.stack(numbers, 2).flatten(0, 1).to(s.dtype)


def _weights(s: Tensor, t: Tensor, temperature: float) -> list[Tensor]:
    """(N, C) each: maxima, sums of exponentials, and of t's times how far the shifted logits of t are above s's."""
    most = [v.amax((2, 3), keepdim=True) for v in (s, t)]
    x, z = ((v - m) / temperature for v, m in zip((s, t), most, strict=True))
    weights = z.exp()
    apart = weights * (z - x)
    return [*(m[:, :, 0, 0].double() for m in most), *(v.sum((2, 3)).double() for v in (x.exp_(), weights, apart))]


ROW_LOSSES = {
    "pkd": Rows(pkd, per_image=False, exponential=False),
    "cwd": Rows(cwd, per_image=True, exponential=True),
}


def row_loss(name: str) -> Rows:
    """Raises RuntimeError where there is none of that name."""
    if name not in ROW_LOSSES:
        raise RuntimeError(f"loss {name!r} is unknown; the valid ones are {', '.join(map(repr, ROW_LOSSES))}")
    return ROW_LOSSES[name]
