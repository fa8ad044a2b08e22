"""Compile every Triton specialisation for sm_80, 90, 100 and 120, with no GPU, and report what the compiler made.

    python tools/codegen.py            check and print the tables
    python tools/codegen.py --write    and write docs/codegen.md
    python tools/codegen.py --quick    the specialisations of one training step only

The kernels compiled are those the launchers would launch: each launcher is called on CPU tensors with its kernel
replaced by a recorder, and the recorded arguments go through Triton's own specialisation. Registers, stack and spills
are read from the cubin; the width of loads, and the instructions that a thread executes for a value, from SASS.
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
import frs_kernels.triton.moments as moments_module
import frs_kernels.triton.scale as scale_module
import frs_kernels.triton.score as score_module
import frs_kernels.triton.softmax as softmax_module
from frs_kernels.levels import accumulate_dtype
from frs_kernels.losses import LOSSES, Pointwise
from frs_kernels.row_losses import ROW_LOSSES

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
MAX_REGISTERS = 128
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
MODULES = {
    "score": score_module,
    "imitate": imitate_module,
    "softmax": softmax_module,
    "scale": scale_module,
    "moments": moments_module,
    "moments_backward": moments_module,
}
# H * W of an image of 800 x 1344: 16,800 and 4,200 positions are a multiple of 8, the rest is not
SIZES = ((8, 16), (8, 8), (4, 4), (3, 5), (1, 3))


class Case(NamedTuple):
    """One launch, by what decides its specialisation."""

    kernel: str
    student: str
    teacher: str
    layout: str
    channels: int
    loss: str = ""  # of imitate, and along rows; "mse+bce" is a step: features of 256 channels, and logits
    mode: str = ""  # of imitate: "loss", "loss+grad" or "grad"
    levels: int = 5
    temperature: float = 1.0

    def __str__(self) -> str:
        dtypes = self.student if self.student == self.teacher else f"{self.student} from {self.teacher}"
        tempered = "" if self.temperature == 1 else "tempered"
        shape = f"C={self.channels} L={self.levels}"
        return " ".join(filter(None, (self.kernel, self.loss, self.mode, tempered, dtypes, self.layout, shape)))


# Instructions a value on sm_90, where a level's rows are aligned: what the machine code may take at most.
BUDGETS = {
    Case("imitate", "bf16", "bf16", "nchw", 720, "bce", "loss+grad"): 46,
    Case("imitate", "fp32", "fp32", "nchw", 720, "bce", "loss+grad"): 48,
    Case("imitate", "fp16", "fp16", "nchw", 720, "bce", "grad"): 33,
    Case("imitate", "fp32", "fp32", "nchw", 256, "mse", "loss+grad"): 20,
    Case("imitate", "bf16", "bf16", "nchw", 256, "mse", "loss+grad"): 14,
    Case("score", "fp32", "fp32", "nchw", 720): 3.5,
    Case("score", "bf16", "bf16", "nchw", 720): 3.5,
    Case("score", "fp16", "fp16", "nchw", 720): 3.5,
    Case("moments", "fp32", "fp32", "nchw", 256, "pkd"): 18,
    Case("moments", "bf16", "bf16", "nchw", 256, "pkd"): 18,
    Case("moments", "fp32", "fp32", "nchw", 256, "cwd"): 28,
    Case("moments", "bf16", "bf16", "nchw", 256, "cwd"): 28,
    Case("moments_backward", "fp32", "fp32", "nchw", 256, "pkd"): 14,
    Case("moments_backward", "bf16", "bf16", "nchw", 256, "pkd"): 14,
    Case("moments_backward", "fp32", "fp32", "nchw", 256, "cwd"): 18,
    Case("moments_backward", "bf16", "bf16", "nchw", 256, "cwd"): 18,
}


class Report(NamedTuple):
    """What the compiler made of a case on one architecture."""

    case: Case
    architecture: int
    registers: int
    stack: int
    spills: int
    wide_loads: int
    narrow_loads: int
    a_value: float | None  # instructions, where rows are aligned and one loss is computed

    @property
    def fault(self) -> str:
        """Why this is not good enough, or an empty string."""
        if self.registers > MAX_REGISTERS:
            return f"{self.registers} registers"
        if self.stack > SPILLED.get((str(self.case), self.architecture), 0):
            return f"{self.stack} bytes of stack, {self.spills} spill instructions"
        row = self.case.channels * min(DTYPES[self.case.student].itemsize, DTYPES[self.case.teacher].itemsize)
        aligned = self.case.layout == "nchw" or (self.case.layout in ("nhwc", "rows") and row % 16 == 0)
        if self.case.kernel == "softmax":  # a group begins anywhere, and in 16 bits it moves 8 bytes at once
            aligned = self.case.layout == "nchw" and DTYPES[self.case.student].itemsize > 2
        if aligned and not self.wide_loads:
            return "no 16-byte load"
        if self.case in BUDGETS and self.architecture == 90:
            if self.a_value is None:
                return "no loop of 16-byte loads to count"
            if self.a_value > BUDGETS[self.case]:
                return f"{self.a_value:.1f} instructions a value, more than {BUDGETS[self.case]}"
        return ""


# Bytes of stack that stay, where more registers would be a block fewer for a case that no detector has: 3 features.
SPILLED = {("moments pkd bf16 nhwc C=3 L=5", 100): 32}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def cases(quick: bool) -> Iterator[Case]:
    """What is compiled.

    What has a budget. In every dtype: a step, both terms in one launch, in every layout and tile; every loss with its
    gradient; mse and bce alone, and their gradient alone; the heaviest, kl, in every layout; a temperature; levels that
    do not begin on 16 bytes. Levels packed as rows of one tensor. A step of every other pair of dtypes, and of other
    numbers of levels. The losses along rows in every dtype and layout.
    """
    if quick:
        yield Case("score", "fp32", "fp32", "nchw", 80)
        yield Case("imitate", "bf16", "bf16", "nchw", 256, "mse", "loss+grad")
        yield Case("imitate", "bf16", "bf16", "nhwc", 80, "bce", "loss+grad")
        yield Case("softmax", "bf16", "bf16", "nchw", 68, "softmax_kl", "loss+grad")
        yield Case("scale", "bf16", "bf16", "nchw", 80)
        return
    yield from BUDGETS
    tiles = (("nchw", 3), ("nchw", 80), ("nhwc", 3), ("nhwc", 80), ("strided", 80))
    for dtype in DTYPES:
        yield Case("scale", dtype, dtype, "nchw", 80)
        for layout, channels in tiles:
            yield Case("score", dtype, dtype, layout, channels)
            yield Case("imitate", dtype, dtype, layout, channels, "mse+bce", "grad" if dtype == "fp16" else "loss+grad")
        for loss in (name for name, found in LOSSES.items() if isinstance(found, Pointwise)):
            yield Case("imitate", dtype, dtype, "nchw", 256, loss, "loss+grad")
        for layout in ("nchw", "nhwc", "strided"):  # the bins of GFL's boxes
            yield Case("softmax", dtype, dtype, layout, 68, "softmax_kl", "grad" if dtype == "fp16" else "loss+grad")
        for loss, mode in itertools.product(("mse", "bce"), ("loss", "grad")):
            yield Case("imitate", dtype, dtype, "nchw", 256, loss, mode)
        for layout in ("nhwc", "strided"):
            yield Case("imitate", dtype, dtype, layout, 256, "kl", "loss+grad")
        yield Case("imitate", dtype, dtype, "nchw", 256, "bce", "loss+grad", temperature=2.0)
        yield Case("score", dtype, dtype, "misaligned", 256)
        yield Case("imitate", dtype, dtype, "misaligned", 256, "mse+bce", "loss+grad")
    for dtype in ("fp32", "bf16"):
        yield Case("score", dtype, dtype, "rows", 80)
        yield Case("imitate", dtype, dtype, "rows", 80, "mse+bce", "loss+grad")
    for student, teacher in itertools.permutations(DTYPES, 2):
        yield Case("imitate", student, teacher, "nchw", 80, "mse+bce", "loss+grad")
    for verb, loss in itertools.product(("moments", "moments_backward"), ROW_LOSSES):
        for dtype in DTYPES:
            yield Case(verb, dtype, dtype, "nchw", 256, loss)
        for dtype, (layout, channels) in itertools.product(("fp32", "fp64", "bf16"), (("nhwc", 256), ("strided", 80))):
            yield Case(verb, dtype, dtype, layout, channels, loss)
        for layout, channels in (("nchw", 3), ("nhwc", 3), ("misaligned", 256), ("rows", 80)):
            yield Case(verb, "bf16", "bf16", layout, channels, loss)
        yield Case(verb, "bf16", "fp32", "nchw", 80, loss)
        yield Case(verb, "bf16", "bf16", "nchw", 256, loss, levels=17)
    for levels in (1, 3, 8):
        yield Case("score", "bf16", "bf16", "nchw", 256, levels=levels)
        yield Case("imitate", "bf16", "bf16", "nchw", 256, "mse+bce", "loss+grad", levels=levels)


def levels_of(case: Case, dtype: str, channels: int) -> list[torch.Tensor]:
    sizes = [SIZES[min(i, len(SIZES) - 1)] for i in range(case.levels)]
    levels = [torch.zeros(2, channels, h, w, dtype=DTYPES[dtype]) for h, w in sizes]
    if case.layout == "nhwc":
        return [x.to(memory_format=torch.channels_last) for x in levels]
    if case.layout == "rows":
        packed = torch.zeros(2, sum(h * w for h, w in sizes), channels, dtype=DTYPES[dtype])
        rows = packed.split([h * w for h, w in sizes], 1)
        return [x.unflatten(1, size).permute(0, 3, 1, 2) for x, size in zip(rows, sizes, strict=True)]
    if case.layout == "misaligned":
        return [torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape) for x in levels]
    return [x.transpose(2, 3) for x in levels] if case.layout == "strided" else levels


def call(case: Case) -> None:
    """Call the launcher of this case."""
    losses = case.loss.split("+")
    # The features of a step have 256 channels, whatever the number of classes.
    channels = [256 if loss == "mse" and len(losses) == 2 else case.channels for loss in losses]
    student = [x for c in channels for x in levels_of(case, case.student, c)]
    teacher = [x for c in channels for x in levels_of(case, case.teacher, c)]
    if case.kernel == "score":
        score_module.score(student)
    elif case.kernel == "scale":
        scale_module.scale_(student + teacher, torch.ones(()))
    elif case.kernel == "moments":
        scale = [1.0] * case.levels
        moments_module.moments(student, teacher, case.loss, scale, 1.0, None, case.temperature, 0.0)
    elif case.kernel == "moments_backward":
        rows = torch.zeros(
            sum(map(ROW_LOSSES[case.loss].count, student)), 5, dtype=accumulate_dtype(*student, *teacher)
        )
        moments_module.moments_backward(student, teacher, rows, case.loss, 1.0, torch.ones(()), case.temperature)
    else:
        scores = torch.zeros(
            sum(x[:, 0].numel() for x in student[: case.levels]), dtype=torch.float64 if "fp64" in case else None
        )
        entries, terms = len(student), len(losses)
        imitate_module.imitate(
            student, teacher, scores, scores[: case.levels],
            [e % case.levels for e in range(entries)], [e // case.levels for e in range(entries)],
            [1.0] * entries, [0.0] * entries, losses, [1.0] * terms,
            [torch.ones(()) if case.mode == "grad" else None] * terms, [case.temperature] * terms,
            [17.0 if loss == "softmax_kl" else 1.0 for loss in losses],
            ["grad" in case.mode] * terms, "loss" in case.mode,
        )  # fmt: skip


def record(case: Case) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel and the arguments that the launcher of this case launches it with."""
    module = MODULES[case.kernel]
    name = f"{case.kernel}_kernel"
    kernel = getattr(module, name)
    recorder = Recorder(kernel)
    setattr(module, name, recorder)
    try:
        call(case)
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
    """Registers, stack, spills, the width of global loads and the instructions a value of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run(TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name)
    loads = tensor_loads(text)
    wide = sum(".128" in load for load in loads)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", text)[0]) for key in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Report(
        case, architecture, registers, stack, spills, wide, len(loads) - wide, instructions_a_value(case, text)
    )


def tensor_loads(sass: str) -> list[str]:
    """The global loads but those of 16 bytes of slots, which go past L1."""
    return [load for load in re.findall(r"\bLDG\S*", sass) if not (".128" in load and "STRONG" in load)]


def instructions_a_value(case: Case, sass: str) -> float | None:
    """Instructions in the innermost loop of 16-byte loads, for each of the values that a thread loads in one round.

    It is where an aligned level spends its time. moments walks twice over a tile for cwd: the maxima, then the sums.
    """
    bytes_a_value = DTYPES[case.student].itemsize
    bytes_a_value += DTYPES[case.teacher].itemsize if case.kernel != "score" else 0
    code = [(int(at, 16), words) for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    counts = []
    for end, words in code:
        jump = re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", words)
        if jump is None or int(jump[1], 16) >= end:
            continue
        body = [other for at, other in code if int(jump[1], 16) <= at <= end]
        loads = tensor_loads(" ".join(body))
        if loads and all(".128" in load for load in loads) and case.kernel != "scale":
            counts.append(len(body) / (16 * len(loads) / bytes_a_value))
    walks = 2 if (case.kernel, case.loss) == ("moments", "cwd") else 1
    return sum(counts) if len(counts) == walks else None


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


PAGE = """\
# What the Triton compiler makes of the kernels

