"""What a user sees: types, presets, modules, the terms, and `python -m frs_kernels`."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import each_backend, relative, run
from environment import ROOT, python_environment
from truth import Pyramid, pyramid, truth

import frs_kernels
from frs_kernels import (
    PRESETS,
    FeatureAdapter,
    FSRLoss,
    FSRTerms,
    Richness,
    fsr_loss,
    masked_imitation_loss,
    native,
    richness_mask,
)
from frs_kernels.backends import BACKENDS
from frs_kernels.row_losses import ROW_LOSSES

TINY = ((2, 2, 3), (2, 1, 1))
MASKED = [name for name, preset in PRESETS.items() if preset.get("feat_loss") not in ROW_LOSSES]

SNIPPET = """
import torch
from typing_extensions import assert_type
from frs_kernels import PRESETS, FSRLoss, FSRTerms, ImitationTerms, fsr_loss, masked_imitation_loss, richness_mask
from frs_kernels import RowTerms, cwd_loss, pkd_loss, quality_focal_distillation

x = [torch.zeros(1, 2, 3, 4)]
flag = bool(x)
assert_type(fsr_loss(x, x, x, x), torch.Tensor)
assert_type(fsr_loss(x, x, x, x, return_terms=False), torch.Tensor)
assert_type(fsr_loss(x, x, None, x, return_terms=True), FSRTerms)
assert_type(pkd_loss(x, x), torch.Tensor)
assert_type(cwd_loss(x, x, temperature=4.0, return_terms=True), RowTerms)
assert_type(pkd_loss(x, x, return_terms=flag), torch.Tensor | RowTerms)
assert_type(fsr_loss(None, None, x, x, return_terms=flag), torch.Tensor | FSRTerms)
assert_type(masked_imitation_loss(x, x, [torch.zeros(1, 3, 4)], weight=torch.ones(())), torch.Tensor)
m = richness_mask(x)
assert_type(masked_imitation_loss(x, x, m, loss="kl", return_terms=True), ImitationTerms)
assert_type(masked_imitation_loss(x, x, m, return_terms=flag), torch.Tensor | ImitationTerms)
assert_type(quality_focal_distillation(x, x, beta=2.0, detach=True), torch.Tensor)
assert_type(quality_focal_distillation(x, x, m, return_terms=True), ImitationTerms)
assert_type(quality_focal_distillation(x, x, m, return_terms=flag), torch.Tensor | ImitationTerms)
assert_type(richness_mask(x).scores, list[torch.Tensor])
assert_type(fsr_loss(x, x, x, x, **PRESETS["gfl"]), torch.Tensor)
assert_type(fsr_loss(x, x, x, x, feat_loss="smooth_l1", beta=0.5, return_terms=True), FSRTerms)
FSRLoss(0.5, feat_loss="l1", backend="torch")
fsr_loss(x, x, x, x, unknown=1)  # type: ignore[call-overload]
fsr_loss(x, x, x, x, 1.0)  # type: ignore[call-overload]
fsr_loss(x, x, x, x, beta="1")  # type: ignore[call-overload]
FSRLoss(feat_loss=1)  # type: ignore[arg-type]
fsr_loss(x, x, x, x, cls_loss="focal")  # type: ignore[call-overload]
masked_imitation_loss(x, x)  # type: ignore[call-overload]
"""


def test_the_types_are_exact(tmp_path, pytestconfig):
    """--strict reports an ignore without an error too, so the last lines of the snippet must be wrong."""
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    cache = pytestconfig.cache.mkdir("mypy")  # kept between runs: torch takes mypy half a minute
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        f"--cache-dir={cache}",
        str(snippet),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, env=python_environment(MYPYPATH=str(ROOT)), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        fsr_loss(None, None, None, None, 1.0)  # type: ignore[call-overload]


@each_backend
@pytest.mark.parametrize("name", MASKED)
def test_every_preset_is_a_set_of_keywords(rng, backend, device, name):
    p = pyramid(rng, sizes=TINY, device=device)
    loss = fsr_loss(*p.inputs, backend=backend, **PRESETS[name])
    expected = truth(p.map(torch.Tensor.cpu), **PRESETS[name]).loss
    assert abs(loss.detach().cpu().double() - expected) <= 1e-6 * expected
    module = FSRLoss(**PRESETS[name], backend=backend)
    assert torch.equal(module(*p.inputs), loss)


def test_the_presets_are_those_of_the_released_configurations():
    weights = {name: (PRESETS[name]["feat_weight"], PRESETS[name]["cls_weight"]) for name in PRESETS}
    assert weights.pop("ultralytics") == (6, 0)
    assert weights == {
        "retinanet": (0.005, 0.02),
        "gfl": (0.1, 0.05),
        "fcos": (0.01, 0.05),
        "faster_rcnn": (0.002, 0.1),
        "pkd": (6, 0),
        "cwd": (10, 0),
    }
    assert PRESETS["ultralytics"]["normalizer"] == "mass_channels"


@each_backend
@pytest.mark.parametrize("weights", [(0.3, 2.0), (0, 1.0), (torch.tensor(0.7), 0.1)], ids=str)
def test_the_terms_add_up(rng, backend, device, weights):
    p = pyramid(rng, device=device)
    feat_weight, cls_weight = (w.to(device) if isinstance(w, torch.Tensor) else w for w in weights)
    terms = fsr_loss(*p.inputs, feat_weight=feat_weight, cls_weight=cls_weight, backend=backend, return_terms=True)
    plain = fsr_loss(*p.inputs, feat_weight=feat_weight, cls_weight=cls_weight, backend=backend)
    assert isinstance(terms, FSRTerms)
    bound = 4 * torch.finfo(torch.float32).eps
    assert torch.equal(terms.loss, plain)
    total = abs(feat_weight * terms.feat) + abs(cls_weight * terms.cls)
    assert abs(terms.loss - (feat_weight * terms.feat + cls_weight * terms.cls)) <= bound * total
    assert relative(terms.feat_per_level.sum(), terms.feat) <= bound
    assert relative(terms.cls_per_level.sum(), terms.cls) <= bound
    richness = richness_mask(p.z, backend=backend)
    assert isinstance(richness, Richness)
    assert torch.equal(richness.mass, terms.mass)
    for a, b, z in zip(richness.scores, terms.mask, p.z, strict=True):
        assert torch.equal(a, b)
        assert a.shape == (z.shape[0], *z.shape[2:])
        assert a.min() >= 0
        assert a.max() <= 1
    assert relative(torch.stack([m.sum() for m in terms.mask]), terms.mass) <= bound


@each_backend
@pytest.mark.parametrize("options", [{"feat_loss": "l1"}, {"feat_loss": "smooth_l1", "beta": 0.3}], ids=str)
def test_a_loss_of_the_features_may_be_chosen(rng, backend, device, options):
    """By fsr_loss, by its terms, by the module, and as a term alone; the head's loss is not touched."""
    p = pyramid(rng, sizes=TINY, device=device)
    plain = fsr_loss(*p.inputs, backend=backend, return_terms=True)
    terms = fsr_loss(*p.inputs, feat_weight=0.7, backend=backend, return_terms=True, **options)
    expected = truth(p.map(torch.Tensor.cpu), feat_weight=0.7, **options)
    assert abs(terms.feat.detach().cpu() - expected.feat) <= 1e-6 * expected.feat
    assert relative(terms.feat_per_level.cpu(), expected.feat_per_level) <= 1e-6
    assert torch.equal(terms.cls, plain.cls)
    assert torch.equal(terms.loss, fsr_loss(*p.inputs, feat_weight=0.7, backend=backend, **options))
    assert torch.equal(terms.loss, FSRLoss(0.7, backend=backend, **options)(*p.inputs))
    alone = {"loss": options["feat_loss"], "beta": options.get("beta", 1.0)}
    masked = masked_imitation_loss(p.s, p.t, terms.mask, backend=backend, **alone)
    assert relative(masked, terms.feat) <= 4 * torch.finfo(torch.float32).eps


