"""pkd_loss and cwd_loss against their published forms in fp64, on every backend."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, OPERATORS, each_backend, guarded_outputs, ids, relative, same_bits, unharmed
from row_truth import CWD, PKD, SIZES, TAU4, Levels, assert_right, gradients, in_dtype, levels, value_bound
from torch import Tensor
from truth import LAYOUTS, lay_out

from frs_kernels import RowTerms, cwd_loss, pkd_loss
from frs_kernels.ops import VERBS
from frs_kernels.row_losses import NUMBERS, ROW_LOSSES

EDGES = ((1, 3, 1, 1), (1, 40, 1, 3), (3, 2, 33, 32), (1, 1, 1, 1))
each_loss = pytest.mark.parametrize("loss", [PKD, CWD, TAU4], ids=["pkd", "cwd", "cwd4"])


@each_backend
@each_loss
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_it_is_the_published_form(rng, backend, device, loss, layout, dtype):
    assert_right(loss, *levels(rng, dtype=dtype, layout=layout, device=device), backend)


@each_backend
@each_loss
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_odd_sizes(rng, backend, device, loss, layout):
    for size in EDGES[1:3]:
        assert_right(loss, *levels(rng, (size,), layout=layout, device=device), backend)


@each_backend
@each_loss
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16], ids=ids)
def test_dtypes_that_mix(rng, backend, device, loss, other):
    assert_right(loss, *levels(rng, device=device, teacher_dtype=other), backend)


@each_backend
@each_loss
def test_a_layout_each(rng, backend, device, loss):
    s, t = levels(rng, device=device)
    mixed = [lay_out(v, layout) for v, layout in zip(t, ("channels_last", "sliced", "contiguous"), strict=True)]
    assert_right(loss, s, mixed, backend)


@each_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pkd_far_from_zero(rng, backend, device, layout):
    """Deviations of 1e-2 around 1e4, where the published form in fp32 is off by percents: right to 1e-5."""
    s, t = levels(rng, ((2, 5, 20, 30),), layout=layout, device=device, mean=1e4, spread=1e-2)
    right, grads = in_dtype(PKD, s, t, torch.float64)
    loss = pkd_loss(s, t, backend=backend)
    assert abs(loss.item() / right.item() - 1) <= 1e-5
    for mine, r in zip(gradients(loss, s), grads, strict=True):
        assert relative(mine.cpu(), r) <= 1e-5


@each_backend
def test_pkd_whose_first_number_is_far_from_the_others(rng, backend, device):
    """Where it is what a tile's sums are formed about, they are much larger than what is left of them."""
    s, t = levels(rng, ((2, 3, 20, 30),), device=device)
    with torch.no_grad():
        for v in (*s, *t):
            v[0, :, 0, 0] = 60.0
    assert_right(PKD, s, t, backend, roundings=32)


@each_backend
@each_loss
@pytest.mark.parametrize("apart", [1e-3, 1e-6])
def test_student_and_teacher_that_nearly_agree(rng, backend, device, loss, apart):
    assert_right(loss, *levels(rng, device=device, apart=apart), backend)


@each_backend
@each_loss
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_a_student_that_agrees_has_nothing_to_learn(rng, backend, device, loss, dtype):
    _, t = levels(rng, dtype=dtype, device=device)
    s = [v.clone().requires_grad_() for v in t]
    got = loss.ours(s, t, backend=backend)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert 0 <= got.item() <= 1e-14
    for mine, x in zip(gradients(got, s), s, strict=True):
        assert mine.abs().max().item() <= 8 * torch.finfo(working).eps * loss.swing(x.detach().cpu())


@each_backend
@pytest.mark.parametrize("scale", [17.0, 30.0, 90.0])
def test_cwd_of_one_position_that_has_all(rng, backend, device, scale):
    s, t = levels(rng, device=device)
    with torch.no_grad():
        for x, z in zip(s, t, strict=True):
            x[:, :, 0, 0] += scale
            z[:, :, -1, -1] += scale
    assert_right(CWD, s, t, backend)