Generated by `make codegen`; not edited. Every specialisation is compiled ahead of time, no GPU needed, by Triton
{version}. `make test` fails if one spills (but for 32 bytes of pkd with 3 channels in nhwc on sm_100), takes more than
{most} registers, has no 16-byte global load where rows are aligned (softmax: in nchw, but in 16 bits, where it moves 8
bytes), or takes more instructions a value than its budget.

{cases} specialisations for {architectures} architectures, {binaries} binaries. Most registers: {registers}. Stack:
{stack} bytes in all. Spill instructions: {spills}.

## Instructions a value

Those of the loop that walks over the channels (along rows: the positions) of a level whose lines are aligned, for each
value that a thread loads in one round. Issue 11 counts on 46 and 48 for bce (bf16, fp32), 33 for its gradient alone, 20
and 14 for mse (fp32, bf16) and 3.5 for score, on sm_90. A value of bce needs four of the slow unit (two ex2, two rcp),
which takes 32 clocks of a warp for them: about as long as the rest takes to issue. moments walks twice over a tile of
cwd, and both loops count; not so what follows once a tile, five sums over 32 values of a thread each (nchw). On sm_100
two multiplications and additions are one instruction.

| kernel, loss, mode, dtype, layout, channels, levels | sm_{architecture_names} | budget (sm_90) |
|---|---|---|
{budgets}

