"""Everything that a machine with an NVIDIA GPU is needed for, in one call with a time limit.

    python benchmarks/gpu_suite.py OUT [--parts build tests sanitizer bench profile] [--limit SECONDS] [--dry-run]

Needs nvcc and its own python3 with torch, triton, setuptools, pytest, hypothesis, rich and matplotlib, and no network:
the package is built in the checkout and runs from it. pytest-xdist, where it is there, lets several processes wait for
Triton's compiler at once. Writes suite.log, suite.json and the benchmarks' result files to the folder OUT.

Where other parts are to come, tests and sanitizer take no more than their share of the time; a part that is cut off is
reported as such, and what it had written stays. The benchmarks begin no case that they are not likely to end.
The benchmarks' loss.json holds beside each measured time what benchmarks/model.py predicts. `profile`, only on demand,
has ncu count what each kernel of a step moves, issues and waits for. With --dry-run, on a machine
without a GPU, each part goes through what can be gone through there: the build, the collection of the tests marked
`gpu`, and the benchmark on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL_STEP = """
import itertools, torch, frs_kernels
shapes = ((2, 12, 20), (2, 7, 5), (2, 1, 1))
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        def levels(c):
            made = [torch.randn(n, c, h, w, device="cuda", dtype=dtype) for n, h, w in shapes]
            return [x.to(memory_format=memory_format).requires_grad_() for x in made]
        for cls_loss, backend in itertools.product(("bce", "kl"), ("cuda", "triton")):
            inputs = [levels(c) for c in (17, 17, 9, 9)]
            frs_kernels.fsr_loss(*inputs, cls_loss=cls_loss, backend=backend).backward()
torch.cuda.synchronize()
"""


# One step of each regime in each dtype, with a factor from upstream, after one that compiles what it needs.
PROFILED_STEP = """
import sys, torch, frs_kernels
sys.path.append("benchmarks")
from grid import Case
for regime in ("retinanet", "gfl", "faster_rcnn"):
    for dtype in ("fp32", "bf16", "fp16"):
        case = Case(regime, 800, 1344, 2, dtype)
        inputs = case.inputs("cuda")
        for backend in ("cuda", "triton"):
            def step():
                loss = frs_kernels.fsr_loss(*inputs, backend=backend, **case.weights)
                torch.autograd.grad(3 * loss, [*inputs[0], *inputs[2]])
                torch.cuda.synchronize()
            step()
            torch.cuda.profiler.start()
            step()
            torch.cuda.profiler.stop()
"""
METRICS = (
    "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_sector_hit_rate.pct",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed.avg.per_cycle_active", "smsp__inst_executed.sum", "smsp__cycles_elapsed.avg.per_second",
    "launch__registers_per_thread",
)  # fmt: skip
SHARE = {"tests": 0.5, "sanitizer": 0.4}
"""Of the time that is left, where other parts are to come."""


def commands_of(part: str, out: Path, seconds: float, dry_run: bool) -> list[list[str]]:
    """The commands of a part, which has this much time."""
    python = sys.executable
    if part == "build":
        return [[python, "setup.py", "--quiet", "build_ext", "--inplace"]]
    if part == "tests":
        pytest = [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", "tests"]
        if dry_run:
            return [[*pytest, "--collect-only"]]
        processes = ["-n", "8", "--dist", "worksteal"] if find_spec("xdist") else []
        # A level of 2^31 elements takes 17 GB: one test of it at a time.
        large = "2_to_the_31"
        return [[*pytest, *processes, "--durations=10", "-k", f"not {large}"], [*pytest, "-k", large]]
    if part == "sanitizer":
        checks = () if dry_run else ("memcheck", "racecheck", "initcheck", "synccheck")
        return [["compute-sanitizer", "--tool", c, "--error-exitcode", "1", python, "-c", SMALL_STEP] for c in checks]
    if part == "profile":
        ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
        return [] if dry_run else [[*ncu, python, "-c", PROFILED_STEP]]
    quick = ["--quick"] if dry_run else []
    limit = ["--limit", str(max(1, int(seconds - 45)))]
    return [[python, "benchmarks/run.py", *quick, *limit, "--out", str(out / "bench")]]


def run(command: list[str], log: Path, seconds: float) -> str:
    """How it ended: "passed", "failed", "cut off", or "absent" where there is no such program."""
    if shutil.which(command[0]) is None:
        return "absent"
    environment = {"FRS_BUILD": "cuda", **os.environ, "PYTHONPATH": str(ROOT)}
    if command[0] == "compute-sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that memcheck sees each tensor's own bounds
    with log.open("a") as file:
        print("$", *(word for word in command if "\n" not in word), file=file, flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return "cut off"
    return "passed" if done.returncode == 0 else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parts = ("build", "tests", "sanitizer", "bench", "profile")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts[:-1]))
    parser.add_argument("--limit", type=float, default=460, help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="go through what needs no GPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run goes through what needs none")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.limit
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "parts": {},
    }
    for number, part in enumerate(options.parts, 1):
        start = time.monotonic()
        share = SHARE.get(part, 1.0) if number < len(options.parts) else 1.0
        until = start + share * (end - start)
        outcomes = [
            run(command, out / "suite.log", max(1.0, until - time.monotonic()))
            for command in commands_of(part, out, until - start, options.dry_run)
        ]
        results["parts"][part] = {"outcomes": outcomes, "seconds": round(time.monotonic() - start, 1)}
        print(part, results["parts"][part], flush=True)
        (out / "suite.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(o == "passed" for p in results["parts"].values() for o in p["outcomes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
