"""The edges: no mass, NaN and inf, empty and odd shapes, many levels, zero weights, offsets beyond 32 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import assert_right, compiled_backends, each_backend, relative, run
from columns import Entry, Term, columns
from truth import QFL, Pyramid, pyramid, truth

from frs_kernels import backends, fsr_loss, masked_imitation_loss, richness_mask
from frs_kernels.ops import VERBS

TWO = ((2, 3, 5), (2, 1, 1))
MODES = pytest.mark.parametrize("grad_mode", ["forward", "backward"])


@each_backend
@MODES
@pytest.mark.parametrize("value", [-math.inf, -200.0])
def test_a_level_without_mass_adds_nothing(rng, backend, device, grad_mode, value):
    p = pyramid(rng, sizes=TWO, device=device)
    p.z[0].fill_(value)
    answer = run(p, backend, grad_mode=grad_mode)
    alone = run(Pyramid(p.s[1:], p.t[1:], p.x[1:], p.z[1:]), backend, grad_mode=grad_mode)
    assert answer.mass[0] == 0
    assert torch.equal(answer.loss, alone.loss)
    assert torch.equal(answer.grads[1], alone.grads[0])
    assert torch.equal(answer.grads[3], alone.grads[1])
    assert not answer.grads[0].any()
    assert not answer.grads[2].any()


@each_backend
def test_a_mass_below_the_normal_numbers_does_not_blow_up(rng, backend, device):
    p = pyramid(rng, sizes=TWO, device=device)
    p.z[0].fill_(-95.0)  # sigmoid(-95) = 5.5e-42
    answer = run(p, backend)
    expected = truth(p.map(torch.Tensor.cpu))
    flushed = answer.mass[0] == 0  # a device may hold no such number
    assert flushed or abs(answer.feat_per_level[0] - expected.feat_per_level[0]) <= 1e-2 * expected.feat_per_level[0]
    assert all(torch.isfinite(g).all() for g in answer.grads)


# (channel, position): the first and the last of both, and the middle
PLACES = [(0, 0), (-1, -1), (0, -1), (-1, 0), (3, 7)]


@each_backend
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [7, 37])  # less than a vector of any width, and more than two of the widest
def test_a_nan_comes_through_the_maximum(rng, backend, device, place, layout, classes):
    p = pyramid(rng, sizes=((1, 3, 5), (1, 1, 1)), classes=classes, layout=layout, device=device)
    channel, position = place
    p.z[0][0, channel, position // 5 if position >= 0 else -1, position % 5] = math.nan
    scores, mass = richness_mask(p.z, backend=backend)
    expected = torch.zeros(15, dtype=torch.bool)
    expected[position] = True
    assert torch.equal(scores[0].flatten().isnan().cpu(), expected)
    assert mass.isnan().tolist() == [True, False]


@each_backend
@MODES
@pytest.mark.parametrize("place", PLACES[:2], ids=str)
@pytest.mark.parametrize("who", ["s", "t", "x", "z"])
def test_a_nan_anywhere_reaches_the_loss(rng, backend, device, grad_mode, place, who):
    p = pyramid(rng, sizes=TWO, device=device)
    with torch.no_grad():
        getattr(p, who)[0].flatten(2)[0, place[0], place[1]] = math.nan
    answer = run(p, backend, grad_mode=grad_mode)
    assert answer.loss.isnan()
    assert answer.feat_per_level.isnan().tolist() == [who != "x", False]
    if who != "z":
        assert answer.mass.isfinite().all()
        grad = answer.grads[0 if who in "st" else 2].flatten(2)
        assert grad[0, place[0], place[1]].isnan()
        assert grad.isnan().sum() == 1
    else:
        assert all(answer.grads[i].isnan().all() for i in (0, 2))
    assert all(answer.grads[i].isfinite().all() for i in (1, 3))


@each_backend
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("who", ["s", "t", "x"])
def test_an_infinity_reaches_the_loss(rng, backend, device, sign, who):
    p = pyramid(rng, sizes=TWO, device=device)
    with torch.no_grad():
        getattr(p, who)[0][1, 2, 1, 1] = sign * math.inf
    answer = run(p, backend)
    assert answer.loss == math.inf


FEAT_LOSSES: dict[str, dict[str, Any]] = {
    "mse": {},
    "l1": {"feat_loss": "l1"},
    **{f"smooth_l1 {beta}": {"feat_loss": "smooth_l1", "beta": beta} for beta in (0.0, 1e-40, 1.0)},
}


@each_backend
@MODES
@pytest.mark.parametrize("loss", FEAT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_where_features_agree_value_and_slope_are_zero(rng, backend, device, grad_mode, loss, dtype):
    p = pyramid(rng, sizes=TWO, dtype=dtype, device=device)
    with torch.no_grad():
        p.s[0].copy_(p.t[0])
        p.s[1][0] = p.t[1][0]
    answer = run(p.without("x"), backend, grad_mode=grad_mode, **FEAT_LOSSES[loss])
    assert answer.feat_per_level[0] == 0
    assert not answer.grads[0].any()
    assert not answer.grads[1][0].any()
    assert torch.equal(answer.grads[1][1] != 0, (p.s[1][1] != p.t[1][1]).to(device))  # bf16's may agree by chance


@each_backend
@MODES
@pytest.mark.parametrize("loss", [*QFL, "kl"])
@pytest.mark.parametrize("beta", [1e-3, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_where_logits_agree_value_and_slope_are_zero(rng, backend, device, grad_mode, loss, beta, dtype):
    """Also for a beta below 1, whose |d|^(beta - 1) is infinite there, and at both ends."""
    p = pyramid(rng, sizes=TWO, dtype=dtype, device=device).without("s", "t")
    with torch.no_grad():
        for i, at in enumerate((-90.0, -17.0, 0.0, 30.0, 90.0, 1e4)):
            p.z[0][1, i] = at
        p.x[0].copy_(p.z[0])
    answer = run(p, backend, grad_mode=grad_mode, cls_loss=loss, beta=beta)
    assert answer.cls_per_level[0] == 0
    assert not answer.grads[0].any()
    assert answer.grads[1].isfinite().all()


@each_backend
@pytest.mark.parametrize("loss", QFL)
@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_next_to_each_other_have_a_finite_slope(backend, device, loss, beta, dtype):
    z = torch.tensor([-95.0, -88.0, -60.0, -17.0, -1e-3, 0.0, 1e-30, 1.0, 17.0, 88.0, 300.0], dtype=dtype)
    ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for end in ends:
        x = torch.nextafter(z, end)
        p = Pyramid(None, None, [x.view(1, 1, 1, -1).to(device)], [z.view(1, 1, 1, -1).to(device)]).map(torch.clone)
        answer = run(p, backend, cls_loss=loss, beta=beta, mask=[torch.ones(1, 1, len(z), device=device)])
        assert answer.loss.isfinite()
        assert answer.grads[0].isfinite().all()
        assert (answer.grads[0].flatten().cpu() * end.sign() >= 0).all()


@each_backend
@pytest.mark.parametrize("loss", QFL)
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("who", ["x", "z"])
def test_a_nan_among_logits_stays_one_in_qfl(rng, backend, device, loss, beta, who):
    p = pyramid(rng, sizes=TWO, device=device).without("s", "t")
    with torch.no_grad():
        getattr(p, who)[0][0, 2, 1, 3] = math.nan
    mask = [torch.ones(v[:, 0].shape, device=device) for v in p.z]
    answer = run(p, backend, cls_loss=loss, beta=beta, mask=mask)
    assert answer.cls_per_level.isnan().tolist() == [True, False]
    assert answer.grads[0][0, 2, 1, 3].isnan()
    assert answer.grads[0].isnan().sum() == 1


@each_backend
@MODES
@pytest.mark.parametrize("loss", FEAT_LOSSES)
def test_features_that_are_no_numbers_stay_none(rng, backend, device, grad_mode, loss):
    """NaN in value and slope, also where the sign of a difference or a clamp would hide it; infinity as its side."""
    p = pyramid(rng, sizes=((1, 3, 5), (1, 1, 2)), device=device)
    where = [(0, 0, 0, 0), (0, 4, 2, 4), (0, 1, 1, 1), (0, 2, 1, 0), (0, 3, 0, 2)]
    with torch.no_grad():
        for index, student, teacher in zip(
            where, (math.nan, 1.0, math.inf, -math.inf, math.inf), (0.0, math.nan, 1.0, 2.0, math.inf), strict=True
        ):
            p.s[0][index], p.t[0][index] = student, teacher
    answer = run(p.without("x"), backend, grad_mode=grad_mode, **FEAT_LOSSES[loss])
    grad = answer.grads[0]
    assert answer.loss.isnan()
    assert [grad[index].isnan().item() for index in where] == [True, True, False, False, True]
    assert grad.isnan().sum() == 3
    assert grad[where[2]] > 0 > grad[where[3]]
    assert grad[where[2]].isinf() == (loss == "mse")
    with torch.no_grad():
        for index in (where[0], where[1], where[4]):
            p.s[0][index] = p.t[0][index] = 0.0
    answer = run(p.without("x"), backend, grad_mode=grad_mode, **FEAT_LOSSES[loss])
    assert answer.feat_per_level[0] == math.inf
    assert answer.feat_per_level[1].isfinite()


@each_backend
@pytest.mark.parametrize("loss", ["l1", "smooth_l1 1.0"])
def test_a_level_without_mass_adds_no_difference_either(rng, backend, device, loss):
    p = pyramid(rng, sizes=TWO, device=device)
    p.z[0].fill_(-math.inf)
    answer = run(p, backend, **FEAT_LOSSES[loss])
    assert answer.feat_per_level[0] == 0
    assert not answer.grads[0].any()


@each_backend
def test_a_teacher_at_infinity_is_certain(rng, backend, device):
    p = pyramid(rng, sizes=TWO, device=device)
    p.z[0][0, 2, 1, 1] = math.inf
    p.z[0][0, 3] = -math.inf
    scores, _ = richness_mask(p.z, backend=backend)
    assert scores[0][0, 1, 1] == 1
    near = Pyramid(p.s, p.t, p.x, [v.clamp(-1e4, 1e4) for v in p.z])
    assert torch.equal(run(p, backend).loss, run(near, backend).loss)


SHAPES: dict[str, dict[str, Any]] = {
    "an empty level": {"sizes": ((2, 0, 4), (2, 2, 2), (2, 3, 0))},
    "an empty batch": {"sizes": ((0, 4, 4), (0, 1, 1))},
    "one level": {"sizes": ((1, 2, 3),)},
    "eight levels": {"sizes": ((1, 2, 2),) * 8, "channels": 2, "classes": 3},
    "one class": {"sizes": TWO, "classes": 1},
    "one channel": {"sizes": TWO, "channels": 1},
    "one value a level": {"sizes": ((1, 1, 1), (1, 1, 1)), "channels": 1, "classes": 1},
    "one row": {"sizes": ((1, 1, 9), (1, 9, 1))},
    "four channels fill the narrow tile": {"sizes": TWO, "channels": 4, "classes": 4},
    "seventeen channels": {"sizes": TWO, "channels": 17, "classes": 17},
    "sixty-five channels": {"sizes": ((1, 2, 3),), "channels": 65, "classes": 65},
    "positions beyond one tile": {"sizes": ((1, 17, 19), (1, 16, 16))},
    "positions beyond one narrow tile": {"sizes": ((1, 23, 23),), "channels": 3, "classes": 2},
    "batch sizes differ between levels": {"sizes": ((3, 2, 2), (1, 3, 3))},
}


@each_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(rng, backend, device, shape, layout):
    assert_right(pyramid(rng, layout=layout, device=device, **SHAPES[shape]), backend)


@each_backend
def test_channels_differ_between_levels(rng, backend, device):
    wide, narrow = (pyramid(rng, sizes=((2, 2, 3),), channels=c, classes=c, device=device) for c in (19, 3))
    p = Pyramid(*(a + b for a, b in zip(wide.inputs, narrow.inputs, strict=True)))
    assert_right(p, backend)
    assert_right(p, backend, normalizer="mass_channels")


@each_backend
@MODES
def test_all_levels_empty_is_a_loss_of_zero(rng, backend, device, grad_mode):
    p = pyramid(rng, sizes=((2, 0, 3), (2, 1, 0)), device=device)
    answer = run(p, backend, grad_mode=grad_mode)
    assert answer.loss == 0
    assert [g.shape for g in answer.grads] == [v.shape for v in p.student]
    assert masked_imitation_loss(p.s, p.t, [s[:, 0].detach() for s in p.s], backend=backend) == 0


@each_backend
@pytest.mark.parametrize("kind", ["zeros", "ones", "boxes", "signed", "sums to zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_from_outside(rng, backend, device, kind, dtype):
    p = pyramid(rng, sizes=TWO, device=device)
    make = {
        "zeros": torch.zeros_like,
        "ones": torch.ones_like,
        "boxes": lambda m: (m > 0.5).to(m),
        # among many, so that little cancels
        "signed": lambda m: (0.5 + m).index_put((torch.tensor(0),) * 3, torch.tensor(-0.05 if m.numel() > 2 else 0.5)),
        "sums to zero": lambda m: torch.stack([torch.ones_like(m[0]), -torch.ones_like(m[0])]),
    }[kind]
    mask = [make(torch.rand(s[:, 0].shape, generator=rng)).to(device, dtype) for s in p.s]
    answer = assert_right(p, backend, mask=mask)
    if kind in ("zeros", "sums to zero"):
        assert answer.loss == 0
        assert not any(g.any() for g in answer.grads)
    features_only = Pyramid(p.s, p.t, None, None)
    alone = fsr_loss(*features_only.inputs, mask=mask, backend=backend).detach()
    assert torch.allclose(alone, answer.feat, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {"level_weights": [0, 0.0]},
        {"level_weights": [0, 2.0], "eps": 0.5},
        {"feat_weight": 0, "cls_weight": 0.0},
        {"eps": 1e6},
        {"eps": 1e-30, "normalizer": "mass_channels"},
    ],
    ids=str,
)
def test_zero_weights_and_eps(rng, backend, device, options):
    assert_right(pyramid(rng, sizes=TWO, device=device), backend, **options)


@each_backend
@pytest.mark.parametrize("levels", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_joint_denominator(rng, backend, device, levels, dtype):
    """total_mass: a level without mass adds 0, and with no mass at all so do all."""
    p = pyramid(rng, sizes=((1, 2, 3),) * levels, dtype=dtype, device=device)
    assert_right(p, backend, normalizer="total_mass")
    p.z[0].fill_(-math.inf)
    answer = assert_right(p, backend, normalizer="total_mass")
    assert answer.feat_per_level[0] == 0
    for z in p.z:
        z.fill_(-math.inf)
    answer = run(p, backend, normalizer="total_mass")
    assert answer.loss == 0
    assert not any(g.any() for g in answer.grads)
    mask = [torch.rand(s[:, 0].shape, generator=rng).to(device, dtype) for s in p.s]
    assert_right(Pyramid(p.s, p.t, None, None), backend, normalizer="total_mass", mask=mask)


@each_backend
def test_eps_keeps_a_level_without_mass_at_zero(rng, backend, device):
    p = pyramid(rng, sizes=TWO, device=device)
    p.z[1].fill_(-math.inf)
    answer = run(p, backend, eps=1e-9)
    assert answer.feat_per_level[1] == 0
    assert not answer.grads[1].any()


@each_backend
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e15), (torch.float16, 3e4), (torch.bfloat16, 1e15)], ids=str
)
def test_very_large_features(rng, backend, device, dtype, size):
    """fp16: the squares are far beyond its range."""
    p = pyramid(rng, sizes=TWO, dtype=dtype, device=device)
    feats = Pyramid(p.s, p.t, None, None).map(lambda v: v.clamp(-1, 1) * size)
    assert_right(Pyramid(feats.s, feats.t, p.x, p.z), backend, feat_weight=0.01)


@compiled_backends
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_more_than_32_bits(rng, backend, device, axis):
    """Neighbours 2^31 + 8 elements apart, in memory that is reserved and for the most part never touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of device memory")
    apart = (1 << 31) + 8
    p = pyramid(rng, sizes=((2, 2, 3),), channels=2, classes=2, dtype=torch.float16, device=device)
    strides = [24, 12, 6, 1]
    strides[axis] = apart
    memory = torch.empty(apart + 128, dtype=torch.float16, device=device)
    z = memory.as_strided(p.z[0].shape, strides, 0).copy_(p.z[0])
    t = memory.as_strided(p.t[0].shape, strides, 48).copy_(p.t[0])
    assert_right(Pyramid(p.s, [t], p.x, [z]), backend)


