"""Every Triton specialisation, compiled ahead of time with no GPU: registers, spills, the width of loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton comes with its compiler for NVIDIA on Linux only")

ROOT = Path(__file__).resolve().parents[1]


def codegen(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "codegen.py"), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_every_specialisation_compiles_without_spills_and_with_wide_loads():
    done = codegen()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_docs_hold_what_the_pinned_compiler_makes():
    """docs/codegen.md names the Triton of constraints-dev.txt; a new pin needs `make codegen`."""
    pinned = next(
        line.partition("==")[2]
        for line in (ROOT / "constraints-dev.txt").read_text().splitlines()
        if line.startswith("triton==")
    )
    assert pinned in (ROOT / "docs" / "codegen.md").read_text()


def test_a_kernel_over_the_limit_is_a_fault(tmp_path):
    """The report can fail: with a limit of 16 registers nothing passes."""
    script = (
        "import sys; sys.path.insert(0, 'tools'); import codegen; codegen.MAX_REGISTERS = 16\n"
        "reports = codegen.build(codegen.Case('scale', 'bf16', 'bf16', 'nchw', 80))\n"
        "assert all('registers' in r.fault for r in reports), reports"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, check=True)
