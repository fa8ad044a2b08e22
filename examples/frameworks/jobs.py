"""One training or one timing, for either framework. A module that neither imports: their environments may lack one."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.digits.coco import Split, read_split
from examples.digits.train import Schedule, fingerprint

SIDE, BATCH = 128, 16


def read(options: argparse.Namespace) -> tuple[Split, Split]:
    return read_split(options.data, "train", SIDE), read_split(options.data, "val", SIDE)


def place(options: argparse.Namespace, framework: str, arm: str, seed: int) -> Path:
    """The folder of one training."""
    return Path(options.out / framework / f"{arm}-{seed}")


def weights(options: argparse.Namespace, framework: str) -> Path:
    """The teacher's checkpoint."""
    folder = place(options, framework, "teacher", 0)
    return folder / ("weights/last.pt" if framework == "ultralytics" else "last.pt")


def settings(options: argparse.Namespace, framework: str, arm: str) -> dict[str, Any]:
    """What the training of one arm depends on, beside its seed."""
    role = "teacher" if arm == "teacher" else "student"
    chosen = {"pictures": options.counts, "batch": BATCH, "arm": arm}
    if framework == "torchvision":
        from examples.frameworks import retinanet

        chosen |= {
            "iterations": options.iterations[role],
            "lr": options.lr[role],
            "size": getattr(retinanet, role.upper()),
        }
        return chosen | {"distiller": retinanet.ARMS.get(arm, {})}
    from examples.frameworks import yolo

    chosen |= {"epochs": options.epochs[role], "width": yolo.WIDTH, "trainer": yolo.SETTINGS}
    return chosen | {"distiller": yolo.ARMS.get(arm, {})}


def train(options: argparse.Namespace, framework: str, arm: str, seed: int) -> dict[str, Any]:
    """One training, in a process of its own; or the result of the one that finished before."""
    folder = place(options, framework, arm, seed)
    key = fingerprint(settings(options, framework, arm))
    kept = folder / "result.json"
    if kept.is_file() and (result := json.loads(kept.read_text()))["key"] == key:
        return dict(result)
    torch.set_num_threads(options.threads)
    folder.mkdir(parents=True, exist_ok=True)
    teacher = None if arm == "teacher" else weights(options, framework)
    role = "teacher" if arm == "teacher" else "student"
    splits = read(options)
    if framework == "torchvision":
        from examples.frameworks import retinanet

        schedule = Schedule(options.iterations[role], options.lr[role], BATCH)
        result = retinanet.train(splits, arm, seed, schedule, teacher, folder / "last.pt")
    else:
        from examples.frameworks import yolo

        data = options.data / "digits.yaml"
        result = yolo.train(data, splits[1], arm, seed, options.epochs[role], BATCH, teacher, folder)
    result["key"] = key
    kept.write_text(json.dumps(result, indent=2) + "\n")
    return dict(result)


def time_steps(options: argparse.Namespace, framework: str) -> dict[str, float]:
    """Milliseconds of a whole training step of each arm, their medians. The arms take turns, so that what else runs on
    the machine falls on all alike."""
    split = read(options)[0]
    steps: dict[str, Callable[[], Any]]
    if framework == "torchvision":
        from examples.frameworks import retinanet

        steps = retinanet.steps(split, weights(options, framework), BATCH)
    else:
        from examples.frameworks import yolo

        steps = yolo.steps(split, weights(options, framework), BATCH, options.out / framework)
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in range(options.rounds + 2):
        for arm, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[arm].append(time.perf_counter() - started)
    return {arm: 1000 * statistics.median(found[2:]) for arm, found in seconds.items()}
