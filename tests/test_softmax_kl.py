"""softmax_kl, localization_distillation and what a softmax head needs beside them, against the formulas written out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import (
    FLOATS,
    OPERATORS,
    compiled_backends,
    each_backend,
    guarded_outputs,
    ids,
    relative,
    same_bits,
    unharmed,
)
from columns import Entry, Term, arguments, assert_right, imitate
from torch import Tensor
from truth import LAYOUTS, lay_out

from frs_kernels import (
    ImitationTerms,
    Richness,
    fsr_loss,
    localization_distillation,
    masked_imitation_loss,
    masks,
    richness_mask,
)

SIZES = ((2, 7, 9), (1, 1, 1))
GROUPS = ((1, 2), (3, 9), (17, 34), (0, 5))  # channels of a group, 0 for all, and of an entry


class Heads(NamedTuple):
    x: list[Tensor]
    z: list[Tensor]
    mask: list[Tensor]


class Expected(NamedTuple):
    loss: float
    grads: list[Tensor]
    sizes: list[float]  # the largest of what is subtracted in each of them


def heads(
    rng: torch.Generator, device: str, channels: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous",
    teacher_dtype: torch.dtype | None = None, teacher_layout: str | None = None, spread: float = 3.0,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
) -> Heads:  # fmt: skip
    def make(n: int, h: int, w: int, kind: torch.dtype, how: str) -> Tensor:
        return lay_out((torch.randn(n, channels, h, w, generator=rng) * spread).to(device, kind), how)

    x = [make(*size, dtype, layout).requires_grad_() for size in sizes]
    z = [make(*size, teacher_dtype or dtype, teacher_layout or layout) for size in sizes]
    mask_dtype = torch.float64 if torch.float64 in (dtype, teacher_dtype) else torch.float32
    return Heads(x, z, [torch.rand(size, generator=rng).to(device, mask_dtype) for size in sizes])


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    return [v - top - math.log(math.fsum(math.exp(u - top) for u in values)) for v in values]


def written_out(of: Heads, group: int, tau: float = 1.0, joint: bool = False, per_channel: bool = False) -> Expected:
    """The loss and its gradient as plain loops over Python's floats, which are fp64, p and q exactly as defined."""
    masses = [m.double().sum().item() for m in of.mask]
    loss, grads, sizes = 0.0, [], []
    for level, (x, z, mask) in enumerate(zip(of.x, of.z, of.mask, strict=True)):
        mass = sum(masses) if joint else masses[level]
        mass *= x.shape[1] if per_channel else 1
        size = group or x.shape[1]
        grad, largest = torch.zeros(x.shape, dtype=torch.float64), 0.0
        for b, g, i, j in torch.cartesian_prod(
            *(torch.arange(n) for n in (x.shape[0], x.shape[1] // size, *x.shape[2:]))
        ).tolist():
            channels = slice(g * size, (g + 1) * size)
            log_p, log_q = (
                log_softmax([v / tau for v in levels[b, channels, i, j].detach().tolist()]) for levels in (x, z)
            )
            share = mask[b, i, j].item() / mass if mass else 0.0
            loss += share * tau**2 * math.fsum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True))
            slope = [share * tau * (math.exp(p) - math.exp(q)) for p, q in zip(log_p, log_q, strict=True)]
            grad[b, channels, i, j] = torch.tensor(slope, dtype=torch.float64)
            largest = max(largest, share * tau * math.exp(max(*log_p, *log_q)))
        grads.append(grad)
        sizes.append(largest)
    return Expected(loss, grads, sizes)


def loss_of(of: Heads, group: int, **options: Any) -> Any:
    return masked_imitation_loss(of.x, of.z, of.mask, loss="softmax_kl", group_size=group or None, **options)


def assert_is(loss: Tensor, of: Heads, expected: Expected, factor: float = 1.0) -> None:
    dtype = of.x[0].dtype
    working = torch.float64 if torch.float64 in (dtype, of.z[0].dtype) else torch.float32
    assert loss.dtype == working
    eps = torch.finfo(working).eps
    assert abs(loss.item() - factor * expected.loss) <= 16 * eps * factor * abs(expected.loss) + 1e-18
    for grad, x, right, size in zip(torch.autograd.grad(loss, of.x), of.x, *expected[1:], strict=True):
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(x).stride()
        error = (grad.cpu().double() - factor * right).abs().max()
        assert error <= factor * (torch.finfo(dtype).eps * right.abs().max() + 16 * eps * size)


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_formula_number_by_number(rng, backend, device, dtype, layout):
    for group, channels in GROUPS:
        of = heads(rng, device, channels, dtype, layout)
        with unharmed(*of.z, *of.mask):
            loss = loss_of(of, group, backend=backend)
        if group == 1:
            assert loss == 0
            assert not any(g.any() for g in torch.autograd.grad(loss, of.x))
        else:
            assert_is(loss, of, written_out(of, group))


