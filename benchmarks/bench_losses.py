"""The other losses: each against its published form in eager PyTorch, that form compiled, and the floor of the memory.

On features or class logits of GFL's pyramid, 400x672, batch 4, and on the 4 x 17 bins of its boxes. Each implementation
is checked against the published form in fp64 before it is timed: loss and gradients. A wrong one is reported as wrong
and has no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from grid import Case
from measure import Step, copies_of, copy_bandwidth, graph_seconds, interleaved, spread
from torch import Tensor

import frs_kernels

CASE = Case("gfl", 400, 672, 4)
QUICK = Case("gfl", 256, 320, 1)  # so many positions on the last level that a channel has a deviation
Levels = list[Tensor]


def quality_focal(x: Levels, z: Levels, beta: float, detach: bool) -> Tensor:
    """Li et al., Generalized Focal Loss, with the teacher's probabilities as targets; a level's mean over positions."""
    loss = x[0].new_zeros(())
    for a, b in zip(x, z, strict=True):
        target = b.sigmoid()
        weight = (a.sigmoid() - target).abs()
        weight = weight if beta == 1 else weight.pow(beta)
        value = F.binary_cross_entropy_with_logits(a, target, reduction="none") * (
            weight.detach() if detach else weight
        )
        loss = loss + value.sum() / (a.shape[0] * a.shape[2] * a.shape[3])
    return loss


def pkd(s: Levels, t: Levels) -> Tensor:
    """Cao et al., PKD, as its authors' PKDLoss in mmrazor has it."""

    def norm(v: Tensor) -> Tensor:
        n, c, h, w = v.shape
        v = v.permute(1, 0, 2, 3).reshape(c, -1)
        v = (v - v.mean(-1, keepdim=True)) / (v.std(-1, keepdim=True) + 1e-6)
        return v.reshape(c, n, h, w).permute(1, 0, 2, 3)

    loss = s[0].new_zeros(())
    for a, b in zip(s, t, strict=True):
        loss = loss + F.mse_loss(norm(a), norm(b)) / 2
    return loss


def cwd(s: Levels, t: Levels, tau: float) -> Tensor:
    """Shu et al., CWD, as mmrazor's ChannelWiseDivergence has it."""
    loss = s[0].new_zeros(())
    for a, b in zip(s, t, strict=True):
        n, c, h, w = a.shape
        teacher = F.softmax(b.reshape(-1, h * w) / tau, dim=1)
        logs = [F.log_softmax(v.reshape(-1, h * w) / tau, dim=1) for v in (b, a)]
        loss = loss + torch.sum(teacher * logs[0] - teacher * logs[1]) * tau**2 / (c * n)
    return loss


def softmax_divergence(x: Levels, z: Levels, group: int, tau: float, per_channel: bool) -> Tensor:
    """KL(teacher || student) of softmaxes over groups of channels: a level's mean over positions, or over its bins.

    With tau, and per channel, what mmdetection's KnowledgeDistillationKLDivLoss makes of Zheng et al., Localization
    Distillation.
    """
    loss = x[0].new_zeros(())
    for a, b in zip(x, z, strict=True):
        student, teacher = (v.unflatten(1, (-1, group)) / tau for v in (a, b))
        value = F.kl_div(F.log_softmax(student, dim=2), F.softmax(teacher, dim=2), reduction="sum") * tau**2
        positions = a.shape[0] * a.shape[2] * a.shape[3]
        loss = loss + value / (positions * (a.shape[1] if per_channel else 1))
    return loss


class Compared(NamedTuple):
    published: Callable[[Levels, Levels], Tensor]
    ours: Callable[..., Tensor]  # and a backend
    tensors: int  # of the student's size that must be read or written
    of: int = 2  # the student's among the lists of a case, behind it the teacher's: 0 features, 2 class logits
    channels: int = 80  # classes, or sides times bins


