"""What the pages say is generated from committed results, and what they show runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import relative
from readme import GUIDE, PAGE, START, blocks, code_after
from toy_detectors import STRIDES, Detector, images
from workers import RANKS, launch, names_of_the_pages, run_blocks

import frs_kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
FRAMEWORKS = ("**torchvision**", "**Ultralytics**", "**transformers**", "**mmdetection**")
processes = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")


def test_the_tables_are_those_of_the_committed_results():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def slug(heading: str) -> str:
    """A heading's anchor, as code hosts and the site make it."""
    words = re.sub(r"[^\w\- ]", "", heading.lower())
    return words.strip().replace(" ", "-")


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name}: {target}#{anchor}"


def test_the_readme_is_short():
    assert len(PAGE.splitlines()) < 195


def test_every_test_that_is_named_exists():
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text())
    assert len(named) > 40
    assert [name for name in named if f"def {name}(" not in text] == []


def test_every_page_is_on_the_site():
    nav = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    known = {page.relative_to(ROOT).as_posix().removeprefix("docs/") for page in PAGES}
    assert set(nav) == known - {"README.md"}


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in set(frs_kernels.__all__) - {"__version__"}:
        assert re.search(rf"^(::: frs_kernels\.[\w.]*|      members: \[\"|`){name}\b", page, re.MULTILINE), name


def test_the_loop_of_the_readme_is_the_call_beside_it():
    call, loop = blocks(PAGE)[:2]
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


def test_every_block_of_the_readme_is_run_somewhere():
    """The first two and the training step here, those of the frameworks in the tests of those."""
    assert len(blocks(PAGE)) == 3 + len(FRAMEWORKS)
    assert blocks(PAGE)[2:] == [code_after("In a training step"), *map(code_after, FRAMEWORKS)]
    tests = "".join(path.read_text() for path in ROOT.glob("tests/*/test_*.py"))
    assert all(f'code_after("{words}")' in tests for words in FRAMEWORKS)


@processes
def test_the_training_step_of_the_readme_keeps_the_ranks_alike(tmp_path):
    """Student and adapter, each rank with images of its own: outside DDP the adapters would drift apart."""
    results = launch(run_blocks, tmp_path, [code_after("In a training step")])
    before = names_of_the_pages(images())
    assert len(results[0]["weights"]) > len([p for p in before["student"].parameters() if p.requires_grad])
    for first, second in zip(*(result["weights"] for result in results), strict=True):
        assert torch.equal(first, second)
    trained = [p.detach() for p in before["student"].parameters() if p.requires_grad]
    assert not any(map(torch.equal, trained, results[0]["weights"]))


def test_the_modules_that_the_readme_names_are_found():
    named = re.findall(r"`(Distiller\(student, teacher, feats=[^`]*\))`", PAGE)
    assert len(named) == 1
    names = {**vars(frs_kernels), "student": Detector(6), "teacher": Detector(9)}
    losses = eval(named[0], names)(images())
    assert {"loss_frs_feat", "loss_frs_cls"} < set(losses)


def test_the_start_page_runs(capsys):
    names: dict[str, Any] = {}
    assert len(blocks(START)) == 1
    torch.manual_seed(0)
    exec(blocks(START)[0], names)
    assert names["student_feats"][0].grad is not None
    assert "nothing looks wrong" in capsys.readouterr().out


