"""The ends of fp32's range, where backends may differ: what docs/mistakes.md says holds in all. Weights below 0."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cases import each_backend, run, same_bits
from truth import pyramid

from frs_kernels import masked_imitation_loss, richness_mask


@pytest.fixture(params=[False, True], ids=["subnormals kept", "subnormals flushed"])
def flushed(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not torch.set_flush_denormal(request.param) and request.param:
        pytest.skip("this CPU flushes none")
    yield request.param
    torch.set_flush_denormal(False)


@each_backend
def test_a_weight_below_zero(rng, backend, device):
    """A number is refused. A tensor's value is not looked at, which would wait for the device: the loss turns round."""
    p = pyramid(rng, device=device)
    with pytest.raises(ValueError, match=r"cls_weight must be zero or more and finite, got -2\.0"):
        run(p, backend, cls_weight=-2.0)
    turned = run(
        p, backend, feat_weight=torch.tensor(-0.3, device=device), cls_weight=torch.tensor(-2.0, device=device)
    )
    plain = run(p, backend, feat_weight=torch.tensor(0.3, device=device), cls_weight=torch.tensor(2.0, device=device))
    assert turned.loss == -plain.loss
    assert all(torch.equal(a, -b) for a, b in zip(turned.grads, plain.grads, strict=True))


@each_backend
def test_scores_below_the_normal_numbers_count_as_they_are_or_as_none(rng, backend, device, flushed):
    """Teacher logits beyond -87.3: scores of less than 2^-126. The level is right, or adds 0; nothing is NaN."""
    p = pyramid(rng, sizes=((2, 4, 5), (1, 3, 3)), device=device)
    p.z[1].copy_(p.z[1] / 100 - 90)
    answer = run(p, backend)
    whole = run(p.map(lambda v: v.double()), "torch")
    for got, right in ((answer.feat_per_level, whole.feat_per_level), (answer.cls_per_level, whole.cls_per_level)):
        assert abs(got[0] - right[0]) <= 1e-6 * right[0]
        # of a subnormal number few digits are left
        assert got[1] == 0 or abs(got[1] - right[1]) <= 1e-3 * right[1]
    for grads, right in zip(answer.grads[1::2], whole.grads[1::2], strict=True):
        assert not grads.any() or (grads - right).abs().max() <= 1e-3 * right.abs().max()
    scores = richness_mask(p.z, backend=backend).scores[1]
    assert ((scores >= 0) & (scores < 2e-38)).all()


@each_backend
def test_features_below_the_normal_numbers(rng, backend, device, flushed):
    """Differences of 1e-39 are themselves, or 0."""
    s = [(torch.randn(2, 3, 4, 5, generator=rng) * 1e-39).to(device).requires_grad_()]
    t = [torch.zeros(2, 3, 4, 5, device=device)]
    loss = masked_imitation_loss(s, t, [torch.ones(2, 4, 5, device=device)], loss="l1", backend=backend)
    most = s[0].detach().double().abs().sum().item() / 40
    assert 0 <= loss.item() <= 1.001 * most
    assert torch.autograd.grad(loss, s)[0].abs().max() <= 1


@each_backend
@pytest.mark.parametrize("loss", ["bce", "kl"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_student_at_infinity(backend, device, loss, sign):
    """The loss is infinite, or NaN for a teacher as sure as fp32 can be; the slope is finite."""
    for z in (-300.0, -100.0, -80.0, -1.0, 0.0, 1.0, 80.0, 81.0, 89.0, 100.0, 300.0):
        x = torch.full((1, 1, 1, 1), sign * math.inf, device=device).requires_grad_()
        teacher = [torch.full((1, 1, 1, 1), sign * z, device=device)]
        value = masked_imitation_loss([x], teacher, [torch.ones(1, 1, 1, device=device)], loss=loss, backend=backend)
        assert value == math.inf or (value.isnan() and z > 80)
        (slope,) = torch.autograd.grad(value, x)
        assert abs(slope.item() - sign * torch.tensor(-z).double().sigmoid().item()) <= 1e-6


@each_backend
def test_flushing_subnormals_changes_no_bit_of_usual_numbers(rng, backend, device):
    p = pyramid(rng, device=device)
    plain = run(p, backend)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU flushes none")
    try:
        again = run(p, backend)
    finally:
        torch.set_flush_denormal(False)
    assert all(same_bits(a, b) for a, b in zip([plain.loss, *plain.grads], [again.loss, *again.grads], strict=True))
