"""Compile csrc/cuda for sm_80, sm_90 and sm_100, with no GPU, and read what the compiler made of it.

    python tools/resources.py        a line a kernel: registers, shared memory, wide loads and stores

Objects are kept in build/cuda, by a hash of the sources and the flags: only a change compiles again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
VERBS = ("score", "imitate", "scale")
ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 128  # four blocks of 128 threads a multiprocessor
FLAGS = (
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden",
    *(word for a in ARCHITECTURES for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")),
    "-gencode", f"arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}",
)  # fmt: skip


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


def find_nvcc() -> Path | None:
    """nvcc on the PATH, under CUDA_HOME, or the newest under /usr/local."""
    places = [shutil.which("nvcc"), os.environ.get("CUDA_HOME", "") + "/bin/nvcc"]
    places += sorted(map(str, Path("/usr/local").glob("cuda*/bin/nvcc")), reverse=True)
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


def find_cuobjdump() -> Path | None:
    """cuobjdump beside nvcc, on the PATH, or the one that Triton carries (there without importing Triton)."""
    nvcc = find_nvcc()
    places = [shutil.which("cuobjdump"), str(nvcc.with_name("cuobjdump")) if nvcc else None]
    spec = find_spec("triton")
    if spec and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


def build(verb: str) -> Path:
    """The object of a verb, compiled if there is none of these sources."""
    nvcc = find_nvcc()
    assert nvcc, "no nvcc"
    source = CSRC / "cuda" / f"{verb}.cu"
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")])
    key = hashlib.sha256(repr((FLAGS, str(nvcc))).encode())
    for path in (source, *headers):
        key.update(path.read_bytes())
    made = ROOT / "build" / "cuda" / f"{verb}-{key.hexdigest()[:16]}.o"
    made.parent.mkdir(parents=True, exist_ok=True)
    with open(made.parent / f"{verb}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second test worker waits for the first one's object
        if not made.exists():
            for old in made.parent.glob(f"{verb}-*.o"):
                old.unlink()
            unfinished = made.with_suffix(".part")
            run(nvcc, *FLAGS, "-I", CSRC, "-c", source, "-o", unfinished)
            unfinished.replace(made)
    return made


def kernels(verb: str) -> Iterator[Kernel]:
    """All kernels of a verb, on all architectures."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump, "no cuobjdump"
    for architecture in ARCHITECTURES:
        made = build(verb)
        usage = demangle(run(cuobjdump, "-arch", f"sm_{architecture}", "--dump-resource-usage", made))
        code = dict(functions(demangle(run(cuobjdump, "-arch", f"sm_{architecture}", "-sass", made))))
        for line, numbers in re.findall(r"Function (.*):\n(.*REG:.*)", usage):
            used = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", numbers)}
            name = signature(line)
            lines = code[name]
            yield Kernel(
                verb,
                name,
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
    """The template arguments of a kernel's demangled name, without what is the same for all."""
    found = re.search(r"_kernel<(.*?)>\(", name)
    if not found:
        return ()
    short = re.sub(r"frs::cuda::|\(anonymous namespace\)::|__nv_|__", "", found[1])
    losses = {"(frs::Loss)0": "mse", "(frs::Loss)1": "bce", "(frs::Loss)2": "kl", "true": "loss", "false": "no loss"}
    return tuple(losses.get(word, word) for word in short.split(", "))


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    found = [k for verb in VERBS for k in kernels(verb)]
    for k in found:
        print(
            f"{k!s:60} {k.registers:4} registers {k.shared:6} shared {k.instructions:6} instructions "
            f"{k.wide_loads:3} wide loads {k.wide_stores:3} wide stores {k.fault()}"
        )
    faults = sum(bool(k.fault()) for k in found)
    print(f"{len(found)} kernels, most registers {max(k.registers for k in found)}, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
