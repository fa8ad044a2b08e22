"""quality_focal_distillation against its formula, written out number by number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from cases import FLOATS, each_backend, ids, relative
from torch import Tensor
from truth import lay_out

from frs_kernels import ImitationTerms, masked_imitation_loss, quality_focal_distillation, richness_mask

SIZES = ((2, 3, 5), (2, 1, 2))
CLASSES = 6


class Heads(NamedTuple):
    x: list[Tensor]
    z: list[Tensor]


class Expected(NamedTuple):
    loss: float
    grads: list[Tensor]


def heads(rng: torch.Generator, device: str, dtype: torch.dtype, layout: str) -> Heads:
    """Student and teacher that differ in every logit but the first, in every dtype."""

    def make(level: int, which: int) -> Tensor:
        n, h, w = SIZES[level]
        v = torch.randn(n, CLASSES, h, w, generator=rng) * 2 - 1
        v = (v * 4).round() / 4 + which / 8
        v[0, 0, 0, 0] = -2.0
        return lay_out(v.to(device, dtype), layout)

    levels = range(len(SIZES))
    return Heads([make(i, 0).requires_grad_() for i in levels], [make(i, 1) for i in levels])


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def written_out(
    of: Heads, mask: list[Tensor] | None, beta: float, detach: bool, tau: float = 1.0, joint: bool = False
) -> Expected:
    """The loss and its gradient as plain loops over Python's floats, which are fp64."""
    weights = [m.double() for m in mask] if mask else [torch.ones(n, h, w, dtype=torch.float64) for n, h, w in SIZES]
    masses = [w.sum().item() for w in weights]
    loss, grads = 0.0, []
    for level, (x, z, weight) in enumerate(zip(of.x, of.z, weights, strict=True)):
        mass = sum(masses) if joint else masses[level]
        grad = torch.zeros(x.shape, dtype=torch.float64)
        for b, k, i, j in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).tolist():
            p, q = sigmoid(x[b, k, i, j].item() / tau), sigmoid(z[b, k, i, j].item() / tau)
            d, bce = p - q, -(q * math.log(p) + (1 - q) * math.log(1 - p))
            share = weight[b, i, j].item() / mass
            factor = abs(d) ** beta
            loss += tau**2 * share * factor * bce
            slope = factor * d
            if not detach and d != 0:
                slope += beta * abs(d) ** (beta - 1) * math.copysign(1, d) * p * (1 - p) * bce
            grad[b, k, i, j] = tau * share * slope
        grads.append(grad)
    return Expected(loss, grads)


def assert_is(loss: Tensor, of: Heads, expected: Expected) -> None:
    dtype = of.x[0].dtype
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == working
    assert abs(loss.item() - expected.loss) <= 16 * torch.finfo(working).eps * expected.loss
    for grad, x, right in zip(torch.autograd.grad(loss, of.x), of.x, expected.grads, strict=True):
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(x).stride()
        assert relative(grad.cpu(), right) <= torch.finfo(dtype).eps + 32 * torch.finfo(working).eps


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 2.5, 3.0])
def test_it_is_the_formula_number_by_number(rng, backend, device, dtype, layout, detach, beta):
    of = heads(rng, device, dtype, layout)
    loss = quality_focal_distillation(of.x, of.z, beta=beta, detach=detach, backend=backend)
    assert_is(loss, of, written_out(of, None, beta, detach))


@each_backend
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("grad_mode", ["forward", "backward"])
def test_under_a_mask_and_with_every_option(rng, backend, device, detach, grad_mode):
    of = heads(rng, device, torch.float32, "contiguous")
    mask = richness_mask(of.z, backend=backend)
    options: dict[str, Any] = {"normalizer": "total_mass", "temperature": 2.0, "grad_mode": grad_mode}
    expected = written_out(of, [m.cpu() for m in mask.scores], 1.5, detach, tau=2.0, joint=True)
    terms = quality_focal_distillation(
        of.x, of.z, mask, beta=1.5, detach=detach, weight=0.25, backend=backend, return_terms=True, **options
    )
    assert isinstance(terms, ImitationTerms)
    assert terms.value.item() == pytest.approx(expected.loss, rel=2e-6)
    assert_is(terms.loss, of, Expected(0.25 * expected.loss, [0.25 * g for g in expected.grads]))
    loss = "qfl_detached" if detach else "qfl"
    plain = masked_imitation_loss(of.x, of.z, mask, loss=loss, beta=1.5, weight=0.25, backend=backend, **options)
    assert torch.equal(plain, terms.loss)


@each_backend
def test_without_a_mask_it_is_the_mean_over_the_positions(rng, backend, device):
    of = heads(rng, device, torch.float32, "contiguous")
    terms = quality_focal_distillation(of.x, of.z, backend=backend, return_terms=True)
    assert terms.mass.tolist() == [n * h * w for n, h, w in SIZES]
    ones = [torch.ones(n, h, w, dtype=torch.bool, device=device) for n, h, w in SIZES]
    assert torch.equal(quality_focal_distillation(of.x, of.z, ones, backend=backend), terms.loss)
    bce = masked_imitation_loss(of.x, of.z, ones, loss="bce", backend=backend)
    assert torch.equal(quality_focal_distillation(of.x, of.z, beta=0, backend=backend), bce)


@each_backend
@pytest.mark.parametrize("detach", [False, True])
def test_a_student_that_agrees_has_nothing_to_learn(rng, backend, device, detach):
    _, z = heads(rng, device, torch.float32, "contiguous")
    x = [v.clone().requires_grad_() for v in z]
    loss = quality_focal_distillation(x, z, beta=0.5, detach=detach, backend=backend)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, x))


def test_it_is_what_a_user_writes_with_autograd(rng):
    """bce with logits times the power of the difference, through autograd, or with the power detached."""
    of = heads(rng, "cpu", torch.float64, "contiguous")
    for detach in (False, True):
        loss = quality_focal_distillation(of.x, of.z, beta=2.0, detach=detach, backend="torch")
        total = torch.zeros((), dtype=torch.float64)
        for x, z in zip(of.x, of.z, strict=True):
            factor = (x.sigmoid() - z.sigmoid()).abs().pow(2.0)
            factor = factor.detach() if detach else factor
            bce = torch.nn.functional.binary_cross_entropy_with_logits(x, z.sigmoid(), reduction="none")
            total = total + (bce * factor).sum() / x[:, 0].numel()
        assert relative(loss.detach(), total.detach()) <= 1e-13
        for a, b in zip(torch.autograd.grad(loss, of.x), torch.autograd.grad(total, of.x), strict=True):
            assert relative(a, b) <= 1e-13
