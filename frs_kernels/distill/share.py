"""`GradientShare`: how hard one term pulls beside all other losses, measured in the backward pass, and held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from frs_kernels import checks


class GradientShare(nn.Module):
    """The gradient of one term at a list of tensors, beside that of all other losses.

        share = GradientShare(0.3)
        term = imitate(share.watch(feats))                # the same values; other losses take feats as they are
        (own_loss(feats) + ramp * share.weight * term).backward()
        share.update(ramp)

    With t_i the term's gradient at tensor i, which comes back through `watch`, and g_i that of everything that is
    differentiated together, `update` moves `weight` towards that at which the term would pull `target` times as hard
    as the rest:

        weight * ramp * target * sqrt(sum_i |g_i - t_i|^2 / sum_i |t_i|^2)

    The mean is of logarithms, over the first updates plain, then exponential. There is no second backward pass and no
    wait for the device; a loss scale cancels; a pass without either gradient, or one that overflowed, changes nothing.
    `weight` is a buffer and saved. Each process has its own, unless `update` is given a group, whose ranks all call it.

    Args:
        target: the share that is wanted, above 0; None measures alone.
        weight: that of the first pass.
        momentum: of the exponential mean, from 0 to below 1.

    Raises:
        ValueError: target or weight is not above 0.
    """

    weight: Tensor  # ()
    updates: Tensor  # ()

    def __init__(self, target: float | None = None, weight: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__()
        if target is not None:
            checks.check_number("target", target, positive=True)
        checks.check_number("weight", weight, positive=True)
        self.target = target
        self.momentum = momentum
        self.register_buffer("weight", torch.tensor(float(weight)))
        self.register_buffer("updates", torch.tensor(0))
        self.own: Tensor | None = None
        """(L,), of the passes before the last update: the norm of the rest's gradient at each tensor."""
        self.term: Tensor | None = None
        """(L,), the norm of the term's."""
        self._seen: list[_Seen] = []

    @property
    def levels(self) -> Tensor | None:
        """(L,), what `term` is of `own`, a number a tensor that was watched; None before the first update."""
        return None if self.term is None or self.own is None else self.term / self.own

    def watch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, for the term alone."""
        return [self._watch(x) if x.requires_grad and torch.is_grad_enabled() else x for x in tensors]

    def _watch(self, x: Tensor) -> Tensor:
        seen = _Seen()
        self._seen.append(seen)
        x.register_hook(seen.total)
        watched: Tensor = _Branch.apply(x, seen)  # type: ignore[no-untyped-call]
        return watched

    @torch.no_grad()
    def update(self, ramp: float = 1.0, process_group: Any = None) -> None:
        """Take what the backward passes since the last update have shown.

        Args:
            ramp: what multiplied `weight` in them.
            process_group: the norms are those of the gradients of all its ranks together.
        """
        seen = [s for s in self._seen if s.own is not None and s.term is not None]
        self._seen = []
        squares = self.weight.new_zeros(2)
        if seen:
            norms = torch.stack([torch.stack([getattr(s, name) for s in seen]) for name in ("own", "term")])
            self.own, self.term = norms
            squares = norms.square().sum(1)
        elif process_group is None:
            return
        if self.target is None:
            return
        if process_group is not None:
            torch.distributed.all_reduce(squares, group=process_group)
        own, term = squares.sqrt()
        change = (self.target * ramp * own / term).log()
        keep = (self.updates / (self.updates + 1)).clamp(max=self.momentum)
        usable = change.isfinite()
        self.weight.mul_(torch.where(usable, (1 - keep) * change, 0).exp())
        self.updates.add_(usable)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follows to a device, and keeps dtype and value: also in a model of 16 bits, and through to_empty()."""
        kept = {"weight": self.weight, "updates": self.updates}
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        for name, value in kept.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy waits for no backward pass."""
        return {**self.__dict__, "_seen": []}

    def extra_repr(self) -> str:
        return f"target={self.target}, momentum={self.momentum}"


class _Seen:
    """Norms of the gradients at one tensor in one backward pass."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.own: Tensor | None = None
        self.term: Tensor | None = None

    def total(self, gradient: Tensor) -> None:
        """With that of the term, which has come before; gradients of further backward passes add up."""
        of_term, self.gradient = self.gradient, None
        with torch.no_grad():
            self.own = _joined(self.own, gradient if of_term is None else gradient - of_term)
            if of_term is not None:
                self.term = _joined(self.term, of_term)


def _joined(norm: Tensor | None, gradient: Tensor) -> Tensor:
    """The norm of what was seen and this gradient together, fp32."""
    more: Tensor = torch.linalg.vector_norm(gradient.float() if gradient.dtype.itemsize == 2 else gradient).float()
    return more if norm is None else torch.hypot(norm, more)


class _Branch(torch.autograd.Function):
    """The identity, which shows the gradient that comes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: _Seen) -> Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.seen.gradient = gradient
        return gradient, None