@each_backend
@pytest.mark.parametrize(("dtype", "teacher"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16),
                                                (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16),
                                                (torch.float16, torch.float64)], ids=ids)  # fmt: skip
def test_dtypes_and_layouts_mix(rng, backend, device, dtype, teacher):
    for layout, teacher_layout in (("contiguous", "channels_last"), ("channels_last", "sliced"), ("rows", "columns")):
        of = heads(rng, device, 12, dtype, layout, teacher, teacher_layout)
        assert_is(loss_of(of, 3, temperature=2.5, backend=backend), of, written_out(of, 3, 2.5))


@each_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_levels_of_several_tiles(rng, backend, device, layout, dtype):
    """Against PyTorch, in fp64: positions that fill columns of vectors, and some more; several groups a tile."""
    cases = ((17, 68, (2, 24, 32)), (3, 12, (1, 33, 21)), (80, 80, (1, 16, 20)), (0, 300, (1, 9, 8)))
    for group, channels, size in cases[1:2] if backend == "triton" and device == "cpu" else cases:
        of = heads(rng, device, channels, dtype, layout, sizes=(size,))
        loss = loss_of(of, group, backend=backend)
        x, z = (v[0].detach().double().unflatten(1, (-1, group or channels)) for v in (of.x, of.z))
        share = of.mask[0].double() / of.mask[0].double().sum()
        kl = F.kl_div(x.log_softmax(2), z.log_softmax(2), reduction="none", log_target=True).sum((1, 2))
        grad = (share[:, None, None] * (x.softmax(2) - z.softmax(2))).flatten(1, 2)
        assert_is(loss, of, Expected((share * kl).sum().item(), [grad.cpu()], [share.max().item()]))


@each_backend
@pytest.mark.parametrize("grad_mode", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_with_every_option(rng, backend, device, grad_mode, layout):
    of = heads(rng, device, 12, layout=layout)
    options: dict[str, Any] = {"grad_mode": grad_mode, "backend": backend, "temperature": 4.0}
    joint, plain = written_out(of, 3, 4.0, joint=True), written_out(of, 3, 4.0)
    terms = loss_of(of, 3, normalizer="total_mass", weight=0.25, return_terms=True, **options)
    assert isinstance(terms, ImitationTerms)
    assert terms.value.item() == pytest.approx(joint.loss, rel=2e-6)
    assert terms.per_level.sum().item() == pytest.approx(joint.loss, rel=2e-6)
    assert_is(terms.loss, of, joint, 0.25)
    weight = torch.tensor(0.5, device=device)
    assert_is(loss_of(of, 3, weight=weight, **options), of, plain, 0.5)
    assert_is(loss_of(of, 3, normalizer="mass_channels", **options), of, plain, 1 / 12)
    # one level, so that eps and its weight are one factor
    one = Heads(of.x[:1], of.z[:1], of.mask[:1])
    alone, mass = written_out(one, 3, 4.0), of.mask[0].sum().item()
    assert_is(loss_of(one, 3, eps=3.0, level_weights=[2.0], **options), one, alone, 2 * mass / (mass + 3))
    assert_is(loss_of(one, 3, normalizer="none", **options), one, alone, mass)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_student_that_agrees_has_nothing_to_learn(rng, backend, device, dtype, layout):
    for group, channels in GROUPS:
        of = heads(rng, device, channels, dtype, layout, spread=30.0)
        x = [z.clone().requires_grad_() for z in of.z]
        loss = loss_of(Heads(x, of.z, of.mask), group, temperature=0.7, backend=backend)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, x))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_a_student_that_nearly_agrees_keeps_its_digits(rng, backend, device, dtype, apart):
    """The sum of q log(q / p) is the square of what its terms are: it would keep as few digits as eager does."""
    of = heads(rng, device, 16, dtype, sizes=((1, 4, 4),))
    x = [(z + (apart * torch.randn(z.shape, generator=rng)).to(z)).requires_grad_() for z in of.z]
    loss = loss_of(Heads(x, of.z, of.mask), 8, backend=backend)
    a, b = (v[0].detach().double().cpu().unflatten(1, (-1, 8)) for v in (x, of.z))
    # t from differences, which are exact here: log p - log q = d - log sum q exp(d)
    d, q = a - b, b.softmax(2)
    middle = d - (q * d).sum(2, keepdim=True)
    t = middle - torch.log1p((q * (middle.expm1() - middle)).sum(2, keepdim=True))
    share = of.mask[0].double().cpu() / of.mask[0].double().cpu().sum()
    series = sum(t**n / math.factorial(n) for n in range(2, 20))
    right = (share[:, None, None] * q * series).sum().item()
    # What is left are the roundings of logits and logarithms, about 3 each, of t.
    assert abs(loss.item() / right - 1) <= 8 * torch.finfo(dtype).eps / apart + 4 * torch.finfo(dtype).eps


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=ids)
@pytest.mark.parametrize("far", [17.0, 30.0, 90.0, 3000.0])
def test_saturated_logits(backend, device, dtype, far):
    values = torch.tensor([far, -far, 0.0, 1.0], dtype=torch.float64)
    cases = torch.cartesian_prod(values, values, values, values).T.reshape(4, 16, 16)
    z = cases[None].to(device, dtype)
    x = cases.roll(1, 0).flip(1)[None].to(device, dtype).requires_grad_()
    of = Heads([x], [z], [torch.ones(1, 16, 16, device=device)])
    loss = loss_of(of, 0, backend=backend)
    assert torch.isfinite(loss)
    assert_is(loss, of, written_out(of, 0))


