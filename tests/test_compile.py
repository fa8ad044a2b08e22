"""torch.compile as one graph, in every mode, without needless recompiles; and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import each_backend, relative, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from truth import Pyramid, pyramid

from frs_kernels import FeatureAdapter, FSRLoss, FSRTerms, fsr_loss, masked_imitation_loss, pkd_loss, richness_mask

pytestmark = pytest.mark.usefixtures("compiler")
TINY = ((1, 2, 3), (1, 1, 1))
MODES = pytest.mark.parametrize("grad_mode", ["forward", "backward"])


def tiny(rng: torch.Generator, device: str, **options: Any) -> Pyramid:
    return pyramid(rng, **{"sizes": TINY, "channels": 2, "classes": 3, "device": device, **options})


def assert_same(a: Any, b: Any) -> None:
    for first, second in zip(a, b, strict=True):
        assert first.dtype == second.dtype
        assert first.stride() == second.stride()
        assert relative(first, second) <= 4 * torch.finfo(first.dtype).eps


@each_backend
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_graph_forward_and_backward(rng, backend, device, grad_mode, dtype):
    p = tiny(rng, device, dtype=dtype, layout="channels_last")
    expected = run(p, backend, grad_mode=grad_mode)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*inputs: Any) -> Tensor:
        return fsr_loss(*inputs, backend=backend, grad_mode=grad_mode)

    loss = step(*p.inputs)
    assert_same([loss.detach(), *torch.autograd.grad(loss, p.student)], [expected.loss, *expected.grads])


@each_backend
@MODES
def test_one_graph_with_every_term_and_a_tensor_weight(rng, backend, device, grad_mode):
    p = tiny(rng, device)
    weight = torch.tensor(0.25, device=device)
    options = {
        "feat_weight": weight, "feat_loss": "smooth_l1", "beta": 0.5, "cls_loss": "kl", "normalizer": "mass_channels",
        "level_weights": [1, 0.5],
    }  # fmt: skip
    expected = run(p, backend, grad_mode=grad_mode, **options)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*inputs: Any) -> FSRTerms:
        return fsr_loss(*inputs, backend=backend, grad_mode=grad_mode, return_terms=True, **options)

    terms = step(*p.inputs)
    assert_same(
        terms[:5], [expected.loss, expected.feat, expected.cls, expected.feat_per_level, expected.cls_per_level]
    )
    assert_same(torch.autograd.grad(terms.loss, p.student), expected.grads)


@each_backend
@pytest.mark.parametrize("given", ["features", "logits", "mask"])
def test_one_graph_of_every_function(rng, backend, device, given):
    p = tiny(rng, device)
    mask = [s[:, 0].detach().abs() for s in p.s]

    def step() -> list[Tensor]:
        if given == "features":
            return [fsr_loss(p.s, p.t, None, p.z, backend=backend)]
        if given == "logits":
            return [fsr_loss(None, None, p.x, p.z, backend=backend), *richness_mask(p.z, backend=backend).scores]
        return [
            masked_imitation_loss(p.s, p.t, mask, loss=loss, backend=backend) for loss in ("mse", "l1", "smooth_l1")
        ]

    for a, b in zip(torch.compile(step, backend="aot_eager", fullgraph=True)(), step(), strict=True):
        assert relative(a, b) <= 4 * torch.finfo(b.dtype).eps


@each_backend
@pytest.mark.parametrize("tensors", [1, 2, 3])
def test_one_graph_without_a_gradient(rng, backend, device, tensors):
    """Of any number of the student's tensors, which are what the autograd functions are given."""
    p = tiny(rng, device)
    s, t = [p.s[0].detach()] * tensors, [p.t[0]] * tensors
    mask = [p.s[0][:, 0].detach().abs()] * tensors

    def step() -> list[Tensor]:
        return [
            masked_imitation_loss(s, t, mask, backend=backend),
            pkd_loss(s, t, backend=backend),
            fsr_loss(s, t, None, t, feat_loss="l1", backend=backend),
        ]

    with torch.no_grad():
        found = torch.compile(step, backend="aot_eager", fullgraph=True)()
        assert all(relative(a, b) <= 4 * torch.finfo(b.dtype).eps for a, b in zip(found, step(), strict=True))


@each_backend
def test_a_model_may_be_its_own_teacher(rng, backend, device):
    p = tiny(rng, device)
    own = Pyramid(p.s, p.s, p.x, p.x)
    step = torch.compile(lambda *i: fsr_loss(*i, cls_loss="kl", backend=backend), backend="aot_eager", fullgraph=True)
    loss = step(*own.inputs)
    loss.backward()
    assert loss == 0
    assert not any(v.grad.any() for v in p.student)


@each_backend
def test_inductor(rng, backend, device):
    p = tiny(rng, device)
    expected = run(p, backend, feat_weight=0.1)
    loss = torch.compile(lambda *i: fsr_loss(*i, feat_weight=0.1, backend=backend), fullgraph=True)(*p.inputs)
    grads = torch.autograd.grad(loss, p.student)
    assert abs(loss - expected.loss) <= 1e-6 * expected.loss
    for a, b in zip(grads, expected.grads, strict=True):
        assert relative(a, b) <= 16 * torch.finfo(b.dtype).eps  # Inductor sums in an order of its own


@each_backend
def test_inductor_copies_no_gradient_before_it_scales_it(rng, backend, device):
    """Multiplied in place, what the forward pass has kept would be cloned first."""
    if backend == "torch":
        pytest.skip("it is fused, not called")
    p = tiny(rng, device)
    loss = torch.compile(lambda: fsr_loss(*p.inputs, backend=backend, grad_mode="forward") * 3)
    expected = torch.autograd.grad(fsr_loss(*p.inputs, backend=backend) * 3, p.student)
    grads, codes = run_and_get_code(lambda: torch.autograd.grad(loss(), p.student))
    assert_same(grads, expected)
    lines = [line for code in codes for line in code.splitlines() if "inductor_meta" not in line]  # Triton's options
    assert not [line for line in lines if "clone" in line or "scale_" in line]


