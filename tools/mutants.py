"""Do the tests notice? Small faults (mutations.py), one at a time, in a copy of the sources; tests must fail.

    python tools/mutants.py --count 360 --seed 1 --out mutants.json
    python tools/mutants.py --parts pointwise cpu --count 40

A mutant is killed where a test fails, the program crashes, or it does not end. One that does not compile, or that
the compiler makes the same machine code of, is no mutant: another is drawn. mutmut and cosmic-ray know Python only;
universalmutator's C++ compiles in one case out of ten, since it knows lines and no syntax.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import random
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutations import MAKERS, Mutation

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # that a mutant's tests may take: ten times what they take without one
MEMORY = 8 << 30
LEFT_OUT = (
    ".git",
    ".venv*",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    "runs",
    "site",
    "dist",
    "asan",
)


class Part(NamedTuple):
    """Sources, the tests that stand for them, and which of those."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    chosen: str
    build: str = ""


LOSSES = (
    "gradients",
    "accuracy",
    "focal",
    "softmax_kl",
    "rows",
    "edges",
    "table",
    "row_terms",
    "operators",
    "malformed",
)
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
        ("triton", "triton_moments", *LOSSES, "properties"), "(triton-cpu or test_triton) and not compile",
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
        "not triton-cpu and not steps and not processes",
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


class Mutant(NamedTuple):
    part: str
    file: str
    mutation: Mutation


def mutants_of(name: str, rng: random.Random) -> list[Mutant]:
    """All of a part, in a random order."""
    found = [
        Mutant(name, str(path.relative_to(ROOT)), mutation)
        for pattern in PARTS[name].sources
        for path in sorted(ROOT.glob(pattern))
        if path.suffix in MAKERS
        for mutation in MAKERS[path.suffix](path.read_bytes())
    ]
    rng.shuffle(found)
    return found


def run(command: Sequence[Any], cwd: Path, seconds: float = SECONDS, **environment: str) -> tuple[int, str]:
    """Exit status and output; -1 where it did not end."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    words = [str(word) for word in command]
    process = subprocess.Popen(
        words, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=limit, start_new_session=True, errors="replace",
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=seconds)
        return process.returncode, out
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return -1, "no end"


class Invalid(Exception):
    """What the compiler refuses."""


class Copy:
    """A copy of the checkout, in which one mutant at a time lives."""

    def __init__(self, folder: Path, parts: Iterable[str]) -> None:
        self.root = folder / "checkout"
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        self.builds = {PARTS[part].build for part in parts} - {""}
        self.objects: dict[str, Native] = {name: BUILDS[name](self.root) for name in self.builds}

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """How it ends, and by what."""
        part, path = PARTS[mutant.part], self.root / mutant.file
        whole = path.read_bytes()
        path.write_bytes(mutant.mutation.of(whole))
        try:
            native = self.objects.get(part.build)
            if native:
                try:
                    if not native.make(path):
                        return "same", ""
                except Invalid as error:
                    return "invalid", str(error)
                end = native.judge() if isinstance(native, Host) else self.test(part)
                return ("same", "") if end[0] == "survived" and native.optimized_alike(path, whole) else end
            return self.test(part)
        finally:
            path.write_bytes(whole)

    def check(self, name: str) -> None:
        """Raises RuntimeError where a part's tests fail without a mutant."""
        native = self.objects.get(PARTS[name].build)
        if native:
            native.link({each: native.folder / f"{each}.o" for each in native.commands})
        end, by = native.judge() if isinstance(native, Host) else self.test(PARTS[name])
        if end != "survived":
            raise RuntimeError(f"{name}: {by}, and nothing was changed")

    def test(self, part: Part) -> tuple[str, str]:
        for group in (part.tests[:4], part.tests[4:]):  # what fails in the first needs no time for the rest
            files = [self.root / "tests" / f"test_{name}.py" for name in group]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
                       "--no-header", "--tb=no", "-k", part.chosen, *files]  # fmt: skip
            code, out = run(
                command, self.root, OMP_NUM_THREADS="1", PYTHONPATH=str(self.root), PYTHONDONTWRITEBYTECODE="1",
                TEST_SEED="1",
            )  # fmt: skip
            if code not in (0, 5):
                said = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return "killed", said[0].split(" - ")[0] if said else f"exit {code}"
        return "survived", ""


class Native:
    """Objects, those of a changed source compiled anew."""

    folder: Path
    commands: dict[str, tuple[list[str], Path]]  # of an object: how it is compiled, from what

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "build" / "mutants"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.needs = {name: self.read(command, source) for name, (command, source) in self.commands.items()}
        for name in self.commands:
            self.compile(name, self.folder / f"{name}.o")

    def read(self, command: list[str], source: Path) -> set[Path]:
        code, out = run([*command, "-MM", source], self.root)
        if code:
            raise Invalid(out)
        return {(self.root / word).resolve() for word in out.partition(":")[2].replace("\\\n", " ").split()}

    def compile(self, name: str, to: Path, *more: str) -> Path:
        command, source = self.commands[name]
        code, out = run([*command, *more, "-c", source, "-o", to], self.root)
        if code:
            errors = [line for line in out.splitlines() if "error" in line]
            raise Invalid(errors[0] if errors else f"exit {code}")
        return to

    def make(self, changed: Path) -> bool:
        """Whether any object is another than before; it is linked."""
        objects, other = {}, False
        for name in self.commands:
            objects[name] = self.folder / f"{name}.o"
            if changed.resolve() in self.needs[name]:
                made = self.compile(name, self.folder / f"{name}.mutant.o")
                other |= made.read_bytes() != objects[name].read_bytes()
                objects[name] = made
        if other:
            self.link(objects)
        return other

    def optimized_alike(self, changed: Path, whole: bytes) -> bool:
        """Whether -O2 makes the same of the changed file and of the whole one: then it is no fault."""
        mutated = changed.read_bytes()
        made = []
        for text in (mutated, whole):
            changed.write_bytes(text)
            names = [name for name in self.commands if changed.resolve() in self.needs[name]]
            made.append([self.compile(name, self.folder / "optimized.o", "-O2", "-g0").read_bytes() for name in names])
        return made[0] == made[1]

    def link(self, objects: dict[str, Path]) -> None:
        raise NotImplementedError


