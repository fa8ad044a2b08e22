"""Error against fp64 truth: the loss within 1e-6, gradients within twice eager's error, in every dtype and layout."""

from __future__ import annotations

import mpmath
import pytest
import torch
from cases import FLOATS, assert_right, each_backend, ids, run, ulp
from truth import LAYOUTS, QFL, Pyramid, authors, lay_out, pyramid

from frs_kernels import fsr_loss, masked_imitation_loss

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MIXES = {
    "bf16 student, fp32 teacher": (bf16, f32),
    "fp32 student, fp16 teacher": (f32, f16),
    "fp16 student, bf16 teacher": (f16, bf16),
    "bf16 student, fp64 teacher": (bf16, f64),
    "another student's dtype at each level": ((f32, bf16, f16), f32),
    "another teacher's dtype at each level": (bf16, (f16, f32, f64)),
}


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype_in_every_layout(rng, backend, device, dtype, layout):
    assert_right(pyramid(rng, dtype=dtype, layout=layout, device=device), backend)


@each_backend
@pytest.mark.parametrize("mix", MIXES)
def test_dtypes_mix(rng, backend, device, mix):
    student, teacher = MIXES[mix]
    assert_right(pyramid(rng, dtype=student, teacher_dtype=teacher, device=device), backend)


@each_backend
@pytest.mark.parametrize(("student", "teacher"), [("channels_last", "contiguous"), ("contiguous", "sliced")])
def test_layouts_mix(rng, backend, device, student, teacher):
    assert_right(pyramid(rng, layout=student, teacher_layout=teacher, device=device), backend)


@each_backend
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_an_expanded_teacher(rng, backend, device, axis):
    p = pyramid(rng, device=device)
    t = [v.narrow(axis, 0, 1).expand(v.shape) for v in p.t]
    z = [v.narrow(axis, 0, 1).expand(v.shape) for v in p.z]
    assert_right(Pyramid(p.s, t, p.x, z), backend)


@each_backend
@pytest.mark.parametrize("dtype", [f32, bf16], ids=ids)
@pytest.mark.parametrize(
    "options",
    [
        {"cls_loss": "kl"},
        {"temperature": 2.5},
        {"normalizer": "total_mass", "level_weights": [0.5, 2]},
        {"temperature": 0.5, "cls_loss": "kl", "normalizer": "mass_channels", "eps": 0.3},
        {"feat_weight": 0.005, "cls_weight": 0.02, "level_weights": [0.5, 2]},
        {"feat_loss": "smooth_l1", "beta": 0.25, "cls_loss": "kl", "temperature": 3.0},
        {"feat_loss": "l1", "normalizer": "mass_channels", "eps": 0.3, "level_weights": [0.5, 2]},
        {"cls_loss": "qfl", "temperature": 2.5},
        {"cls_loss": "qfl", "beta": 1.5, "normalizer": "total_mass"},
        {"cls_loss": "qfl_detached", "beta": 2.0, "temperature": 0.5, "level_weights": [0.5, 2]},
        {"cls_loss": "qfl_detached", "beta": 0.5, "feat_loss": "smooth_l1"},
        {"cls_loss": "softmax_kl"},
        {"cls_loss": "softmax_kl", "temperature": 2.5, "normalizer": "total_mass", "level_weights": [0.5, 2]},
    ],
    ids=str,
)
def test_every_option(rng, backend, device, dtype, options):
    assert_right(pyramid(rng, sizes=((2, 5, 3), (2, 1, 1)), dtype=dtype, device=device), backend, **options)


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_qfl_in_every_dtype_and_layout(rng, backend, device, dtype, layout):
    p = pyramid(rng, sizes=((2, 5, 3), (2, 1, 1)), dtype=dtype, layout=layout, device=device)
    for cls_loss, beta in (("qfl", 1.0), ("qfl", 2.0), ("qfl", 2.7), ("qfl_detached", 1.0), ("qfl_detached", 0.7)):
        assert_right(p.without("s", "t"), backend, cls_loss=cls_loss, beta=beta)


@each_backend
@pytest.mark.parametrize("cls_loss", QFL)
@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=ids)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_qfl_with_a_beta_of_zero_is_bce(rng, backend, device, cls_loss, dtype, temperature):
    p = pyramid(rng, sizes=((2, 5, 3), (2, 1, 1)), dtype=dtype, device=device)
    a, b = (run(p, backend, cls_loss=loss, beta=0, temperature=temperature) for loss in (cls_loss, "bce"))
    assert torch.equal(a.loss, b.loss)
    assert all(torch.equal(v, w) for v, w in zip(a.grads, b.grads, strict=True))