@each_backend
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("channel", [0, 1, 4, 5])
def test_what_is_not_finite_stays_so(rng, backend, device, who, number, channel):
    of = heads(rng, device, 6, sizes=((1, 9, 8),))
    with torch.no_grad():
        (of.x if who == "student" else of.z)[0][0, channel, 3, 2] = number
    loss = loss_of(of, 3, backend=backend)
    assert not torch.isfinite(loss)
    (grad,) = torch.autograd.grad(loss, of.x)
    first = channel // 3 * 3
    assert grad[0, first : first + 3, 3, 2].isnan().any()
    grad[0, first : first + 3, 3, 2] = 0
    assert torch.isfinite(grad).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=ids)
def test_a_class_that_the_teacher_masks_out(rng, backend, device, dtype):
    of = heads(rng, device, 6, dtype, sizes=((1, 9, 8),))
    of.z[0][:, 4] = -math.inf
    loss = loss_of(of, 3, backend=backend)
    x, z = (v[0].detach().double().unflatten(1, (-1, 3)) for v in (of.x, of.z))
    share = of.mask[0].double() / of.mask[0].double().sum()
    kl = F.kl_div(x.log_softmax(2), z.softmax(2), reduction="none").sum((1, 2))
    grad = (share[:, None, None] * (x.softmax(2) - z.softmax(2))).flatten(1, 2)
    assert_is(loss, of, Expected((share * kl).sum().item(), [grad.cpu()], [share.max().item()]))


@each_backend
def test_levels_without_mass_or_positions(rng, backend, device):
    of = heads(rng, device, 6, sizes=((2, 3, 4), (0, 3, 4), (2, 0, 4), (1, 2, 2)))
    of.mask[0].zero_()
    loss = loss_of(of, 3, backend=backend)
    expected = written_out(Heads(of.x[3:], of.z[3:], of.mask[3:]), 3)
    grads = torch.autograd.grad(loss, of.x, retain_graph=True)
    assert not any(g.any() for g in grads[:3])
    assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
    assert relative(grads[3].cpu(), expected.grads[0]) <= 1e-6
    empty = Heads(of.x[1:3], of.z[1:3], of.mask[1:3])
    assert loss_of(empty, 3, backend=backend) == 0


@each_backend
def test_gradcheck(rng, backend, device):
    of = heads(rng, device, 4, torch.float64, sizes=((1, 2, 2), (1, 1, 1)))

    def loss(*x: Tensor) -> Tensor:
        return loss_of(Heads(list(x), of.z, of.mask), 2, temperature=2.0, backend=backend)

    assert torch.autograd.gradcheck(loss, of.x, fast_mode=backend != "torch")


