"""How things are timed: in turn, in one process, with the caches as training finds them; and what memory they take.

On the CPU a round runs every implementation once, one after another, so that a slow moment of the machine hits all;
each run is preceded by an untimed one of the same, as in training: the first may meet memory that the system hands out
for the first time, or has taken back. On a GPU time is CUDA events', over copies of the inputs that together exceed the
L2 cache three times; a step is also timed as replays of a CUDA graph, without what the host takes.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
Loss = Callable[..., Tensor]


def commit() -> str:
    """What is measured; FRS_COMMIT says it where the checkout came without its history."""
    if "FRS_COMMIT" in os.environ or shutil.which("git") is None:
        return os.environ.get("FRS_COMMIT", "unknown")
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


class Spread(NamedTuple):
    """Seconds."""

    median: float
    low: float  # quartiles: the extremes of a shared machine say nothing of the code
    high: float


def spread(runs: list[float]) -> Spread:
    if len(runs) < 2:
        return Spread(runs[0], runs[0], runs[0])
    low, median, high = statistics.quantiles(runs, n=4, method="inclusive")
    return Spread(median, low, high)


class Step:
    """One training step of a loss, forward and backward with an upstream factor, on the next of several inputs."""

    def __init__(
        self, loss: Loss, copies: list[list[list[Tensor]]], scale: float, students: Sequence[int] = (0, 2)
    ) -> None:
        self.loss = loss
        self.students = students  # which of the lists' gradients are taken
        self.copies = itertools.cycle(copies)
        self.scale = scale

    def __call__(self) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass; the gradients are new in each step, as in training."""
        inputs = next(self.copies)
        students = self.wanted(inputs)
        if students[0].is_cuda:
            return self._on_gpu(inputs, students)
        start = time.perf_counter()
        loss = self.forward(inputs)
        middle = time.perf_counter()
        torch.autograd.grad(loss, students)
        return middle - start, time.perf_counter() - middle

    def wanted(self, inputs: list[list[Tensor]]) -> list[Tensor]:
        return [v for number in self.students for v in inputs[number]]

    def forward(self, inputs: list[list[Tensor]]) -> Tensor:
        loss = self.loss(*inputs)
        return loss if self.scale == 1 else loss * self.scale  # as a gradient scaler does

    def _on_gpu(self, inputs: list[list[Tensor]], students: list[Tensor]) -> tuple[float, float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        events[0].record()
        loss = self.forward(inputs)
        events[1].record()
        torch.autograd.grad(loss, students)
        events[2].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3


def timed(step: Callable[[], object], device: str) -> Callable[[], float]:
    """Seconds of a call, by the host's clock: a whole step is long."""

    def call() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return call


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step, as torch's allocator on a GPU does, and jemalloc.

    glibc gives large blocks and the end of its heap back to the system, and gets them zeroed, page by page, in the next
    step. What is large depends on what was freed before: with three implementations in one process, Faster R-CNN at
    400x672 in the authors' form took 40 ms in a fresh one and 15 in one that had seen larger images (AMD EPYC, 2
    cores). Cannot be undone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h's names for them
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def copies_of(make: Callable[[], list[list[Tensor]]], device: str) -> list[list[list[Tensor]]]:
    """Inputs, as many times as it takes to fill the L2 cache of a GPU three times over; once on the CPU."""
    first = make()
    if device != "cuda":
        return [first]
    size = sum(x.nbytes for levels in first for x in levels)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(min(31, 3 * cache // size)))]


def interleaved(
    steps: dict[str, Callable[[], Any]], seconds: float, least: int = 5, most: int = 31
) -> dict[str, list[Any]]:
    """What each step returned in each round; rounds until the time is used, at least `least`, at most `most`."""
    found: dict[str, list[Any]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        for name, step in steps.items():
            step()
            found[name].append(step())
    return found


def copy_bandwidth(device: str, megabytes: int = 256, deep: int = 8) -> Callable[[], float]:
    """A step that copies, and returns bytes read and written a second: what a perfect kernel could reach.

    On a GPU the time of `deep` copies queued at once, so that what a launch takes does not count.
    """
    source = torch.empty(megabytes << 18, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)

    def run() -> float:
        if device == "cuda":
            seconds = _gpu_seconds(lambda: [target.copy_(source) for _ in range(deep)])
            return deep * 2 * source.nbytes / seconds
        begin = time.perf_counter()
        target.copy_(source)
        return 2 * source.nbytes / (time.perf_counter() - begin)

    return run


def _gpu_seconds(call: Callable[[], object]) -> float:
    """Seconds between two events around what a call queues, on a GPU that has nothing else to do."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def graph_seconds(
    loss: Loss, copies: list[list[list[Tensor]]], scale: float, students: Sequence[int] = (0, 2), calls: int = 20
) -> list[float] | None:
    """Seconds of a step, in each of several replays of a CUDA graph of many; None where the loss cannot be captured."""
    steps = Step(loss, copies, scale, students)

    def once() -> None:
        inputs = next(steps.copies)
        torch.autograd.grad(steps.forward(inputs), steps.wanted(inputs))

    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            once()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                once()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    return [_gpu_seconds(graph.replay) / calls for _ in range(10)]


def launches(call: Callable[[], object], device: str) -> int:
    """Kernels that a call launches on a GPU; on the CPU the operators it dispatches, which the host pays for."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    call()
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return sum(event.cpu_parent is None or "::" not in event.cpu_parent.name for event in profile.events())


def peak_extra(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at most beyond what was there; None on a CPU whose system does not tell.

    On a GPU what the allocator handed out; on the CPU the peak of the resident memory, which Linux forgets on request.
    Memory that an earlier call freed is given back first: reused, it would not show.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not STATUS.is_file():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
