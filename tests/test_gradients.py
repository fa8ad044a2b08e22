"""Gradients: right in every mode, by every term, at every upstream gradient; once, twice or an error, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import each_backend, eager_error, relative, run, ulp
from torch import Tensor
from truth import Pyramid, pyramid, truth

from frs_kernels import FSRTerms, fsr_loss, masked_imitation_loss

TINY = ((1, 1, 2), (1, 1, 1))
MODES = pytest.mark.parametrize("grad_mode", ["forward", "backward"])


def tiny(rng: torch.Generator, device: str, **options: Any) -> Pyramid:
    return pyramid(rng, sizes=TINY, channels=2, classes=3, device=device, **options)


def rebuilt(p: Pyramid, leaves: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The arguments of `fsr_loss` with these leaves as the student's."""
    feats = len(p.s or [])
    return (list(leaves[:feats]) or None, p.t, list(leaves[feats:]) or None, p.z)


def away_from_kinks(p: Pyramid) -> Pyramid:
    """Features that differ by 0.05 or more: l1 has no slope at 0."""
    differences = (0.05 + 0.4 * torch.sigmoid(s.detach() - t) for s, t in zip(p.s, p.t, strict=True))
    near = [t + d * (1 if i else -3) for i, (t, d) in enumerate(zip(p.t, differences, strict=True))]
    return Pyramid(near, p.t, p.x, p.z).map(torch.clone)


@each_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cls_loss": "kl", "temperature": 2.0},
        {"normalizer": "mass_channels", "eps": 0.3, "level_weights": [0.5, 2.0], "feat_weight": 0.1},
        {"normalizer": "total_mass", "eps": 0.2, "level_weights": [0.5, 2.0]},
        {"feat_loss": "l1"},
        {"feat_loss": "smooth_l1", "beta": 0.5},
        {"feat_loss": "smooth_l1", "beta": 20.0, "cls_loss": "kl"},
        {"cls_loss": "qfl"},
        {"cls_loss": "qfl", "beta": 2.0, "temperature": 2.0},
        {"cls_loss": "qfl", "beta": 0.5},
        {"cls_loss": "qfl_detached", "beta": 0.0},
        {"cls_loss": "softmax_kl", "temperature": 2.0},
    ],
    ids=str,
)
def test_gradcheck(rng, backend, device, options):
    p = away_from_kinks(tiny(rng, device, dtype=torch.float64))

    def call(*leaves: Tensor) -> Tensor:
        return fsr_loss(*rebuilt(p, leaves), backend=backend, **options)

    assert torch.autograd.gradcheck(call, p.student, fast_mode=backend != "torch")


@each_backend
@pytest.mark.parametrize("loss", ["mse", "l1", "smooth_l1", "bce", "kl", "qfl", "softmax_kl"])
def test_gradcheck_of_masked_imitation(rng, backend, device, loss):
    p = away_from_kinks(tiny(rng, device, dtype=torch.float64))
    mask = [torch.rand(s[:, 0].shape, generator=rng, dtype=torch.float64).to(device) for s in p.s]

    def call(*student: Tensor) -> Tensor:
        return masked_imitation_loss(student, p.t, mask, loss=loss, temperature=1.5, beta=0.5, backend=backend)

    assert torch.autograd.gradcheck(call, p.s, fast_mode=backend != "torch")


@each_backend
def test_gradcheck_of_every_term(rng, backend, device):
    p = tiny(rng, device, dtype=torch.float64)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        terms = fsr_loss(*rebuilt(p, leaves), feat_weight=0.3, cls_weight=0.0, backend=backend, return_terms=True)
        assert isinstance(terms, FSRTerms)
        return terms[:3]

    assert torch.autograd.gradcheck(call, p.student, fast_mode=backend != "torch")


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_both_modes_give_the_same_gradient(rng, backend, device, dtype):
    p = tiny(rng, device, dtype=dtype)
    first, second = (run(p, backend, grad_mode=mode, feat_weight=0.3).grads for mode in ("forward", "backward"))
    for a, b in zip(first, second, strict=True):
        assert relative(a, b) <= torch.finfo(dtype).eps


WEIGHTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "numbers": lambda _: {"feat_weight": 0.3, "cls_weight": 0.05},
    "no head": lambda _: {"feat_weight": 0.3, "cls_weight": 0.0},
    "no features": lambda _: {"feat_weight": 0, "cls_weight": 2},
    "tensors": lambda device: {
        "feat_weight": torch.tensor(0.3, device=device),
        "cls_weight": torch.tensor(0.0, device=device),
    },
    "tensor and number": lambda device: {"feat_weight": torch.tensor(0.3, device=device), "cls_weight": 0.05},
}
UPSTREAM: dict[str, Callable[[FSRTerms], Tensor]] = {
    "loss": lambda o: o.loss,
    "feat": lambda o: o.feat,
    "cls": lambda o: o.cls,
    "all": lambda o: 0.5 * o.loss - 3 * o.feat + 7 * o.cls,
    "feat and cls": lambda o: o.feat + 2 * o.cls,
    "loss and cls": lambda o: 2 * o.loss + o.cls,
}