@each_backend
@pytest.mark.parametrize("left_out", ["feat", "cls"])
def test_a_term_that_was_not_asked_for_is_zero(rng, backend, device, left_out):
    p = pyramid(rng, sizes=TINY, device=device)
    p = Pyramid(None, None, p.x, p.z) if left_out == "feat" else Pyramid(p.s, p.t, None, p.z)
    terms = fsr_loss(*p.inputs, backend=backend, return_terms=True)
    assert getattr(terms, left_out) == 0
    assert getattr(terms, f"{left_out}_per_level").tolist() == [0, 0]
    other = terms.cls if left_out == "feat" else terms.feat
    assert relative(terms.loss, other) <= torch.finfo(torch.float32).eps


def test_a_module_keeps_its_weights_as_buffers_that_move_and_are_not_saved():
    module = FSRLoss(torch.tensor(0.5), 0.25, return_terms=True)
    assert dict(module.named_buffers())["feat_weight"] == 0.5
    assert module.state_dict() == {}
    assert not list(module.parameters())
    assert module.to(torch.float64).feat_weight.dtype == torch.float64
    assert module.to("meta").feat_weight.device.type == "meta"


def test_a_modules_weight_is_its_own():
    weight = torch.tensor(0.5)
    module = FSRLoss(weight)
    module.feat_weight.fill_(2.0)
    assert weight == 0.5


