"""Every Triton specialisation, compiled ahead of time with no GPU: registers, spills, loads, instructions a value."""

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


@pytest.mark.timeout(1800)  # four minutes on two cores of its own
def test_every_specialisation_compiles_without_spills_with_wide_loads_and_within_its_budget():
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


def in_the_tool(script: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = f"import sys; sys.path.insert(0, 'tools'); import codegen\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_kernel_over_the_limit_is_a_fault():
    """The report can fail: with a limit of 16 registers nothing passes."""
    in_the_tool("""
codegen.MAX_REGISTERS = 16
reports = codegen.build(codegen.Case('scale', 'bf16', 'bf16', 'nchw', 80))
assert all('registers' in r.fault for r in reports), reports
""")


def test_a_kernel_over_its_budget_is_a_fault():
    in_the_tool("""
case = codegen.Case('score', 'bf16', 'bf16', 'nchw', 720)
codegen.ARCHITECTURES = (90,)
(report,) = codegen.build(case)
assert not report.fault, report.fault
codegen.BUDGETS[case] = report.a_value - 0.1
assert 'instructions a value' in report.fault
assert 'no loop' in report._replace(a_value=None).fault
""")


LISTING = """
/*0000*/ S2R R0, SR_TID.X ;
/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0020*/ LDG.E.128 R8, desc[UR4][R12.64] ;
/*0030*/ FADD R4, R4, -R8 ;
/*0040*/ @!P0 BRA 0x10 ;
/*0050*/ LDG.E.U16 R4, desc[UR4][R2.64] ;
/*0060*/ @P1 BRA 0x50 ;
/*0070*/ BRA 0x70 ;
"""


def test_instructions_are_counted_in_the_loop_of_wide_loads():
    """Four instructions for four values of fp32 or eight of bf16, each from both tensors."""
    in_the_tool(f"""
listing = '''{LISTING}'''
for dtype, expected in (('fp32', 1.0), ('bf16', 0.5)):
    case = codegen.Case('imitate', dtype, dtype, 'nchw', 256, 'mse', 'loss')
    assert codegen.instructions_a_value(case, listing) == expected
    assert codegen.instructions_a_value(case, listing.replace('.128', '')) is None
""")
