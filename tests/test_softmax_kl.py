"""softmax_kl against its formula written out, on every backend."""

from __future__ import annotations

import math
from typing import Any

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
from softmax_heads import Expected, Heads, assert_is, heads, loss_of, written_out
from torch import Tensor
from truth import LAYOUTS, lay_out

from frs_kernels import ImitationTerms, localization_distillation

GROUPS = ((1, 2), (3, 9), (17, 34), (0, 5))  # channels of a group, 0 for all, and of an entry


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_neighbours_in_memory_are_of_two_images(rng, backend, device, dtype):
    """A channel's positions are 2 apart, in the gradients too."""

    def inside(v: torch.Tensor) -> torch.Tensor:
        return v.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)

    of = heads(rng, device, 12, dtype)
    of = of._replace(x=[inside(v).requires_grad_() for v in of.x], z=[inside(v) for v in of.z])
    assert_is(loss_of(of, 3, backend=backend), of, written_out(of, 3))


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