@each_backend
@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.7)], ids=str)
def test_what_one_term_is_made_of(rng, backend, device, weight):
    p = pyramid(rng, device=device)
    weight = weight.to(device) if isinstance(weight, torch.Tensor) else weight
    mask = richness_mask(p.z, backend=backend)
    options = {"loss": "kl", "weight": weight, "backend": backend}
    terms = masked_imitation_loss(p.x, p.z, mask, return_terms=True, **options)
    assert torch.equal(terms.loss, masked_imitation_loss(p.x, p.z, mask, **options))
    bound = 4 * torch.finfo(torch.float32).eps
    assert relative(weight * terms.value, terms.loss) <= bound
    assert relative(terms.per_level.sum(), terms.value) <= bound
    assert all(map(torch.equal, terms.mask, mask.scores))
    assert relative(terms.mass, mask.mass) <= bound
    right = torch.autograd.grad(masked_imitation_loss(p.x, p.z, mask, **options | {"weight": 1.0}), p.x)
    for a, b in zip(torch.autograd.grad(terms.value, p.x), right, strict=True):
        torch.testing.assert_close(a, b)


def test_another_spelling():
    assert frs_kernels.frs_loss is frs_kernels.fsr_loss


def test_a_module_gives_what_the_function_gives(rng):
    p = pyramid(rng, sizes=TINY)
    options = {
        "feat_weight": torch.tensor(0.3), "cls_weight": 0.7, "cls_loss": "kl", "temperature": 2.0, "eps": 0.1,
        "normalizer": "mass_channels", "level_weights": [1.0, 0.5], "grad_mode": "backward", "backend": "torch",
        "feat_loss": "smooth_l1", "beta": 0.5,
    }  # fmt: skip
    mask = [s[:, 0].detach().abs() for s in p.s]
    assert torch.equal(FSRLoss(**options)(*p.inputs, mask=mask), fsr_loss(*p.inputs, mask=mask, **options))
    terms = FSRLoss(**options, return_terms=True)(*p.inputs)
    assert isinstance(terms, FSRTerms)
    changed = FSRLoss(**options)
    changed.feat_weight.fill_(0.0)
    changed.cls_weight = 1.0
    assert torch.equal(changed(*p.inputs), terms.cls)


