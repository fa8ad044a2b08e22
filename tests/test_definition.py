"""The definition: the torch backend in fp64 is the formula of the paper, with every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import assert_right, relative
from truth import QFL, Answer, Pyramid, authors, eager, pyramid, truth

from frs_kernels import fsr_loss, masked_imitation_loss
from frs_kernels.losses import LOSSES

OPTIONS: list[dict[str, Any]] = [
    {},
    {"cls_loss": "kl"},
    {"temperature": 2.5},
    {"temperature": 0.5, "cls_loss": "kl"},
    {"normalizer": "mass_channels"},
    {"normalizer": "total_mass"},
    {"normalizer": "total_mass", "eps": 0.3, "level_weights": [0.5, 0.0, 2], "cls_loss": "kl"},
    {"eps": 0.3},
    {"normalizer": "mass_channels", "eps": 0.3, "level_weights": [0.5, 0.0, 2]},
    {"level_weights": [1, 0.25, 3.0]},
    {"feat_weight": 0.005, "cls_weight": 0.02},
    {"feat_weight": 0.0},
    {"cls_weight": 1.5},
    {"feat_loss": "l1"},
    {"feat_loss": "smooth_l1"},
    {"feat_loss": "smooth_l1", "beta": 0.3, "normalizer": "mass_channels", "level_weights": [0.5, 0.0, 2]},
    {"feat_loss": "smooth_l1", "beta": 0.0, "cls_loss": "kl"},
    {"cls_loss": "qfl"},
    {"cls_loss": "qfl", "beta": 2.0, "temperature": 2.5},
    {"cls_loss": "qfl", "beta": 1.7, "normalizer": "mass_channels", "level_weights": [0.5, 0.0, 2]},
    {"cls_loss": "qfl", "beta": 0.0, "feat_loss": "smooth_l1"},
    {"cls_loss": "qfl_detached"},
    {"cls_loss": "softmax_kl"},
    {"cls_loss": "softmax_kl", "temperature": 2.5, "normalizer": "mass_channels", "eps": 0.3},
    {"cls_loss": "qfl_detached", "beta": 0.5, "temperature": 0.5, "eps": 0.3},
]


def written_out(p: Pyramid) -> float:
    """The loss in plain Python, number by number."""
    total = 0.0
    for s, t, x, z in zip(*p.inputs, strict=True):
        mass, feat, cls = 0.0, 0.0, 0.0
        n, c, height, width = s.shape
        for b in range(n):
            for i in range(height):
                for j in range(width):
                    q = [1 / (1 + math.exp(-v)) for v in z[b, :, i, j].tolist()]
                    score = max(q)
                    mass += score
                    feat += score * sum((s[b, k, i, j].item() - t[b, k, i, j].item()) ** 2 for k in range(c))
                    for v, target in zip(x[b, :, i, j].tolist(), q, strict=True):
                        prediction = 1 / (1 + math.exp(-v))
                        cls -= score * (target * math.log(prediction) + (1 - target) * math.log(1 - prediction))
        total += (feat + cls) / mass
    return total


def test_the_truth_is_the_formula_number_by_number(rng):
    p = pyramid(rng, dtype=torch.float64, sizes=((2, 2, 3), (2, 1, 1)))
    assert truth(p).loss.item() == pytest.approx(written_out(p), rel=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_torch_backend_in_fp64_is_the_truth(rng, options):
    assert_right(pyramid(rng, dtype=torch.float64), "torch", **options)


@pytest.mark.parametrize("options", [{}, {"normalizer": "mass_channels", "level_weights": [0.5, 0, 2]}], ids=str)
@pytest.mark.parametrize("left_out", [("s", "t"), ("x",)], ids=["head-only", "features-only"])
def test_one_term_alone(rng, left_out, options):
    assert_right(pyramid(rng, dtype=torch.float64).without(*left_out), "torch", **options)


@pytest.mark.parametrize("signed", [False, True])
def test_a_given_mask_takes_the_place_of_the_score(rng, signed):
    p = pyramid(rng, dtype=torch.float64)
    mask = [torch.rand(z[:, 0].shape, generator=rng, dtype=torch.float64) + 0.5 for z in p.z]
    if signed:
        mask[0][0, 0, 0] = -0.05
    assert_right(p, "torch", mask=mask)


def test_within_ten_it_is_what_the_authors_wrote(rng):
    p = pyramid(rng, dtype=torch.float64).map(lambda v: v.clamp(-10, 10))
    loss = fsr_loss(*p.inputs, feat_weight=0.1, cls_weight=0.05, backend="torch")
    theirs = authors(p, feat_weight=0.1, cls_weight=0.05)
    # 1 - sigmoid(10) keeps 11 of fp64's 16 digits, which is all that their log sees.
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-10)
    for grad, expected in zip(torch.autograd.grad(loss, p.student), theirs.grads, strict=True):
        assert relative(grad, expected) <= 1e-10


def test_in_fp32_it_is_what_the_authors_wrote_to_the_digits_theirs_has(rng):
    p = pyramid(rng).map(lambda v: v.clamp(-10, 10))
    loss, theirs, right = fsr_loss(*p.inputs, backend="torch"), authors(p).loss, truth(p).loss
    assert abs(loss.double() - right) <= 1e-6 * right
    assert abs(theirs.double() - right) <= 1e-4 * right


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1.0, 100.0])
def test_the_truth_of_the_smooth_l1_is_pytorchs(rng, beta):
    p = pyramid(rng, dtype=torch.float64)
    for a, b in zip(truth(p, feat_loss="smooth_l1", beta=beta).grads, eager_in_fp64(p, beta).grads, strict=True):
        assert relative(a, b) <= 1e-15


def eager_in_fp64(p: Pyramid, beta: float) -> Answer:
    return eager(p, dtype=torch.float64, feat_loss="smooth_l1", beta=beta)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_masked_imitation_is_one_term_of_it(rng, loss):
    p = pyramid(rng, dtype=torch.float64)
    mask = [torch.rand(z[:, 0].shape, generator=rng, dtype=torch.float64) for z in p.z]
    options = {"normalizer": "mass_channels", "eps": 0.2, "level_weights": [1, 0.5, 2.0]}
    beta = 1.4 if loss in QFL else 0.4
    if not LOSSES[loss].takes_logits:
        given = {"feat_weight": 0.3, "feat_loss": loss, "beta": beta}
        student, teacher, expected = p.s, p.t, truth(p.without("x"), mask=mask, **given, **options)
    else:
        student, teacher = p.x, p.z
        expected = truth(p.without("s", "t"), mask=mask, cls_weight=0.3, cls_loss=loss, temperature=2.0, beta=beta,
                         **options)  # fmt: skip
    value = masked_imitation_loss(
        student, teacher, mask, loss=loss, weight=0.3, temperature=2.0, beta=beta, backend="torch", **options
    )
    assert value.item() == pytest.approx(expected.loss.item(), rel=1e-13)
    for grad, right in zip(torch.autograd.grad(value, student), expected.grads, strict=True):
        assert relative(grad, right) <= 1e-14
