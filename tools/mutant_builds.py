"""How a mutant of a compiled source is compiled: the CPU library, or the CUDA sources for the host."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900  # that a group of tests may take: some times what they take without a mutant
MEMORY = 8 << 30


def run(command: Sequence[Any], cwd: Path, memory: int = MEMORY, **environment: str) -> tuple[int, str]:
    """Exit status and output; -1 where it did not end."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    words = [str(word) for word in command]
    process = subprocess.Popen(
        words, cwd=cwd, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=limit, start_new_session=True, errors="replace",
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=SECONDS)
        return process.returncode, out
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return -1, "no end"


class Invalid(Exception):
    """What the compiler refuses."""


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
            # "far" reserves 100 GB of addresses
            code, out = run([self.folder / "driver", *arguments], self.root, memory=resource.RLIM_INFINITY)
            if code not in (0, 77):
                said = [line for line in out.splitlines() if line.strip()]
                return "killed", f"driver {' '.join(arguments)}: {said[-1][:120] if said else code}"
        return "survived", ""


BUILDS: dict[str, type[Native]] = {"cpu": Cpu, "host": Host}
