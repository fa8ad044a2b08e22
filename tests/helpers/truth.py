"""The loss three more times, none from the package: in fp64 as docs define it, as its authors wrote it, and eager.

    truth     fp64, softplus form, gradients by autograd
    authors   sigmoids of both sides first, then BCE: what the paper's code does; right for |logit| <= 10
    eager     the logits form that a user writes in plain PyTorch; its own error sets the bounds of the tests

And the makers of random pyramids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Levels = list[Tensor]
SMALL = ((2, 8, 12), (2, 3, 7), (2, 1, 1))  # (N, H, W) a level
QFL = ("qfl", "qfl_detached")
CANCELS = (*QFL, "kl", "softmax_kl")  # their values are smaller than what they are made of
MOVES = (*QFL, "softmax_kl")  # their slopes are smaller than what `moves` says
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "misaligned", "rows", "columns")


@dataclass(frozen=True)
class Pyramid:
    """Student and teacher: features (s, t) and class logits (x, z)."""

    s: Levels | None
    t: Levels | None
    x: Levels | None
    z: Levels | None

    @property
    def inputs(self) -> tuple[Levels | None, Levels | None, Levels | None, Levels | None]:
        """In the order of `fsr_loss`."""
        return self.s, self.t, self.x, self.z

    @property
    def student(self) -> Levels:
        return [*(self.s or []), *(self.x or [])]

    def map(self, change: Callable[[Tensor], Tensor]) -> Pyramid:
        """The pyramid with every tensor changed; the student's become leaves that require a gradient."""

        def each(levels: Levels | None, grad: bool) -> Levels | None:
            return None if levels is None else [change(v.detach()).detach().requires_grad_(grad) for v in levels]

        return Pyramid(each(self.s, True), each(self.t, False), each(self.x, True), each(self.z, False))

    def to(self, dtype: torch.dtype) -> Pyramid:
        return self.map(lambda v: v.to(dtype))

    def without(self, *names: str) -> Pyramid:
        return replace(self, **dict.fromkeys(names))


@dataclass(frozen=True)
class Answer:
    loss: Tensor
    feat: Tensor
    cls: Tensor
    feat_per_level: Tensor
    cls_per_level: Tensor
    mask: Levels
    mass: Tensor
    grads: Levels  # of the student's features, then of its logits


def _answer(
    p: Pyramid,
    feat_value: Callable[[Tensor, Tensor], Tensor],
    cls_value: Callable[[Tensor, Tensor], Tensor],
    *,
    feat_weight: float | Tensor = 1.0,
    cls_weight: float | Tensor = 1.0,
    normalizer: str = "mass",
    eps: float = 0.0,
    level_weights: Sequence[float] | None = None,
    mask: Levels | None = None,
) -> Answer:
    levels = len(p.t or p.z or [])
    given = p.t or p.z or []
    if mask is None:
        scores = [torch.sigmoid(z).amax(1) for z in p.z or []]
    else:
        scores = [m.to(v.dtype) for m, v in zip(mask, given, strict=True)]
    feats, classes, masks, masses = [], [], [], []
    for level in range(levels):
        S = scores[level]
        w = 1.0 if level_weights is None else level_weights[level]
        M = S.sum()

        def normalised(value: Tensor, M: Tensor = M, S: Tensor = S, w: float = w) -> Tensor:
            if normalizer == "none":
                M = torch.ones_like(M)
            if normalizer == "total_mass":
                M = sum(v.sum() for v in scores)
            norm = M * (value.shape[1] if normalizer == "mass_channels" else 1) + eps
            return (w * S.unsqueeze(1) * value / norm).sum() if norm != 0 else 0.0 * value.sum()

        zero = S.new_zeros(())
        feats.append(normalised(feat_value(p.s[level], p.t[level])) if p.s else zero)
        classes.append(normalised(cls_value(p.x[level], p.z[level])) if p.x else zero)
        masks.append(S)
        masses.append(M)
    feat, cls = sum(feats), sum(classes)
    loss = feat_weight * feat + cls_weight * cls
    grads = torch.autograd.grad(loss, p.student) if loss.requires_grad else ()
    per_level = (torch.stack(feats).detach(), torch.stack(classes).detach())
    return Answer(
        loss.detach(), feat.detach(), cls.detach(), *per_level, masks, torch.stack(masses), [g.detach() for g in grads]
    )


def softplus(v: Tensor) -> Tensor:
    return F.softplus(v, threshold=50)  # beyond 50 fp64 does not see the difference from v


