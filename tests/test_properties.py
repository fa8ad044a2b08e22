"""What holds for every input: scaling laws, ranges. Hypothesis looks for the input that breaks it."""

from __future__ import annotations

import os
from typing import Any

import torch
from cases import FLOATS, close, relative, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from truth import LAYOUTS, Pyramid, pyramid

from frs_kernels import fsr_loss, masked_imitation_loss, richness_mask

EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "12"))
few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow], database=None
)

levels = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)
channels = st.integers(1, 12)
dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**31)


@st.composite
def pyramids(draw: st.DrawFn, **fixed: Any) -> Pyramid:
    options = {
        "sizes": draw(levels),
        "channels": draw(channels),
        "classes": draw(channels),
        "dtype": draw(dtypes),
        "teacher_dtype": draw(dtypes),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "teacher_layout": draw(st.sampled_from(LAYOUTS)),
        "spread": draw(st.sampled_from([0.1, 3.0, 20.0])),
    }
    return pyramid(torch.Generator().manual_seed(draw(seeds)), **options | fixed)


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64), factor=st.floats(0.01, 8))
@few
def test_the_loss_is_linear_in_its_weights(p, factor):
    one, none, some = (run(p, "torch", feat_weight=w, cls_weight=2 * w) for w in (1.0, 0.0, factor))
    assert none.loss == 0
    assert abs(some.loss - factor * one.loss) <= 1e-14 * factor * (one.feat + 2 * one.cls)
    for a, b in zip(some.grads, one.grads, strict=True):
        assert close(a, factor * b)


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64), order=st.randoms(use_true_random=False))
@few
def test_levels_in_another_order_give_the_same_values_in_that_order(p, order):
    indices = list(range(len(p.s)))
    order.shuffle(indices)
    shuffled = Pyramid(*([v[i] for i in indices] for v in p.inputs))
    a, b = run(p, "torch"), run(shuffled, "torch")
    assert torch.equal(a.feat_per_level[indices], b.feat_per_level)
    assert torch.equal(a.cls_per_level[indices], b.cls_per_level)
    assert torch.equal(a.mass[indices], b.mass)
    assert relative(a.loss, b.loss) <= 1e-14


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64, sizes=((4, 3, 2), (4, 1, 1))))
@few
def test_a_batch_in_two_halves_with_the_mean_mass_is_the_whole_batch(p):
    """What process_group does, without processes: the halves' losses over the mean mass average to the whole's."""
    whole = run(p, "torch")
    halves = [Pyramid(*([v.detach()[part] for v in each] for each in p.inputs)) for part in (slice(0, 2), slice(2, 4))]
    total = 0.0
    for half in halves:
        scores, mass = richness_mask(half.z, backend="torch")
        local = run(half.map(torch.clone), "torch")
        total = total + ((local.feat_per_level + local.cls_per_level) * mass / (whole.mass / 2)).sum() / 2
        assert len(scores) == 2
    assert relative(total, whole.loss) <= 1e-13


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64))
@few
def test_kl_is_never_negative_and_zero_where_they_agree(p):
    kl = run(p, "torch", cls_loss="kl").cls_per_level
    bce = run(p, "torch", cls_loss="bce").cls_per_level
    assert (kl >= -1e-15 * bce).all()
    assert (kl <= bce).all()
    same = Pyramid(p.t, p.t, p.z, p.z).map(torch.clone)
    assert run(same, "torch", cls_loss="kl").loss == 0
    assert not any(g.any() for g in run(same, "torch").grads)


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64), beta=st.floats(1e-3, 10))
@few
def test_qfl_is_a_part_of_bce_and_zero_where_they_agree(p, beta):
    bce, qfl, detached = (run(p, "torch", cls_loss=loss, beta=beta) for loss in ("bce", "qfl", "qfl_detached"))
    assert (qfl.cls_per_level >= 0).all()
    assert (qfl.cls_per_level <= bce.cls_per_level).all()
    assert torch.equal(qfl.loss, detached.loss)
    for plain, whole, part in zip(*(a.grads[len(p.s) :] for a in (bce, qfl, detached)), strict=True):
        assert (whole * plain >= 0).all()
        assert (part.abs() <= whole.abs()).all()
        assert (part.abs() <= plain.abs()).all()
    same = Pyramid(p.t, p.t, p.z, p.z).map(torch.clone)
    for loss in ("qfl", "qfl_detached"):
        answer = run(same, "torch", cls_loss=loss, beta=beta)
        assert answer.loss == 0
        assert not any(g.any() for g in answer.grads)


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64), beta=st.floats(1e-3, 10))
@few
def test_smooth_l1_lies_between_its_neighbours(p, beta):
    """Below l1 by at most beta / 2 a value, and below mse / (2 beta); its slope never beyond that of l1."""
    smooth, l1, mse = (run(p.without("x"), "torch", feat_loss=loss, beta=beta) for loss in ("smooth_l1", "l1", "mse"))
    channels = torch.tensor([s.shape[1] for s in p.s], dtype=torch.float64)
    slack = 1e-13 * (l1.feat_per_level + mse.feat_per_level / beta)
    assert (smooth.feat_per_level <= l1.feat_per_level + slack).all()
    assert (smooth.feat_per_level >= l1.feat_per_level - channels * beta / 2 - slack).all()
    assert (smooth.feat_per_level <= mse.feat_per_level / (2 * beta) + slack).all()
    for a, b in zip(smooth.grads, l1.grads, strict=True):
        assert (a.abs() <= b.abs() * (1 + 1e-14)).all()
        assert (a * b >= 0).all()


@given(p=pyramids())
@few
def test_scores_are_probabilities_and_the_mass_is_their_sum(p):
    scores, mass = richness_mask(p.z, backend="torch")
    for s, m, z in zip(scores, mass, p.z, strict=True):
        assert s.min() >= 0
        assert s.max() <= 1
        assert 0 <= m <= s.numel() * (1 + 1e-6)
        best = torch.sigmoid(z.double()).amax(1)
        assert relative(s, best) <= 4 * torch.finfo(torch.float32).eps


@given(p=pyramids(dtype=torch.float64, teacher_dtype=torch.float64), factor=st.floats(0.01, 100))
@few
def test_a_mask_may_be_scaled(p, factor):
    """The mass takes the factor out again."""
    mask = [z.sigmoid().amax(1) for z in p.z]
    plain, scaled = (masked_imitation_loss(p.s, p.t, [m * f for m in mask], backend="torch") for f in (1.0, factor))
    assert relative(scaled, plain) <= 1e-13
    assert relative(fsr_loss(p.s, p.t, None, p.z, backend="torch"), plain) <= 1e-13
