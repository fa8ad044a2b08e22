"""Losses that people distil with against each other, equal effort for each, on the digits and on photographs.

    python -m examples.digits.compare --data digits BCCD_Dataset/BCCD

Every loss gets the same. One short training holds each of its terms at the rest's gradient (`GradientShare`): the
weights it needs for that are where tuning starts. Three multiples of them are tried with the tuning seeds; the one with
the best mean AP is taken. Then it is judged: trained with other seeds, on a short and on a long schedule. The student
alone has nothing to tune. First weights and order of the pictures are the same in all trainings of a seed, so that
differences to the student alone are taken seed by seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import options as settings
from . import report
from .coco import DataError
from .pool import Bench, Job, Pool, pool
from .progress import stage
from .train import Distillation, Run, Schedule
from .voc import convert

STUDIES = Path(__file__).parent / "studies"
SCALES = (1 / 3, 1.0, 3.0)
"""Of the weights at which a term's gradient equals the rest's: what is tried for every loss."""
DEFAULTS = {
    "out": Path("runs/losses"),
    "bins": 8,
    "student_iterations": 500,
    "long_iterations": 1500,
    "seeds": [0, 1, 2, 3, 4],
}


@dataclass(frozen=True)
class Way:
    """One way to teach; `how` has the weight 1 for each of its terms."""

    label: str
    how: Distillation | None


def ways(options: argparse.Namespace) -> dict[str, Way]:
    """All that are compared.

    QFL compares every position, as CrossKD does. LD is weighed by the richness, since distributions are trained where
    objects are, and LD's authors leave out the rest. "frs-ld" is their sum of LD, of classes and of features, with FRS
    for the latter two.
    """
    none = Distillation(0.0, 0.0, options.ramp, backend=options.backend, normalizer="total_mass")
    frs = replace(none, feat_weight=1.0, cls_weight=1.0)
    pkd = replace(none, feat_weight=1.0, feat_loss="pkd")
    qfl = replace(none, cls_weight=1.0, cls_loss="qfl", mask="ones")
    return {
        "alone": Way("student alone", None),
        "frs": Way("FRS (richness)", frs),
        "frs-mass": Way('FRS (richness, the paper\'s "mass")', replace(frs, normalizer="mass")),
        "frs-ones": Way("FRS (all-ones mask)", replace(frs, mask="ones")),
        "frs-boxes": Way("FRS (box mask)", replace(frs, mask="boxes")),
        "pkd": Way("PKD (features)", pkd),
        "cwd": Way("CWD (features)", replace(pkd, feat_loss="cwd")),
        "qfl": Way("QFL (class logits)", qfl),
        "ld": Way("LD (box distributions)", replace(none, box_weight=1.0)),
        "pkd-qfl": Way("PKD + QFL", replace(qfl, feat_weight=1.0, feat_loss="pkd")),
        "frs-ld": Way("FRS (richness) + LD", replace(frs, box_weight=1.0)),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """This command's own options and those of the example, in one."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.compare",
        description="Compare losses to distil with, equal effort for each. With the defaults a data set is 125 short "
        "and 55 long trainings: the digits and BCCD together take about 3 hours on two cores. What is finished is "
        "kept; the same command goes on. Further options are those of python -m examples.digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data", nargs="+", default=["digits"], help="digits, folders of COCO's kind (README.md), of Pascal VOC's kind"
    )
    add("--workers", type=int, default=2, help="processes of one thread each; 1: no other process, all threads")
    add("--tuning-seeds", type=int, nargs="+", default=[100, 101], help="of the trainings that choose the weights")
    add("--ways", nargs="+", help="only these, and the student alone")
    add(
        "--results",
        type=Path,
        help="folder for losses-DATA.json; by default examples/digits/studies, with --quick or --ways that of --out",
    )
    own, rest = parser.parse_known_args(argv)
    options = settings.parse(rest, DEFAULTS)
    if options.quick and own.tuning_seeds == parser.get_default("tuning_seeds"):
        own.tuning_seeds = own.tuning_seeds[:1]
    if not options.bins:
        parser.error("--bins must be at least 2: LD compares distributions")
    if shared := set(own.tuning_seeds) & set(options.seeds):
        parser.error(f"--seeds and --tuning-seeds share {', '.join(map(str, sorted(shared)))}: judged by what chose it")
    known = list(ways(options))
    if unknown := set(own.ways or ()) - set(known):
        parser.error(f"--ways: {', '.join(sorted(unknown))} are not among {', '.join(known)}")
    own.results = own.results or (options.out if options.quick or own.ways else STUDIES)
    own.ways = [name for name in known if name == "alone" or name in (own.ways or known)]
    return argparse.Namespace(**{**vars(options), **vars(own)})


