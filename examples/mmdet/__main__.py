"""Train a teacher, a student alone and a distilled student with mmdetection, and compare their COCO mAP.

python -m examples.mmdet                       GFL, one seed: some minutes on two cores
python -m examples.mmdet --detector fcos       or retinanet, faster_rcnn
python -m examples.mmdet --ablation            with one term, an all-ones mask, other teachers, 1x1 adapters
python -m examples.mmdet --quick               seconds: shows only that every part works
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

import frs_kernels
from examples.digits.progress import Advance, stage
from examples.digits.report import cpu_name
from examples.mmdet import data

CONFIGS = Path(__file__).parent / "configs" / "digits"
DETECTORS = ("gfl", "retinanet", "fcos", "faster_rcnn")
METRICS = {"AP": "bbox_mAP", "AP50": "bbox_mAP_50", "AP75": "bbox_mAP_75"}
PACKAGES = ("torch", "onedl-mmdetection", "onedl-mmcv", "onedl-mmengine", "pycocotools", "numpy")

# label, the config's suffix, and what it changes in the distiller
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "alone": ("student alone", "", {}),
    "both": ("student + fsr_loss", "_distil", {}),
    "features": ("features only", "_distil", {"model.terms": "features"}),
    "head": ("head only", "_distil", {"model.terms": "head"}),
    "ones": ("both, all-ones mask", "_distil", {"model.mask": "ones"}),
    "whole-teacher": ("both, teacher as it is", "_distil", {"model.fast_teacher": False}),
    "16-bit-teacher": ("both, teacher in 16 bits", "_distil", {"model.fast_teacher": {"dtype": "auto"}}),
    "small-adapter": ("both, 1x1 adapters", "_distil", {"model.adapter_kernel": 1}),
}


class Observer(Hook):
    """Moves the progress bar, times the steps and keeps the metrics of the last validation."""

    priority = "VERY_LOW"

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.seconds: list[float] = []
        self.metrics: dict[str, float] = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.started = time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.advance(runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = {name: 100 * (metrics or {})[f"coco/{key}"] for name, key in METRICS.items()}


def train(
    console: Console, options: argparse.Namespace, name: str, arm: str, label: str, seed: int, changes: dict[str, Any]
) -> tuple[dict[str, Any], Runner]:
    """Train one config from the beginning; its mAP, time a step, parameters and folder of logs."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    iterations = options.iterations
    teacher = options.out / f"{options.detector}_teacher"
    run = "-".join([name, *([arm] if changes else []), f"seed{seed}"])
    config.work_dir = str(teacher if name.endswith("_teacher") else options.out / run)
    shutil.rmtree(config.work_dir, ignore_errors=True)
    settings: dict[str, Any] = {
        "train_cfg.max_iters": iterations,
        "train_cfg.val_interval": iterations,
        "default_hooks.checkpoint.interval": iterations,
        "log_level": "ERROR",
        "randomness.seed": seed,
        "experiment_name": run,
        "visualizer.name": run,  # mmengine keeps one of a name for the life of the process
    }
    for split in ("train", "val", "test"):
        settings[f"{split}_dataloader.dataset.data_root"] = str(options.data)
        if split != "train":
            settings[f"{split}_evaluator.ann_file"] = f"{options.data}/annotations/val.json"
    if name.endswith("_distil"):
        settings["model.teacher_checkpoint"] = str(teacher / f"iter_{iterations}.pth")
        settings["model.warmup"] = min(config.model.warmup, iterations // 2)
    config.merge_from_dict(settings | changes)
    begin = min(50, iterations // 2)
    config.param_scheduler[0].end = config.param_scheduler[1].begin = begin
    config.param_scheduler[1].end, config.param_scheduler[1].T_max = iterations, iterations - begin
    with stage(console, f"{label}, seed {seed}", iterations) as advance:
        observer = Observer(advance)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
            runner = Runner.from_cfg(config)
            runner.register_hook(observer)
            runner.train()
    result = {
        "metrics": observer.metrics,
        "step_ms": 1000 * statistics.median(observer.seconds),
        "parameters": sum(p.numel() for p in getattr(runner.model, "student", runner.model).parameters()),
        "folder": os.path.relpath(runner.log_dir),
    }
    return result, runner


@torch.no_grad()
def mask_difference(a: Runner, b: Runner) -> float:
    """The largest difference of two distillers' richness scores on the validation pictures."""
    largest = 0.0
    for batch in a.val_dataloader:
        images = a.model.data_preprocessor(batch)["inputs"]
        scores = (runner.model.richness(images).scores for runner in (a, b))
        largest = max(largest, *(float((x - y).abs().max()) for x, y in zip(*scores, strict=True)))
    return largest


def compare(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """All trainings, as results.json keeps them."""
    detector = options.detector
    teacher, _ = train(console, options, f"{detector}_teacher", "teacher", "teacher", 0, {})
    arms = {"teacher": {"label": "teacher", "seeds": {"0": teacher}}}
    runners: dict[str, Runner] = {}
    for arm in ARMS if options.ablation else ("alone", "both"):
        label, suffix, changes = ARMS[arm]
        runs = {}
        for seed in options.seeds:
            runs[str(seed)], runners[arm] = train(console, options, detector + suffix, arm, label, seed, changes)
        arms[arm] = {"label": label, "seeds": runs}
    differences = {}
    if (whole := runners.get("whole-teacher")) is not None:
        differences = {arm: mask_difference(whole, runners[arm]) for arm in ("both", "16-bit-teacher")}
    for arm in arms.values():
        runs = list(arm["seeds"].values())
        arm["mean"] = {name: statistics.fmean(run["metrics"][name] for run in runs) for name in METRICS}
        arm["spread"] = statistics.stdev(run["metrics"]["AP"] for run in runs) if len(runs) > 1 else None
        arm["step_ms"] = statistics.median(run["step_ms"] for run in runs)
        arm["parameters"] = runs[0]["parameters"]
    return {
        "detector": detector,
        "arms": arms,
        "mask_difference": differences,
        "settings": {"iterations": options.iterations, "seeds": options.seeds, "pictures": options.counts},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"frs_kernels": frs_kernels.__version__} | {name: version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def table(results: dict[str, Any]) -> Table:
    arms = results["arms"]
    made = Table(title=f"{results['detector']}: COCO mAP on {results['settings']['pictures']['val']} pictures")
    for column in ("", *METRICS, "gain", "parameters", "ms a step"):
        made.add_column(column, justify="left" if not column else "right")
    for name, arm in arms.items():
        gain = "" if name in ("teacher", "alone") else f"{arm['mean']['AP'] - arms['alone']['mean']['AP']:+.1f}"
        first, *rest = (f"{value:.1f}" for value in arm["mean"].values())
        first += "" if arm["spread"] is None else f" ± {arm['spread']:.1f}"
        made.add_row(arm["label"], first, *rest, gain, f"{arm['parameters']:,}", f"{arm['step_ms']:.0f}")
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", choices=DETECTORS, default="gfl")
    parser.add_argument("--iterations", type=int, default=500, help="of each training (500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the students (0)")
    parser.add_argument("--ablation", action="store_true", help="one term, all-ones mask, other teachers, 1x1 adapters")
    parser.add_argument("--out", type=Path, default=Path("runs/mmdet"))
    parser.add_argument("--quick", action="store_true", help="a few pictures and iterations")
    options = parser.parse_args(argv)
    options.counts = {"train": 48, "val": 8} if options.quick else data.COUNTS
    options.data = options.out / ("data-quick" if options.quick else "data")
    if options.quick:
        options.iterations = 4
    if options.iterations < 2:
        parser.error("--iterations must be 2 or more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # The stream of now: what trains writes to another one.
    console = Console(file=sys.stdout)
    started = time.perf_counter()
    warnings.filterwarnings("ignore")  # mmengine's, on what it finds or misses in the configs
    data.make(console, options.data, options.counts)
    results = compare(console, options)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(results))
    masks = Path(results["arms"]["both"]["seeds"][str(options.seeds[0])]["folder"]) / "vis_data" / "vis_image"
    console.print(f"{time.perf_counter() - started:.0f} s; {options.out / 'results.json'}; the masks are in {masks}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
