"""Do the tests notice? Small faults (mutations.py), one at a time, in a copy of the sources; tests must fail.

    python tools/mutants.py --count 360 --seed 1 --out mutants.json
    python tools/mutants.py --parts pointwise cpu --count 40

A mutant is killed where a test fails, the program crashes, or it does not end. One that does not compile, or that
the compiler makes the same machine code of, is no mutant: another is drawn. mutmut and cosmic-ray know Python only;
universalmutator changes C++ by patterns over whole lines, template brackets and comments among them.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutant_builds import BUILDS, ROOT, Host, Invalid, Native, run
from mutations import MAKERS, Mutation

JUDGED = ("killed", "survived")
LEFT_OUT = (
    ".git", ".venv*", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "runs", "site", "dist", "asan",
    "tsan",
)  # fmt: skip


class Part(NamedTuple):
    """Sources, the tests that stand for them, and which of those."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    chosen: str
    build: str = ""


LOSSES = (
    "gradients", "accuracy", "focal", "softmax_kl", "rows", "edges", "table", "row_terms", "operators", "malformed",
)  # fmt: skip
PARTS = {
    "pointwise": Part(
        ("csrc/pointwise.h", "csrc/softmax.h", "csrc/row_losses.h"),
        (*LOSSES, "cpu"), "(cpu-cpu or test_cpu) and not compile", "cpu",
    ),
    "cpu": Part(
        ("csrc/cpu/*.cpp", "csrc/cpu/*.h", "csrc/*ops.cpp", "csrc/tensors.h", "csrc/queue.h"),
        (*LOSSES, "cpu", "properties"), "(cpu-cpu or malformed or test_cpu) and not compile", "cpu",
    ),
    "cuda": Part(("csrc/cuda/*",), (), "", "host"),
    "triton": Part(
        ("frs_kernels/triton/*.py",),
        ("triton", "triton_moments", *LOSSES, "properties"),
        "(triton-cpu or test_triton) and not compile and not float16 and not float64",
    ),
    "python": Part(
        tuple(
            f"frs_kernels/{name}.py"
            for name in (
                "autograd", "checks", "functional", "heads", "levels", "losses", "modules", "ops", "options", "pairs",
                "reference", "row_losses", "rows",
            )
        ),
        ("definition", "errors", "interface", "heads", *LOSSES, "fast_path", "loops", "misuse", "masks", "distributed",
         "ranks", "compile"),
        "not triton-cpu and not steps and not processes and not types_are_exact",
    ),
    "distill": Part(
        ("frs_kernels/distill/*.py",),
        ("distiller", "tap", "distiller_refusals", "teacher", "beside", "share", "masks", "integrations", "misuse",
         "distributed"),
        "not triton-cpu",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    part: str
    file: str
    line: int
    text: str
    old: str
    new: str
    end: str  # killed, survived, invalid, same
    by: str
    seconds: float

    @property
    def place(self) -> tuple[str, int, str, str, str]:
        return self.file, self.line, self.text, self.old, self.new


class Mutant(NamedTuple):
    part: str
    file: str
    mutation: Mutation
    line: int
    text: str

    @property
    def place(self) -> tuple[str, int, str, str, str]:
        return self.file, self.line, self.text, self.mutation.old, self.mutation.new


def mutants_of(name: str, seed: int) -> list[Mutant]:
    """All of a part, in a random order; of several that read alike on one line the last."""
    found: dict[tuple[str, int, str, str, str], Mutant] = {}
    for path in sorted({path for pattern in PARTS[name].sources for path in ROOT.glob(pattern)}):
        if path.suffix in MAKERS:
            source = path.read_bytes()
            lines = source.decode().splitlines()
            for mutation in MAKERS[path.suffix](source):
                line = mutation.line(source)
                mutant = Mutant(name, str(path.relative_to(ROOT)), mutation, line, lines[line - 1].strip())
                found[mutant.place] = mutant
    mutants = list(found.values())
    random.Random(f"{seed} {name}").shuffle(mutants)
    return mutants


class Copy:
    """A copy of the checkout, in which one mutant at a time lives."""

    def __init__(self, folder: Path, parts: Iterable[str]) -> None:
        self.root = folder / "checkout"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        builds = {PARTS[part].build for part in parts} - {""}
        self.objects: dict[str, Native] = {name: BUILDS[name](self.root) for name in builds}

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """How it ends, and by what."""
        part, path = PARTS[mutant.part], self.root / mutant.file
        whole = path.read_bytes()
        path.write_bytes(mutant.mutation.of(whole))
        native = self.objects.get(part.build)
        try:
            if native and not native.make(path):
                return "same", ""
            end, by = self.verdict(part)
            if native and end == "survived" and native.optimized_alike(path, whole):
                return "same", ""
            return end, by
        except Invalid as error:
            return "invalid", str(error)
        finally:
            path.write_bytes(whole)

    def check(self, name: str) -> None:
        """Raises RuntimeError where a part's tests fail without a mutant."""
        if native := self.objects.get(PARTS[name].build):
            native.link({each: native.folder / f"{each}.o" for each in native.commands})
        end, by = self.verdict(PARTS[name])
        if end != "survived":
            raise RuntimeError(f"{name}: {by}, and nothing was changed")

    def verdict(self, part: Part) -> tuple[str, str]:
        native = self.objects.get(part.build)
        return native.judge() if isinstance(native, Host) else self.test(part)

    def test(self, part: Part) -> tuple[str, str]:
        for group in (part.tests[:4], part.tests[4:]):  # what fails in the first needs no time for the rest
            files = [self.root / "tests" / f"test_{name}.py" for name in group]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
                       "--no-header", "--tb=no", "-k",
                       f"({part.chosen}) and not elements and not 32_bits", *files]  # fmt: skip
            code, out = run(
                command, self.root, OMP_NUM_THREADS="1", PYTHONPATH=str(self.root), PYTHONDONTWRITEBYTECODE="1",
                TEST_SEED="1",
            )  # fmt: skip
            if code not in (0, 5):
                said = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return "killed", said[0].split(" - ")[0] if said else f"exit {code}"
        return "survived", ""


def work(waiting: dict[str, list[Mutant]], wanted: dict[str, int], workers: int, console: Console) -> Iterator[Result]:
    """Results as they come; of each part as many mutants as are wanted, invalid ones not among them."""
    lock, results = threading.Lock(), queue.Queue[Result | None]()
    open_places, checked = dict(wanted), set[str]()

    def take() -> Mutant | None:
        with lock:
            for name, mutants in waiting.items():
                if open_places[name] and mutants:
                    open_places[name] -= 1
                    return mutants.pop()
        return None

    def loop(folder: Path) -> None:
        try:
            copy = Copy(folder, waiting)
            while mutant := take():
                with lock:
                    first = mutant.part not in checked
                    checked.add(mutant.part)
                if first:
                    copy.check(mutant.part)
                started = time.monotonic()
                end, by = copy.judge(mutant)
                if end in ("invalid", "same"):
                    with lock:
                        open_places[mutant.part] += 1
                seconds = time.monotonic() - started
                results.put(Result(mutant.part, *mutant.place, end, by, seconds))
        except RuntimeError as error:
            console.print(f"stopped: {error}")
        finally:
            results.put(None)

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=loop, args=(Path(folder, str(i)),)) for i in range(workers)]
        for thread in threads:
            thread.start()
        running = workers
        while running:
            result = results.get()
            if result is None:
                running -= 1
            else:
                yield result


