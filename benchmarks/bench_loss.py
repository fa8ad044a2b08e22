"""Time the loss, forward and backward, against what people use instead and against the floor of the memory.

    python benchmarks/bench_loss.py [--quick] [--compile] [--out FILE.json]

Every implementation is checked against fp64 before it is timed; a wrong one gets no time. Runs are interleaved in one
process and medians reported. The floor is the byte model's 4 L + 3 F (L: bytes of the student's logits, F: of its
features) over the copy bandwidth measured in the same run. The gradients are taken as a training step takes them, new
in each step and not added to old ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from forms import authors_form, logits_form
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import frs_kernels

# name: channels C, logits K, strides of the levels, weights
REGIMES = {
    "RetinaNet": (256, 720, (8, 16, 32, 64, 128), "retinanet"),
    "GFL": (256, 80, (8, 16, 32, 64, 128), "gfl"),
    "Faster R-CNN": (256, 3, (4, 8, 16, 32, 64), "faster_rcnn"),
}
Step = Callable[[], None]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; within a round they take turns, so that a slow moment hits all.

    A turn is two runs and the second counts, as in training: the first may meet memory that the system has taken back
    meanwhile, or that it hands out for the first time.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def inputs(channels: int, strides: Sequence[int], size: tuple[int, int], batch: int, device: str) -> list[Tensor]:
    shapes = [(batch, channels, -(-size[0] // s), -(-size[1] // s)) for s in strides]
    return [torch.randn(shape, device=device) for shape in shapes]


def case(regime: str, size: tuple[int, int], batch: int, rounds: int, device: str, compiled: bool) -> dict[str, Any]:
    channels, logits, strides, preset = REGIMES[regime]
    weights: dict[str, Any] = dict(frs_kernels.PRESETS[preset])
    s, t = (inputs(channels, strides, size, batch, device) for _ in range(2))
    x, z = ([v * 2 - 5 for v in inputs(logits, strides, size, batch, device)] for _ in range(2))
    losses: dict[str, Callable[[], Tensor]] = {
        "authors' form": lambda: authors_form(s, t, x, z, **weights),
        "logits form": lambda: logits_form(s, t, x, z, **weights),
    }
    if compiled:
        fused = torch.compile(logits_form, dynamic=False)
        losses["torch.compile of it"] = lambda: fused(s, t, x, z, **weights)
    for backend, reason in frs_kernels.backends.available().items():
        if reason is None and not (backend == "triton" and device == "cpu"):
            losses[f"frs_kernels {backend}"] = lambda backend=backend: frs_kernels.fsr_loss(
                s, t, x, z, backend=backend, **weights
            )

    wide = [[v.double() for v in levels] for levels in (s, t, x, z)]
    truth = logits_form(*wide, **weights).item()
    students = [*s, *x]
    for v in students:
        v.requires_grad_()
    wrong = {name: abs(loss().item() / truth - 1) for name, loss in losses.items()}
    wrong = {name: error for name, error in wrong.items() if not error < 1e-5}

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            torch.autograd.grad(loss(), students)

        return run

    big = torch.empty(1 << 26, dtype=torch.float32, device=device)
    other = torch.empty_like(big)
    steps = {name: step(loss) for name, loss in losses.items() if name not in wrong}
    times = measure({**steps, "copy": lambda: other.copy_(big)}, rounds, device)
    seconds = {name: statistics.median(runs) for name, runs in times.items()}
    bandwidth = 2 * big.nbytes / seconds.pop("copy")
    # score reads L; imitate reads 2 L + 2 F and writes L + F
    floor = (4 * sum(v.nbytes for v in x) + 3 * sum(v.nbytes for v in s)) / bandwidth
    return {
        "regime": regime, "size": size, "batch": batch, "seconds": seconds, "wrong": wrong,
        "spread": {name: [min(runs), max(runs)] for name, runs in times.items()},
        "floor_seconds": floor, "copy_bytes_per_second": bandwidth,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, few rounds")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the logits form (takes a minute)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_loss.json"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, rounds = ([((128, 192), 1)], 5) if options.quick else ([((400, 672), 1), ((800, 1344), 2)], 21)
    cases = [(regime, size, batch) for size, batch in sizes for regime in REGIMES]
    results = []
    for regime, size, batch in track(cases, description="timing", disable=None):
        torch._dynamo.reset()
        results.append(case(regime, size, batch, rounds, device, options.compile))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    title = "fsr_loss, forward + backward, fp32"
    caption = f"{name}, {torch.get_num_threads()} threads; medians of {rounds} interleaved runs"
    columns = ("regime", "implementation", "ms", "speed-up on the authors' form", "time over the floor")
    table = Table(*columns, title=title, caption=caption)
    for result in results:
        authors = result["seconds"].get("authors' form", float("nan"))
        height, width = result["size"]
        label = f"{result['regime']} {height} x {width}, batch {result['batch']}"
        for implementation, seconds in result["seconds"].items():
            table.add_row(
                label, implementation, f"{1e3 * seconds:.2f}", f"{authors / seconds:.2f}x",
                f"{seconds / result['floor_seconds']:.1f}x",
            )  # fmt: skip
        for implementation, error in result["wrong"].items():
            table.add_row(label, implementation, "wrong", f"relative error {error:.1e}", "")
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": name, "torch": torch.__version__, "frs_kernels": frs_kernels.__version__, "results": results}
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