def data_sets(console: Console, options: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The options for each of --data, with a folder of its own; VOC folders become COCO ones, mirrored as well."""
    found = {}
    for given in options.data:
        name = Path(given).resolve().name.lower()
        out, data = options.out / name, None if given == "digits" else Path(given)
        if data and (data / "ImageSets").is_dir():
            voc, data = data, out / "pictures"
            if not (data / "annotations" / "val.json").is_file():
                with stage(console, f"convert {voc}") as advance:
                    convert(voc, data, flips=True, advance=advance)
        found[name] = argparse.Namespace(**{**vars(options), "data": data, "out": out})
    return found


def schedules(options: argparse.Namespace) -> dict[str, Schedule]:
    lengths = {"short": options.student_iterations, "long": options.long_iterations}
    return {
        name: Schedule(count, options.student_lr, options.batch, check_every=500) for name, count in lengths.items()
    }


def count(options: argparse.Namespace) -> int:
    """Iterations of all trainings of students."""
    taught, seeds = len(options.ways) - 1, len(options.seeds)
    judged: int = seeds * len(options.ways)
    short = judged + taught * (1 + len(SCALES) * len(options.tuning_seeds))
    return sum(n * plan.iterations for n, plan in zip((short, judged), schedules(options).values(), strict=True))


def scaled(how: Distillation, weights: Mapping[str, float], scale: float) -> Distillation:
    changed: dict[str, Any] = {f"{name}_weight": scale * weight for name, weight in weights.items()}
    return replace(how, **changed)


def balance(run: Run) -> dict[str, float]:
    """The weights that a training with shares needed: the geometric mean over its second half."""
    return {
        name: math.exp(statistics.fmean(map(math.log, values[len(values) // 2 :])))
        for name, values in run.weights.items()
    }


def best(tried: Mapping[float, Sequence[float]]) -> float:
    """The scale with the highest mean AP; of equals, the smallest."""
    return max(sorted(tried), key=lambda scale: statistics.fmean(tried[scale]))


def compare(options: argparse.Namespace, run_all: Pool) -> dict[str, Any]:
    """Balance, tune and judge every way."""
    plans, chosen = schedules(options), {name: way for name, way in ways(options).items() if name in options.ways}
    taught = {name: way.how for name, way in chosen.items() if way.how}
    labels = {name: way.label for name, way in chosen.items()}

    first = options.tuning_seeds[0]
    jobs = [Job(labels[name], plans["short"], first, replace(how, share=1.0)) for name, how in taught.items()]
    starts = {name: balance(run) for name, run in zip(taught, run_all("where to start", jobs), strict=True)}

    tries = [(name, scale, seed) for name in taught for scale in SCALES for seed in options.tuning_seeds]
    jobs = [
        Job(f"{labels[name]}, × {scale:.2g}", plans["short"], seed, scaled(taught[name], starts[name], scale))
        for name, scale, seed in tries
    ]
    tuning: dict[str, dict[float, list[float]]] = {name: {scale: [] for scale in SCALES} for name in taught}
    for (name, scale, _), run in zip(tries, run_all("weights", jobs), strict=True):
        tuning[name][scale].append(run.metrics["AP"] or 0.0)
    scales = {name: best(tried) for name, tried in tuning.items()}

    final = {name: scaled(how, starts[name], scales[name]) for name, how in taught.items()}
    arms: dict[str, dict[str, Any]] = {
        name: {"label": labels[name], "how": asdict(final[name]) if name in final else None} for name in chosen
    }
    for name in taught:
        tried = {f"{scale:.3g}": {"AP": values} for scale, values in tuning[name].items()}
        arms[name] |= {"start": starts[name], "tuning": tried, "scale": scales[name]}
    for plan, schedule in plans.items():
        cases = [(name, seed) for name in chosen for seed in options.seeds]
        jobs = [Job(labels[name], schedule, seed, final.get(name)) for name, seed in cases]
        runs: dict[str, dict[int, Run]] = {name: {} for name in chosen}
        for (name, seed), run in zip(cases, run_all(f"{plan} schedule", jobs), strict=True):
            runs[name][seed] = run
        for name in chosen:
            arms[name][plan] = report.summarize(runs[name])
        for name in taught:
            arms[name][plan]["gain"] = report.gain(arms[name][plan], arms["alone"][plan])
    return arms


def table(title: str, arms: Mapping[str, Any]) -> Table:
    made = Table(title=title)
    for column in ("", "weights", "short", "gain", "long", "gain"):
        made.add_column(column)
    for arm in arms.values():
        cells = [f"× {arm['scale']:.2g}" if "scale" in arm else ""]
        for plan in ("short", "long"):
            found = arm[plan]
            cells.append(report.number(found["mean"]["AP"], found["spread"]["AP"]))
            cells.append(report.number(found["gain"]["mean"], found["gain"]["spread"], "+") if "gain" in found else "")
        made.add_row(arm["label"], *cells)
    return made


def work(console: Console, name: str, options: argparse.Namespace) -> None:
    bench = Bench(options, console)
    with pool(bench, options.workers, console, count(options)) as run_all:
        arms = compare(options, run_all)
    common = report.describe(options, bench.splits, bench.sides)
    if options.workers > 1:
        common["machine"] |= {"threads": 1, "workers": options.workers}
    results = {"arms": arms, "teacher": report.summarize({0: bench.teacher_run})["mean"], **common}
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"losses-{name}.json"
    report.write(results, path)
    console.print(table(f"COCO AP on {name}", arms))
    console.print(f"{path}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        for name, of_one in data_sets(console, options).items():
            work(console, name, of_one)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
