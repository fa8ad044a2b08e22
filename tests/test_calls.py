"""How often a step goes through the dispatcher, and what may be done to what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from building import CHECKOUT, needs_sources
from cases import OPERATORS, compiled_backends, each_backend, relative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import pyramid

from frs_kernels import FSRTerms, fsr_loss, richness_mask
from frs_kernels.ops import SCHEMAS

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
MODES = pytest.mark.parametrize("grad_mode", ["forward", "backward"])


class Calls(TorchDispatchMode):
    """The names of the operators called, those of torch beside ours."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.names.append(name.partition("::")[2] if name.startswith(OPERATORS) else name)
        return func(*args, **(kwargs or {}))


def calls_of_a_step(dtypes: tuple[torch.dtype, torch.dtype], rng: Any, device: str, **options: Any) -> list[list[str]]:
    """Forward and backward; logits of another dtype than the features."""
    of_feats, of_logits = dtypes
    p, other = (pyramid(rng, dtype=dtype, device=device) for dtype in dtypes)
    assert of_feats == p.s[0].dtype
    assert of_logits == other.x[0].dtype
    found = []
    one = torch.ones((), device=device)
    with Calls() as forward:
        loss = fsr_loss(p.s, p.t, other.x, other.z, **options)
        loss = loss.loss if isinstance(loss, FSRTerms) else loss
    found.append(forward.names)
    with Calls() as backward:
        torch.autograd.grad(loss, [*p.s, *other.x], one)
    return [*found, backward.names]


@compiled_backends
@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, bf16), (f32, bf16)], ids=str)
def test_a_step_is_two_calls(rng, backend, device, dtypes):
    assert ours(calls_of_a_step(dtypes, rng, device, backend=backend)) == [["distill"], ["scale_"]]


@compiled_backends
def test_nothing_of_torch_is_called_beside_them(rng, backend, device):
    forward, backward = calls_of_a_step((f32, f32), rng, device, backend=backend, feat_weight=0.1)
    assert len(forward) == len(backward) == 1, (forward, backward)


@compiled_backends
@pytest.mark.parametrize("dtypes", [(f16, f16), (f16, f32), (bf16, f16)], ids=str)
def test_so_it_is_where_a_gradient_waits_for_its_scale(rng, backend, device, dtypes):
    """Both in one call if both wait; else the other's is scaled in place."""
    late = [["distill"], ["imitate"]] if dtypes == (f16, f16) else [["distill"], ["imitate", "scale_"]]
    assert ours(calls_of_a_step(dtypes, rng, device, backend=backend)) == late


@compiled_backends
@pytest.mark.parametrize(
    "options",
    [
        {"return_terms": True},
        {"feat_loss": "smooth_l1", "cls_loss": "kl", "temperature": 2.0},
        {"normalizer": "mass_channels", "eps": 0.1, "level_weights": [1.0, 2.0, 0.5]},
    ],
    ids=str,
)
def test_options_add_no_call(rng, backend, device, options):
    assert ours(calls_of_a_step((f32, f32), rng, device, backend=backend, **options)) == [["distill"], ["scale_"]]


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup | None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@compiled_backends
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_a_process_group_adds_one(rng, backend, device, alone):
    if device != "cpu":
        pytest.skip("gloo on the CPU: the reduction is the same call on a GPU")
    found = ours(calls_of_a_step((f32, f32), rng, device, backend=backend, process_group=alone))
    assert found == [["score", "imitate"], ["scale_"]]


@compiled_backends
def test_a_given_mask_needs_no_score(rng, backend, device):
    p = pyramid(rng, device=device)
    mask = [s[:, 0].detach().abs() for s in p.s]
    with Calls() as calls:
        fsr_loss(*p.inputs, mask=mask, backend=backend).backward()
        richness_mask(p.z, backend=backend)
    assert ours([calls.names]) == [["imitate", "scale_", "score"]]


def ours(found: list[list[str]]) -> list[list[str]]:
    return [[name for name in names if "::" not in name] for names in found]


@needs_sources
def test_the_schemas_are_written_once():
    names = [schema.partition("(")[0] for schema in SCHEMAS]
    for path in [*CHECKOUT.glob("csrc/**/*"), *CHECKOUT.glob("frs_kernels/**/*.py")]:
        if path.is_file() and path != Path(CHECKOUT, "frs_kernels/ops.py"):
            text = path.read_text()
            assert not [name for name in names if f'"{name}(Tensor' in text], path
    assert (CHECKOUT / "csrc/ops.cpp").read_text().count("library.def(") == 1  # instructions() alone


@each_backend
@MODES
def test_the_loss_may_be_changed_in_place(rng, backend, device, grad_mode):
    p = pyramid(rng, device=device)
    expected = torch.autograd.grad(2 * fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode), p.student)
    loss = fsr_loss(*p.inputs, backend=backend, grad_mode=grad_mode)
    loss *= 2
    assert_equal(torch.autograd.grad(loss, p.student), expected)


@each_backend
@MODES
@pytest.mark.parametrize("name", ["loss", "feat", "cls"])
def test_the_terms_may_be_changed_in_place(rng, backend, device, grad_mode, name):
    """Without the others being changed."""
    p = pyramid(rng, device=device)
    options = {"feat_weight": 0.3, "backend": backend, "grad_mode": grad_mode, "return_terms": True}
    expected = fsr_loss(*p.inputs, **options)
    grads = torch.autograd.grad(3 * getattr(expected, name), p.student, materialize_grads=True, allow_unused=True)
    terms = fsr_loss(*p.inputs, **options)
    getattr(terms, name).mul_(3)
    for other in ("loss", "feat", "cls", "feat_per_level", "cls_per_level"):
        factor = 3 if other == name else 1
        assert torch.equal(getattr(terms, other), factor * getattr(expected, other)), other
    found = torch.autograd.grad(getattr(terms, name), p.student, materialize_grads=True, allow_unused=True)
    assert_equal(found, grads)


def assert_equal(a: Any, b: Any) -> None:
    for first, second in zip(a, b, strict=True):
        assert isinstance(first, Tensor)
        assert relative(first, second) <= 4 * torch.finfo(first.dtype).eps