## Registers and loads

Loads are counted in the code: of 16 bytes, slots left out, and narrower. The narrower serve levels whose rows are not
aligned, the scores or the numbers of rows, and sums over slots; on an aligned level all but the first run. C = 3 in
nhwc, the strided layout and levels that do not begin on 16 bytes (misaligned) have no aligned rows. In rows levels are
slices of one tensor (N, P, C).

| kernel, loss, mode, dtype, layout, channels, levels | registers sm_{architecture_names} | 16-byte loads | narrower |
|---|---|---|---|
"""


def markdown(reports: Sequence[Report]) -> str:
    """docs/codegen.md: a line a specialisation."""
    grouped = {case: list(made) for case, made in itertools.groupby(reports, key=lambda r: r.case)}
    lines, budgets = [], []
    for case, made in grouped.items():
        registers = " / ".join(str(r.registers) for r in made)
        lines.append(f"| {case} | {registers} | {made[1].wide_loads} | {made[1].narrow_loads} |")
        if case in BUDGETS:
            counts = " / ".join(f"{r.a_value:.1f}" if r.a_value else "?" for r in made)
            budgets.append(f"| {case} | {counts} | {BUDGETS[case]} |")
    head = PAGE.format(
        version=triton.__version__,
        most=MAX_REGISTERS,
        cases=len(grouped),
        architectures=len(ARCHITECTURES),
        architecture_names=" / ".join(map(str, ARCHITECTURES)),
        binaries=len(reports),
        registers=max(r.registers for r in reports),
        stack=sum(r.stack for r in reports),
        spills=sum(r.spills for r in reports),
        budgets="\n".join(budgets),
    )
    return head + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the specialisations of one training step only")
    parser.add_argument("--write", action="store_true", help="write docs/codegen.md")
    parser.add_argument("--jobs", type=int, default=2, help="compile in this many processes")
    options = parser.parse_args(argv)
    with ProcessPoolExecutor(options.jobs) as pool:
        reports = [r for made in pool.map(build, dict.fromkeys(cases(options.quick))) for r in made]
    text = markdown(reports)
    if options.write:
        (ROOT / "docs" / "codegen.md").write_text(text)
    faults = [r for r in reports if r.fault]
    for r in faults:
        print(f"FAULT sm_{r.architecture} {r.case}: {r.fault}")
    print(text if not options.write else text.split("## Registers")[0])
    print(f"{len(reports)} binaries, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