@each_backend
@pytest.mark.parametrize("loss", [CWD, TAU4], ids=["tau 1", "tau 4"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("distance", [1e3, -1e5])
def test_cwd_of_a_teacher_far_from_the_student(rng, backend, device, loss, layout, distance):
    """A softmax does not see what is added to all logits; t - s would have few digits."""
    s, t = levels(rng, ((2, 5, 20, 30), *SIZES), layout=layout, device=device)
    with torch.no_grad():
        for z in t:
            z += distance
    assert_right(loss, s, t, backend)


@each_backend
@each_loss
def test_the_magnitude_of_fp32(rng, backend, device, loss):
    """Numbers of 1e15 and of 1e-15; a channel that is constant."""
    for spread in (1e15, 1e-15):
        s, t = levels(rng, device=device, mean=0.0, spread=spread)
        if loss is not PKD and spread > 1:
            continue  # a softmax of such numbers has one position
        assert_right(loss, s, t, backend)


@each_backend
@pytest.mark.parametrize("spread", [1e-4, 1e-9])
def test_pkd_of_a_channel_that_is_nearly_constant(rng, backend, device, spread):
    """p^2 S - p q X and its like are 1e3 to 1e6 times the value there, which the published form never forms."""
    for which in (0, 1):
        both = levels(rng, ((2, 3, 4, 5),), torch.float64, device=device, mean=0.0)
        with torch.no_grad():
            both[which][0][:, 1] *= spread
        assert_right(PKD, *both, backend)


@each_backend
def test_pkd_of_a_constant_channel(rng, backend, device):
    """As the published form: a gradient of the size of 1 / eps, finite; without eps the channel is 0."""
    s, t = levels(rng, ((2, 3, 4, 5),), device=device)
    with torch.no_grad():
        s[0][:, 1] = 2.0
    assert_right(PKD, s, t, backend)
    loss = pkd_loss(s, t, eps=0.0, backend=backend)
    assert loss.isfinite()
    (grad,) = gradients(loss, s)
    assert grad.isfinite().all()
    assert not grad[:, 1].any()


@each_backend
@each_loss
def test_levels_without_anything_to_compare_add_nothing(rng, backend, device, loss):
    empty = ((0, 3, 2, 2), (2, 3, 0, 4), (1, 5, 1, 1))
    s, t = levels(rng, (SIZES[0], *empty), device=device)
    terms = loss.ours(s, t, backend=backend, return_terms=True)
    assert terms.per_level[1:].tolist() == [0, 0, 0]
    assert not any(g.any() for g in gradients(terms.loss, s)[1:])
    assert same_bits(terms.value.detach(), loss.ours(s[:1], t[:1], backend=backend).detach())
    nothing = levels(rng, empty[:1], device=device)
    assert loss.ours(*nothing, backend=backend).item() == 0


@each_backend
@each_loss
def test_many_levels(rng, backend, device, loss):
    sizes = [(1, 2 + i % 3, 1 + i % 4, 2 + i % 5) for i in range(19)]
    s, t = levels(rng, sizes, device=device)
    terms = loss.ours(s, t, backend=backend, return_terms=True)
    for i, value in enumerate(terms.per_level.tolist()):
        right, near = (in_dtype(loss, s[i : i + 1], t[i : i + 1], dtype)[0] for dtype in (torch.float64, torch.float32))
        assert abs(value - right.item()) <= value_bound(loss, right, near, 1, 8 * torch.finfo(torch.float32).eps)
    assert_right(loss, s, t, backend)


@each_backend
@each_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(rng, backend, device, loss, bad):
    for which in range(2):
        pair = levels(rng, device=device)
        with torch.no_grad():
            pair[which][0][1, 2, 3, 4] = bad
        got = loss.ours(*pair, backend=backend)
        assert got.isnan()
        grads = gradients(got, pair[0])
        assert grads[0][1, 2].isnan().any()
        assert all(g.isfinite().all() for g in grads[1:])


@each_backend
@each_loss
def test_weights_and_terms(rng, backend, device, loss):
    s, t = levels(rng, device=device)
    plain = loss.ours(s, t, backend=backend)
    grads = gradients(plain, s)
    factor = torch.tensor(0.25, device=device)
    for weight in (0.25, factor):
        terms = loss.ours(s, t, weight=weight, level_weights=[1.0, 0.0, 2.0], backend=backend, return_terms=True)
        assert isinstance(terms, RowTerms)
        assert not terms.per_level.requires_grad
        singles = [loss.ours([a], [b], backend=backend).item() for a, b in zip(s, t, strict=True)]
        expected = [singles[0], 0.0, 2 * singles[2]]
        assert terms.per_level.tolist() == pytest.approx(expected, rel=1e-6)
        assert terms.value.item() == pytest.approx(sum(expected), rel=1e-6)
        assert terms.loss.item() == pytest.approx(0.25 * sum(expected), rel=1e-6)
        got = gradients(terms.loss + 2 * terms.value, s)
        for mine, single, x, w in zip(got, grads, s, (1.0, 0.0, 2.0), strict=True):
            most = max(single.abs().max().item(), loss.swing(x.detach().cpu()))
            assert (mine - 2.25 * w * single).abs().max().item() <= 4e-6 * 2.25 * w * most


@each_backend
@each_loss
def test_a_loss_scale_reaches_the_gradient_before_it_is_rounded(rng, backend, device, loss):
    """fp16: without the scale all would be 0."""
    s, t = levels(rng, ((2, 4, 32, 40),), dtype=torch.float16, device=device)
    scale = 2.0**14
    got = gradients(loss.ours(s, t, weight=1e-4, backend=backend) * scale, s)
    right = in_dtype(loss, s, t, torch.float64)[1]
    for mine, r in zip(got, right, strict=True):
        assert relative(mine.cpu(), 1e-4 * scale * r) <= 2e-3


@each_backend
@each_loss
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_run_gives_the_same_bits(rng, backend, device, loss, layout):
    s, t = levels(rng, (*SIZES, (2, 40, 30, 31)), layout=layout, device=device)
    first = loss.ours(s, t, backend=backend, return_terms=True)
    grads = gradients(first.loss, s)
    threads = torch.get_num_threads()
    for number in (1, 2, threads):
        torch.set_num_threads(number)
        again = loss.ours(s, t, backend=backend, return_terms=True)
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(first, again, strict=True))
        assert all(same_bits(a, b) for a, b in zip(grads, gradients(again.loss, s), strict=True))
    torch.set_num_threads(threads)


@each_backend
@each_loss
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_stay_and_everything_handed_out_is_written(rng, poison, backend, device, loss, layout):
    s, t = levels(rng, layout=layout, device=device)
    with unharmed(*s, *t):
        assert_right(loss, s, t, backend)


@each_backend
@each_loss
def test_nothing_outside_the_outputs_is_written(rng, backend, device, loss):
    if backend == "cpu" or backend == "cuda":
        pytest.skip("allocates outside torch.empty; fenced.py and the sanitizers look at it")
    s, t = levels(rng, device=device)
    with guarded_outputs() as guards:
        gradients(loss.ours(s, t, backend=backend), s)
    guards.assert_unharmed()


@each_backend
@each_loss
def test_gradcheck(rng, backend, device, loss):
    s, t = levels(rng, ((2, 3, 2, 3), (2, 2, 1, 2)), dtype=torch.float64, device=device)
    torch.autograd.gradcheck(lambda *x: loss.ours(list(x), t, weight=0.5, backend=backend), s)


@each_backend
@each_loss
def test_backward_twice_and_of_the_gradient(rng, backend, device, loss):
    s, t = levels(rng, device=device)
    got = loss.ours(s, t, backend=backend)
    first = torch.autograd.grad(got, s, retain_graph=True)
    assert all(same_bits(a, b) for a, b in zip(first, torch.autograd.grad(got, s, retain_graph=True), strict=True))
    some = torch.autograd.grad(got, s[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        some[0].sum().backward()


@each_backend
@each_loss
def test_a_level_that_learns_nothing_has_no_gradient(rng, backend, device, loss):
    s, t = levels(rng, device=device)
    s[1] = s[1].detach()
    loss.ours(s, t, backend=backend).backward()
    assert s[1].grad is None
    assert s[0].grad.any()


@pytest.mark.usefixtures("compiler")
@each_backend
@each_loss
def test_one_graph(rng, backend, device, loss):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(s: Levels, t: Levels, backend: str) -> Tensor:
        return loss.ours(s, t, backend=backend)

    assert_right(loss._replace(ours=step), *levels(rng, device=device), backend)


@pytest.mark.parametrize("namespace", OPERATORS)
@pytest.mark.parametrize("name", list(ROW_LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=ids)
def test_opcheck(rng, namespace, name, dtype):
    s, t = levels(rng, ((1, 2, 2, 3), (1, 3, 1, 1)), dtype=dtype, layout="channels_last")
    s = [v.detach() for v in s]
    factor = torch.tensor(0.5)
    ops = getattr(torch.ops, namespace)
    args = (s, t, name, [1.0, 2.0], 0.5, factor, 2.0, 1e-6)
    torch.library.opcheck(ops.moments.default, args)
    rows = VERBS["torch"].moments(*args)[2]
    assert rows.shape[1] == NUMBERS
    torch.library.opcheck(ops.moments_backward.default, (s, t, rows, name, 0.5, factor, 2.0))


@pytest.mark.parametrize("namespace", OPERATORS)
def test_operators_refuse_what_does_not_fit(rng, namespace):
    s, t = levels(rng, ((1, 2, 2, 3), (1, 3, 1, 1)))
    s = [v.detach() for v in s]
    ops = getattr(torch.ops, namespace)
    for changed, message in (
        ({"loss": "mse"}, "'mse'.*'pkd', 'cwd'"),
        ({"scale": [1.0]}, "scale"),
        ({"temperature": 0.0}, "temperature"),
        ({"eps": -1.0}, "eps"),
        ({"teacher": t[:1]}, "same shape"),
        ({"teacher": [t[1], t[0]]}, "same shape"),
        ({"student": [], "teacher": []}, "empty"),
        ({"factor": torch.ones(2)}, "factor"),
    ):
        given = {
            "student": s, "teacher": t, "loss": "pkd", "scale": [1.0, 1.0], "weight": 1.0, "factor": None,
            "temperature": 1.0, "eps": 1e-6, **changed,
        }  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            ops.moments(**given)
    rows = ops.moments(s, t, "pkd", [1.0, 1.0], 1.0, None, 1.0, 1e-6)[2]
    for wrong in (rows[1:], rows.double(), rows.t()):
        with pytest.raises(RuntimeError, match="rows"):
            ops.moments_backward(s, t, wrong, "pkd", 1.0, None, 1.0)


def test_refusals(rng):
    s, t = levels(rng)
    with pytest.raises(ValueError, match=r"student_feats\[0\].*FeatureAdapter"):
        pkd_loss([v[:, :1] for v in s], t)
    with pytest.raises(ValueError, match=r"student\[1\].*differ in N, H or W"):
        cwd_loss([s[0], s[2], s[1]], [t[0], t[1], t[1]])
    with pytest.raises(ValueError, match="temperature must be positive"):
        cwd_loss(s, t, temperature=0.0)
    with pytest.raises(ValueError, match="eps must be zero or more"):
        pkd_loss(s, t, eps=-1.0)
    with pytest.raises(ValueError, match="level_weights has 2 entries"):
        pkd_loss(s, t, level_weights=[1, 1])
    with pytest.raises(TypeError, match="weight must be a number"):
        pkd_loss(s, t, weight="1")
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        pkd_loss(s, t, backend="gpu")
    with pytest.raises(ValueError, match="swapped"):
        pkd_loss(t, s)
    with pytest.warns(UserWarning, match="trains nothing"):
        pkd_loss(t, t)
