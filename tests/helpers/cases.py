"""Which backends the tests run on, and the checks that several of them share.

The checks are functions, so that test_meta.py can plant faults and show that they are seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from truth import CANCELS, MOVES, Answer, Levels, Pyramid, eager, moves, size, truth

from frs_kernels import FSRTerms, backends, fsr_loss

# A new backend is one line here: (backend, device type).
BACKENDS = (
    ("torch", "cpu"),
    ("cpu", "cpu"),
    ("triton", "cpu"),
    ("torch", "cuda"),
    ("triton", "cuda"),
    ("cuda", "cuda"),
)
OPERATORS = ("frs_triton", "frs_kernels")  # the namespaces of torch.ops that hold the verbs

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _param(backend: str, device: str) -> Any:
    marks = []
    if device == "cuda":
        marks.append(pytest.mark.gpu)
    elif reason := backends.why_not(backend, device):
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(backend, device, marks=marks, id=f"{backend}-{device}")


each_backend = pytest.mark.parametrize(("backend", "device"), [_param(*case) for case in BACKENDS])
compiled_backends = pytest.mark.parametrize(
    ("backend", "device"), [_param(*case) for case in BACKENDS if case[0] != "torch"]
)


def ids(value: object) -> str | None:
    """Short names for dtypes in test ids."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def run(p: Pyramid, backend: str, **options: Any) -> Answer:
    """`fsr_loss` with all its terms, and the gradients of the loss by every tensor of the student."""
    terms = fsr_loss(*p.inputs, backend=backend, return_terms=True, **options)
    assert isinstance(terms, FSRTerms)
    grads = torch.autograd.grad(terms.loss, p.student)
    return Answer(*(v.detach() if isinstance(v, Tensor) else v for v in terms), list(grads))