def value(loss: str, x: Tensor, z: Tensor, temperature: float = 1.0, beta: float = 1.0) -> Tensor:
    """A loss as docs/math.md defines it; of softmax_kl what each channel adds to its group's, of beta channels."""
    d = (x - z).abs()
    if loss == "mse":
        return d**2
    if loss == "l1" or (loss == "smooth_l1" and beta == 0):
        return d
    if loss == "smooth_l1":
        return torch.where(d < beta, d**2 / (2 * beta), d - beta / 2)
    if loss == "softmax_kl":
        log_p, log_q = log_softmax(x / temperature, beta), log_softmax(z / temperature, beta)
        return temperature**2 * log_q.exp() * (log_q - log_p)
    # Where x > 0 that of -x and -z, which is the same: 1 - p and softplus(x) - x q would keep few digits of fp64 there.
    mirror = torch.where(x > 0, -1.0, 1.0)
    x, z = mirror * x / temperature, mirror * z / temperature
    bce = softplus(x) - x * torch.sigmoid(z)
    low = -z.abs()  # likewise
    entropy = softplus(low) - low * torch.sigmoid(low)
    if loss in QFL:
        bce = bce * power(torch.sigmoid(x) - torch.sigmoid(z), beta, detach=loss == "qfl_detached")
    return temperature**2 * (bce - entropy if loss == "kl" else bce)


