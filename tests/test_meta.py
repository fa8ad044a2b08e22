"""The net holds: each planted fault is caught by the check that the other tests use.

A fault is another kernel function in the place of the right one, or another launcher or verb.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import triton
import triton.language as tl
from cases import assert_right, guarded_outputs, run, same_bits
from truth import Pyramid, pyramid

from frs_kernels import backends, reference, richness_mask
from frs_kernels.ops import VERBS
from frs_kernels.triton import imitate, levels, score, slots
from frs_kernels.triton.pointwise import pointwise as right_pointwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((2, 3, 5), (2, 1, 1))
Patch = pytest.MonkeyPatch


@triton.jit
def sigmoid_reversed(x):
    return 1.0 / (1.0 + tl.exp(x))


@triton.jit
def pointwise_wrong_sign(x, z, beta, inverse_beta, LOSS: tl.constexpr):
    value, slope = right_pointwise(x, z, beta, inverse_beta, LOSS)
    return value, -slope


@triton.jit
def pointwise_half_slope(x, z, beta, inverse_beta, LOSS: tl.constexpr):
    value, slope = right_pointwise(x, z, beta, inverse_beta, LOSS)
    return value, slope * 0.5 if LOSS == "mse" else slope


@triton.jit
def pointwise_sigmoid_first(x, z, beta, inverse_beta, LOSS: tl.constexpr):
    """The authors' form: sigmoids of both, then logs clamped at -100."""
    value, slope = right_pointwise(x, z, beta, inverse_beta, LOSS)
    if LOSS != "mse":
        p = 1.0 / (1.0 + tl.exp(-x))
        q = 1.0 / (1.0 + tl.exp(-z))
        value = -(q * tl.maximum(tl.log(p), -100.0) + (1.0 - q) * tl.maximum(tl.log(1.0 - p), -100.0))
    return value, slope


@triton.jit
def pointwise_rounded(x, z, beta, inverse_beta, LOSS: tl.constexpr):
    """A relative error of 2^-19, eight roundings of fp32."""
    value, slope = right_pointwise(x, z, beta, inverse_beta, LOSS)
    return value * 1.0000019, slope * 1.0000019


# Changes of what a kernel function returns need no signature: in the interpreter they are calls like any other.
def changed(function: Any, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(function(*args, **kwargs))


max_that_drops_nan = changed(score.max_over_channels, lambda top: tl.where(top != top, float("-inf"), top))
max_over_a_padding_of_zeros = changed(score.max_over_channels, lambda top: tl.where(top < 0, 0.0, top))
offsets_one_position_on = changed(imitate.tile_offsets, lambda at: at + 1)
starts_in_32_bits = changed(imitate.tile_start, lambda start: start & 0x7FFFFFFF)
sum_of_a_level_in_half = changed(score.sum_entry, lambda total: total.to(tl.float16).to(tl.float64))
never_last = changed(score.store_partial, lambda last: last & (last != last))


def with_nan(p: Pyramid) -> None:
    p.z[0][0, 1, 1, 1] = float("nan")
    assert richness_mask(p.z, backend="triton").scores[0][0, 1, 1].isnan(), "the maximum hides a NaN"


def right(p: Pyramid) -> None:
    assert_right(p, "triton")


def saturated(p: Pyramid) -> None:
    assert_right(p.map(lambda v: 12 * v), "triton")


def guarded(p: Pyramid) -> None:
    with guarded_outputs() as guards:
        run(p, "triton")
    guards.assert_unharmed()


def far_apart(p: Pyramid) -> None:
    apart = (1 << 31) + 8
    memory = torch.empty(apart + 64, dtype=torch.float16, device=DEVICE)
    t = memory.as_strided(p.t[0].shape, (apart, 3, 3, 1)).copy_(p.t[0])
    assert_right(Pyramid(p.s, [t], p.x, p.z), "triton")


def verbs(**changed: Callable[..., Any]) -> Callable[[Patch], None]:
    """Triton's verbs with some of them changed, `distill` made of them."""

    def distill(student: Any, teacher: Any, logits: Any, *table: Any) -> Any:
        scores, mass = VERBS["triton"].score(reference.logits_of(teacher, logits, table))
        return scores, mass, *VERBS["triton"].imitate(student, teacher, scores, mass, *table)

    return lambda patch: patch.setitem(VERBS, "triton", VERBS["triton"]._replace(distill=distill, **changed))


def no_division(student: Any, teacher: Any, scores: Any, norm: Any, *rest: Any) -> Any:
    return VERBS["torch"].imitate(student, teacher, scores, torch.ones_like(norm), *rest)


def sum_over_positions_only(student: Any, teacher: Any, *rest: Any) -> Any:
    total, values, grads = VERBS["torch"].imitate(student, teacher, *rest)
    return total / student[0].shape[1], values / student[0].shape[1], grads


def scores_shifted(student: Any, teacher: Any, scores: Any, *rest: Any) -> Any:
    return VERBS["torch"].imitate(student, teacher, scores.roll(1), *rest)


def contiguous_gradients(*arguments: Any) -> Any:
    total, values, grads = VERBS["torch"].imitate(*arguments)
    return total, values, [g.contiguous() for g in grads]


def unwritten_tail(*arguments: Any) -> Any:
    total, values, grads = VERBS["torch"].imitate(*arguments)
    for g in grads:
        g[-1, -1, -1, -1:] = torch.empty_like(g[-1, -1, -1, -1:])
    return total, values, grads


def score_in_bf16(logits: Any) -> Any:
    scores, mass = VERBS["torch"].score(logits)
    return scores.bfloat16().float(), mass


def kernels(module: Any, name: str, fault: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(module, name, fault)


# name: (where it is planted, the check that must see it, how the inputs lie in memory)
FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[[Pyramid], None], str]] = {
    "a sigmoid of the wrong sign": (kernels(score, "sigmoid", sigmoid_reversed), right, "contiguous"),
    "a gradient of the wrong sign": (kernels(imitate, "pointwise", pointwise_wrong_sign), right, "contiguous"),
    "a gradient without its 2": (kernels(imitate, "pointwise", pointwise_half_slope), right, "contiguous"),
    "sigmoids before the BCE": (kernels(imitate, "pointwise", pointwise_sigmoid_first), saturated, "contiguous"),
    "an error of 2^-19": (kernels(imitate, "pointwise", pointwise_rounded), right, "contiguous"),
    "a maximum that drops NaN": (kernels(score, "max_over_channels", max_that_drops_nan), with_nan, "contiguous"),
    "a maximum over a padding of zeros": (
        kernels(score, "max_over_channels", max_over_a_padding_of_zeros),
        lambda p: right(p.map(lambda v: v - 6)),
        "contiguous",
    ),
    "the score of the next position": (verbs(imitate=scores_shifted), right, "contiguous"),
    "a write past the end": (kernels(imitate, "tile_offsets", offsets_one_position_on), guarded, "contiguous"),
    "a mass in half precision": (kernels(score, "sum_entry", sum_of_a_level_in_half), right, "contiguous"),
    "a mass never written": (kernels(score, "store_partial", never_last), right, "contiguous"),
    "no division by the mass": (verbs(imitate=no_division), right, "contiguous"),
    "a mean over the channels": (verbs(imitate=sum_over_positions_only), right, "contiguous"),
    "gradients in another layout": (verbs(imitate=contiguous_gradients), right, "channels_last"),
    "a value never written": (verbs(imitate=unwritten_tail), right, "contiguous"),
    "scores in half precision": (verbs(score=score_in_bf16), right, "contiguous"),
    "a scale_ that does nothing": (
        verbs(scale_=lambda grads, factor: None),
        lambda p: torch.testing.assert_close(*scaled_and_plain(p)),
        "contiguous",
    ),
}  # fmt: skip


