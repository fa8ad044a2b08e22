"""The losses along rows where other losses are: as terms of fsr_loss, as modules, in the distiller."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import each_backend, relative
from toy_detectors import distiller, images
from truth import pyramid

from frs_kernels import PRESETS, CWDLoss, FSRLoss, FSRTerms, PKDLoss, RowTerms, cwd_loss, fsr_loss, pkd_loss


@each_backend
def test_beside_a_masked_term(rng, backend, device):
    p = pyramid(rng, device=device)
    weights = {"feat_weight": 6.0, "cls_weight": 0.5}
    terms = fsr_loss(*p.inputs, feat_loss="pkd", backend=backend, return_terms=True, **weights)
    alone = fsr_loss(None, None, p.x, p.z, backend=backend, return_terms=True)
    pkd = pkd_loss(p.s, p.t, backend=backend, return_terms=True)
    assert isinstance(terms, FSRTerms)
    assert torch.equal(terms.feat, pkd.value)
    assert torch.equal(terms.feat_per_level, pkd.per_level)
    assert relative(terms.cls, alone.cls) <= 1e-6
    assert all(torch.equal(a, b) for a, b in zip(terms.mask, alone.mask, strict=True))
    total = 6 * pkd.value + 0.5 * alone.cls
    assert relative(terms.loss.detach(), total.detach()) <= 1e-6
    plain = fsr_loss(*p.inputs, feat_loss="pkd", backend=backend, **weights)
    expected = torch.autograd.grad(total, p.student)
    for loss in (terms.loss, plain):
        for a, b in zip(torch.autograd.grad(loss, p.student), expected, strict=True):
            assert relative(a, b) <= 2e-6


@each_backend
def test_alone_it_asks_for_no_mask(rng, backend, device):
    p = pyramid(rng, device=device)
    terms = fsr_loss(
        *p.without("x").inputs, feat_loss="cwd", feat_weight=torch.tensor(2.0, device=device), temperature=3.0,
        level_weights=[1, 2, 3], backend=backend, return_terms=True,
    )  # fmt: skip
    cwd = cwd_loss(p.s, p.t, temperature=3.0, weight=2.0, level_weights=[1, 2, 3], backend=backend, return_terms=True)
    assert relative(terms.loss.detach(), cwd.loss.detach()) <= 1e-6
    assert terms.mask == []
    assert terms.mass.tolist() == terms.cls_per_level.tolist() == [0, 0, 0]
    both = fsr_loss(*p.inputs, feat_loss="pkd", cls_loss="cwd", backend=backend)
    assert relative(both.detach(), (pkd_loss(p.s, p.t) + cwd_loss(p.x, p.z)).detach()) <= 1e-6


def test_what_fsr_loss_refuses_stays_refused(rng):
    p = pyramid(rng)
    with pytest.raises(ValueError, match=r"student_feats\[0\].*channels"):
        fsr_loss([s[:, :1] for s in p.s], p.t, p.x, p.z, feat_loss="pkd")
    with pytest.raises(TypeError, match="process_group must be"):
        fsr_loss(p.s, p.t, None, None, feat_loss="pkd", process_group="world")
    with pytest.raises(ValueError, match="cls_loss='pkd' is unknown"):
        fsr_loss(*p.inputs, cls_loss="pkd")
    with pytest.raises(ValueError, match="level_weights has 1 entries"):
        fsr_loss(*p.inputs, feat_loss="pkd", level_weights=[1])


def test_modules_are_the_functions(rng):
    p = pyramid(rng)
    for module, function, options in (
        (PKDLoss(6.0, eps=1e-3), pkd_loss, {"weight": 6.0, "eps": 1e-3}),
        (CWDLoss(10.0, temperature=2.0, return_terms=True), cwd_loss, {"weight": 10.0, "temperature": 2.0}),
    ):
        found = module(p.s, p.t)
        loss = found.loss if isinstance(found, RowTerms) else found
        assert torch.equal(loss, function(p.s, p.t, **options))
        assert str(module.weight) in repr(module)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            again = twin(p.s, p.t)
            assert torch.equal(again.loss if isinstance(again, RowTerms) else again, loss)
    scaled = PKDLoss(torch.tensor(2.0))
    assert dict(scaled.named_buffers()).keys() == {"weight"}
    assert not scaled.state_dict()
    for wrong, message in (({"eps": -1.0}, "eps"), ({"backend": "gpu"}, "backend"), ({"weight": -1.0}, "weight")):
        with pytest.raises(ValueError, match=message):
            PKDLoss(**wrong)
    with pytest.raises(ValueError, match="temperature"):
        CWDLoss(temperature=0.0)


@pytest.mark.parametrize("preset", ["pkd", "cwd"])
def test_a_distiller_of_features_leaves_the_teachers_head_alone(preset):
    d, x = distiller(preset=preset), images()
    assert isinstance(d.criterion, FSRLoss)
    ran = []
    d.teacher.head.register_forward_hook(lambda *_: ran.append(1))
    losses = d(x)
    assert set(losses) == {"loss_cls", "loss_frs_feat"}
    assert not ran
    function = {"pkd": pkd_loss, "cwd": cwd_loss}[preset]
    with torch.no_grad():
        feats = d.adapter(
            d.student.neck(d.student.backbone(x)) if hasattr(d.student, "backbone") else d.student.neck(x)
        )
        expected = PRESETS[preset]["feat_weight"] * function(feats, d.observe(x).feats)
    assert torch.allclose(losses["loss_frs_feat"].detach(), expected, rtol=1e-5)
    losses["loss_frs_feat"].backward()
    assert all(p.grad is not None for p in d.adapter.parameters())


def test_a_head_term_beside_them_keeps_the_head():
    d, x = distiller(preset="pkd", cls_weight=0.5), images()
    assert set(d(x)) == {"loss_cls", "loss_frs_feat", "loss_frs_cls"}
    with pytest.raises(ValueError, match="the richness is made of the teacher's class logits"):
        distiller(logits=None)
    assert set(distiller(logits=None, preset="pkd")(x)) == {"loss_cls", "loss_frs_feat"}


@pytest.mark.parametrize("options", [{}, {"logits": None}], ids=["logits", "no logits"])
def test_a_mask_of_a_distiller_is_left_out_where_no_term_has_one(options):
    def mask(z: list[torch.Tensor]) -> list[torch.Tensor]:
        raise AssertionError("asked for a mask")

    plain, masked = (distiller(preset="pkd", **more, **options)(images()) for more in ({}, {"mask": mask}))
    assert plain["loss_frs_feat"] == masked["loss_frs_feat"]
