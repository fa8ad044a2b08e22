"""Compare two result files, or two git revisions measured here and now, case by case.

    python benchmarks/compare.py A B [--all] [--repeats 3] [--cases TEXT]

A and B are loss.json files, folders that hold one, or git revisions. A revision is checked out into a temporary folder,
its libraries are built there, and the benchmarks of this checkout are run with --quick against both in turn, several
times, since two runs of one revision differ by more than the rounds of one do. A difference counts where the quartiles
of the two do not overlap; exits 1 if something of B is slower by that, or wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from grid import Case
from report import OURS, seconds_of
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WRONG = (math.nan, math.nan, math.nan)
Timings = dict[tuple[str, str], tuple[float, float, float]]  # (case, implementation): median, lower, upper quartile


def timings(record: dict[str, Any]) -> Timings:
    return {
        (Case(**measured["case"]).title, name): tuple(seconds_of(result)) if "step" in result else WRONG
        for measured in record["cases"]
        for name, result in measured["implementations"].items()
    }


def merge(runs: list[Timings]) -> Timings:
    """Several runs as one: the middle of the medians, the widest of the quartiles."""
    found: Timings = {}
    for key in (key for key in runs[0] if all(key in run for run in runs)):
        medians, lows, highs = zip(*(run[key] for run in runs), strict=True)
        wrong = any(map(math.isnan, medians))
        found[key] = WRONG if wrong else (sorted(medians)[len(medians) // 2], min(lows), max(highs))
    return found


def verdict(a: tuple[float, float, float], b: tuple[float, float, float]) -> str:
    """What can be said of B against A; a wrong result has no time."""
    if math.isnan(b[0]):
        return "wrong"
    if math.isnan(a[0]):
        return "was wrong"
    if b[2] < a[1]:
        return "faster"
    if b[1] > a[2]:
        return "slower"
    return "within the spread"


def rows(a: Timings, b: Timings, everything: bool) -> list[tuple[str, str, float, float, str]]:
    """(case, implementation, ms of A, ms of B, verdict), ours only unless told otherwise."""
    return [
        (case, name, 1e3 * a[case, name][0], 1e3 * b[case, name][0], verdict(a[case, name], b[case, name]))
        for case, name in a
        if (case, name) in b and (everything or name.startswith(OURS))
        if not math.isnan(a[case, name][0]) or not math.isnan(b[case, name][0])
    ]


def load(path: Path) -> Timings:
    path = path / "loss.json" if path.is_dir() else path
    return timings(json.loads(path.read_text()))


def revisions(names: list[str], repeats: int, console: Console) -> list[Timings]:
    """Each revision's timings, all measured now and in turn."""
    with tempfile.TemporaryDirectory() as folder:
        trees = []
        for number, name in enumerate(names):
            tree = Path(folder) / f"{number}"
            subprocess.run(["git", "worktree", "add", "--detach", "--quiet", tree, name], cwd=ROOT, check=True)
            trees.append(tree)
        try:
            for name, tree in zip(names, trees, strict=True):
                console.print(f"building {name}")
                build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
                wanted = {"FRS_BUILD": "cuda" if torch.cuda.is_available() else "cpu"}
                subprocess.run(build, cwd=tree, env=os.environ | wanted, check=True, capture_output=True)
            runs: list[list[Timings]] = [[] for _ in names]
            for repeat in range(repeats):
                turn = list(zip(names, trees, runs, strict=True))
                for name, tree, found in turn[:: 1 if repeat % 2 == 0 else -1]:  # none is always the first
                    console.print(f"measuring {name}, {repeat + 1} of {repeats}")
                    out = tree / f"compare-{repeat}"
                    command = [sys.executable, "benchmarks/run.py", "--quick", "--parts", "loss", "--out", out]
                    environment = os.environ | {"PYTHONPATH": str(tree)}
                    ran = subprocess.run(
                        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
                    )
                    result = next(out.glob("*/loss.json"), None)
                    if result is None:
                        raise SystemExit(f"{name} could not be measured:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
                    found.append(load(result))
            return [merge(found) for found in runs]
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--all", action="store_true", help="the rivals too: what they differ by is the machine's noise")
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement of revisions")
    parser.add_argument("--cases", default="", help="only cases whose title holds this text")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 130)
    names = [options.a, options.b]
    files = [Path(name).exists() for name in names]
    if all(files):
        a, b = (load(Path(name)) for name in names)
    elif not any(files):
        a, b = revisions(names, options.repeats, console)
    else:
        parser.error("give two files or two revisions, not one of each")
    found = [row for row in rows(a, b, options.all) if options.cases in row[0]]
    if not found:
        parser.error("the two have no case in common")
    table = Table("case", "implementation", "A, ms", "B, ms", "B / A", "", title=f"A: {names[0]}   B: {names[1]}")
    colours = {"faster": "[green]", "slower": "[red]", "wrong": "[red]"}
    for case, name, first, second, word in found:
        table.add_row(
            case, name, f"{first:.2f}", f"{second:.2f}", f"{second / first:.2f}", f"{colours.get(word, '')}{word}"
        )
    console.print(table)
    return 1 if any(row[-1] in ("slower", "wrong") and row[1].startswith(OURS) for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
