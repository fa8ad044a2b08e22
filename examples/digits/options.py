"""The command line, and the trainings that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import frs_kernels

from .detector import REACH, STUDENT, TEACHER, Size
from .train import Distillation, Schedule

QUICK = {
    "image_size": 64,
    "train_pictures": 40,
    "val_pictures": 12,
    "teacher_iterations": 12,
    "student_iterations": 8,
    "long_iterations": 12,
    "batch": 8,
    "ramp": 4,
    "seeds": [0, 1],
    "ablation": True,
}


@dataclass(frozen=True)
class Arm:
    """One way to train the student; `long` ones are compared with each other."""

    name: str
    label: str
    schedule: Schedule
    how: Distillation | None
    long: bool = False

    @property
    def baseline(self) -> str:
        return "alone-long" if self.long else "alone"


def parse(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Distil a small detector of handwritten digits with frs_kernels.fsr_loss.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/digits"), help="folder of all that is written")
    add("--data", type=Path, help="a COCO folder (README.md) in place of the digits")
    add("--image-size", type=int, default=128, help="side of the pictures, a multiple of 32")
    add("--train-pictures", type=int, default=3000, help="digits pictures to train on")
    add("--val-pictures", type=int, default=500, help="digits pictures to validate on")
    add("--teacher-iterations", type=int, default=1200)
    add("--student-iterations", type=int, default=700)
    add("--long-iterations", type=int, default=2400, help="of the ablation's long schedule")
    add("--bins", type=int, default=0, help="of each side's distribution, as GFL's; 0: a side is one number")
    add("--batch", type=int, default=16, help="pictures an iteration")
    add("--teacher-lr", type=float, default=5e-3)
    add("--student-lr", type=float, default=1e-2)
    add("--feat-weight", type=float, default=0.003, help="weight of the feature term")
    add("--cls-weight", type=float, default=1.0, help="weight of the classification term")
    add("--normalizer", choices=("mass", "total_mass"), default="mass", help="of fsr_loss")
    add("--ramp", type=int, default=200, help="iterations over which both weights rise from 0")
    add("--backend", default="auto", help="backend of fsr_loss and richness_mask")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto prefers cuda")
    add("--cache-gb", type=float, default=2.0, help="most memory for kept teacher outputs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one student of each arm a seed")
    add(
        "--ablation",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="add one-term, all-ones, other teachers', 1x1 adapters' and long trainings",
    )
    add("--quick", action="store_true", help="a tiny run that only shows that all parts work")
    parser.set_defaults(**defaults or {})
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)  # what the command line says still wins
    options = parser.parse_args(argv)
    if options.image_size < 32 or options.image_size % 32:
        parser.error("--image-size must be a multiple of 32")
    if options.bins and (options.bins < 2 or options.image_size > 32 * REACH):
        parser.error(f"--bins must be 0 or at least 2, and reaches across an --image-size of {32 * REACH:g} at most")
    for name in ("train_pictures", "val_pictures", "student_iterations", "teacher_iterations"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.batch < 1 or options.long_iterations < 1 or options.ramp < 1:
        parser.error("--batch, --long-iterations and --ramp must be at least 1")
    backends = frs_kernels.backends.available()
    if options.backend != "auto" and backends.get(options.backend, "no such backend") is not None:
        parser.error(f"--backend: {backends.get(options.backend, 'no such backend')}")
    options.seeds = list(dict.fromkeys(options.seeds))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {str(error).splitlines()[0]}")
    return options


def schedule(options: argparse.Namespace, iterations: int, lr: float) -> Schedule:
    every = 4 if options.quick else 100
    return Schedule(iterations, lr, options.batch, check_every=every)


def sizes(options: argparse.Namespace) -> tuple[Size, Size]:
    """Those of teacher and student."""
    return replace(TEACHER, bins=options.bins), replace(STUDENT, bins=options.bins)


def teacher_schedule(options: argparse.Namespace) -> Schedule:
    return schedule(options, options.teacher_iterations, options.teacher_lr)


def student_arms(options: argparse.Namespace) -> list[Arm]:
    """The students to train: alone and with both terms; with --ablation, eight more arms."""
    short = schedule(options, options.student_iterations, options.student_lr)
    both = Distillation(
        options.feat_weight, options.cls_weight, options.ramp, backend=options.backend, normalizer=options.normalizer
    )
    arms = [
        Arm("alone", "student alone", short, None),
        Arm("both", "student + fsr_loss", short, both),
    ]
    if options.ablation:
        long = schedule(options, options.long_iterations, options.student_lr)
        count = f"{options.long_iterations:,} iterations"
        arms += [
            Arm("features", "  features only", short, replace(both, cls_weight=0.0)),
            Arm("head", "  head only", short, replace(both, feat_weight=0.0)),
            Arm("ones", "  both, all-ones mask", short, replace(both, mask="ones")),
            Arm("whole-teacher", "  both, teacher as it is", short, replace(both, teacher="whole")),
            Arm("16-bit-teacher", "  both, teacher in 16 bits", short, replace(both, teacher="16 bits")),
            Arm("small-adapter", "  both, 1x1 adapters", short, replace(both, adapter_kernel=1)),
            Arm("alone-long", f"student alone, {count}", long, None, long=True),
            Arm("both-long", f"student + fsr_loss, {count}", long, both, long=True),
        ]
    return arms
