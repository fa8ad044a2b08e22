"""What is Triton's own in the losses along rows: one launch whatever the levels, how parts become rows, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BAND, guarded_outputs, same_bits, unharmed
from test_triton import cut, in_the_compiler, launches  # noqa: F401
from torch import Tensor

from frs_kernels import backends
from frs_kernels.ops import VERBS
from frs_kernels.row_losses import ROW_LOSSES

if reason := backends.why_not("triton", "cpu"):
    pytest.skip(reason, allow_module_level=True)

from frs_kernels.triton import moments, row_losses, row_tiles

LOSSES = list(ROW_LOSSES)
FORMATS = [torch.contiguous_format, torch.channels_last]
# (C, H, W): tiles that are full, that are not, one position, none
SIZES = ((16, 16, 20), (17, 3, 5), (5, 1, 1), (4, 0, 3), (3, 8, 8))


def levels_of(rng: torch.Generator, sizes: Any = SIZES, dtype: torch.dtype = torch.float32, n: int = 2) -> list[Tensor]:
    return [torch.randn(n, *size, generator=rng).to(dtype) for size in sizes]


def beside(rng: torch.Generator, student: list[Tensor]) -> list[Tensor]:
    """A teacher of the same layout."""
    return [(s + torch.randn(s.shape, generator=rng)).to(s.dtype) for s in student]


def columns(student: list[Tensor], loss: str, factor: Tensor | None = None) -> tuple[Any, ...]:
    return loss, [0.5 + 0.25 * i for i in range(len(student))], 3.0, factor, 2.0, 1e-3


def wide(levels: list[Tensor]) -> list[Tensor]:
    return [v.double() for v in levels]


def assert_right(student: list[Tensor], teacher: list[Tensor], loss: str, factor: Tensor | None = None) -> None:
    """Loss, values and gradients against the definition in fp64."""
    verbs, call = VERBS["triton"], columns(student, loss, factor)
    total, values, rows = verbs.moments(student, teacher, *call)
    right = VERBS["torch"].moments(wide(student), wide(teacher), *call)
    double = total.dtype == torch.float64
    bound = 1e-12 if double else 2e-6
    for found, expected in ((total, right[0]), (values, right[1])):
        assert ((found.double() - expected).abs() <= bound * right[1].abs().max() * 3).all()
    back = (loss, 3.0, factor, 2.0)
    grads = verbs.moments_backward(student, teacher, rows, *back)
    expected = VERBS["torch"].moments_backward(wide(student), wide(teacher), right[2], *back)
    alone = right[2].clone()
    alone[:, 3:] = 0
    subtracted = VERBS["torch"].moments_backward(wide(student), wide(teacher), alone, *back)
    for s, g, e, x in zip(student, grads, expected, subtracted, strict=True):
        assert (g.dtype, g.stride()) == (s.dtype, torch.empty_like(s).stride())
        if g.numel():
            allowed = torch.finfo(s.dtype).eps * e.abs() + bound * x.abs().max() + torch.finfo(s.dtype).smallest_normal
            assert ((g.double() - e).abs() <= allowed).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_call_is_one_launch_whatever_its_levels(rng, loss, launches):  # noqa: F811
    student = [
        *levels_of(rng),
        *(v.contiguous(memory_format=torch.channels_last) for v in levels_of(rng, dtype=torch.bfloat16)),
        *cut(torch.randn(2, 37, 8, generator=rng), [(4, 8), (5, 1)]),
        *(v.transpose(2, 3) for v in levels_of(rng, dtype=torch.float16)),
    ]
    teacher = [v.bfloat16() if i % 3 == 0 else v.clone() for i, v in enumerate(beside(rng, student))]
    assert len(student) > 16
    assert_right(student, teacher, loss, torch.tensor(0.5))
    assert launches == ["moments_kernel", "moments_backward_kernel"]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_rows_of_many_parts(rng, loss, memory_format):
    """More than are added up at once, in some images; another number of parts in the last step; channels left over."""
    student = [v.contiguous(memory_format=memory_format) for v in levels_of(rng, ((17, 75, 60), (32, 5, 5)), n=2)]
    _, (segment,) = row_tiles.segments_of(loss, student, student, None)
    assert math.ceil(75 * 60 / segment.block_p) > row_losses.AT_ONCE.value // segment.block_c
    assert_right(student, beside(rng, student), loss)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [((1, 16, 3),), ((1, 0, 3),), ((5, 1, 1), (5, 1, 1))])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_small_levels(rng, poison, loss, sizes, images):
    student = levels_of(rng, sizes, torch.float64, images)
    teacher = beside(rng, student)
    call = columns(student, loss)
    found, expected = (VERBS[name].moments(student, teacher, *call) for name in ("triton", "torch"))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_run_gives_the_same_bits(rng, loss, memory_format):
    student = [v.contiguous(memory_format=memory_format) for v in levels_of(rng, ((17, 30, 30), (3, 5, 5)))]
    teacher = beside(rng, student)
    first, again = (VERBS["triton"].moments(student, teacher, *columns(student, loss)) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_agreement_is_exactly_0(rng, loss, memory_format):
    student = [v.contiguous(memory_format=memory_format) for v in levels_of(rng, ((17, 30, 30), (3, 5, 5)))]
    teacher = [v.clone() for v in student]
    total, values, _ = VERBS["triton"].moments(student, teacher, *columns(student, loss))
    assert total == 0
    assert (values == 0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_far_from_0_nothing_cancels(rng, memory_format):
    """Means of 1e4 and deviations of 1e-2, ten units in the last place of fp32."""
    student = [1e4 + 1e-2 * torch.randn(2, 8, 20, 20, generator=rng)]
    teacher = [v + 3e-3 * torch.randn(v.shape, generator=rng) for v in student]
    student, teacher = ([v.contiguous(memory_format=memory_format) for v in levels] for levels in (student, teacher))
    assert_right(student, teacher, "pkd")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_program_of_a_launch_counts_once(rng, loss, monkeypatch):
    """Of the programs of a group, of the groups of a block of rows, and of the blocks."""
    made: list[Tensor] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(zeros(*a, **k)) or made[-1])
    student = levels_of(rng, ((17, 30, 30), (32, 5, 5), (4, 0, 1)), n=3)
    VERBS["triton"].moments(student, student, *columns(student, loss))
    (counters,) = [v for v in made if v.dtype == torch.int32]
    # Two blocks of 16 channels a level, three images; four tiles and one.
    groups = [4] * 6 + [1] * 6
    assert counters.tolist() == ([4, *groups, *[3] * 4] if loss == "pkd" else [12, *groups, *[0] * 12])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("channels", [1, 5, 17])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nothing_outside_is_read_or_written(rng, loss, channels, memory_format):
    """Inputs lie in NaN and outputs in sentinels."""

    def surrounded(v: Tensor) -> Tensor:
        v = v.contiguous(memory_format=memory_format)
        buffer = v.new_full((v.numel() + 2 * BAND + 1,), math.nan)
        return buffer.as_strided(v.shape, v.stride(), BAND + 1).copy_(v)

    student = levels_of(rng, ((channels, 5, 7), (channels, 1, 1), (channels, 8, 8)))
    teacher = beside(rng, student)
    student, teacher = [surrounded(v) for v in student], [surrounded(v) for v in teacher]
    with guarded_outputs() as guards:
        assert_right(student, teacher, loss)
    guards.assert_unharmed()
    assert guards.buffers


Change = Callable[[list[Tensor], list[Tensor]], dict[str, Any]]


def given(**changed: Any) -> Change:
    return lambda student, teacher: changed


REFUSED: dict[str, tuple[Change, str]] = {
    "nothing": (given(student=[], teacher=[]), "student is empty"),
    "a level too few": (lambda s, t: {"teacher": t[:1]}, "student and teacher must have the same shape"),
    "channels": (lambda s, t: {"teacher": [v[:, 1:] for v in t]}, "student and teacher must have the same shape"),
    "3-dim": (lambda s, t: {"student": [v[0] for v in s]}, r"student\[0\] must be \(N, C, H, W\)"),
    "integers": (lambda s, t: {"teacher": [v.int() for v in t]}, r"teacher\[0\] must be"),
    "a loss": (given(loss="mse"), "loss 'mse' is unknown; the valid ones are 'pkd', 'cwd'"),
    **{
        f"temperature {v}": (given(temperature=v), "temperature must be positive and finite")
        for v in (0.0, -1.0, math.inf, math.nan)
    },
    "a factor of a vector": (given(factor=torch.ones(1)), "a factor must be None, or 0-dim"),
    "a factor of an integer": (given(factor=torch.tensor(1)), "a factor must be None, or 0-dim"),
}
OF_MOMENTS: dict[str, tuple[Change, str]] = {
    "a scale too few": (given(scale=[1.0]), "scale must have an element a level: 2"),
    **{f"eps {v}": (given(eps=v), "eps must be zero or more and finite") for v in (-1.0, math.inf, math.nan)},
}
OTHER_ROWS = {
    "rows too few": torch.zeros(7, 5),
    "rows of four": torch.zeros(8, 4),
    "rows apart": torch.zeros(5, 8).t(),
    "rows in fp64": torch.zeros(8, 5, dtype=torch.float64),
}
OF_BACKWARD = {name: (given(rows=rows), "rows must be what moments returned") for name, rows in OTHER_ROWS.items()}


@pytest.mark.parametrize("wrong", [*REFUSED, *OF_MOMENTS])
def test_moments_refuses_before_any_launch(rng, wrong, launches):  # noqa: F811
    student = levels_of(rng, ((4, 2, 2), (4, 1, 1)))
    teacher = beside(rng, student)
    change, message = (REFUSED | OF_MOMENTS)[wrong]
    call = {"student": student, "teacher": teacher, "loss": "pkd", "scale": [1.0, 1.0], "weight": 1.0, "factor": None,
            "temperature": 1.0, "eps": 0.0} | change(student, teacher)  # fmt: skip
    with unharmed(*student, *teacher), pytest.raises(RuntimeError, match=f"moments: {message}"):
        moments.moments(**call)
    assert not launches


@pytest.mark.parametrize("wrong", [*REFUSED, *OF_BACKWARD])
def test_moments_backward_refuses_before_any_launch(rng, wrong, launches):  # noqa: F811
    student = levels_of(rng, ((4, 2, 2), (4, 1, 1)))
    teacher = beside(rng, student)
    change, message = (REFUSED | OF_BACKWARD)[wrong]
    call = {"student": student, "teacher": teacher, "rows": torch.zeros(8, 5), "loss": "pkd", "weight": 1.0,
            "factor": None, "temperature": 1.0} | change(student, teacher)  # fmt: skip
    with unharmed(*student, *teacher), pytest.raises(RuntimeError, match=f"moments_backward: {message}"):
        moments.moments_backward(**call)
    assert not launches


def test_other_sizes_and_numbers_compile_nothing_again():
    in_the_compiler("""