def test_a_modules_repr_shows_its_options():
    """The weights, and what is not the default."""
    assert repr(FSRLoss(0.1, 0.05)) == "FSRLoss(feat_weight=0.1, cls_weight=0.05)"
    made = FSRLoss(0.1, 1.0, cls_loss="kl", feat_loss="smooth_l1", beta=0.5, backend="torch", return_terms=True)
    assert repr(made) == (
        "FSRLoss(feat_weight=0.1, cls_weight=1.0, feat_loss='smooth_l1', cls_loss='kl', beta=0.5, backend='torch', "
        "return_terms=True)"
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_module_can_be_copied_and_pickled(rng, duplicate):
    p = pyramid(rng, sizes=TINY)
    module = FSRLoss(torch.tensor(0.5), 0.25, level_weights=[1.0, 2.0], backend="torch")
    other = duplicate(module)
    assert torch.equal(other(*p.inputs), module(*p.inputs))
    other.feat_weight.fill_(0.0)
    assert module.feat_weight == 0.5


def test_the_adapter_brings_each_level_to_the_teachers_channels():
    adapter = FeatureAdapter([2, 3], [5, 4], 2)
    out = adapter([torch.zeros(1, 2, 7, 6), torch.zeros(1, 3, 1, 1)])
    assert [tuple(v.shape) for v in out] == [(1, 5, 7, 6), (1, 4, 1, 1)]
    assert len(list(adapter.parameters())) == 4
    one = FeatureAdapter(2, 5, 3, kernel_size=1)
    assert [tuple(conv.weight.shape) for conv in one.convs] == [(5, 2, 1, 1)] * 3
    assert len({id(conv) for conv in one.convs}) == 3
    assert all(conv.bias is not None for conv in one.convs)


def test_the_public_names():
    assert set(frs_kernels.__all__) <= set(dir(frs_kernels))
    for name in ("fsr_loss", "richness_mask", "masked_imitation_loss", "FSRLoss", "FeatureAdapter", "PRESETS"):
        assert name in frs_kernels.__all__
    assert (Path(frs_kernels.__file__).parent / "py.typed").exists()


def python(*arguments: str, **changes: str | None) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], env=python_environment(**changes), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_says_what_is_here_and_why_the_rest_is_not():
    out = python("-m", "frs_kernels", TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES="")
    assert out.startswith(f"frs_kernels {frs_kernels.__version__}, torch {torch.__version__}")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert set(BACKENDS) < set(lines)
    assert lines["torch"].split() == ["torch", "available"]
    assert "not available" in lines["cuda"]
    assert "install" in lines["cuda"] or "move them there" in lines["cuda"]
    if native.WHY_NOT["cpu"]:
        assert f"not available: {native.WHY_NOT['cpu']}" in lines["cpu"]
    else:
        assert lines["cpu"].split()[1] == "available"
        assert f"uses {torch.ops.frs_kernels.instructions()}" in lines["cpu"]
        assert ", ".join(native.targets("cpu")) in lines["cpu"]
    assert "not available" in lines["triton"]
    assert "TRITON_INTERPRET=1" in lines["triton"]
    assert f"backend='auto' takes {'torch' if native.WHY_NOT['cpu'] else 'cpu'!r} for cpu tensors" in out
    interpreted = python("-m", "frs_kernels", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert re.search(r"triton +available", interpreted)


def test_the_command_for_a_bug_report():
    found = json.loads(python("-m", "frs_kernels", "--json", TRITON_INTERPRET=None, CUDA_VISIBLE_DEVICES=""))
    assert found["torch"] == torch.__version__
    assert found["why_not"]["torch"] is None
    assert found["why_not"]["cpu"] == native.WHY_NOT["cpu"]
    assert found["auto"] == {"cpu": "torch" if native.WHY_NOT["cpu"] else "cpu"}
    assert found["build"] == native.RECORD


def test_the_import_brings_nothing_that_a_loss_does_not_need():
    heavy = (
        "triton",
        "numpy",
        "sklearn",
        "PIL",
        "matplotlib",
        "pycocotools",
        "rich",
        "mmdet",
        "examples",
        "benchmarks",
    )
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport frs_kernels\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    assert not set(python("-c", code).split()) & set(heavy)


@each_backend
def test_auto_takes_a_backend_that_is_right(rng, backend, device):
    p = pyramid(rng, sizes=TINY, device=device)
    assert relative(run(p, "auto").loss, run(p, backend).loss) <= 1e-6