def log_softmax(v: Tensor, group: float) -> Tensor:
    """Of each `group` neighbouring channels, all of them where it is 0."""
    size = int(group) or v.shape[1]
    return v.unflatten(1, (v.shape[1] // size, size)).log_softmax(2).flatten(1, 2)


def power(d: Tensor, beta: float, *, detach: bool) -> Tensor:
    """|d|^beta, and where d is 0 a derivative of 0, which autograd gives to no beta < 1."""
    if beta == 0:
        return torch.ones_like(d)
    d = d.detach() if detach else d
    return torch.where(d == 0, 0.0, torch.where(d == 0, 1.0, d.abs()) ** beta)


def size(loss: str, x: Tensor, z: Tensor, temperature: float = 1.0, beta: float = 1.0, eps: float = 1e-7) -> Tensor:
    """What the roundings of a value are relative to, where it is more than the value: sums of what may cancel in it.

    kl and softmax_kl are differences of two entropies; those of a group of one are 0 but for a rounding of 1. qfl is a
    power of a difference of two probabilities, which is off by `eps` of the smaller of p and 1 - p.
    """
    if loss not in CANCELS:
        return value(loss, x, z, temperature, beta)
    if loss == "softmax_kl":
        q = log_softmax(z / temperature, beta).exp()
        return value(loss, x, z, temperature, beta).abs() + temperature**2 * eps * q
    bce = value("bce", x, z, temperature)
    if loss == "kl" or beta == 0:
        return bce
    p, q = (torch.sigmoid(v / temperature) for v in (x, z))
    d = (p - q).abs().clamp_min(eps)
    return bce * (d**beta + beta * d ** (beta - 1) * (p * (1 - p) + q * (1 - q)))


def moves(loss: str, x: Tensor, z: Tensor, temperature: float = 1.0, beta: float = 1.0, eps: float = 1e-7) -> Tensor:
    """As a value: its gradient is what the roundings of a slope are relative to, for qfl what moves with d, for
    softmax_kl both probabilities."""
    if loss == "softmax_kl":
        p, q = (log_softmax(v / temperature, beta).exp() for v in (x, z))
        return (temperature * (p + q)).detach() * x
    if loss not in QFL or beta == 0:
        return value(loss, x, z, temperature, beta)
    bce = value("bce", x, z, temperature) / temperature**2
    p, q = (torch.sigmoid(v / temperature) for v in (x, z))
    d = (p - q).abs().clamp_min(eps)
    with_weight = (beta + 1) * d**beta
    within = beta * abs(beta - 1) * d ** (beta - 2) * p * (1 - p) * bce * (loss == "qfl")
    return (temperature * (with_weight + within) * (p + q)).detach() * x


def eager_value(loss: str, x: Tensor, z: Tensor, temperature: float = 1.0, beta: float = 1.0) -> Tensor:
    """What PyTorch has for it."""
    if loss == "mse":
        return F.mse_loss(x, z, reduction="none")
    if loss == "l1":
        return F.l1_loss(x, z, reduction="none")
    if loss == "smooth_l1":
        return F.smooth_l1_loss(x, z, reduction="none", beta=beta)
    x, z = x / temperature, z / temperature
    if loss == "softmax_kl":
        target = log_softmax(z, beta).exp()
        return temperature**2 * F.kl_div(log_softmax(x, beta), target, reduction="none")
    bce = F.binary_cross_entropy_with_logits(x, z.sigmoid(), reduction="none")
    if loss == "kl":
        bce = bce - F.binary_cross_entropy_with_logits(z, z.sigmoid(), reduction="none")
    if loss in QFL:
        bce = bce * power(x.sigmoid() - z.sigmoid(), beta, detach=loss == "qfl_detached")
    return temperature**2 * bce


def _values(
    of: Callable[..., Tensor], feat_loss: str, cls_loss: str, temperature: float, beta: float, group_size: int
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    of_cls = group_size if cls_loss == "softmax_kl" else beta
    return partial(of, feat_loss, beta=beta), partial(of, cls_loss, temperature=temperature, beta=of_cls)


def truth(
    p: Pyramid,
    *,
    feat_loss: str = "mse",
    cls_loss: str = "bce",
    temperature: float = 1.0,
    beta: float = 1.0,
    group_size: int = 0,
    of: Callable[..., Tensor] = value,
    **options: Any,
) -> Answer:
    """The definition, in fp64, of the values the tensors hold; or `size` in its place.

    Of softmax_kl each `group_size` channels are a group, all of them where it is 0.
    """
    values = _values(of, feat_loss, cls_loss, temperature, beta, group_size)
    return _answer(p.map(lambda v: v.double().contiguous()), *values, **options)


def authors(p: Pyramid, **options: Any) -> Answer:
    """What the paper's code computes, in the dtype of the inputs."""

    def cls_value(x: Tensor, z: Tensor) -> Tensor:
        return F.binary_cross_entropy(x.sigmoid(), z.sigmoid(), reduction="none")

    return _answer(p.map(torch.clone), partial(value, "mse"), cls_value, **options)


def eager(
    p: Pyramid,
    *,
    dtype: torch.dtype = torch.float32,
    feat_loss: str = "mse",
    cls_loss: str = "bce",
    temperature: float = 1.0,
    beta: float = 1.0,
    group_size: int = 0,
    **options: Any,
) -> Answer:
    """What a user writes with PyTorch's own losses, in `dtype`.

    Contiguous, since PyTorch's sigmoid of numbers in a row and of numbers apart differ in the last bit, and with it the
    slope of qfl where student and teacher agree.
    """
    return _answer(
        p.map(lambda v: v.to(dtype).contiguous()),
        *_values(eager_value, feat_loss, cls_loss, temperature, beta, group_size),
        **options,
    )


def lay_out(v: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; what lies around them is NaN."""
    n, c, h, w = v.shape
    if layout == "contiguous":
        return v.contiguous()
    if layout == "channels_last":
        return v.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return v.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "sliced":
        big = v.new_full((n, c + 2, h + 1, 2 * w + 1), float("nan"))
        return big[:, 1 : c + 1, :h, 1::2].copy_(v)
    if layout == "rows":  # a level among others, packed as (N, P, C)
        big = v.new_full((n, 3 + h * w + 2, c), float("nan"))
        return big[:, 3 : 3 + h * w].unflatten(1, (h, w)).permute(0, 3, 1, 2).copy_(v)
    if layout == "columns":  # packed as (N, C, P)
        big = v.new_full((n, c, 16 + h * w + 8), float("nan"))
        return big[:, :, 16 : 16 + h * w].unflatten(2, (h, w)).copy_(v)
    if layout == "misaligned":
        big = v.new_full((v.numel() + 64,), float("nan"))
        return big[33 : 33 + v.numel()].view(v.shape).copy_(v)
    raise ValueError(layout)


def pyramid(
    rng: torch.Generator,
    *,
    sizes: Sequence[tuple[int, int, int]] = SMALL,
    channels: int = 5,
    classes: int = 7,
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    teacher_dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    layout: str = "contiguous",
    teacher_layout: str | None = None,
    device: str = "cpu",
    spread: float = 3.0,
) -> Pyramid:
    """Random features, and logits with the bias to the negative that a detector's have."""

    def make(count: int, scale: float, shift: float, kind: Any, how: str, grad: bool) -> Levels:
        kinds = [kind] * len(sizes) if isinstance(kind, torch.dtype) else kind
        return [
            lay_out((torch.randn(n, count, h, w, generator=rng) * scale + shift).to(device, k), how).requires_grad_(
                grad
            )
            for (n, h, w), k in zip(sizes, kinds, strict=True)
        ]

    teacher_dtype = teacher_dtype or dtype
    teacher_layout = teacher_layout or layout
    return Pyramid(
        make(channels, 1.0, 0.0, dtype, layout, True),
        make(channels, 1.0, 0.2, teacher_dtype, teacher_layout, False),
        make(classes, spread, -1.0, dtype, layout, True),
        make(classes, spread, -1.0, teacher_dtype, teacher_layout, False),
    )