@each_backend
@MODES
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_the_gradient_of_each_term_and_of_mixes(rng, backend, device, grad_mode, weights, upstream):
    if backend == "triton" and upstream not in ("all", "cls"):
        pytest.skip("the autograd function is the same for every backend: two upstream gradients go through Triton")
    p = tiny(rng, device)
    options = WEIGHTS[weights](device)
    terms = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode, return_terms=True, **options)
    grads = torch.autograd.grad(UPSTREAM[upstream](terms), p.student, allow_unused=True, materialize_grads=True)
    numbers = {name: float(value) for name, value in options.items()}
    # by linearity: the gradients of feat and cls, each with its share of the mix
    one = truth(p.map(torch.Tensor.cpu))
    basis = {name: float(name == "feat") for name in ("feat", "cls")}
    share = {
        name: UPSTREAM[upstream](
            FSRTerms(
                torch.tensor(numbers[f"{name}_weight"]), torch.tensor(basis[name]), torch.tensor(1 - basis[name]),
                *terms[3:],
            )
        ).item()
        for name in ("feat", "cls")
    }  # fmt: skip
    errors = eager_error(p.map(torch.Tensor.cpu), one)
    for number, (grad, unit, error) in enumerate(zip(grads, one.grads, errors, strict=True)):
        factor = share["feat" if number < len(TINY) else "cls"]
        # a mix is summed from weights in fp32: up to 12 in absolute value, and it may cancel
        assert (grad.cpu() - factor * unit).abs().max() <= 2 * 12 * error


@each_backend
@MODES
@pytest.mark.parametrize(
    ("wrap", "factor"),
    [
        (lambda loss: loss.expand(3).sum(), 3.0),
        (lambda loss: loss * torch.tensor(-2.5, device=loss.device), -2.5),
        (lambda loss: 0.0 * loss, 0.0),
        (lambda loss: loss.double() * 65536.0, 65536.0),
        (lambda loss: loss.unsqueeze(0).expand(2, 2)[1].mean(), 1.0),
    ],
    ids=["expanded", "times a tensor", "times zero", "scaled in fp64", "a view of it"],
)
def test_any_upstream_gradient(rng, backend, device, grad_mode, wrap, factor):
    p = tiny(rng, device)
    plain = run(p, backend, grad_mode=grad_mode).grads
    loss = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    for a, b in zip(torch.autograd.grad(wrap(loss), p.student), plain, strict=True):
        assert relative(a, factor * b) <= 4 * torch.finfo(b.dtype).eps


@each_backend
@MODES
def test_a_retained_graph_can_be_gone_through_again(rng, backend, device, grad_mode):
    p = tiny(rng, device)
    loss = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    first = torch.autograd.grad(loss, p.student, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss, p.student, retain_graph=True)
    third = torch.autograd.grad(loss, p.student)
    for a, b, c, k in zip(first, second, third, kept, strict=True):
        assert relative(b, 3 * a) <= 4 * torch.finfo(a.dtype).eps
        assert torch.equal(a, c)
        assert torch.equal(a, k), "a gradient that was handed out has changed"
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p.student)


@each_backend
@MODES
def test_the_terms_of_a_retained_graph_add_up(rng, backend, device, grad_mode):
    p = tiny(rng, device)
    terms = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode, return_terms=True, feat_weight=2.0)
    feat = torch.autograd.grad(terms.feat, p.s, retain_graph=True)
    cls = torch.autograd.grad(terms.cls, p.x, retain_graph=True)
    terms.loss.backward()
    for x, part in zip([*p.s, *p.x], [*(2 * g for g in feat), *cls], strict=True):
        assert relative(x.grad, part) <= 4 * torch.finfo(x.dtype).eps


