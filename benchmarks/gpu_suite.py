"""Everything that a machine with an NVIDIA GPU is needed for, in one call with a time limit.

    python benchmarks/gpu_suite.py OUT [--parts build tests sanitizer profile bench] [--limit SECONDS] [--dry-run]

Needs its own python3 with torch, triton, setuptools, pytest, hypothesis, rich and matplotlib, and no network: the
package runs from the checkout, and is built there, by nvcc, if the libraries in it do not load. pytest-xdist, where it
is there, lets several processes wait for Triton's compiler at once. Writes suite.log, suite.json and the benchmarks'
result files to the folder OUT.

Tests and sanitizer time nothing, and run at once. Where other parts are to come, a part takes no more than its share of
the time; one that is cut off is reported as such, and what it had written stays. The benchmarks begin no case that they
are not likely to end.
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
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import commit

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
AT_ONCE = (("build",), ("tests", "sanitizer"), ("profile",), ("bench",))
SHARE = {"tests": 0.5, "sanitizer": 0.5, "profile": 0.4}
"""Of the time that is left, where other parts are to come."""
LOADS = "import sys; from frs_kernels import backends; sys.exit(backends.why_not('cuda', 'cuda'))"


def commands_of(part: str, seconds: float, dry_run: bool, bench: list[str]) -> list[list[str]]:
    """The commands of a part, which has this much time; they run at once."""
    python = sys.executable
    if part == "build":
        loads = subprocess.run([python, "-c", LOADS], cwd=ROOT, env=environment(), capture_output=True, check=False)
        return [] if loads.returncode == 0 else [[python, "setup.py", "--quiet", "build_ext", "--inplace"]]
    if part == "tests":
        pytest = [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", "tests"]
        if dry_run:
            return [[*pytest, "--collect-only"]]
        processes = ["-n", "12", "--dist", "worksteal"] if find_spec("xdist") else []
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
    limit = ["--limit", str(max(1, int(seconds - 20)))]
    return [[python, "benchmarks/run.py", *quick, *limit, *bench]]


def environment() -> dict[str, str]:
    return {"FRS_BUILD": "cuda", **os.environ, "PYTHONPATH": str(ROOT)}


def run(command: list[str], log: Path, seconds: float) -> str:
    """How it ended: "passed", "failed", "cut off", or "absent" where there is no such program.

    What it printed is appended to the log as a whole, as several run at once.
    """
    if shutil.which(command[0]) is None:
        return "absent"
    own = environment()
    if command[0] == "compute-sanitizer":
        own["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that memcheck sees each tensor's own bounds
    with tempfile.TemporaryFile("w+") as output:
        running = subprocess.Popen(command, cwd=ROOT, env=own, stdout=output, stderr=subprocess.STDOUT)
        try:
            outcome = "passed" if running.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "cut off"
            running.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
        output.seek(0)
        with log.open("a") as file:
            file.write(f"$ {' '.join(word for word in command if chr(10) not in word)}\n{output.read()}\n")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parts = [part for group in AT_ONCE for part in group]
    parser.add_argument("--parts", nargs="+", choices=parts, default=[part for part in parts if part != "profile"])
    parser.add_argument("--limit", type=float, default=460, help="seconds in all")
    parser.add_argument("--bench", default="", help="options for benchmarks/run.py: --bench='--eager'")
    parser.add_argument("--dry-run", action="store_true", help="go through what needs no GPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run goes through what needs none")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.limit
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "parts": {},
    }
    bench = [*options.bench.split(), "--out", str(out / "bench")]
    groups = [[part for part in group if part in options.parts] for group in AT_ONCE]
    groups = [group for group in groups if group]
    for number, group in enumerate(groups, 1):
        start = time.monotonic()
        share = SHARE.get(group[0], 1.0) if number < len(groups) else 1.0
        seconds = share * (end - start)
        commands = [(part, command) for part in group for command in commands_of(part, seconds, options.dry_run, bench)]
        left = max(1.0, start + seconds - time.monotonic())
        with ThreadPoolExecutor(max(1, len(commands))) as pool:
            running = [pool.submit(run, command, out / "suite.log", left) for _, command in commands]
            outcomes = [each.result() for each in running]
        for part in group:
            ended = [outcome for (whose, _), outcome in zip(commands, outcomes, strict=True) if whose == part]
            results["parts"][part] = {"outcomes": ended, "seconds": round(time.monotonic() - start, 1)}
            print(part, results["parts"][part], flush=True)
        (out / "suite.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(o == "passed" for p in results["parts"].values() for o in p["outcomes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