class Cpu(Native):
    """The CPU library: of the kernels those of this CPU's instructions, at -O0, which takes a seventh of the time."""

    def __init__(self, root: Path) -> None:
        here = Path.cwd()
        os.chdir(root)
        try:
            with mock.patch("setuptools.setup"):
                recipe = runpy.run_path("setup.py")
            made = recipe["cpu_recipe"](recipe["find_torch"](), recipe["find_compiler"]())
            flags = Path("/proc/cpuinfo").read_text()
            isa = next(name for name in ("avx512", "avx2", "baseline") if name in flags or name == "baseline")
            mine = [each for each in made.objects if each.name.endswith(isa) or each.name.count(".") == 1]
            self.others = [root / recipe["compiled"](each) for each in made.objects if each not in mine]
        finally:
            os.chdir(here)
        self.commands = {each.name: ([*each.command, "-O0", "-w"], each.source) for each in mine}
        self.last = [*made.link, *map(str, self.others)], made.libraries
        super().__init__(root)

    def link(self, objects: dict[str, Path]) -> None:
        command, libraries = self.last
        library = self.root / "frs_kernels" / "lib" / "libfrs_cpu.so"
        part = library.with_suffix(".part")
        code, out = run([*command, *objects.values(), *libraries, "-o", part], self.root)
        if code:
            raise Invalid(out[-200:])
        part.replace(library)


class Host(Native):
    """The CUDA sources compiled for the host, and the driver that compares them with loops."""

    def __init__(self, root: Path) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        import test_cuda_source as source

        native = root / "tests" / "native"
        flags = [flag for flag in source.FLAGS if flag != "-Werror"]
        command = ["g++", *flags, "-O0", "-w", "-I", str(native), "-I", "csrc", "-I", "csrc/cuda", "-x", "c++"]
        files = [*(root / "csrc" / "cuda" / f"{name}.cu" for name in source.KERNELS), native / "driver.cpp"]
        self.commands = {path.stem: (command, path) for path in files}
        super().__init__(root)

    def link(self, objects: dict[str, Path]) -> None:
        code, out = run(["g++", *objects.values(), "-o", self.folder / "driver", "-pthread"], self.root)
        if code:
            raise Invalid(out[-200:])

    def judge(self) -> tuple[str, str]:
        for arguments in (("1", "one"), ("1", "random", "60"), ("1",), ("1", "far")):
            code, out = run([self.folder / "driver", *arguments], self.root)
            if code not in (0, 77):
                said = [line for line in out.splitlines() if line.strip()]
                return "killed", f"driver {' '.join(arguments)}: {said[-1][:120] if said else code}"
        return "survived", ""


BUILDS: dict[str, type[Native]] = {"cpu": Cpu, "host": Host}


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
                source = (ROOT / mutant.file).read_bytes()
                line = mutant.mutation.line(source)
                text = source.splitlines()[line - 1].decode().strip()
                old, new = mutant.mutation.old, mutant.mutation.new
                results.put(Result(mutant.part, mutant.file, line, text, old, new, end, by, time.monotonic() - started))
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
        judged = [r for r in results if r.part == name and r.end in ("killed", "survived")]
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
    options = parser.parse_args()
    rng, console = random.Random(options.seed), Console()
    known = (
        [Result(**each) for each in json.loads(options.out.read_text())["mutants"]]
        if (options.out and options.out.exists())
        else []
    )
    done = {(r.file, r.line, r.text, r.old, r.new) for r in known}
    waiting, wanted = {}, {}
    for name in options.parts:
        waiting[name] = [
            m
            for m in mutants_of(name, rng)
            if (
                m.file,
                (line := m.mutation.line(b := (ROOT / m.file).read_bytes())),
                b.splitlines()[line - 1].decode().strip(),
                m.mutation.old,
                m.mutation.new,
            )
            not in done
        ]
        judged = sum(r.part == name and r.end in ("killed", "survived") for r in known)
        wanted[name] = max(0, options.count // len(options.parts) - judged)
    results = known
    with Progress(console=console) as progress:
        task = progress.add_task("mutants", total=sum(wanted.values()))
        for result in work(waiting, wanted, options.workers, console):
            results.append(result)
            progress.advance(task, result.end in ("killed", "survived"))
            if result.end == "survived":
                progress.print(f"{result.file}:{result.line}: {result.text}\n    {result.old!r} -> {result.new!r}")
            if options.out:
                facts = {"python": platform.python_version(), "seed": options.seed}
                options.out.write_text(json.dumps({**facts, "mutants": [asdict(r) for r in results]}, indent=1) + "\n")
    console.print(table(results))


if __name__ == "__main__":
    main()
