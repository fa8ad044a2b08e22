"""The losses in plain PyTorch: the value of a student's x against a teacher's z, and its derivative by x.

    mse         (x - z)^2                                           2 (x - z)
    l1          |x - z|                                             sign(x - z)
    smooth_l1   d^2 / (2 beta) where |d| < beta, else |d| - beta/2  d / beta, or sign(d)        d = x - z
    bce         softplus(x) - x sigmoid(z)                          sigmoid(x) - sigmoid(z)
    kl          bce(x, z) - bce(z, z)                               as bce
    qfl         |d|^beta bce(x, z)                                  |d|^beta d + beta |d|^(beta-1) sign(d) p (1 - p) bce
    qfl_detached  as qfl                                            |d|^beta d          d = p - q, the slope of bce

with p = sigmoid(x) and q = sigmoid(z): the pointwise ones. Of a group of channels j

    softmax_kl  sum_j q_j (log q_j - log p_j)                       p_j - q_j       p = softmax(x), q = softmax(z)

A loss is one entry of LOSSES; every name, check and default elsewhere is read from it. docs/math.md derives the
formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ValueAndSlope = tuple[Tensor | None, Tensor]


class Pointwise(NamedTuple):
    """A loss: `at(x, z, beta, want_value)` is its value (None where it is not wanted) and slope, element by element.

    Both are new tensors, which the caller may change in place; x and z stay.
    """

    at: Callable[..., ValueAndSlope]
    takes_logits: bool  # x and z are logits, which a temperature divides


class Grouped(NamedTuple):
    """A loss of groups of channels: `at(x, z, beta, want_value)` as above, but the value is one of each group.

    x, z and the slope are (N, C, ...), the value is (N, C / size, ...), the size being `group_size(beta, C)`.
    """

    at: Callable[..., ValueAndSlope]
    takes_logits: bool


def group_size(beta: float, channels: int) -> int:
    """How many of the channels a group has, which the table of terms holds as `beta`: 0 stands for all.

    Raises:
        RuntimeError: it is no whole number, or does not divide the channels.
    """
    size = beta or channels
    if not size > 0 or size % 1 or channels % size:
        raise RuntimeError(
            f"beta={beta:g}: a group of softmax_kl must have a whole number of channels that divides {channels}, or 0"
            " for all"
        )
    return int(size)


def mse(x: Tensor, z: Tensor, _: float, want_value: bool = True) -> ValueAndSlope:
    d = x - z
    return d.square() if want_value else None, d.mul_(2)


def l1(x: Tensor, z: Tensor, _: float, want_value: bool = True) -> ValueAndSlope:
    d = x - z
    slope = torch.where(d.isnan(), d, d.sign())  # sign(NaN) is 0
    return d.abs_() if want_value else None, slope


def smooth_l1(x: Tensor, z: Tensor, beta: float, want_value: bool = True) -> ValueAndSlope:
    """Both halves as one: with slope = d / beta, clamped to [-1, 1], the value is slope (d - slope beta / 2)."""
    if beta < torch.finfo(x.dtype).tiny:  # a GPU divides by a number through its reciprocal, which is infinite then
        return l1(x, z, beta, want_value)
    d = x - z
    slope = (d / beta).clamp_(-1, 1)
    return d.sub_(slope, alpha=beta / 2).mul_(slope) if want_value else None, slope


def bce(x: Tensor, z: Tensor, _: float, want_value: bool = True) -> ValueAndSlope:
    """Mirrored, so that the student is on the positive side, nothing cancels where logits saturate.

    With tail = sigmoid(-|x|), and miss = sigmoid(-z), or sigmoid(z) where x < 0,

        bce = softplus(-|x|) + |x| miss        slope = sign(x) (miss - tail)        softplus(-|x|) = -log(1 - tail)
    """
    flip = torch.copysign(x.new_ones(()), x).neg_()
    near = x * flip
    tail = torch.sigmoid(near)
    miss = (z * flip).sigmoid_()
    value = _mirrored(near, tail, miss) if want_value else None
    return value, tail.sub_(miss).mul_(flip)


def kl(x: Tensor, z: Tensor, beta: float, want_value: bool = True) -> ValueAndSlope:
    value, slope = bce(x, z, beta, want_value)
    if value is not None:
        near = z.abs().neg_()
        tail = torch.sigmoid(near)
        value.sub_(_mirrored(near, tail, tail))  # as in bce, to the last bit: 0 where they agree
    return value, slope


def qfl(x: Tensor, z: Tensor, beta: float, want_value: bool = True) -> ValueAndSlope:
    bce_value, d = bce(x, z, beta)
    assert bce_value is not None
    if beta == 0:
        return bce_value if want_value else None, d
    power = _power_of_size(d, beta - 1)
    slope = (torch.sigmoid(x) * torch.sigmoid(-x)).mul_(bce_value).mul_(power).mul_(beta).mul_(d.sign())
    weight = power.mul_(d.abs())
    slope.addcmul_(weight, d)
    return weight.mul_(bce_value) if want_value else None, slope


def qfl_detached(x: Tensor, z: Tensor, beta: float, want_value: bool = True) -> ValueAndSlope:
    """The weight |d|^beta is a constant to the gradient."""
    bce_value, d = bce(x, z, beta, want_value)
    if beta == 0:
        return bce_value, d
    weight = _power_of_size(d, beta - 1).mul_(d.abs())
    return None if bce_value is None else bce_value.mul_(weight), d.mul_(weight)


def softmax_kl(x: Tensor, z: Tensor, beta: float, want_value: bool = True) -> ValueAndSlope:
    """As a sum of numbers that are not negative, since the probabilities of both sides add up to 1: with t = log p / q,

        q log(q / p)  becomes  p - q - q t = q (exp(t) - 1 - t)

    Near 0 the first form would lose what is left of q log(q / p) when most of the sum has cancelled.
    """
    groups = x.shape[1] // group_size(beta, x.shape[1])
    a, b = (v.unflatten(1, (groups, -1)).log_softmax(2) for v in (x, z))
    q = b.exp()
    slope = a.exp().sub_(q)
    if not want_value:
        return None, slope.flatten(1, 2)
    t = a.sub_(b).clamp_max_(torch.finfo(a.dtype).max)  # of a class that the teacher masks with -inf
    near = t.expm1().sub_(t).mul_(q)
    value = torch.where(t.abs() < 1, near, slope - q * t).sum(2)
    return value, slope.flatten(1, 2)


def _power_of_size(d: Tensor, exponent: float) -> Tensor:
    """|d|^exponent, that of the smallest normal number where |d| is less: finite, so that 0 times it is 0."""
    return d.abs().clamp_min_(torch.finfo(d.dtype).tiny).pow_(exponent)


def _mirrored(near: Tensor, tail: Tensor, miss: Tensor) -> Tensor:
    """softplus(near) - near miss, with tail = sigmoid(near)."""
    return tail.neg().log1p_().addcmul_(near, miss).neg_()


LOSSES: dict[str, Pointwise | Grouped] = {
    "mse": Pointwise(mse, takes_logits=False),
    "l1": Pointwise(l1, takes_logits=False),
    "smooth_l1": Pointwise(smooth_l1, takes_logits=False),
    "bce": Pointwise(bce, takes_logits=True),
    "kl": Pointwise(kl, takes_logits=True),
    "qfl": Pointwise(qfl, takes_logits=True),
    "qfl_detached": Pointwise(qfl_detached, takes_logits=True),
    "softmax_kl": Grouped(softmax_kl, takes_logits=True),
}
FEAT_LOSSES = tuple(name for name, loss in LOSSES.items() if not loss.takes_logits)
CLS_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.takes_logits)
