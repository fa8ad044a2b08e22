"""Distil torchvision's RetinaNet and Ultralytics' YOLO11 on the digits, and compare COCO's AP with the students' alone.

python -m examples.frameworks                            both, three seeds: an hour or so on two cores
python -m examples.frameworks --frameworks torchvision   or ultralytics
python -m examples.frameworks --quick                    under a minute: shows only that every part works

A training that finished with the same settings is kept. `--processes 2` trains two at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import frs_kernels
from examples.digits.coco import METRICS
from examples.digits.digits import make_digits
from examples.digits.progress import stage
from examples.digits.report import cpu_name
from examples.frameworks.jobs import BATCH, SIDE, settings, time_steps, train

FRAMEWORKS = {"torchvision": "RetinaNet", "ultralytics": "YOLO11"}
LABELS = {
    "teacher": "teacher", "alone": "student alone", "distilled": "student + Distiller",
    "preset": "the same, the preset's weights", "built-in": "the built-in distillation",
}  # fmt: skip
ARMS = {"torchvision": ("alone", "distilled"), "ultralytics": ("alone", "distilled", "preset", "built-in")}
PACKAGES = ("torch", "torchvision", "ultralytics", "pycocotools", "numpy")
ROUNDS = 9
"""Steps of each arm that are timed, in turn."""


def compare(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """All trainings, as results.json keeps them; the teachers first."""
    runs: dict[str, dict[str, dict[str, Any]]] = {name: {"teacher": {}} for name in options.frameworks}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for jobs in (
            [(name, "teacher", 0) for name in options.frameworks],
            [(name, arm, seed) for seed in options.seeds for name in options.frameworks for arm in ARMS[name]],
        ):
            with stage(console, "teachers" if jobs[0][1] == "teacher" else "students", len(jobs)) as advance:
                futures = [pool.submit(train, options, *job) for job in jobs]
                for done, ((name, arm, seed), future) in enumerate(zip(jobs, futures, strict=True), start=1):
                    runs[name].setdefault(arm, {})[str(seed)] = future.result()
                    advance(done, note=f"{name} {LABELS[arm]}")
    torch.set_num_threads(options.cores)
    frameworks = {}
    for name, arms in runs.items():
        step_ms = time_steps(options, name)
        frameworks[name] = {
            "detector": FRAMEWORKS[name],
            "arms": {arm: summary(arm, found, step_ms.get(arm)) for arm, found in arms.items()},
            "settings": {arm: settings(options, name, arm) for arm in ("teacher", "distilled")},
        }
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine["capability"] = torch.backends.cpu.get_cpu_capability()
    return {
        "frameworks": frameworks,
        "pictures": options.counts,
        "batch": BATCH,
        "seeds": options.seeds,
        "machine": machine | {"shared": options.shared},
        "versions": {"frs_kernels": frs_kernels.__version__} | {name: version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def summary(arm: str, seeds: dict[str, dict[str, Any]], step_ms: float | None) -> dict[str, Any]:
    found = {name: [run["metrics"][name] for run in seeds.values()] for name in METRICS}
    return {
        "label": LABELS[arm],
        "seeds": {seed: run["metrics"] for seed, run in seeds.items()},
        "mean": {name: None if None in values else statistics.fmean(values) for name, values in found.items()},
        "spread": statistics.stdev(found["AP"]) if len(seeds) > 1 else None,
        "parameters": next(iter(seeds.values()))["parameters"],
        "step_ms": step_ms,
    }


def table(results: dict[str, Any]) -> Table:
    made = Table(title=f"COCO AP on {results['pictures']['val']} pictures")
    for column in ("", *METRICS[:3], "parameters", "ms a step"):
        made.add_column(column, justify="left" if not column else "right")
    for name, found in results["frameworks"].items():
        for arm in found["arms"].values():
            first, *rest = ("-" if arm["mean"][m] is None else f"{arm['mean'][m]:.1f}" for m in METRICS[:3])
            first += "" if arm["spread"] is None else f" ± {arm['spread']:.1f}"
            ms = "" if arm["step_ms"] is None else f"{arm['step_ms']:.0f}"
            made.add_row(f"{name}: {arm['label']}", first, *rest, f"{arm['parameters']:,}", ms)
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frameworks", nargs="+", choices=tuple(FRAMEWORKS), default=list(FRAMEWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students (0 1 2)")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, that share the threads (1)")
    parser.add_argument("--shared", action="store_true", help="note that something else ran on the machine")
    parser.add_argument("--out", type=Path, default=Path("runs/frameworks"))
    parser.add_argument("--quick", action="store_true", help="a few pictures and iterations")
    options = parser.parse_args(argv)
    options.counts = {"train": 32, "val": 8} if options.quick else {"train": 3000, "val": 500}
    options.data = options.out / ("data-quick" if options.quick else "data")
    if options.quick:
        options.out, options.seeds = options.out / "quick", options.seeds[:1]
    options.rounds = 1 if options.quick else ROUNDS
    options.iterations = {"teacher": 2, "student": 2} if options.quick else {"teacher": 700, "student": 500}
    options.epochs = {"teacher": 1, "student": 1} if options.quick else {"teacher": 5, "student": 2}
    options.lr = {"teacher": 3e-3, "student": 5e-3}
    options.cores = torch.get_num_threads()
    options.threads = max(1, options.cores // options.processes)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(file=sys.stdout)
    started = time.perf_counter()
    with stage(console, "make pictures", sum(options.counts.values())) as advance:
        make_digits(options.data, counts=options.counts, image_size=SIDE, advance=advance)
    if "ultralytics" in options.frameworks:
        # Before it is imported, here and in the processes that train: it writes to no other place.
        os.environ.setdefault("YOLO_CONFIG_DIR", str(options.out.resolve()))
        os.environ.setdefault("YOLO_OFFLINE", "true")
        os.environ.setdefault("YOLO_VERBOSE", "false")
        from examples.frameworks import yolo

        yolo.write_labels(options.data)
    results = compare(console, options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(results))
    console.print(f"{time.perf_counter() - started:.0f} s; {options.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
