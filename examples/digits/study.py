"""Denominators, masks and weights of `fsr_loss` against each other, on the digits or a COCO folder.

    python -m examples.digits.study --out runs/study --seeds 0 1 2 3 4

Each of the normalizers "mass" and "total_mass", each of three masks and each of several weights trains one student a
seed. A weight is a multiple of --feat-weight and --cls-weight, or a share: then both terms are held where their
gradients, at the features and at the logits, are that part of the rest's. The gradients' norms are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.console import Console

from . import options as settings
from . import report
from .__main__ import Trainer, load
from .coco import COCO_SIDES, DataError
from .digits import DIGIT_SIDES
from .progress import stage
from .train import MASKS, Distillation, Run, TeacherOutputs

NORMALIZERS = ("mass", "total_mass")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """This command's own options, and those of the example."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.study",
        description="Further options are those of python -m examples.digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scales", type=float, nargs="*", default=[1.0, 3.0], help="multiples of both weights")
    parser.add_argument("--shares", type=float, nargs="*", default=[1.0], help="shares of the gradient")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--normalizers", nargs="+", choices=NORMALIZERS, default=list(NORMALIZERS))
    own, rest = parser.parse_known_args(argv)
    return own, settings.parse(rest)


def ways(own: argparse.Namespace, options: argparse.Namespace) -> list[Distillation]:
    plain = Distillation(options.feat_weight, options.cls_weight, options.ramp, backend=options.backend, measure=True)
    found = []
    for normalizer in own.normalizers:
        for mask in own.masks:
            base = replace(plain, normalizer=normalizer, mask=mask)
            for scale in own.scales:
                weights = {"feat_weight": scale * plain.feat_weight, "cls_weight": scale * plain.cls_weight}
                found.append(replace(base, **weights))
            found += [replace(base, share=share) for share in own.shares]
    return found


def label(how: Distillation | None) -> str:
    if how is None:
        return "alone"
    weight = f"share {how.share:g}" if how.share is not None else f"weights {how.feat_weight:g}, {how.cls_weight:g}"
    return f"{how.normalizer}, {how.mask}, {weight}"


def work(console: Console, own: argparse.Namespace, options: argparse.Namespace) -> None:
    splits = load(console, options)
    trainer = Trainer(console, options, splits, COCO_SIDES if options.data else DIGIT_SIDES)
    teacher_size, student_size = settings.sizes(options)
    teacher, teacher_run = trainer("teacher", "teacher", teacher_size, settings.teacher_schedule(options), seed=0)
    with stage(console, "teacher outputs", len(splits[0])) as advance:
        outputs = TeacherOutputs(teacher, splits[0].pictures, options.cache_gb, advance)
    short = settings.schedule(options, options.student_iterations, options.student_lr)
    arms = []
    for how in (None, *ways(own, options)):
        runs = {
            seed: trainer("study", label(how), student_size, short, seed, how, outputs if how else None)[1]
            for seed in options.seeds
        }
        arms.append({"how": asdict(how) if how else None, **report.summarize(runs), "pull": _pull(list(runs.values()))})
    common = report.describe(options, splits, trainer.sides)
    results = {"arms": arms, "teacher": report.summarize({0: teacher_run})["mean"], **common}
    report.write(results, options.out / "study.json")
    console.print(f"{options.out / 'study.json'}")


def _pull(runs: list[Run]) -> dict[str, list[float]]:
    """Mean norms of an iteration over the seeds."""
    steps = sum(len(run.step_seconds) for run in runs)
    names = runs[0].pull
    return {name: [sum(each) / steps for each in zip(*(run.pull[name] for run in runs), strict=True)] for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    own, options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        work(console, own, options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
