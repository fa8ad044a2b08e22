"""What softmax heads need beside softmax_kl: localization distillation, masks, normalizer="none"."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import each_backend, ids, relative
from softmax_heads import SIZES, Expected, assert_is, heads, loss_of, written_out
from torch import Tensor

from frs_kernels import (
    ImitationTerms,
    LocalizationDistillation,
    QualityFocalDistillation,
    Richness,
    fsr_loss,
    localization_distillation,
    masked_imitation_loss,
    masks,
    quality_focal_distillation,
    richness_mask,
)


def mmdetection(pred: Tensor, soft: Tensor, weight: Tensor, tau: float) -> Tensor:
    """KnowledgeDistillationKLDivLoss on (N, sides * bins, H, W), avg_factor = sides * the sum of the weights."""
    bins = pred.shape[1] // 4
    a, b = (v.permute(0, 2, 3, 1).reshape(-1, bins) for v in (pred, soft))
    target = F.softmax(b / tau, dim=1).detach()
    value = F.kl_div(F.log_softmax(a / tau, dim=1), target, reduction="none").mean(1) * (tau * tau)
    weights = weight.reshape(-1, 1).expand(-1, 4).reshape(-1)
    return (value * weights).sum() / (4 * weight.sum())


@each_backend
@pytest.mark.parametrize("masked", [True, False])
def test_localization_distillation_is_what_mmdetection_computes(rng, backend, device, masked):
    of = heads(rng, device, 68, sizes=((2, 5, 8), (1, 1, 3)))
    loss = localization_distillation(of.x, of.z, of.mask if masked else None, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in of.x]
    right = sum(
        mmdetection(x, z.double(), m.double() if masked else torch.ones_like(m, dtype=torch.float64), 10.0)
        for x, z, m in zip(wide, of.z, of.mask, strict=True)
    )
    assert isinstance(right, Tensor)
    grads = [g.cpu() for g in torch.autograd.grad(right, wide)]
    expected = Expected(
        right.item(),
        grads,
        [10 * m.max().item() / (68 * m.sum().item()) if masked else 10 / (68 * m.numel()) for m in of.mask],
    )
    assert_is(loss, of, expected)
    weights = [0.5, 2.0]
    terms = localization_distillation(of.x, of.z, of.mask if masked else None, level_weights=weights, weight=3.0,
                                      temperature=1.0, backend=backend, return_terms=True)  # fmt: skip
    plain = loss_of(of if masked else of._replace(mask=[torch.ones_like(m) for m in of.mask]), 17, weight=3.0,
                    level_weights=weights, normalizer="mass_channels", backend=backend)  # fmt: skip
    assert torch.equal(terms.loss, plain)
    assert terms.loss.item() == pytest.approx(3 * terms.value.item(), rel=1e-6)


def test_localization_distillation_with_other_sides(rng):
    of = heads(rng, "cpu", 12, torch.float64)
    loss = localization_distillation(of.x, of.z, of.mask, sides=2, temperature=3.0, backend="torch")
    assert_is(loss, of, written_out(of, 6, 3.0, per_channel=True))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sides": 5}, ValueError, r"student_reg\[0\] \(2, 12, 7, 9\) must have sides \* bins channels, sides=5"),
        ({"sides": 0}, ValueError, "sides must be 1 or more, got 0"),
        ({"sides": 2.0}, TypeError, "sides must be a whole number, got float"),
        ({"sides": True}, TypeError, "sides must be a whole number, got bool"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"normalizer": "mean"}, ValueError, "'mass', 'mass_channels', 'total_mass', 'none'"),
    ],
)
def test_localization_distillation_refuses(rng, options, error, words):
    of = heads(rng, "cpu", 12)
    with pytest.raises(error, match=words):
        localization_distillation(of.x, of.z, **options)


def test_levels_of_other_channels_are_refused(rng):
    x, z = ([torch.randn(1, c, 2, 2, generator=rng) for c in (8, 12)] for _ in range(2))
    with pytest.raises(ValueError, match=r"student_reg\[1\] \(1, 12, 2, 2\) must have sides \* bins channels"):
        localization_distillation(x, z)


@pytest.mark.parametrize(
    ("size", "loss", "error", "words"),
    [
        (5, "softmax_kl", ValueError, r"group_size=5 does not divide the 12 channels of student\[0\] \(2, 12, 7, 9\)"),
        (0, "softmax_kl", ValueError, "group_size must be 1 or more, got 0"),
        (3.0, "softmax_kl", TypeError, "group_size must be a whole number, got float"),
        (3, "kl", ValueError, "group_size=3 is of loss='softmax_kl', not of loss='kl'"),
    ],
)
def test_group_sizes_are_refused(rng, size, loss, error, words):
    of = heads(rng, "cpu", 12)
    with pytest.raises(error, match=words):
        masked_imitation_loss(of.x, of.z, of.mask, loss=loss, group_size=size)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=ids)
def test_the_richness_of_a_softmax(rng, backend, device, dtype):
    z = [(torch.randn(2, 5, h, w, generator=rng) * 4).to(device, dtype) for h, w in ((3, 4), (1, 1), (0, 2))]
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for background in (-1, 0, 2, None):
        found = richness_mask(z, head="softmax", background=background, backend=backend)
        assert isinstance(found, Richness)
        for scores, level, mass in zip(found.scores, z, found.mass, strict=True):
            p = level.double().softmax(1)
            right = p.amax(1) if background is None else 1 - p[:, background]
            assert scores.dtype == working
            assert scores.shape == right.shape
            assert torch.allclose(scores.double(), right, rtol=1e-5 if working == torch.float32 else 1e-12, atol=1e-15)
            assert mass == scores.sum()


def test_a_small_richness_keeps_its_digits():
    z = torch.tensor([0.0, -1.0, 40.0]).view(1, 3, 1, 1)
    found = richness_mask([z], head="softmax").scores[0].item()
    assert found == pytest.approx((1 + math.exp(-1)) * math.exp(-40), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"head": "logits"}, ValueError, "head='logits' is unknown; the valid ones are 'sigmoid', 'softmax'"),
        (
            {"head": "softmax", "background": 3},
            ValueError,
            r"background=3: teacher_logits\[0\] \(1, 3, 2, 2\) must have",
        ),
        ({"head": "softmax", "background": -4}, ValueError, "background=-4"),
        (
            {"head": "softmax", "background": 1.0},
            TypeError,
            "background must be the number of a logit or None, got float",
        ),
    ],
)
def test_a_wrong_head_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        richness_mask([torch.zeros(1, 3, 2, 2)], **options)


def test_one_logit_alone_is_no_background():
    with pytest.raises(ValueError, match="must have that logit, and others"):
        richness_mask([torch.zeros(1, 1, 2, 2)], head="softmax")


@each_backend
@pytest.mark.parametrize("features", [True, False])
def test_fsr_loss_of_a_softmax_head(rng, backend, device, features):
    of = heads(rng, device, 9)
    s, t = ([torch.randn(n, 5, h, w, generator=rng).to(device) for n, h, w in SIZES] for _ in range(2))
    mask = richness_mask(of.z, head="softmax", backend=backend)
    terms = fsr_loss(*((s, t) if features else (None, None)), of.x, of.z, cls_loss="softmax_kl", temperature=2.0,
                     mask=mask, backend=backend, return_terms=True)  # fmt: skip
    expected = written_out(of._replace(mask=mask.scores), 0, 2.0)
    assert terms.cls.item() == pytest.approx(expected.loss, rel=2e-6)
    for grad, right in zip(torch.autograd.grad(terms.loss, of.x), expected.grads, strict=True):
        assert relative(grad.cpu(), right) <= 4e-6
    if features:
        right = sum(
            (m[:, None] * (a - b) ** 2).sum().item() / m.sum().item() for a, b, m in zip(s, t, mask.scores, strict=True)
        )
        assert terms.feat.item() == pytest.approx(right, rel=1e-5)
        assert terms.loss.item() == pytest.approx(right + expected.loss, rel=1e-5)
    # without a mask the scores are a sigmoid's, made in the same call
    again = fsr_loss(*((s, t) if features else (None, None)), of.x, of.z, cls_loss="softmax_kl", backend=backend)
    given = fsr_loss(*((s, t) if features else (None, None)), of.x, of.z, cls_loss="softmax_kl", backend=backend,
                     mask=richness_mask(of.z, backend=backend))  # fmt: skip
    assert again.item() == pytest.approx(given.item(), rel=1e-6)


@each_backend
@pytest.mark.parametrize("grad_mode", ["forward", "backward"])
def test_the_normalizer_none_divides_by_1(rng, backend, device, grad_mode):
    of = heads(rng, device, 4)
    s, t = ([torch.randn(n, 3, h, w, generator=rng).to(device).requires_grad_(i == 0) for n, h, w in SIZES]
            for i in range(2))  # fmt: skip
    options: dict[str, Any] = {"normalizer": "none", "grad_mode": grad_mode, "backend": backend}
    terms = fsr_loss(s, t, of.x, of.z, return_terms=True, eps=1.0, **options)
    right = sum((m[:, None] * (a - b) ** 2).sum() / 2 for a, b, m in zip(s, t, terms.mask, strict=True))
    assert terms.feat.item() == pytest.approx(right.item(), rel=1e-5)
    assert all(mass == m.sum() for mass, m in zip(terms.mass, terms.mask, strict=True)) or backend != "torch"
    assert torch.allclose(terms.mass, torch.stack([m.sum() for m in terms.mask]))
    for a, b in zip(torch.autograd.grad(terms.feat, s), torch.autograd.grad(right, s), strict=True):
        assert relative(a, b) <= 1e-5
    plain = masked_imitation_loss(s, t, of.mask, **options)
    weighed = masked_imitation_loss(s, t, of.mask, backend=backend, return_terms=True)
    assert isinstance(weighed, ImitationTerms)
    assert plain.item() == pytest.approx((weighed.per_level * weighed.mass).sum().item(), rel=1e-5)


@each_backend
def test_defeat_in_one_pass(rng, backend, device):
    """Objects and background as two means with weights of their own, of Guo et al., CVPR 2021."""
    s, t = ([torch.randn(n, 3, h, w, generator=rng).to(device).requires_grad_(i == 0) for n, h, w in SIZES]
            for i in range(2))  # fmt: skip
    objects = [(torch.rand(size, generator=rng) < 0.3).float().to(device) for size in SIZES]
    objects[1].zero_()
    mask = masks.decoupled(objects, 2.0, 0.5)
    loss = masked_imitation_loss(s, t, mask, normalizer="none", backend=backend)
    right = s[0].new_zeros(())
    for a, b, m in zip(s, t, objects, strict=True):
        value = (a - b).square().sum(1)
        for weight, part in ((2.0, m), (0.5, 1 - m)):
            if part.any():
                right = right + weight * (part * value).sum() / part.sum()
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(loss, s), torch.autograd.grad(right, s), strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (QualityFocalDistillation, quality_focal_distillation, {"beta": 2.0, "detach": True, "normalizer": "none"}),
        (LocalizationDistillation, localization_distillation, {"sides": 3, "temperature": 2.0, "eps": 0.5}),
        (LocalizationDistillation, localization_distillation, {}),
    ],
)
def test_modules_are_the_functions(rng, module, function, options):
    of = heads(rng, "cpu", 12)
    for mask in (None, of.mask):
        right = function(of.x, of.z, mask, weight=0.25, **options)
        made = module(0.25, **options)
        for twin in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(twin(of.x, of.z, mask), right)
        terms = module(torch.tensor(0.25), return_terms=True, **options)(of.x, of.z, mask)
        assert isinstance(terms, ImitationTerms)
        assert terms.loss.item() == pytest.approx(right.item(), rel=1e-6)
    assert "weight=0.25" in repr(made)
    assert all(f"{name}={value!r}" in repr(made) for name, value in options.items())
    scaled = module(torch.tensor(2.0))
    assert dict(scaled.named_buffers()).keys() == {"weight"}
    assert not scaled.state_dict()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: QualityFocalDistillation(-1.0), ValueError, "weight must be zero or more"),
        (lambda: QualityFocalDistillation(beta=-1.0), ValueError, "beta must be zero or more"),
        (lambda: QualityFocalDistillation(detach=1), TypeError, "detach"),
        (lambda: QualityFocalDistillation(sides=4), TypeError, "sides"),
        (lambda: LocalizationDistillation(sides=0), ValueError, "sides must be 1 or more"),
        (lambda: LocalizationDistillation(temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: LocalizationDistillation(normalizer="sum"), ValueError, "normalizer='sum' is unknown"),
        (lambda: LocalizationDistillation(process_group="WORLD"), TypeError, "process_group must be"),
    ],
)
def test_a_module_is_refused_when_it_is_made(make, error, words):
    with pytest.raises(error, match=words):
        make()