BETAS = [0.0, 1e-6, 1.0, 100.0]


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_l1_in_every_dtype_and_layout(rng, backend, device, dtype, layout):
    p = pyramid(rng, sizes=((2, 5, 3), (2, 1, 1)), dtype=dtype, layout=layout, device=device)
    assert_right(p.without("x"), backend, feat_loss="l1")


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_smooth_l1_in_every_dtype_and_layout(rng, backend, device, dtype, layout):
    p = pyramid(rng, sizes=((2, 5, 3), (2, 1, 1)), dtype=dtype, layout=layout, device=device)
    for beta in (0.5, 1.0):  # about half of the differences are on either side
        assert_right(p.without("x"), backend, feat_loss="smooth_l1", beta=beta)


@each_backend
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("mix", [(f32, f32), (bf16, f32), (f64, f64)], ids=str)
def test_every_beta(rng, backend, device, beta, mix):
    student, teacher = mix
    p = pyramid(rng, sizes=((2, 5, 3), (2, 1, 1)), dtype=student, teacher_dtype=teacher, device=device)
    answer = assert_right(p, backend, feat_loss="smooth_l1", beta=beta)
    if beta == 0:
        l1 = run(p, backend, feat_loss="l1")
        assert torch.equal(answer.feat, l1.feat)
        assert all(torch.equal(a, b) for a, b in zip(answer.grads, l1.grads, strict=True))


@each_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_channels_over_several_tiles(rng, backend, device, layout):
    sizes, channels, classes = ((1, 3, 5), (1, 2, 2)), 300, 260
    assert_right(pyramid(rng, sizes=sizes, channels=channels, classes=classes, layout=layout, device=device), backend)


def slope(x: float, z: float) -> float:
    """sigmoid(x) - sigmoid(z) with 60 digits."""
    with mpmath.workdps(60):
        return float(1 / (1 + mpmath.exp(-x)) - 1 / (1 + mpmath.exp(-z)))


def bce(x: float, z: float) -> float:
    """BCE(x, sigmoid(z)) with 60 digits."""
    with mpmath.workdps(60):
        return float(mpmath.log(1 + mpmath.exp(x)) - x / (1 + mpmath.exp(-mpmath.mpf(z))))


def qfl(x: float, z: float, beta: float, detach: bool) -> tuple[float, float]:
    """|d|^beta BCE(x, sigmoid(z)) and its derivative, with 60 digits."""
    if x == z:
        return 0.0, 0.0
    with mpmath.workdps(60):
        p, q = (1 / (1 + mpmath.exp(-mpmath.mpf(v))) for v in (x, z))
        d, loss = p - q, mpmath.log(1 + mpmath.exp(x)) - x * q
        weight = abs(d) ** beta
        moving = 0 if detach else beta * abs(d) ** (beta - 1) * mpmath.sign(d) * p * (1 - p) * loss
        return float(weight * loss), float(weight * d + moving)


PAIRS = [(a, b) for a in (-90.0, -17.0, 0.0, 17.0, 30.0) for b in (-90.0, -30.0, 17.0, 30.0)]


@each_backend
@pytest.mark.parametrize("dtype", [f32, f64], ids=ids)
def test_saturated_logits_keep_every_digit(backend, device, dtype):
    """Value by value, not by the largest of a level: nothing cancels where both logits are at one end."""
    x = torch.tensor([[a for a, _ in PAIRS]], dtype=dtype, device=device).view(1, 1, 1, -1).requires_grad_()
    z = torch.tensor([[b for _, b in PAIRS]], dtype=dtype, device=device).view(1, 1, 1, -1)
    mask = torch.eye(len(PAIRS), dtype=dtype, device=device).view(-1, 1, 1, len(PAIRS))
    terms = fsr_loss(
        None, None, [x] * len(PAIRS), [z] * len(PAIRS), mask=list(mask), backend=backend, return_terms=True
    )
    (grad,) = torch.autograd.grad(terms.loss, x)
    for (a, b), value, g in zip(PAIRS, terms.cls_per_level.tolist(), grad.flatten().tolist(), strict=True):
        # exp, 1 + e, the quotient and the difference are worth an ulp each. A GPU's exp rounds x log2(e) before it, |x|
        # ulps of the result. exp(-90) is below fp32's normal numbers: it may be flushed to 0.
        ulps = 4 + (max(abs(a), abs(b)) if device == "cuda" else 0)
        flushed = 100 * torch.finfo(dtype).smallest_normal
        for name, got, right in (("gradient", g, slope(a, b)), ("loss", value, bce(a, b))):
            allowed = ulps * ulp(torch.tensor(right, dtype=f64), dtype).item() + flushed
            assert abs(got - right) <= allowed, f"{name} at {a}, {b}: {got}, not {right}"