class TestGuide:
    @pytest.fixture
    def names(self) -> dict[str, Any]:
        """What the first block leaves to those that build on it."""
        names = names_of_the_pages(images())
        exec(code_after("## A training loop", GUIDE), names)
        for kind in ("feats", "logits"):  # the graph of the last step is gone
            names[kind] = [x.detach().requires_grad_() for x in names[kind]]
        return names

    def test_every_section_with_code_is_run_here(self):
        sections = re.split(r"^## ", GUIDE, flags=re.MULTILINE)[1:]
        with_code = {section.partition("\n")[0]: len(blocks(section)) for section in sections if blocks(section)}
        tests = Path(__file__).read_text()
        assert all(f'code_after("## {heading}", GUIDE)' in tests for heading in with_code)
        # The second is run in tests/frameworks.
        assert [heading for heading, count in with_code.items() if count > 1] == ["Any detector"]
        assert "of your own for Ultralytics" in (ROOT / "tests" / "frameworks" / "test_ultralytics.py").read_text()

    def test_a_training_loop(self, names):
        assert names["step"] == 1
        assert names["loss"] > names["detection_loss"]
        trained = [p for p in names["model"].parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        assert all(p.grad is None for p in names["teacher"].parameters())

    def test_any_detector(self, names):
        names |= {"student": Detector(6), "teacher": Detector(9)}
        exec(code_after("## Any detector", GUIDE), names)
        assert {"loss_frs_feat", "loss_frs_cls"} < set(names["losses"])
        assert all(p.grad is not None for p in names["distiller"].adapter.parameters())
        # and what is said of torch.compile
        student = names["distiller"].student
        student.neck = torch.compile(student.neck, backend="eager")
        assert set(names["distiller"](images())) == set(names["losses"])

    def test_mixed_precision(self, names):
        before = names["model"].adapter.convs[0].weight.detach().clone()
        block = code_after("## Mixed precision", GUIDE)
        assert block.count("GradScaler(device)") == 1
        # With its usual first scale the first steps overflow, here as elsewhere, and are left out.
        exec(block.replace("GradScaler(device)", "GradScaler(device, init_scale=64.0)"), names)
        assert names["feats"][0].dtype == torch.float16
        assert not torch.equal(names["model"].adapter.convs[0].weight, before)

    @pytest.mark.usefixtures("compiler")
    def test_compile(self, names):
        block = code_after("## torch.compile", GUIDE)
        assert block.count("@torch.compile\n") == 1
        names["optimizer"].zero_grad()
        exec(block.replace("@torch.compile\n", '@torch.compile(backend="aot_eager", fullgraph=True)\n'), names)
        found = [p.grad.clone() for p in names["model"].parameters() if p.requires_grad]
        names["optimizer"].zero_grad()
        names["torch"] = torch
        exec(block.replace("@torch.compile\n", ""), names)
        right = [p.grad for p in names["model"].parameters() if p.requires_grad]
        assert all(relative(a, b) <= 1e-5 for a, b in zip(found, right, strict=True))

    @processes
    @pytest.mark.parametrize("kind", ["DDP", "FSDP"])
    def test_several_gpus(self, tmp_path, kind):
        """Two processes with half of the images each are one with all."""
        first = code_after("## A training loop", GUIDE).partition("teacher.eval()")[0]
        ddp, fsdp = code_after("## Several GPUs: DDP", GUIDE), code_after("## Several GPUs: FSDP", GUIDE)
        prepare = "with torch.no_grad():\n    teacher_feats, teacher_logits = teacher(images)\ntorch.manual_seed(1)\n"
        if kind == "FSDP":  # whose block divides by each rank's own mass: that of all images it is with the group
            group = "process_group=torch.distributed.group.WORLD"
            fsdp = fsdp.replace('**PRESETS["gfl"]', f'**PRESETS["gfl"], {group}')
        results = launch(run_blocks, tmp_path, [first, prepare, ddp if kind == "DDP" else fsdp])
        names = names_of_the_pages(images(n=2 * RANKS))
        alone = fsdp.replace(", process_group=torch.distributed.group.WORLD", "")
        alone = re.sub(r"^fully_shard.*\n", "", alone, flags=re.MULTILINE)
        for block in (first, prepare, alone):
            exec(block, names)
        right = [p.grad for p in names["model"].parameters() if p.requires_grad]
        for result in results:
            assert all(relative(a, b) <= 1e-5 for a, b in zip(result["grads"], right, strict=True))

    def test_masks(self, names):
        names |= {"boxes": [torch.tensor([[8.0, 8.0, 40.0, 40.0]])] * 2, "strides": [*STRIDES, 32, 32]}
        exec(code_after("## Masks", GUIDE), names)
        assert names["inside"][0].sum() == 2 * 16
        names["loss"].backward()

    def test_other_losses(self, names):
        exec(code_after("## Masks", GUIDE).partition("inside")[0], names)
        exec(code_after("## Other losses", GUIDE), names)
        names["loss"].backward()
        assert all(x.grad.any() for x in (*names["feats"], *names["logits"]))

    def test_boxes_as_distributions_and_softmax_heads(self, names, rng):
        sizes = [z[:, 0].shape for z in names["teacher_logits"]]
        names |= {name: [torch.randn(n, 68, h, w, generator=rng).requires_grad_(name == "student_reg")
                         for n, h, w in sizes] for name in ("student_reg", "teacher_reg")}  # fmt: skip
        names["inside"] = [torch.ones(size) for size in sizes]
        exec(code_after("## Boxes as distributions, and softmax heads", GUIDE), names)
        (names["boxes_loss"] + names["loss"]).backward()
        assert all(x.grad.any() for x in names["student_reg"])

    def test_choosing_weights(self, names, capsys):
        names |= {"student": Detector(6), "teacher": Detector(9)}
        exec(code_after("## Choosing weights", GUIDE), names)
        feat, cls = capsys.readouterr().out.splitlines()
        assert feat.startswith("feat ")
        assert cls.startswith("cls ")
        assert "None" not in feat + cls

    def test_reading_the_terms(self, names, capsys):
        exec(code_after("## Reading FSRTerms", GUIDE), names)
        terms = names["terms"]
        assert torch.allclose(terms.loss, 0.1 * terms.feat + 0.05 * terms.cls)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5
        assert f"mean score {terms.mask[1].mean():.4f}" in lines[1]

    def test_all_options(self):
        block = code_after("## All options", GUIDE)
        for name, parameter in inspect.signature(frs_kernels.fsr_loss).parameters.items():
            if parameter.default is inspect.Parameter.empty:
                assert name in block
            else:
                assert f"{name}={parameter.default!r}".replace("'", '"') in block
