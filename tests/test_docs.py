"""What the pages say is generated from committed results, and what they show runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import frs_kernels

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_committed_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_link_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_loop_of_the_readme_is_the_call_beside_it():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    call, loop = blocks[0], blocks[1]
    torch.manual_seed(0)
    feats, logits = ([[torch.randn(2, c, h, h) for h in (6, 3)] for _ in range(2)] for c in (5, 4))
    names = {
        "F": torch.nn.functional, "torch": torch, "student_feats": feats[0], "teacher_feats": feats[1],
        "student_logits": logits[0], "teacher_logits": logits[1],
    }  # fmt: skip
    exec(call, names)
    ours = names["loss"]
    exec(loop, names)
    assert torch.allclose(ours, names["loss"], rtol=1e-5, atol=0)


def test_the_interface_of_the_readme_is_the_signature():
    import inspect

    block = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if b.startswith("frs_kernels."))
    for name, parameter in inspect.signature(frs_kernels.fsr_loss).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            assert name in block
        else:
            assert f"{name}={parameter.default!r}".replace("'", '"') in block
