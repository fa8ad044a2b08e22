"""What a call costs before it computes anything: a step on levels of one position.

The yardstick is an `autograd.Function` that takes the same tensors and computes nothing: what PyTorch asks for any
function of 20 tensors with 10 gradients. It runs in turn with the losses, so that their ratio is not the machine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from grid import Case
from measure import Loss, Step, interleaved, launches, spread
from torch import Tensor

CASE = Case("gfl", 8, 8, 1)
TRIVIAL = "trivial autograd.Function"
TARGET = 1.6  # times the trivial one


class Trivial(torch.autograd.Function):
    """Takes features and logits of student and teacher, in this order; its gradients are new and hold nothing."""

    @staticmethod
    def forward(ctx: Any, levels: int, *tensors: Tensor) -> Tensor:
        ctx.levels = levels
        ctx.grads = [torch.empty_like(x) for i, x in enumerate(tensors) if i // levels in (0, 2)]
        return tensors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        none = [None] * ctx.levels
        return None, *ctx.grads[: ctx.levels], *none, *ctx.grads[ctx.levels :], *none


def trivial(s: list[Tensor], t: list[Tensor], x: list[Tensor], z: list[Tensor]) -> Tensor:
    found: Tensor = Trivial.apply(len(s), *s, *t, *x, *z)  # type: ignore[no-untyped-call]
    return found


def measure_host(losses: dict[str, Loss], device: str, seconds: float = 5.0) -> dict[str, dict[str, float]]:
    """Seconds and launches of a step, by name; the trivial one first."""
    inputs = CASE.inputs(device)
    students = [*inputs[0], *inputs[2]]

    def timed(loss: Loss, calls: int = 10) -> Callable[[], float]:
        def run() -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                torch.autograd.grad(loss(*inputs), students)
            return (time.perf_counter() - begin) / calls

        return run

    losses = {TRIVIAL: trivial, **losses}
    times = interleaved({name: timed(loss) for name, loss in losses.items()}, seconds, least=9, most=99)
    return {
        name: {"seconds": spread(runs).median, "launches": launches(Step(losses[name], [inputs], 1.0), device)}
        for name, runs in times.items()
    }