def ulp(v: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of `dtype`, at each value."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(v.abs().clamp_min(info.smallest_normal)))
    return torch.exp2(exponent) * info.eps


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not b.numel():
        return 0.0
    difference, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
    return difference / size if size else difference


def working_dtype(p: Pyramid, mask: Levels | None = None) -> torch.dtype:
    every = [v for levels in (*p.inputs, mask) if levels is not None for v in levels]
    return torch.float64 if all(v.dtype == torch.float64 for v in every) else torch.float32


def condition(p: Pyramid, temperature: float = 1.0, **_: Any) -> float:
    """By how much a rounding of x / temperature is enlarged in exp(-x / temperature); 1 where the quotient is exact."""
    if math.frexp(temperature)[0] == 0.5:
        return 1.0
    return 1 + max((v.abs().max().item() for v in (*p.x, *p.z) if v.numel()), default=0.0) / temperature


def eager_error(p: Pyramid, expected: Answer, **options: Any) -> list[float]:
    """How far eager is from the truth, for each gradient: its worst error of all levels, relative to a level's largest.

    In fp32 also for bf16 and fp16 inputs, which is what autocast does to a loss and less than eager's error in their
    own dtype. At least two roundings of what is subtracted (for logits share * sigmoid(x)), since a pyramid of a few
    numbers may be right by chance; in fp64 four, since the truth itself is rounded to fp64; of a softmax more.
    """
    dtype = working_dtype(p, options.get("mask"))
    eps = torch.finfo(dtype).eps * (2 if dtype == torch.float64 else 1)
    grads = eager(p, dtype=dtype, **options).grads
    worst = max(relative(a, b) for a, b in zip(grads, expected.grads, strict=True))
    subtracted = expected.grads
    if p.x:
        alone = Pyramid(p.s, p.t, p.x, [torch.full_like(z, -1e4) for z in p.z])
        given = options | {"mask": expected.mask}
        subtracted = [*subtracted[: len(p.s or [])], *truth(alone, **given).grads[len(p.s or []) :]]
        if options.get("cls_loss") in MOVES:
            moved = truth(p, **options, of=partial(moves, eps=eps)).grads[len(p.s or []) :]
            heads = [torch.maximum(a.abs(), b.abs()) for a, b in zip(subtracted[len(p.s or []) :], moved, strict=True)]
            subtracted = [*subtracted[: len(p.s or [])], *heads]
        eps *= condition(p, **options)
        if options.get("cls_loss") == "softmax_kl":  # a sum of so many exponentials, one after another
            eps *= max(1.0, math.sqrt(options.get("group_size") or max(x.shape[1] for x in p.x)) / 4)
    sizes = [(b.abs().max().item(), c.abs().max().item()) if b.numel() else (0.0, 0.0)
             for b, c in zip(expected.grads, subtracted, strict=True)]  # fmt: skip
    return [max(worst * size, 2 * eps * max(size, before)) for size, before in sizes]


def assert_gradients(
    actual: Sequence[Tensor], like: Sequence[Tensor], expected: Levels, errors: Sequence[float], roundings: int = 1
) -> None:
    """dtype, shape, strides of `like`; values within twice eager's error, and an ulp for each rounding to the dtype."""
    for number, (grad, leaf, right, error) in enumerate(zip(actual, like, expected, errors, strict=True)):
        where = f"gradient {number}"
        assert grad.dtype == leaf.dtype, where
        assert grad.shape == leaf.shape, where
        assert grad.stride() == torch.empty_like(leaf).stride(), where
        assert torch.isfinite(grad).all(), f"{where} is not finite"
        if right.numel():
            allowed = 2 * error + roundings * ulp(right, leaf.dtype)
            worst = ((grad.double() - right).abs() / allowed).max().item()
            assert worst <= 1, f"{where}: {worst:.3g} times the bound"


def assert_right(
    p: Pyramid,
    backend: str,
    call: Callable[..., Answer] = run,
    pull: dict[str, float] | None = None,
    **options: Any,
) -> Answer:
    """The loss, its terms and its gradients on `backend` against the truth of the very values in `p`.

    Of another `call` than `fsr_loss` with all its terms, what is None is not looked at. `pull`: the weights whose loss
    has the gradients that the call's have after the upstream ones, if those are not 1.
    """
    mode = {key: options.pop(key) for key in ("grad_mode",) if key in options}
    actual, expected = call(p, backend, **options, **mode), truth(host(p), **_host(options))
    working = working_dtype(p, options.get("mask"))
    double = working == torch.float64
    cancels = options.get("cls_loss") in CANCELS
    of = partial(size, eps=torch.finfo(working).eps)
    scale = truth(host(p), **_host(options), of=of) if cancels else expected
    loosened = condition(host(p), **options) if p.x else 1.0
    for name in ("loss", "feat", "cls", "feat_per_level", "cls_per_level", "mass"):
        if getattr(actual, name) is None:
            continue
        a, b, most = (getattr(answer, name).double().cpu() for answer in (actual, expected, scale))
        allowed = (1e-13 if double else 1e-6) * most.abs() * loosened
        assert ((a - b).abs() <= allowed).all(), f"{name}: {a.tolist()} is not {b.tolist()}"
    for level, (a, b) in enumerate(zip(actual.mask or expected.mask, expected.mask, strict=True)):
        assert a.shape == b.shape
        assert relative(a.cpu(), b) <= 4 * torch.finfo(working).eps, f"mask of level {level}"
    accumulated = torch.float64 if any(v.dtype == torch.float64 for v in _all(p)) else torch.float32
    assert actual.loss.dtype == accumulated
    grads = [g.cpu() for g in actual.grads] if p.student and p.student[0].is_cuda else actual.grads
    like = host(p).student if p.student and p.student[0].is_cuda else p.student
    pulled = options if pull is None else options | pull
    expected = expected if pull is None else truth(host(p), **_host(pulled))
    errors = eager_error(host(p), expected, **_host(pulled))
    assert_gradients(grads, like, expected.grads, errors, roundings=1 if pull is None else 2)
    return actual


def _all(p: Pyramid) -> Levels:
    return [v for levels in p.inputs if levels is not None for v in levels]


def host(p: Pyramid) -> Pyramid:
    """The pyramid on the CPU, strides kept."""
    return p.map(lambda v: torch.empty_like(v, device="cpu").copy_(v)) if _all(p)[0].is_cuda else p


def _host(options: dict[str, Any]) -> dict[str, Any]:
    moved = dict(options)
    if moved.get("mask") is not None:
        moved["mask"] = [m.cpu() for m in moved["mask"]]
    for name in ("feat_weight", "cls_weight"):
        if isinstance(moved.get(name), Tensor):
            moved[name] = moved[name].item()
    return moved


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN payloads and signs of zero included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@dataclass
class Guards:
    """The buffers that outputs were given out of."""

    buffers: list[tuple[Tensor, int, int]] = field(default_factory=list)

    def assert_unharmed(self) -> None:
        for buffer, first, last in self.buffers:
            around = torch.cat([buffer[:first], buffer[last:]])
            assert (around == SENTINEL).all(), "a kernel wrote outside its output"


SENTINEL = 123
BAND = 8192  # more than any tile holds


@contextmanager
def guarded_outputs() -> Iterator[Guards]:
    """Every tensor made by torch.empty and torch.empty_like lies inside a larger buffer of sentinels."""
    guards = Guards()
    empty, empty_like = torch.empty, torch.empty_like

    def wrap(plain: Tensor) -> Tensor:
        if plain.numel() == 0:
            return plain
        buffer = torch.full((plain.numel() + 2 * BAND,), SENTINEL, dtype=plain.dtype, device=plain.device)
        guards.buffers.append((buffer, BAND, BAND + plain.numel()))
        return buffer.as_strided(plain.shape, plain.stride(), BAND)

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: wrap(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: wrap(empty_like(*a, **k))),
    ):
        yield guards


@contextmanager
def unharmed(*levels: Tensor) -> Iterator[None]:
    """The tensors are not written: neither other bits nor another version."""
    before = [(v.detach().clone(memory_format=torch.preserve_format), v._version) for v in levels]
    yield
    for number, (v, (copy, version)) in enumerate(zip(levels, before, strict=True)):
        assert v._version == version, f"tensor {number} was written"
        assert same_bits(v.detach(), copy), f"tensor {number} has changed"


def close(a: Tensor, b: Tensor, ulps: float = 4) -> bool:
    """Equal up to a few roundings of their dtype, relative to the largest value."""
    return relative(a, b) <= ulps * torch.finfo(a.dtype).eps or (not math.isfinite(relative(a, b)) and same_bits(a, b))