@pytest.fixture
def only_both_ends(monkeypatch):
    """The interpreter runs a launch's first and last program: one of them owns the last positions and channels."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if backends.why_not("triton", "cpu"):
        pytest.skip("the interpreter is off")
    builder = interpreter.interpreter_builder

    def run_ends(self, *args, grid, warmup, **kwargs):
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", (*grid, 1, 1)))
        for program in (0, grid[0] - 1):
            monkeypatch.setattr(
                builder, "set_grid_idx", lambda *_, program=program: setattr(builder, "grid_idx", (program, 0, 0))
            )
            interpreter.GridExecutor(self.rewrite(), self.arg_names, (1,), self.pre_run_hooks)(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run_ends)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_levels_of_more_than_2_to_the_31_elements(only_both_ends, layout):
    """The kernel at the far end of such a level; fresh memory is zero and costs nothing until it is touched."""
    shape = (1, 4096, 1024, 514)
    x, z = (torch.empty(shape, dtype=torch.float16, memory_format=layout) for _ in range(2))
    assert x.numel() > 1 << 31
    end = (0, -1, -1, -1)
    x[end], z[end] = 2.0, 1.5
    scores, _ = VERBS["triton"].score([z])
    assert relative(scores[-1:], torch.sigmoid(torch.tensor([1.5]))) <= torch.finfo(torch.float32).eps
    table = columns([Entry(x, z)], [Term("mse", 3.0)], want_loss=False)
    _, _, (grad,) = VERBS["triton"].imitate([x], [z], torch.ones(scores.shape), torch.full((1,), 0.25), *table)
    assert grad[end] == 3 * 4 * 2 * 0.5
    assert grad[0, -2, -1, -1] == 0