@each_backend
@MODES
def test_double_backward_raises(rng, backend, device, grad_mode):
    p = tiny(rng, device)
    scale = torch.ones((), device=device, requires_grad=True)
    loss = scale * fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    grads = torch.autograd.grad(loss, p.student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        sum(g.sum() for g in grads).backward()


@each_backend
@MODES
def test_a_gradient_penalty_beside_the_loss_raises(rng, backend, device, grad_mode):
    """Its part of the gradient would be missing, and nothing would say so."""
    p = tiny(rng, device)
    loss = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    grads = torch.autograd.grad(loss, p.student, create_graph=True)
    penalty = sum(g.square().sum() for g in grads) + sum(v.sum() for v in p.student)
    with pytest.raises(RuntimeError):
        penalty.backward()


@each_backend
@MODES
def test_the_teacher_gets_no_gradient(rng, backend, device, grad_mode):
    p = tiny(rng, device)
    t, z = ([v.clone().requires_grad_() for v in levels] for levels in (p.t, p.z))
    fsr_loss(p.s, t, p.x, z, backend=backend, grad_mode=grad_mode).backward()
    assert all(v.grad is None for v in (*t, *z))
    assert all(v.grad is not None for v in p.student)


@each_backend
@MODES
@pytest.mark.parametrize("wanted", [(0,), (3,), (1, 2), ()])
def test_only_the_gradients_asked_for(rng, backend, device, grad_mode, wanted):
    p = tiny(rng, device)
    everything = run(p, backend, grad_mode=grad_mode)
    for number, leaf in enumerate(p.student):
        leaf.requires_grad_(number in wanted)
    loss = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    assert torch.equal(loss.detach(), everything.loss)
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    for number, (leaf, grad) in enumerate(zip(p.student, everything.grads, strict=True)):
        if number in wanted:
            assert torch.equal(leaf.grad, grad)
        else:
            assert leaf.grad is None


@each_backend
@MODES
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(rng, backend, device, grad_mode, context):
    p = tiny(rng, device)
    with context():
        loss = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    assert not loss.requires_grad
    assert torch.equal(loss, run(p, backend, grad_mode=grad_mode).loss)


@each_backend
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_teacher_run_in_inference_mode(rng, backend, device, grad_mode, dtype):
    p = tiny(rng, device, dtype=dtype)
    with torch.inference_mode():
        t, z = ([v.clone() for v in levels] for levels in (p.t, p.z))
    weight = torch.tensor(1.0, device=device)
    for options in ({}, {"feat_weight": weight, "return_terms": True}):
        answer = fsr_loss(p.s, t, p.x, z, backend=backend, grad_mode=grad_mode, **options)
        grads = torch.autograd.grad(answer.loss if options else answer, p.student)
        assert all(torch.equal(a, b) for a, b in zip(grads, run(p, backend, grad_mode=grad_mode).grads, strict=True))


@each_backend
def test_a_tiny_weight_leaves_the_gradient_of_the_term_alone_right(rng, backend, device):
    p = tiny(rng, device)
    terms = fsr_loss(*p.inputs, feat_weight=1e-40, backend=backend, return_terms=True)
    grads = torch.autograd.grad(terms.feat, p.s)
    expected = run(Pyramid(p.s, p.t, None, p.z), backend).grads
    assert all(relative(a, b) <= 4 * torch.finfo(b.dtype).eps for a, b in zip(grads, expected, strict=True))


@each_backend
def test_the_diagnostics_may_be_changed_before_backward(rng, backend, device):
    p = tiny(rng, device)
    terms = fsr_loss(*p.inputs, backend=backend, grad_mode="forward", return_terms=True)
    terms.mask[0].zero_()
    grads = torch.autograd.grad(terms.loss, p.student)
    assert all(torch.equal(a, b) for a, b in zip(grads, run(p, backend).grads, strict=True))


@each_backend
def test_the_diagnostics_carry_no_gradient(rng, backend, device):
    p = tiny(rng, device)
    terms = fsr_loss(*p.inputs, backend=backend, return_terms=True)
    assert all(v.requires_grad for v in terms[:3])
    assert not any(v.requires_grad for v in (*terms.mask, terms.mass, terms.feat_per_level, terms.cls_per_level))


def test_a_tensor_in_two_levels_gets_both_gradients(rng):
    p = tiny(rng, "cpu")
    s = p.s[0]
    loss = fsr_loss([s, s], [p.t[0], p.t[0]], None, [p.z[0], p.z[0]], backend="torch")
    alone = fsr_loss([s], [p.t[0]], None, [p.z[0]], backend="torch")
    assert torch.equal(torch.autograd.grad(loss, s)[0], 2 * torch.autograd.grad(alone, s)[0])


def scaled_grads(rng: torch.Generator, backend: str, device: str, grad_mode: str) -> tuple[list[Tensor], list[Tensor]]:
    """fp16 gradients of a loss so small that they are below fp16's range until the loss scale multiplies them."""
    p = tiny(rng, device, dtype=torch.float16)
    options = {"feat_weight": 1e-9, "cls_weight": 1e-9}
    loss = 65536.0 * fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode, **options)
    expected = truth(p.map(torch.Tensor.cpu), **options).grads
    return [g.cpu() for g in torch.autograd.grad(loss, p.student)], [65536.0 * g for g in expected]


@each_backend
@pytest.mark.parametrize("grad_mode", ["auto", "backward"])
def test_fp16_gradients_do_not_underflow_before_the_loss_scale(rng, backend, device, grad_mode):
    for grad, expected in zip(*scaled_grads(rng, backend, device, grad_mode), strict=True):
        assert ((grad.double() - expected).abs() <= 2 * ulp(expected, torch.float16)).all()


@each_backend
def test_fp16_gradients_stored_in_the_forward_pass_do_underflow(rng, backend, device):
    """Why "auto" does not store them."""
    grads, expected = scaled_grads(rng, backend, device, "forward")
    assert max(g.abs().max().item() for g in expected) > torch.finfo(torch.float16).smallest_normal / 16
    assert all((g == 0).all() for g in grads)