@each_backend
@pytest.mark.parametrize("dtype", [f32, f64], ids=ids)
@pytest.mark.parametrize("loss", QFL)
@pytest.mark.parametrize("beta", [0.25, 1.0, 1.5, 2.0, 3.7])
def test_saturated_logits_keep_every_digit_of_qfl(backend, device, dtype, loss, beta):
    """As above. A power takes beta times the roundings of d, and of its own a few more."""
    pairs = [*PAIRS, (-17.0, -17.0), (0.0, 0.0), (0.5, -1.5), (90.0, 90.0)]
    x = torch.tensor([[a for a, _ in pairs]], dtype=dtype, device=device).view(1, 1, 1, -1).requires_grad_()
    z = torch.tensor([[b for _, b in pairs]], dtype=dtype, device=device).view(1, 1, 1, -1)
    mask = list(torch.eye(len(pairs), dtype=dtype, device=device).view(-1, 1, 1, len(pairs)))
    terms = masked_imitation_loss(
        [x] * len(pairs), [z] * len(pairs), mask, loss=loss, beta=beta, backend=backend, return_terms=True
    )
    (grad,) = torch.autograd.grad(terms.loss, x)
    for (a, b), value, g in zip(pairs, terms.per_level.tolist(), grad.flatten().tolist(), strict=True):
        ulps = (3 + beta) * (4 + (max(abs(a), abs(b)) if device == "cuda" else 0))
        flushed = 100 * torch.finfo(dtype).smallest_normal
        if dtype == f32 and -90 in (a, b) and beta < 1 and a != b:
            flushed = max(flushed, 1e-9)  # where exp(-90) is flushed to 0, its power is not below the normal numbers
        for name, got, right in zip(("loss", "gradient"), (value, g), qfl(a, b, beta, loss != "qfl"), strict=True):
            allowed = ulps * ulp(torch.tensor(right, dtype=f64), dtype).item() + flushed
            assert abs(got - right) <= allowed, f"{name} at {a}, {b}: {got}, not {right}"
            assert right or got == 0


@each_backend
@pytest.mark.parametrize("at", [17.0, 30.0, 90.0])
def test_a_saturated_student_still_learns_where_the_authors_has_no_gradient(backend, device, at):
    p = Pyramid(None, None, [torch.full((1, 2, 1, 3), at)], [torch.full((1, 2, 1, 3), -3.0)]).map(torch.clone)
    theirs = authors(p).grads[0]
    on_device = p.map(lambda v: v.to(device))
    ours = run(on_device, backend).grads[0].cpu()
    assert (theirs == 0).all()
    assert torch.allclose(ours, torch.full_like(ours, slope(at, -3.0) / 3), rtol=1e-6, atol=0)


@each_backend
def test_the_gradient_of_a_leaf_accumulates_in_its_layout(rng, backend, device):
    p = pyramid(rng, layout="channels_last", device=device)
    fsr_loss(*p.inputs, backend=backend).backward()
    for leaf in p.student:
        assert leaf.grad.stride() == leaf.stride()
        assert leaf.grad.shape == leaf.shape


@each_backend
def test_the_layout_makes_no_difference_to_the_values(rng, backend, device):
    p = pyramid(rng, device=device)
    expected = run(p, backend)
    for layout in LAYOUTS[1:3]:
        actual = run(p.map(lambda v, layout=layout: lay_out(v, layout)), backend)
        assert torch.allclose(actual.loss, expected.loss, rtol=1e-6, atol=0)
        for a, b in zip(actual.grads, expected.grads, strict=True):
            assert (a - b).abs().max() <= 4 * torch.finfo(f32).eps * b.abs().max()
