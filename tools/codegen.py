"""Compile every Triton specialisation for sm_80, sm_90 and sm_100, with no GPU, and report what the compiler made.

    python tools/codegen.py            check and print the table
    python tools/codegen.py --write    and write docs/codegen.md
    python tools/codegen.py --quick    the specialisations of one training step only

The kernels compiled are those the launchers would launch: each launcher is called on CPU tensors with its kernel
replaced by a recorder, and the recorded arguments go through Triton's own specialisation. Registers, stack and
spills are read from the cubin, the width of loads and stores from SASS.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import frs_kernels.triton.imitate as imitate_module
import frs_kernels.triton.scale as scale_module
import frs_kernels.triton.score as score_module

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
MAX_REGISTERS = 128
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
# H * W of an image of 800 x 1344: 16,800 and 4,200 positions are a multiple of 8, the rest is not
SIZES = ((8, 16), (8, 8), (4, 4), (3, 5), (1, 3))


class Case(NamedTuple):
    """One launch, by what decides its specialisation."""

    kernel: str
    student: str
    teacher: str
    layout: str
    channels: int
    loss: str = ""
    mode: str = ""  # of imitate: "loss", "loss+grad" or "grad"
    levels: int = 5

    def __str__(self) -> str:
        dtypes = self.student if self.student == self.teacher else f"{self.student} from {self.teacher}"
        return " ".join(
            filter(None, (self.kernel, self.loss, self.mode, dtypes, self.layout, f"C={self.channels} L={self.levels}"))
        )


class Report(NamedTuple):
    """What the compiler made of a case on one architecture."""

    case: Case
    architecture: int
    registers: int
    stack: int
    spills: int
    wide_loads: int
    narrow_loads: int

    @property
    def fault(self) -> str:
        """Why this is not good enough, or an empty string."""
        if self.registers > MAX_REGISTERS:
            return f"{self.registers} registers"
        if self.stack or self.spills:
            return f"{self.stack} bytes of stack, {self.spills} spill instructions"
        row = self.case.channels * min(DTYPES[self.case.student].itemsize, DTYPES[self.case.teacher].itemsize)
        aligned = self.case.layout == "nchw" or (self.case.layout == "nhwc" and row % 16 == 0)
        if aligned and not self.wide_loads:
            return "no 16-byte load"
        return ""


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def cases(quick: bool) -> Iterator[Case]:
    """What is compiled.

    Five levels of one dtype in every layout and tile; for imitate with every loss and mode. Every other pair of dtypes,
    and contiguous levels that do not begin on 16 bytes, with the loss and the gradient of the paper's terms. One to
    eight levels.
    """
    if quick:
        yield Case("score", "fp32", "fp32", "nchw", 80)
        yield Case("imitate", "bf16", "bf16", "nchw", 256, "mse", "loss+grad")
        yield Case("imitate", "bf16", "bf16", "nhwc", 80, "bce", "loss+grad")
        yield Case("scale", "bf16", "bf16", "nchw", 80)
        return
    tiles = (("nchw", 3), ("nchw", 256), ("nhwc", 3), ("nhwc", 256), ("strided", 256))
    outputs = [(loss, mode) for loss in ("mse", "bce", "kl") for mode in ("loss", "loss+grad", "grad")]
    outputs.remove(("kl", "grad"))  # runs the one of bce
    for dtype in DTYPES:
        yield Case("scale", dtype, dtype, "nchw", 256)
        for layout, channels in tiles:
            yield Case("score", dtype, dtype, layout, channels)
            for loss, mode in outputs:
                yield Case("imitate", dtype, dtype, layout, channels, loss, mode)
    for student, teacher in itertools.permutations(DTYPES, 2):
        for layout, loss in (("nchw", "mse"), ("nchw", "bce"), ("nhwc", "bce")):
            yield Case("imitate", student, teacher, layout, 256, loss, "loss+grad")
    for dtype in DTYPES:
        yield Case("score", dtype, dtype, "misaligned", 256)
        yield Case("imitate", dtype, dtype, "misaligned", 256, "mse", "loss+grad")
        yield Case("imitate", dtype, dtype, "misaligned", 256, "bce", "loss+grad")
    for levels in (1, 2, 3, 4, 6, 7, 8):
        yield Case("score", "bf16", "bf16", "nchw", 256, levels=levels)
        yield Case("imitate", "bf16", "bf16", "nchw", 256, "bce", "loss+grad", levels=levels)


def levels_of(case: Case, dtype: str) -> list[torch.Tensor]:
    sizes = [SIZES[min(i, len(SIZES) - 1)] for i in range(case.levels)]
    levels = [torch.zeros(2, case.channels, h, w, dtype=DTYPES[dtype]) for h, w in sizes]
    if case.layout == "nhwc":
        return [x.to(memory_format=torch.channels_last) for x in levels]
    if case.layout == "misaligned":
        return [torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape) for x in levels]
    return [x.transpose(2, 3) for x in levels] if case.layout == "strided" else levels


def record(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel and the arguments that the launcher of this case launches it with."""
    module = {"score": score_module, "imitate": imitate_module, "scale": scale_module}[case.kernel]
    name = f"{case.kernel}_kernel"
    kernel = getattr(module, name)
    recorder = Recorder(kernel)
    setattr(module, name, recorder)
    try:
        student, teacher = levels_of(case, case.student), levels_of(case, case.teacher)
        if case.kernel == "score":
            score_module.score(student)
        elif case.kernel == "scale":
            scale_module.scale_(student + teacher, torch.ones(()))
        else:
            scores = torch.zeros(sum(x[:, 0].numel() for x in student), dtype=torch.float64 if "fp64" in case else None)
            factor = torch.ones(()) if case.mode == "grad" else None
            imitate_module.imitate(
                student, teacher, scores, scores[: case.levels], factor, 1.0, case.loss, 1.0,
                "loss" in case.mode, "grad" in case.mode,
            )  # fmt: skip
    finally:
        setattr(module, name, kernel)
    ((args, kwargs),) = recorder.launches
    return kernel, args, kwargs


