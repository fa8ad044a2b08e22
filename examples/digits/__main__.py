"""The stages of the example, in order. `python -m examples.digits --help` lists the options."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch
from rich.console import Console

from . import pictures, report
from .coco import COCO_SIDES, DataError, Split, read_split
from .detector import Detector, Size
from .digits import DIGIT_SIDES, make_digits
from .options import Arm, parse, sizes, student_arms, teacher_schedule
from .progress import Advance, stage
from .timing import time_losses
from .train import Distillation, Run, Schedule, TeacherOutputs, fingerprint, mask_difference, train


def load(console: Console, options: argparse.Namespace) -> tuple[Split, Split]:
    """Make the digits if they are wanted; read both splits onto the device."""
    folder = options.data
    if folder is None:
        folder = options.out / f"data-{options.image_size}"
        counts = {"train": options.train_pictures, "val": options.val_pictures}
        with stage(console, "make digits", sum(counts.values())) as advance:
            make_digits(folder, counts=counts, image_size=options.image_size, advance=advance)
    splits = []
    for name in ("train", "val"):
        with stage(console, f"read {name} pictures") as advance:
            split = read_split(folder, name, options.image_size, advance)
        splits.append(
            replace(
                split,
                pictures=split.pictures.to(options.device),
                boxes=split.boxes.to(options.device),
                labels=split.labels.to(options.device),
            )
        )
    if splits[0].category_ids != splits[1].category_ids:
        raise DataError(f"{folder}: train.json and val.json list different categories")
    return splits[0], splits[1]


class Trainer:
    """Trains one detector a call, each in a folder named for all that its result depends on."""

    def __init__(
        self,
        console: Console,
        options: argparse.Namespace,
        splits: tuple[Split, Split],
        sides: tuple[float, float],
    ) -> None:
        self.console, self.options, self.splits, self.sides = console, options, splits, sides
        self.teacher_key = ""

    def __call__(
        self,
        name: str,
        label: str,
        size: Size,
        schedule: Schedule,
        seed: int,
        how: Distillation | None = None,
        teacher: TeacherOutputs | None = None,
        advance: Advance | None = None,
    ) -> tuple[Detector, Run]:
        key = fingerprint(
            {
                "size": asdict(size),
                "schedule": asdict(schedule),
                "seed": seed,
                "data": [split.fingerprint for split in self.splits],
                "device": self.options.device,
                "how": asdict(how) | {"teacher": self.teacher_key} if how else None,
            }
        )
        if name == "teacher":
            self.teacher_key = key
        title = f"{label.strip()}, seed {seed}"
        with nullcontext(advance) if advance else stage(self.console, title, schedule.iterations) as told:
            return train(
                size,
                self.splits,
                schedule,
                self.options.out / "trainings" / f"{name}-seed{seed}-{key}",
                seed=seed,
                device=torch.device(self.options.device),
                sides=self.sides,
                how=how,
                teacher=teacher,
                advance=told,
            )


def work(console: Console, options: argparse.Namespace) -> None:
    started = time.perf_counter()
    splits = load(console, options)
    sides = COCO_SIDES if options.data else DIGIT_SIDES
    trainer = Trainer(console, options, splits, sides)

    teacher_size, student_size = sizes(options)
    teacher, teacher_run = trainer("teacher", "teacher", teacher_size, teacher_schedule(options), seed=0)
    outputs: dict[str, TeacherOutputs] = {}

    def outputs_of(kind: str) -> TeacherOutputs:
        if kind not in outputs:
            with stage(console, f"teacher outputs, {kind}", len(splits[0])) as advance:
                outputs[kind] = TeacherOutputs(teacher, splits[0].pictures, options.cache_gb, advance, kind)
        return outputs[kind]

    students: dict[str, tuple[Arm, dict[int, Run]]] = {}
    shown: dict[str, Detector] = {}
    for arm in student_arms(options):
        runs: dict[int, Run] = {}
        taught = outputs_of(arm.how.teacher) if arm.how else None
        for seed in options.seeds:
            model, runs[seed] = trainer(arm.name, arm.label, student_size, arm.schedule, seed, arm.how, taught)
            if seed == options.seeds[0]:
                shown[arm.name] = model
        students[arm.name] = arm, runs

    with stage(console, "timing the loss", 1) as advance:
        rows = torch.arange(min(options.batch, len(splits[0])))
        loss_ms, absent = time_losses(*outputs_of("folded").batch(rows)[:2], options.feat_weight, options.cls_weight)
        advance(1)
    with stage(console, "pictures", 3) as advance:
        pictures.draw_masks(teacher, splits[1], options.out / "masks.png", options.backend)
        advance(1)
        models = {"student alone": shown["alone"], "student + fsr_loss": shown["both"]}
        models["teacher"] = teacher
        pictures.draw_detections(splits[1], models, options.out / "detections.png")
        advance(2)
        pictures.draw_curves(students, options.out / "curves.png")
        advance(3)
    results = report.collect(options, splits, sides, teacher_run, students, loss_ms, absent, parameters(teacher, shown))
    if (whole := outputs.get("whole")) is not None:
        others = {kind: made for kind, made in outputs.items() if made is not whole}
        results["mask_difference"] = {
            kind: mask_difference(whole, made, splits[1].pictures) for kind, made in others.items()
        }
    report.write(results, options.out / "results.json")
    console.print(report.table(results))
    console.print(
        f"{time.perf_counter() - started:.0f} s; results.json, masks.png, detections.png and "
        f"curves.png are in {options.out}"
    )


def parameters(teacher: Detector, students: dict[str, Detector]) -> dict[str, int]:
    models = {"teacher": teacher, "student": students["alone"]}
    return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        work(console, options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
