"""All benchmarks of the loss on this machine: one command, one table, a result file a part, and plots.

    python benchmarks/run.py [--quick] [--eager] [--parts loss losses scaling] [--out FOLDER]

Writes loss.json, losses.json and scaling.json, and the plots, to FOLDER/<device>/; `--out benchmarks/results` is how
the committed ones are made. Takes under 10 minutes on two cores, with --quick under 2. A whole training step is
bench_mmdet.py's and bench_torchvision.py's, which need other environments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import bench_loss
import bench_losses
import bench_scaling
import report
import torch
import torch._inductor.config as inductor
from grid import loss_cases
from measure import commit, keep_memory
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import frs_kernels

PARTS = ("loss", "losses", "scaling")


def describe(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit: without them a figure means nothing."""
    record = {
        "device": device_name(device),
        "kind": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "frs_kernels": frs_kernels.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        record |= {"cuda": torch.version.cuda, "l2_bytes": torch.cuda.get_device_properties(0).L2_cache_size}
    return record


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def folder_of(out: Path, device: str) -> Path:
    """The device's folder: its name in lower case, words joined by hyphens."""
    return out / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, few rounds: for a look")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, which takes longer than all the rest")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case is begun")
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_memory()
    inductor.force_disable_caches = True  # so that the time to the first result is that of compiling
    console = Console(width=None if sys.stdout.isatty() else 130)
    folder = folder_of(options.out, device)
    folder.mkdir(parents=True, exist_ok=True)
    head = describe(device) | {"quick": options.quick}
    cases = list(loss_cases(device, options.quick)) if "loss" in options.parts else []
    total = (len(cases) + 1 if cases else 0) + (6 if "scaling" in options.parts else 0)
    total += len(bench_losses.compared()) if "losses" in options.parts else 0
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def advance(what: str) -> bool:
            progress.update(task, advance=1 if progress.tasks[0].description else 0, description=what)
            return time.monotonic() < end

        def save(part: str, found: dict[str, Any]) -> None:
            (folder / f"{part}.json").write_text(json.dumps(head | found, indent=1) + "\n")

        if cases:
            bench_loss.run(device, cases, options.quick, options.eager, advance, lambda found: save("loss", found))
        if "losses" in options.parts:
            bench_losses.run(device, options.quick, advance, lambda found: save("losses", found))
        if "scaling" in options.parts:
            bench_scaling.run(device, options.quick, advance, lambda found: save("scaling", found))
        progress.update(task, description="done", completed=total)
    report.show(console, folder)
    report.plot(folder)
    console.print(f"results and plots are in {folder}")
    wrong = report.wrong_of_ours(folder)
    if wrong:
        console.print(f"[red]wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