@each_backend
@MODES
@pytest.mark.parametrize("loss", ["l1", "smooth_l1"])
def test_inductor_with_another_loss_of_the_features(rng, backend, device, grad_mode, loss):
    p = tiny(rng, device)
    options = {"feat_loss": loss, "beta": 0.7, "backend": backend, "grad_mode": grad_mode}
    expected = run(p, **options)
    value = torch.compile(lambda *i: fsr_loss(*i, **options), fullgraph=True)(*p.inputs)
    grads = torch.autograd.grad(value, p.student)
    assert abs(value - expected.loss) <= 1e-6 * expected.loss
    for a, b in zip(grads, expected.grads, strict=True):
        assert relative(a, b) <= 16 * torch.finfo(b.dtype).eps


@each_backend
@pytest.mark.parametrize("dynamic", [True, None])
def test_sizes_may_change_without_a_compile_for_each(rng, backend, device, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda *i: fsr_loss(*i, backend=backend), backend=counter, fullgraph=True, dynamic=dynamic)
    # sizes unlike each other and the channels: Dynamo ties sizes that are equal at first (duck shapes)
    counts = []
    for height, width in ((7, 11), (6, 9), (8, 13), (9, 10)):
        p = tiny(rng, device, sizes=((2, height, width), (2, 2, 3)))
        loss = step(*p.inputs)
        assert_same([loss.detach(), *torch.autograd.grad(loss, p.student)], _values(run(p, backend)))
        counts.append(counter.frame_count)
    assert counts[0 if dynamic else 1] == counts[-1]


@pytest.mark.parametrize("name", ["feat_weight", "temperature", "eps", "beta"])
def test_numbers_may_change_between_calls(rng, name):
    p = tiny(rng, "cpu")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(**options: float) -> Tensor:
        return fsr_loss(*p.inputs, feat_loss="smooth_l1", backend="torch", **options)

    for value in (0.5, 0.75, 1.5):
        expected = run(p, "torch", feat_loss="smooth_l1", **{name: value}).loss
        assert relative(step(**{name: value}), expected) <= 1e-6


def _values(answer: Any) -> list[Tensor]:
    return [answer.loss, *answer.grads]


@each_backend
def test_another_value_of_a_tensor_weight_does_not_recompile(rng, backend, device):
    p = tiny(rng, device)
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.tensor(0.0, device=device)

    @torch.compile(backend=counter, fullgraph=True)
    def step(weight: Tensor) -> Tensor:
        return fsr_loss(*p.inputs, feat_weight=weight, cls_weight=0.5, backend=backend)

    for value in (0.0, 1.0, 0.3):
        weight.fill_(value)
        loss = step(weight)
        expected = run(p, backend, feat_weight=value, cls_weight=0.5)
        assert_same([loss.detach(), *torch.autograd.grad(loss, p.student)], _values(expected))
    assert counter.frame_count == 1


class Student(nn.Module):
    """A detector's two outputs, as small as they come."""

    def __init__(self, backend: str, weight: float | Tensor = 0.5) -> None:
        super().__init__()
        self.neck = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 6, 1)
        self.adapter = FeatureAdapter(4, 5, 1)
        self.distil = FSRLoss(feat_weight=weight, cls_weight=0.1, backend=backend)

    def forward(self, images: Tensor, t: list[Tensor], z: list[Tensor]) -> Tensor:
        feats = [self.neck(images)]
        loss = self.distil(self.adapter(feats), t, [self.head(v) for v in feats], z)
        assert isinstance(loss, Tensor)
        return loss


def images_and_teacher(rng: torch.Generator, device: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    made = [torch.randn(2, c, 5, 6, generator=rng).to(device) for c in (3, 5, 6)]
    return made[0], [made[1]], [made[2]]


@each_backend
def test_a_module_in_a_compiled_step_trains_and_warms_up(rng, backend, device):
    model = Student(backend, torch.tensor(0.5)).to(device)
    twin = Student(backend, torch.tensor(0.5)).to(device)
    twin.load_state_dict(model.state_dict())
    assert isinstance(model.distil.feat_weight, Tensor)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        batch = images_and_teacher(rng, device)
        for module, call in ((model, compiled), (twin, twin)):
            module.distil.feat_weight.fill_(step / 2)
            module.zero_grad()
            call(*batch).backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            # a sum over images and positions, in another order
            assert relative(a.grad, b.grad) <= 64 * torch.finfo(b.dtype).eps
    assert counter.frame_count == 1


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(rng, backend, device, dtype, compiled):
    """The convolutions come out in half precision; the loss takes them as they are and sums in fp32."""
    model = Student(backend).to(device)
    batch = images_and_teacher(rng, device)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.autocast(device, dtype=dtype):
        loss = call(*batch)
        half = [model.head(model.neck(batch[0]))]
        assert half[0].dtype == dtype
        alone = fsr_loss(None, None, half, batch[2], backend=backend)
    assert loss.dtype == alone.dtype == torch.float32
    (1024.0 * loss).backward()
    grads = {name: v.grad / 1024 for name, v in model.named_parameters()}
    model.zero_grad()
    model(*batch).backward()
    for name, v in model.named_parameters():
        # the step from fp32 to half precision of the convolutions themselves: a few of their roundings
        assert torch.isfinite(grads[name]).all()
        assert relative(grads[name], v.grad) <= 16 * torch.finfo(dtype).eps
