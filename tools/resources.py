"""What nvcc made of csrc/cuda: registers, memory, width of loads and stores of every kernel in the CUDA library.

    python tools/resources.py [--write]     a line a kernel; --write puts them into docs/codegen-cuda.md

Reads the library that `make install` has built, no GPU needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "frs_kernels" / "lib" / "libfrs_cuda.so"
VERBS = ("score", "imitate", "scale")
ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 128  # four blocks of 128 threads a multiprocessor


class Kernel(NamedTuple):
    """A kernel on one architecture."""

    verb: str
    arguments: tuple[str, ...]  # of its template
    architecture: int
    registers: int
    stack: int
    local: int
    shared: int
    instructions: int
    wide_loads: int
    wide_stores: int
    spills: int

    @property
    def packet(self) -> int:
        """The numbers moved at once on a level whose rows are aligned."""
        return int(self.arguments[-1]) if self.arguments else 16

    def fault(self, most_registers: int = MAX_REGISTERS) -> str:
        """Why this is not good enough, or an empty string."""
        if self.registers > most_registers:
            return f"{self.registers} registers"
        if self.stack or self.local or self.spills:
            return f"{self.stack} bytes of stack, {self.local} of local memory, {self.spills} spill instructions"
        if self.packet > 1 and not self.wide_loads:
            return "no 16-byte load"
        if self.packet > 1 and self.verb != "score" and not self.wide_stores:
            return "no 16-byte store"
        return ""

    def __str__(self) -> str:
        return f"{self.verb}<{', '.join(self.arguments)}> sm_{self.architecture}"


def find_cuobjdump() -> Path | None:
    """cuobjdump on the PATH, in the newest toolkit under /usr/local, or the one that Triton carries."""
    places = [shutil.which("cuobjdump")]
    places += sorted(map(str, Path("/usr/local").glob("cuda*/bin/cuobjdump")), reverse=True)
    spec = find_spec("triton")  # found without importing it
    if spec and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


def kernels() -> Iterator[Kernel]:
    """All kernels of the library, on all architectures."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "no cuobjdump"
    for architecture in ARCHITECTURES:
        usage = demangle(run(cuobjdump, "-arch", f"sm_{architecture}", "--dump-resource-usage", LIBRARY))
        code = dict(functions(demangle(run(cuobjdump, "-arch", f"sm_{architecture}", "-sass", LIBRARY))))
        for line, numbers in re.findall(r"Function (.*):\n(.*REG:.*)", usage):
            used = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", numbers)}
            name = signature(line)
            lines = code[name]
            yield Kernel(
                name[0],
                name[1:],
                architecture,
                used["REG"],
                used["STACK"],
                used["LOCAL"],
                used["SHARED"],
                len(lines),
                sum(bool(re.search(r"\bLDG\S*\.128", x)) for x in lines),
                sum(bool(re.search(r"\bSTG\S*\.128", x)) for x in lines),
                sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in lines),
            )


def functions(sass: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The instructions of every function in a listing."""
    for part in re.split(r"Function : ", sass)[1:]:
        name, _, listing = part.partition("\n")
        yield signature(name), re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", listing)


def signature(name: str) -> tuple[str, ...]:
    """The verb of a kernel's demangled name and its template arguments, without what is the same for all."""
    found = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", name)
    assert found, name
    short = re.sub(r"frs::cuda::|\(anonymous namespace\)::|__nv_|__", "", found[2] or "")
    words = {"(frs::Loss)0": "mse", "(frs::Loss)1": "bce", "(frs::Loss)2": "kl", "true": "loss", "false": "no loss"}
    return found[1], *(words.get(word, word) for word in short.split(", ") if word)


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


PAGE = """\
# What nvcc makes of the CUDA kernels

Generated by `make codegen`; not edited. The kernels of the CUDA library, built by {compiler}. `make test` fails if one
spills, takes more than {most} registers, or has no 16-byte access where rows are aligned.

{kernels} kernels for {architectures} architectures. Most registers: {registers}. Stack and local memory: {memory}
bytes. Spill instructions: {spills}. Template arguments: dtypes of student and teacher (Any: read at run time), what is
computed in, the loss, whether it is wanted, and the numbers that are moved at once. Instructions and accesses are
sm_90's.

| kernel | registers sm_80 / 90 / 100 | shared bytes | instructions | 16-byte loads | 16-byte stores |
|---|---|---|---|---|---|
"""


def markdown(found: list[Kernel]) -> str:
    """docs/codegen-cuda.md: a line a kernel."""
    record = json.loads((LIBRARY.parent / "build.json").read_text())
    head = PAGE.format(
        compiler=record["cuda"]["compiler"],
        most=MAX_REGISTERS,
        kernels=len(found) // len(ARCHITECTURES),
        architectures=len(ARCHITECTURES),
        registers=max(k.registers for k in found),
        memory=sum(k.stack + k.local for k in found),
        spills=sum(k.spills for k in found),
    )
    lines = []
    in_order = sorted(found, key=lambda k: (VERBS.index(k.verb), k.arguments, k.architecture))
    for _, group in itertools.groupby(in_order, key=lambda k: (k.verb, k.arguments)):
        made = list(group)
        registers = " / ".join(str(k.registers) for k in made)
        k = made[1]
        name = f"{k.verb} {', '.join(k.arguments)}"
        lines.append(f"| {name} | {registers} | {k.shared} | {k.instructions} | {k.wide_loads} | {k.wide_stores} |")
    return head + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/codegen-cuda.md")
    options = parser.parse_args()
    found = list(kernels())
    text = markdown(found)
    if options.write:
        (ROOT / "docs" / "codegen-cuda.md").write_text(text)
    else:
        print(text)
    faults = [f"FAULT {k}: {k.fault()}" for k in found if k.fault()]
    print(*faults, f"{len(found)} kernels, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