def table(results: Sequence[Result]) -> Table:
    made = Table("part", "mutants", "killed", "share")
    for name in dict.fromkeys(r.part for r in results):
        judged = [r for r in results if r.part == name and r.end in JUDGED]
        killed = sum(r.end == "killed" for r in judged)
        made.add_row(name, str(len(judged)), str(killed), f"{killed / max(1, len(judged)):.0%}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--count", type=int, default=360, help="of mutants, the same of every part")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file; mutants that it holds are not judged again")
    parser.add_argument("--survivors", action="store_true", help="judge those of --out again that survived, no others")
    options = parser.parse_args()
    console = Console()
    held = json.loads(options.out.read_text())["mutants"] if options.out and options.out.exists() else []
    results = [Result(**each) for each in held]
    waiting = {name: mutants_of(name, options.seed) for name in options.parts}
    if options.survivors:
        again = {r.place for r in results if r.end == "survived"}
        results = [r for r in results if r.place not in again or r.part not in options.parts]
        waiting = {name: [m for m in mutants if m.place in again] for name, mutants in waiting.items()}
        wanted = {name: len(mutants) for name, mutants in waiting.items()}
    else:
        done = {r.place for r in results}
        waiting = {name: [m for m in mutants if m.place not in done] for name, mutants in waiting.items()}
        judged = {name: sum(r.part == name and r.end in JUDGED for r in results) for name in options.parts}
        wanted = {name: max(0, options.count // len(options.parts) - judged[name]) for name in options.parts}
    with Progress(console=console) as progress:
        task = progress.add_task("mutants", total=sum(wanted.values()))
        for result in work(waiting, wanted, options.workers, console):
            results.append(result)
            progress.advance(task, result.end in JUDGED)
            if result.end == "survived":
                progress.print(f"{result.file}:{result.line}: {result.text}\n    {result.old!r} -> {result.new!r}")
            if options.out:
                kept = {"seed": options.seed, "mutants": [asdict(r) for r in results]}
                options.out.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(table(results))


if __name__ == "__main__":
    main()