import torch, codegen
from codegen import GPUTarget, create_function_from_signature, make_backend
from frs_kernels.triton import moments

def specialisations(n, sizes, weight, scale, eps, temperature):
    student = [torch.zeros(n, 256, h, w) for h, w in sizes]
    found = []
    for name in ("moments_kernel", "moments_backward_kernel"):
        recorder, kernel = codegen.Recorder(None), getattr(moments, name)
        setattr(moments, name, recorder)
        call = ("pkd", weight, torch.ones(()), temperature)
        if name == "moments_kernel":
            moments.moments(student, student, "pkd", [scale] * len(sizes), weight, torch.ones(()), temperature, eps)
        else:
            moments.moments_backward(student, student, torch.zeros(256 * len(sizes), 5), *call)
        setattr(moments, name, kernel)
        ((args, kwargs),) = recorder.launches
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        found.append(str(bind(*args, **kwargs)[1]))
    return found

first = specialisations(1, [(8, 16), (4, 4), (3, 5)], 1.0, 1.0, 0.0, 2.0)
assert first == specialisations(3, [(31, 47), (16, 16), (1, 1)], 0.005, 0.25, 1e-9, 0.5)
assert first == specialisations(16, [(1, 1), (2, 1), (64, 64)], -16.0, 16.0, 2.0**40, 3.0)
""")


@pytest.mark.parametrize("verb", ["moments", "moments_backward"])
def test_a_loss_without_its_maths_does_not_compile(verb):
    in_the_compiler(f"""
import codegen
from frs_kernels.row_losses import ROW_LOSSES
ROW_LOSSES["quartic"] = ROW_LOSSES["pkd"]
try:
    codegen.build(codegen.Case("{verb}", "fp32", "fp32", "nchw", 16, "quartic"))
except Exception as error:
    causes = []
    while error:
        causes.append(str(error))
        error = error.__cause__
    assert "a loss without its maths" in " ".join(causes), causes
else:
    raise AssertionError("it has compiled")
""")
