"""The results: means and spreads over seeds, the table, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import frs_kernels

from .coco import METRICS, Split
from .options import Arm
from .train import Run

PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "pycocotools")
ABSENT = "-"


def summarize(runs: dict[int, Run]) -> dict[str, Any]:
    """Metrics and step time of each seed, their mean, and their sample standard deviation."""
    seeds = {seed: {**run.metrics, "step_ms": run.step_ms} for seed, run in runs.items()}
    columns: dict[str, list[float]] = {}
    for name in (*METRICS, "step_ms"):
        values = [row[name] for row in seeds.values()]
        columns[name] = [value for value in values if value is not None]
    return {
        "seeds": {str(seed): row for seed, row in seeds.items()},
        "mean": {name: statistics.fmean(v) if v else None for name, v in columns.items()},
        "spread": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in columns.items()},
    }


def collect(
    options: argparse.Namespace,
    splits: tuple[Split, Split],
    sides: tuple[float, float],
    teacher: Run,
    students: dict[str, tuple[Arm, dict[int, Run]]],
    loss_ms: dict[str, float],
    absent: dict[str, str],
    parameters: dict[str, int],
) -> dict[str, Any]:
    """All that `results.json` holds."""
    arms = {"teacher": {"label": "teacher", **summarize({0: teacher})}}
    for name, (arm, runs) in students.items():
        arms[name] = {"label": arm.label, **summarize(runs)}
    for name, (arm, _) in students.items():
        if name != arm.baseline:
            arms[name]["gain_over"] = arm.baseline
            arms[name]["gain"] = gain(arms[name], arms[arm.baseline])
    return {
        "arms": arms,
        "loss_ms": loss_ms,
        "absent_backends": absent,
        "parameters": parameters,
        **describe(options, splits, sides),
    }


def describe(options: argparse.Namespace, splits: tuple[Split, Split], sides: tuple[float, float]) -> dict[str, Any]:
    """Data, settings, machine and versions of a run."""
    train, val = splits
    return {
        "data": {
            "folder": _shown(options.data or "digits"),
            "pictures": {"train": len(train), "val": len(val)},
            "objects": {
                "train": int((train.labels >= 0).sum()),
                "val": int((val.labels >= 0).sum()),
            },
            "categories": train.names,
            "small_medium_large_sides": list(sides),
        },
        "settings": {name: _shown(value) for name, value in vars(options).items()},
        "machine": _machine(options.device),
        "versions": {"python": platform.python_version(), **_versions()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _shown(value: Any) -> Any:
    """Of a path that which says something elsewhere: where it lies below the working directory, or its name."""
    if not isinstance(value, Path):
        return value
    path, here = value.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def gain(arm: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """AP above the baseline's: of each seed, and their mean and spread."""
    seeds = {seed: row["AP"] - baseline["seeds"][seed]["AP"] for seed, row in arm["seeds"].items()}
    gains = list(seeds.values())
    spread = statistics.stdev(gains) if len(gains) > 1 else None
    return {"seeds": seeds, "mean": statistics.fmean(gains), "spread": spread}


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if "model name" in line), name)


def _machine(device: str) -> dict[str, Any]:
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _versions() -> dict[str, str]:
    versions = {"frs_kernels": frs_kernels.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def table(results: dict[str, Any]) -> Table:
    """Trainings first, then the loss alone."""
    small, large = results["data"]["small_medium_large_sides"]
    arms = results["arms"]
    seeds = len(arms["alone"]["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds; " if seeds > 1 else ""
    made = Table(
        title=f"COCO AP on {results['data']['pictures']['val']} validation pictures",
        caption=f"{spread}small, medium, large: sides under {small:g}, between, over {large:g} px; "
        "gain: AP over the same schedule alone; ms: a training step, or the loss alone "
        f"(forward + backward), median, on {results['machine']['device']}",
    )
    made.add_column("")
    for column in (*METRICS, "gain", "ms"):
        made.add_column(column, justify="right", no_wrap=True)
    for arm in arms.values():
        mean, deviation = arm["mean"], arm["spread"]
        cells = [number(mean["AP"], deviation["AP"])]
        cells += [number(mean[name]) for name in METRICS[1:]]
        gain = arm.get("gain")
        cells.append(number(gain["mean"], gain["spread"], sign="+") if gain else "")
        made.add_row(arm["label"], *cells, number(mean["step_ms"]))
    made.add_section()
    for name, milliseconds in results["loss_ms"].items():
        made.add_row(f"loss alone: {name}", *[""] * (len(METRICS) + 1), f"{milliseconds:.2f}")
    return made


def number(mean: float | None, spread: float | None = None, sign: str = "") -> str:
    if mean is None:
        return ABSENT
    return f"{mean:{sign}.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