def scaled_and_plain(p: Pyramid) -> tuple[torch.Tensor, torch.Tensor]:
    loss = cases.fsr_loss(*p.inputs, grad_mode="forward", backend="triton")
    return torch.autograd.grad(3 * loss, p.student)[0], 3 * run(p, "torch").grads[0]


@pytest.fixture
def fresh_kernels(monkeypatch: Patch) -> Patch:
    """Kernels compiled with a fault must not stay in the caches of the right ones."""
    if reason := backends.why_not("triton", DEVICE):
        pytest.skip(reason)
    if DEVICE == "cuda":
        pytest.skip("a compiled kernel keeps the functions it was compiled with: faults are planted in the interpreter")
    return monkeypatch


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(rng, poison, fresh_kernels, fault):
    plant, check, layout = FAULTS[fault]
    p = pyramid(rng, sizes=SIZES, layout=layout, device=DEVICE)
    check(p)
    plant(fresh_kernels)
    with pytest.raises(AssertionError):
        check(p)


def test_a_scale_that_always_multiplies_is_caught(fresh_kernels):
    signalling = torch.full((64,), 0x7F800001, dtype=torch.int32).view(torch.float32)
    before = signalling.clone()
    signalling.mul_(torch.ones(()))
    assert not same_bits(signalling, before)


def test_offsets_in_32_bits_are_caught(rng, fresh_kernels):
    p = pyramid(rng, sizes=((2, 1, 3),), dtype=torch.float16, device=DEVICE)
    far_apart(p)
    fresh_kernels.setattr(imitate, "tile_start", starts_in_32_bits)
    with pytest.raises(AssertionError):
        far_apart(p)


def test_a_counter_that_does_not_start_at_zero_is_caught(rng, poison, fresh_kernels):
    workspace = slots.workspace
    fresh_kernels.setattr(score, "workspace", lambda *args: (workspace(*args)[0], torch.ones(1, dtype=torch.int32)))
    with pytest.raises(AssertionError):
        right(pyramid(rng, sizes=SIZES, device=DEVICE))


def test_fp16_gradients_stored_early_are_caught(rng, fresh_kernels):
    p = pyramid(rng, sizes=SIZES, dtype=torch.float16, device=DEVICE)
    options = {"feat_weight": 1e-9, "cls_weight": 1e-9}
    early, late = (
        torch.autograd.grad(65536.0 * cases.fsr_loss(*p.inputs, backend="triton", grad_mode=m, **options), p.student)
        for m in ("forward", "auto")
    )
    assert not any(g.any() for g in early)
    assert all(g.any() for g in late)


def test_a_layout_taken_for_another_is_caught(rng, fresh_kernels):
    p = pyramid(rng, sizes=SIZES, layout="channels_last", device=DEVICE)
    fresh_kernels.setattr(levels, "layout_of", lambda *lists: "nchw")
    with pytest.raises(AssertionError):
        right(p)
