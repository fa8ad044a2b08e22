"""How cost grows: with positions, feature channels, class logits, levels and batch, and with threads on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from forms import logits_form
from grid import Case
from measure import Loss, Spread, Step, copies_of, graph_seconds, interleaved, spread

import frs_kernels


def sweeps(device: str, quick: bool) -> dict[str, dict[float, Case]]:
    """What is varied: x, and the case at x. All in fp32, around a base that is neither small nor large."""
    side = (800, 1344) if device == "cuda" else (256, 320)
    base = Case("gfl", *side, 1)
    sizes = [(128, 160), (256, 320), (384, 480), (512, 640)] if device == "cpu" else [
        (256, 320), (512, 640), (800, 1344), (1344, 2016)
    ]  # fmt: skip
    steps = slice(None, None, 3) if quick else slice(None)
    by_size = [replace(base, height=h, width=w) for h, w in sizes]
    return {
        "positions": {float(case.positions): case for case in by_size[steps]},
        "feature channels": {float(c): replace(base, channels=c) for c in (64, 256, 512, 1024)[steps]},
        "class logits": {float(k): replace(base, logits=k) for k in (3, 80, 320, 720)[steps]},
        "levels": {float(n): replace(base, levels=n) for n in (1, 2, 3, 5)[steps]},
        "batch": {float(n): replace(base, batch=n) for n in (1, 2, 4, 8, 16)[steps]},
    }


def losses(case: Case) -> dict[str, Loss]:
    weights = case.weights
    return {
        "logits form": lambda s, t, x, z: logits_form(s, t, x, z, **weights),
        "frs_kernels": lambda s, t, x, z: frs_kernels.fsr_loss(s, t, x, z, **weights),
    }


def measure_sweep(points: dict[float, Case], device: str, seconds: float) -> dict[str, Any]:
    """Seconds of a step at each x, and the line through them: what one more of x costs, and what there is at none."""
    steps: dict[str, Callable[[], Any]] = {}
    graphs: dict[str, Spread] = {}
    for x, case in points.items():
        copies = copies_of(lambda case=case: case.inputs(device), device)
        for name, loss in losses(case).items():
            steps[f"{name} @ {x}"] = Step(loss, copies, 1.0)
            if device == "cuda" and (runs := graph_seconds(loss, copies, 1.0)):
                graphs[f"{name} @ {x}"] = spread(runs)
    times = interleaved(steps, seconds)
    medians = {name: spread([sum(run) for run in runs]) for name, runs in times.items()} | graphs
    found: dict[str, Any] = {}
    for name in losses(next(iter(points.values()))):
        seconds_at = [medians[f"{name} @ {x}"] for x in points]
        slope, intercept = np.polyfit(list(points), [s.median for s in seconds_at], 1)
        found[name] = {"seconds": seconds_at, "slope": float(slope), "intercept": float(intercept)}
    return {"x": list(points), "bytes": [case.bytes for case in points.values()], "implementations": found}


def measure_threads(seconds: float) -> dict[str, Any]:
    """A step of each regime with every number of threads that the machine has cores for, up to 8."""
    before = torch.get_num_threads()
    counts = [n for n in (1, 2, 4, 8) if n <= max(before, 1)]
    found: dict[str, Any] = {"threads": counts}
    for regime in ("retinanet", "gfl", "faster_rcnn"):
        case = Case(regime, 400, 672, 1)
        copies = [case.inputs("cpu")]
        steps: dict[str, Callable[[], Any]] = {}
        for name, loss in losses(case).items():
            for count in counts:
                steps[f"{name} @ {count}"] = _with_threads(Step(loss, copies, 1.0), count)
        times = interleaved(steps, seconds)
        torch.set_num_threads(before)
        found[regime] = {
            name: [spread([sum(run) for run in times[f"{name} @ {count}"]]) for count in counts]
            for name in losses(case)
        }
    return found


def _with_threads(step: Step, count: int) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        torch.set_num_threads(count)
        return step()

    return run


def run(device: str, quick: bool, advance: Callable[[str], bool], save: Callable[[dict[str, Any]], None]) -> None:
    """Saves this benchmark's part of the result file after each sweep; begins none that `advance` says is too late."""
    seconds = 0.5 if quick else 6.0
    found: dict[str, Any] = {"sweeps": {}}
    for name, points in sweeps(device, quick).items():
        if advance(f"cost against {name}"):
            found["sweeps"][name] = measure_sweep(points, device, seconds)
            save(found)
    if device == "cpu" and advance("threads"):
        found["threads"] = measure_threads(seconds / 2)
        save(found)
