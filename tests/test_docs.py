"""What the pages say is generated from committed results, and what they show runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from readme import BLOCKS, PAGE, code_after
from torch import Tensor, nn
from toy_detectors import STRIDES, Detector, images

import frs_kernels

ROOT = Path(__file__).resolve().parents[1]


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
    call, loop = BLOCKS[0], BLOCKS[1]
    torch.manual_seed(0)
    feats, logits = (
        [[torch.randn(2, c, h, h, requires_grad=student) for h in (6, 3)] for student in (True, False)] for c in (5, 4)
    )
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

    block = next(b for b in BLOCKS if b.startswith("frs_kernels."))
    for name, parameter in inspect.signature(frs_kernels.fsr_loss).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            assert name in block
        else:
            assert f"{name}={parameter.default!r}".replace("'", '"') in block


class Loop(nn.Module):
    """A model as the README's training step has it: features, logits and, given targets, its own loss."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = Detector(channels, classes=4, returns="logits")
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(5 - len(STRIDES)))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[list[Tensor] | Tensor, ...]:
        feats = self.inner.neck(x)
        for conv in self.extra:
            feats.append(conv(feats[-1]))
        logits = self.inner.head(feats)
        return (feats, logits) if targets is None else (feats, logits, sum(z.square().mean() for z in logits))


def test_the_training_step_of_the_readme_runs():
    student, teacher = Loop(6), Loop(9).eval()
    names = {
        "torch": torch, **vars(frs_kernels), "student": student, "teacher": teacher, "images": images(),
        "targets": images(), "step": 250, "student_channels": 6, "teacher_channels": 9,
    }  # fmt: skip
    exec(code_after("A training step:"), names)
    assert names["ramp"] == 0.5
    assert names["loss"] > names["detection_loss"]
    names["loss"].backward()
    trained = [*student.inner.neck.parameters(), *student.inner.head.cls.parameters(), *names["adapter"].parameters()]
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_modules_that_the_readme_names_are_found():
    named = re.findall(r"`(Distiller\(student, teacher, feats=[^`]*\))`", PAGE)
    assert len(named) == 1
    names = {**vars(frs_kernels), "student": Detector(6), "teacher": Detector(9)}
    losses = eval(named[0], names)(images())
    assert {"loss_frs_feat", "loss_frs_cls"} < set(losses)