def build(case: Case) -> list[Report]:
    """Compile one case for every architecture."""
    kernel, args, kwargs = record(case)
    reports = []
    for architecture in ARCHITECTURES:
        target = GPUTarget("cuda", architecture, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        reports.append(read(case, architecture, compiled.asm["cubin"]))
    return reports


def read(case: Case, architecture: int, cubin: bytes) -> Report:
    """Registers, stack, spills and the width of global loads of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run(TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name)
    loads = re.findall(r"\bLDG\S*", text)
    wide = sum(".128" in load for load in loads)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", text)[0]) for key in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Report(case, architecture, registers, stack, spills, wide, len(loads) - wide)


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


PAGE = """\
# What the Triton compiler makes of the kernels

Generated by `make codegen`; not edited. Every specialisation is compiled ahead of time, no GPU needed, by Triton
{version}. `make test` fails if one spills, takes more than {most} registers, or has no 16-byte global load where rows
are aligned.

{cases} specialisations for {architectures} architectures, {binaries} binaries. Most registers: {registers}. Stack:
{stack} bytes in all. Spill instructions: {spills}.

Loads are counted in the code: of 16 bytes, and narrower. The narrower serve levels whose rows are not aligned, the
scores, and the sums over slots; on an aligned level only the last two run. C = 3 in nhwc, the strided layout and
levels that do not begin on 16 bytes (misaligned) have no aligned rows.

| kernel, loss, mode, dtype, layout, channels, levels | registers sm_80 / 90 / 100 | 16-byte loads | narrower |
|---|---|---|---|
"""


def markdown(reports: Sequence[Report]) -> str:
    """docs/codegen.md: a line a specialisation."""
    head = PAGE.format(
        version=triton.__version__,
        most=MAX_REGISTERS,
        cases=len({r.case for r in reports}),
        architectures=len(ARCHITECTURES),
        binaries=len(reports),
        registers=max(r.registers for r in reports),
        stack=sum(r.stack for r in reports),
        spills=sum(r.spills for r in reports),
    )
    lines = []
    for case, group in itertools.groupby(reports, key=lambda r: r.case):
        made = list(group)
        registers = " / ".join(str(r.registers) for r in made)
        lines.append(f"| {case} | {registers} | {made[1].wide_loads} | {made[1].narrow_loads} |")
    return head + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the specialisations of one training step only")
    parser.add_argument("--write", action="store_true", help="write docs/codegen.md")
    parser.add_argument("--jobs", type=int, default=2, help="compile in this many processes")
    options = parser.parse_args(argv)
    with ProcessPoolExecutor(options.jobs) as pool:
        reports = [r for made in pool.map(build, cases(options.quick), chunksize=4) for r in made]
    text = markdown(reports)
    if options.write:
        (ROOT / "docs" / "codegen.md").write_text(text)
    faults = [r for r in reports if r.fault]
    for r in faults:
        print(f"FAULT sm_{r.architecture} {r.case}: {r.fault}")
    print(text if not options.write else text.split("| kernel")[0])
    print(f"{len(reports)} binaries, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
