"""The loss, forward and backward, against what people use instead and against the floor of the memory.

Every implementation is checked against fp64 on the same inputs before it is timed: loss and all gradients. A wrong one
is reported as wrong and has no time.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from bench_host import CASE, measure_host
from forms import authors_form, logits_form
from grid import DTYPES, Case
from measure import (
    Loss,
    Step,
    copies_of,
    copy_bandwidth,
    graph_seconds,
    interleaved,
    peak_extra,
    spread,
)
from model import predict
from torch import Tensor

import frs_kernels

COMPILED = {"torch.compile": "default", "torch.compile, max-autotune": "max-autotune-no-cudagraphs"}


def implementations(case: Case, device: str, compiled: Iterable[str]) -> dict[str, Loss]:
    """What is timed, by name: rivals first, then each backend that is here."""
    weights = case.weights
    losses: dict[str, Loss] = {
        "authors' form": lambda s, t, x, z: authors_form(s, t, x, z, **weights),
        "logits form": lambda s, t, x, z: logits_form(s, t, x, z, **weights),
    }
    for name in compiled:
        fused = torch.compile(logits_form, dynamic=False, mode=COMPILED[name])
        losses[name] = lambda s, t, x, z, fused=fused: fused(s, t, x, z, **weights)
    for backend, reason in frs_kernels.backends.available().items():
        if reason is None and (backend != "triton" or device == "cuda"):
            losses[f"frs_kernels {backend}"] = _ours(weights, backend)
    losses["frs_kernels, level by level"] = lambda *lists: sum(
        frs_kernels.fsr_loss(*([x] for x in level), **weights) for level in zip(*lists, strict=True)
    )  # type: ignore[assignment]
    return losses


def _ours(weights: dict[str, Any], backend: str) -> Loss:
    return lambda s, t, x, z: frs_kernels.fsr_loss(s, t, x, z, backend=backend, **weights)


class Truth:
    """Loss and gradients in fp64, and how far an implementation's are from them."""

    def __init__(self, case: Case, inputs: list[list[Tensor]]) -> None:
        self.case = case
        self.loss = 0.0
        self.grads: list[Tensor] = []
        feats, logits = [], []
        for level in zip(*inputs, strict=True):  # a level at a time: fp64 takes much memory
            s, t, x, z = ([v.detach().double()] for v in level)
            students = [s[0].requires_grad_(), x[0].requires_grad_()]
            loss = logits_form(s, t, x, z, **case.weights)
            grads = torch.autograd.grad(loss * case.scale, students)
            self.loss += loss.item()
            feats.append(grads[0])
            logits.append(grads[1])
        self.grads = [*feats, *logits]

    def fault(self, loss: Loss, inputs: list[list[Tensor]]) -> str | None:
        """What is wrong with an implementation, or None.

        The loss within 1e-5. Each gradient within 8 roundings of its dtype, by norm, and the spacing of the dtype's
        smallest numbers: fp16's gradients lie among them where there is no loss scale.
        """
        try:
            got = loss(*inputs)
            grads = torch.autograd.grad(got * self.case.scale, [*inputs[0], *inputs[2]])
        except (RuntimeError, TypeError, ValueError) as error:
            return f"raises {type(error).__name__}: {str(error).splitlines()[0][:80]}"
        off = abs(got.item() / self.loss - 1)
        if not off < 1e-5:
            return f"loss off by {off:.1e}"
        info = torch.finfo(DTYPES[self.case.dtype])
        for g, right in zip(grads, self.grads, strict=True):
            allowed = 8 * info.eps * right.norm() + info.smallest_normal * info.eps * right.numel() ** 0.5
            far = ((g.double() - right).norm() / allowed).item()
            if not far <= 1:
                return f"gradients off by {8 * far:.0f} roundings of {self.case.dtype}"
        return None


def measure_case(
    case: Case, device: str, compiled: Iterable[str], seconds: float, bandwidth_step: Callable[[], float]
) -> dict[str, Any]:
    """Everything that is measured of one case, as the result file keeps it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    copies = copies_of(lambda: case.inputs(device), device)
    truth = Truth(case, copies[0])
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    losses = implementations(case, device, compiled)
    for name, loss in losses.items():
        begin = time.perf_counter()
        fault = truth.fault(loss, copies[0])
        results[name] = {"first_seconds": time.perf_counter() - begin}
        if fault is not None:
            results[name]["wrong"] = fault
            continue
        step = Step(loss, copies, case.scale)
        results[name]["peak_extra"] = peak_extra(step, device)
        if device == "cuda" and (runs := graph_seconds(loss, copies, case.scale)):
            results[name]["graph"] = spread(runs)
        steps[name] = step
    del truth
    times = interleaved({**steps, "copy": bandwidth_step}, seconds)
    bandwidth = spread(times.pop("copy")).median
    for name, runs in times.items():
        forward, backward = zip(*runs, strict=True)
        results[name] |= {
            "forward": spread(list(forward)),
            "backward": spread(list(backward)),
            "step": spread([sum(run) for run in runs]),
            "rounds": len(runs),
        }
    students = sum(x.nbytes for levels in (copies[0][0], copies[0][2]) for x in levels)
    return {
        "case": case.key(),
        "bytes": case.bytes,
        "student_bytes": students,
        "positions": case.positions,
        "copy_bandwidth": bandwidth,
        "model": predict(case, torch.cuda.get_device_name(), bandwidth) if device == "cuda" else None,
        "implementations": results,
    }


def measure_returned(case: Case, compiled: list[str], seconds: float) -> dict[str, Any]:
    """`measure_case` on the CPU in a process of its own, so that no other case decides what the C library keeps."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_alone, (case, compiled, seconds))


def _measure_alone(case: Case, compiled: list[str], seconds: float) -> dict[str, Any]:
    return measure_case(case, "cpu", compiled, seconds, copy_bandwidth("cpu"))


def compiled_for(case: Case, device: str, quick: bool) -> list[str]:
    """Which forms of torch.compile a case is compared with: compiling takes longer than all the rest together."""
    if case.layout != "contiguous" or case.scale != 1 or (device == "cpu" and case.dtype == "fp16"):
        return []
    if case.memory == "returned":
        return ["torch.compile"]
    if quick:
        return ["torch.compile"] if case.dtype == "fp32" and case.regime == "gfl" else []
    if case.height > 800:
        return []
    if device == "cuda":
        both = case.dtype == "bf16" and case.regime == "gfl"
        wanted = case.dtype in ("fp32", "bf16") and (case.height, case.batch) == (800, 2)
    else:
        both, wanted = case.dtype == "fp32" and case.batch == 1, True
    return list(COMPILED) if both and wanted else ["torch.compile"] if wanted else []


def run(
    device: str,
    cases: list[Case],
    quick: bool,
    eager: bool,
    advance: Callable[[str], bool],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Saves this benchmark's part of the result file after each case; begins none that `advance` says is too late."""
    bandwidth_step = copy_bandwidth(device, 64 if quick else 256)
    seconds = 0.5 if quick else 1.0 if device == "cuda" else 3.0
    found: dict[str, Any] = {"cases": [], "host": {}}
    if advance("host time"):
        found["host"] = measure_host(implementations(CASE, device, [] if eager else ["torch.compile"]), device)
    for case in cases:
        if advance(case.title):
            compiled = [] if eager else compiled_for(case, device, quick)
            if case.memory == "returned":
                measured = measure_returned(case, compiled, seconds)
            else:
                measured = measure_case(case, device, compiled, seconds, bandwidth_step)
            found["cases"].append(measured)
            save(found)
