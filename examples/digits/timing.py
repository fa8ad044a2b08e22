"""Time the distillation loss alone, forward and backward, on one batch of the example."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import frs_kernels

AUTHORS_LOOP = "sigmoid-then-BCE loop"


def authors_loop(
    student_feats: list[Tensor],
    teacher_feats: list[Tensor],
    student_logits: list[Tensor],
    teacher_logits: list[Tensor],
    feat_weight: float,
    cls_weight: float,
) -> Tensor:
    """The loss in eager PyTorch, level by level, on probabilities: the paper's formulas."""
    total = student_feats[0].new_zeros(())
    for s, t, x, z in zip(student_feats, teacher_feats, student_logits, teacher_logits, strict=True):
        probability, target = x.sigmoid(), z.sigmoid()
        mask = target.amax(1, keepdim=True)
        feat = (F.mse_loss(s, t, reduction="none") * mask).sum() / mask.sum()
        entropy = F.binary_cross_entropy(probability, target, reduction="none")
        total = total + feat_weight * feat + cls_weight * (entropy * mask).sum() / mask.sum()
    return total


def time_losses(
    teacher_feats: list[Tensor],
    teacher_logits: list[Tensor],
    feat_weight: float,
    cls_weight: float,
    *,
    repeats: int = 30,
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds (median) of each backend and of the authors' loop, and why others are absent.

    The students' tensors are random, of the teacher's shapes.
    """
    generator = torch.Generator().manual_seed(0)

    def student(levels: list[Tensor]) -> list[Tensor]:
        return [torch.randn(level.shape, generator=generator).to(level.device).requires_grad_() for level in levels]

    feats, logits = student(teacher_feats), student(teacher_logits)
    tensors = (feats, teacher_feats, logits, teacher_logits)
    losses: dict[str, Callable[[], Tensor]] = {AUTHORS_LOOP: partial(authors_loop, *tensors, feat_weight, cls_weight)}
    absent: dict[str, str] = {}
    device = teacher_feats[0].device.type
    backends = {"cuda": ("cuda", "triton", "torch")}.get(device, ("cpu", "torch"))
    for backend, why in frs_kernels.backends.available().items():
        if why is None and backend in backends:
            losses[f"fsr_loss, {backend}"] = partial(
                frs_kernels.fsr_loss,
                *tensors,
                feat_weight=feat_weight,
                cls_weight=cls_weight,
                backend=backend,
            )
        else:
            absent[backend] = why or f"not for tensors on {device}"
    leaves = [*feats, *logits]
    return {name: _median_ms(loss, leaves, repeats) for name, loss in losses.items()}, absent


def _median_ms(loss: Callable[[], Tensor], leaves: list[Tensor], repeats: int) -> float:
    seconds = []
    for _ in range(5 + repeats):
        for leaf in leaves:
            leaf.grad = None
        start = _now(leaves[0])
        loss().backward()
        seconds.append(_now(leaves[0]) - start)
    return 1000 * statistics.median(seconds[5:])


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