def table(rng: torch.Generator, device: str) -> tuple[list[Entry], list[Term], Tensor, Tensor]:
    """Entries of pointwise losses and of softmax_kl, of several group sizes and dtypes, in one call."""
    sizes = ((2, 5, 8), (1, 3, 3))
    terms = [Term("softmax_kl", 0.5, temperature=3.0, beta=4), Term("mse", 2.0),
             Term("softmax_kl", 1.5, torch.tensor(2.0, device=device)), Term("bce", 0.25, temperature=2.0),
             Term("softmax_kl", 1.0, beta=2, want_grad=False)]  # fmt: skip
    entries = []
    for number, (term, channels) in enumerate(((0, 12), (1, 5), (2, 7), (3, 4), (4, 6), (2, 9), (0, 8), (1, 3))):
        level = number % 2
        n, h, w = sizes[level]
        kind = torch.bfloat16 if number > 5 else torch.float32
        x, z = (lay_out((torch.randn(n, channels, h, w, generator=rng) * 2).to(device, kind), LAYOUTS[number % 5])
                for _ in range(2))  # fmt: skip
        entries.append(Entry(x, z, level, term, 0.5 + number, 0.25 * (number % 3)))
    scores = torch.rand(sum(n * h * w for n, h, w in sizes), generator=rng).to(device)
    return entries, terms, scores, torch.tensor([40.0, 5.0], device=device)


@each_backend
@pytest.mark.parametrize("want_loss", [True, False])
def test_beside_other_terms_in_one_call(rng, backend, device, want_loss):
    entries, terms, scores, norm = table(rng, device)
    got = imitate(backend, entries, terms, scores, norm, want_loss=want_loss)
    assert_right(got, entries, terms, scores, norm, want_loss)
    again = imitate(backend, entries, terms, scores, norm, want_loss=want_loss)
    assert all(same_bits(a, b) for a, b in zip((*got[:2], *got.grads), (*again[:2], *again.grads), strict=True))


@compiled_backends
def test_poisoned_memory(rng, backend, device, monkeypatch):
    entries, terms, scores, norm = table(rng, device)
    with guarded_outputs() as guards:
        got = imitate(backend, entries, terms, scores, norm)
    guards.assert_unharmed()
    assert_right(got, entries, terms, scores, norm)


@each_backend
def test_in_any_number_of_threads_and_in_any_run_the_bits_are_the_same(rng, backend, device):
    of = heads(rng, device, 34, sizes=((2, 20, 28), (1, 5, 5)))
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count if backend != "torch" else threads)
        loss = loss_of(of, 17, temperature=10.0, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, of.x)))
    torch.set_num_threads(threads)
    for run in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(run, found[0], strict=True))


@pytest.mark.parametrize("namespace", OPERATORS)
@pytest.mark.parametrize("verb", ["imitate", "distill"])
def test_opcheck(rng, namespace, verb):
    if not hasattr(torch.ops, namespace) or not hasattr(getattr(torch.ops, namespace), verb):
        pytest.skip("the library is not here")
    entries, terms, scores, norm = table(rng, "cpu")
    args = arguments(entries, terms, scores, norm)
    if verb == "distill":
        logits = [torch.randn(n, 3, h, w, generator=rng) for n, h, w in ((2, 5, 8), (1, 3, 3))]
        args = [*args[:2], logits, *args[4:]]
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), verb), args)


@each_backend
@pytest.mark.parametrize(("beta", "channels"), [(5.0, 12), (2.5, 5), (24.0, 12), (0.5, 12)])
def test_an_operator_refuses_a_group_that_does_not_divide(rng, backend, device, beta, channels):
    x, z = (torch.randn(1, channels, 2, 2, generator=rng).to(device) for _ in range(2))
    scores, norm = torch.ones(4, device=device), torch.ones(1, device=device)
    with pytest.raises(RuntimeError, match=rf"beta={beta:g}.* whole number of channels that divides {channels}"):
        imitate(backend, [Entry(x, z)], [Term("softmax_kl", beta=beta)], scores, norm)


@each_backend
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_torch_compile(rng, backend, device, mode):
    of = heads(rng, device, 8, sizes=((1, 3, 4), (1, 1, 2)))

    def loss(x: list[Tensor], z: list[Tensor]) -> Tensor:
        found = localization_distillation(x, z, sides=2, backend=backend, grad_mode=mode)
        assert isinstance(found, Tensor)
        return found

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)(of.x, of.z)
    expected = loss(of.x, of.z)
    assert compiled.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(compiled, of.x), torch.autograd.grad(expected, of.x), strict=True):
        assert relative(a, b) <= 1e-5


# localization_distillation


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


# refusals


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


# a softmax head


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


# normalizer="none"


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