def compared() -> dict[str, Compared]:
    found = {
        "pkd": Compared(pkd, frs_kernels.pkd_loss, 5, of=0),
        "cwd, features, tau 1": Compared(partial(cwd, tau=1.0), frs_kernels.cwd_loss, 5, of=0),
        "cwd, logits, tau 4": Compared(partial(cwd, tau=4.0), partial(frs_kernels.cwd_loss, temperature=4.0), 5),
    }
    for beta, detach in ((1.0, False), (2.0, False), (1.5, False), (1.0, True)):
        ours = partial(frs_kernels.quality_focal_distillation, beta=beta, detach=detach)
        name = f"quality focal, beta {beta:g}{', detached' if detach else ''}"
        found[name] = Compared(partial(quality_focal, beta=beta, detach=detach), ours, 3)
    boxes = partial(softmax_divergence, group=17, tau=10.0, per_channel=True)
    found["localization distillation"] = Compared(boxes, frs_kernels.localization_distillation, 3, channels=4 * 17)
    classes = partial(softmax_divergence, group=80, tau=1.0, per_channel=False)
    found["softmax KL of 80 classes"] = Compared(classes, softmax_of_classes, 3)
    return found


def softmax_of_classes(x: Levels, z: Levels, backend: Any) -> Tensor:
    everywhere = [b.new_ones(b.shape[0], *b.shape[2:]) for b in z]
    return frs_kernels.masked_imitation_loss(x, z, everywhere, loss="softmax_kl", backend=backend)


def implementations(loss: Compared, device: str) -> dict[str, Callable[[Levels, Levels], Tensor]]:
    found = {"eager": loss.published, "torch.compile": torch.compile(loss.published, dynamic=False)}
    for backend, reason in frs_kernels.backends.available().items():
        if reason is None and (backend != "triton" or device == "cuda"):
            found[f"frs_kernels {backend}"] = partial(loss.ours, backend=backend)
    return found


def fault(loss: Callable[..., Tensor], truth: Callable[..., Tensor], x: Levels, z: Levels) -> str | None:
    """What is wrong with an implementation, or None: loss within 1e-5, each gradient within 16 roundings by norm."""
    wide = [[v.detach().double() for v in levels] for levels in (x, z)]
    right = truth([v.requires_grad_() for v in wide[0]], wide[1])
    got = loss(x, z)
    if not abs(got.item() / right.item() - 1) < 1e-5:
        return f"loss off by {abs(got.item() / right.item() - 1):.1e}"
    for g, r in zip(torch.autograd.grad(got, x), torch.autograd.grad(right, wide[0]), strict=True):
        far = ((g.double() - r).norm() / r.norm() / torch.finfo(g.dtype).eps).item()
        if not far <= 16:
            return f"gradients off by {far:.0f} roundings"
    return None


def run(device: str, quick: bool, advance: Callable[[str], bool], save: Callable[[dict[str, Any]], None]) -> None:
    """Saves this benchmark's part of the result file after each loss; begins none that `advance` says is too late."""
    case, bandwidth_step = QUICK if quick else CASE, copy_bandwidth(device, 64 if quick else 256)
    found: dict[str, Any] = {"losses": {}}
    for name, loss in compared().items():
        if not advance(name):
            continue
        torch._dynamo.reset()
        torch.manual_seed(0)
        given = replace(case, logits=loss.channels)
        copies = copies_of(partial(given.inputs, device), device)
        results: dict[str, Any] = {}
        steps: dict[str, Callable[[], Any]] = {}
        for who, call in implementations(loss, device).items():
            if (wrong := fault(call, loss.published, *copies[0][loss.of : loss.of + 2])) is not None:
                results[who] = {"wrong": wrong}
                continue
            on_all = partial(lambda call, of, *lists: call(*lists[of : of + 2]), call, loss.of)
            results[who] = {}
            if device == "cuda" and (runs := graph_seconds(on_all, copies, 1.0, students=(loss.of,))):
                results[who]["graph"] = spread(runs)
            steps[who] = Step(on_all, copies, 1.0, students=(loss.of,))
        times = interleaved({**steps, "copy": bandwidth_step}, 0.5 if quick else 4.0)
        bandwidth = spread(times.pop("copy")).median
        for who, runs in times.items():
            results[who]["step"] = spread([sum(each) for each in runs])
        size = sum(v.nbytes for v in copies[0][loss.of])
        found["losses"][name] = {
            "case": given.key(), "bytes": loss.tensors * size, "copy_bandwidth": bandwidth, "implementations": results,
        }  # fmt: skip
        save(found)
