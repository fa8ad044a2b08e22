"""What is Triton's own: one launch whatever differs among the entries, in which order; what makes it compile again."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from columns import Entry, Results, Term, arguments, assert_right, columns
from torch import Tensor

from frs_kernels import backends
from frs_kernels.ops import VERBS

if reason := backends.why_not("triton", "cpu"):
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

from frs_kernels.triton import imitate, levels, score
from frs_kernels.triton.levels import number_of, size_of

ROOT = Path(__file__).resolve().parents[1]
PLACES = ((2, 4, 8), (2, 3, 5), (2, 1, 1))  # (N, H, W) of a level


def entries_of(rng: torch.Generator, kinds: list[tuple[torch.dtype, torch.memory_format, int]]) -> list[Entry]:
    """An entry of every level for each term's (dtype, layout, channels)."""

    def make(level: int, dtype: torch.dtype, layout: torch.memory_format, channels: int) -> Tensor:
        n, h, w = PLACES[level]
        return torch.randn(n, channels, h, w, generator=rng).to(dtype).contiguous(memory_format=layout)

    return [
        Entry(make(level, *kind), make(level, *kind), level, term)
        for term, kind in enumerate(kinds)
        for level in range(len(PLACES))
    ]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    run = interpreter.InterpretedFunction.run

    def count(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", count)
    return names


def test_a_call_is_one_launch_whatever_its_entries(rng, launches):
    plain, last = torch.contiguous_format, torch.channels_last
    kinds = [
        (torch.float32, plain, 6),
        (torch.bfloat16, last, 8),
        (torch.float16, plain, 3),
        (torch.bfloat16, plain, 5),
    ]
    entries, terms = (
        entries_of(rng, kinds),
        [Term("mse"), Term("bce", 0.5), Term("smooth_l1"), Term("kl", temperature=2.0)],
    )
    scores, norm = torch.rand(2 * (32 + 15 + 1), generator=rng), torch.ones(3)
    call = (entries, terms, scores, norm)
    assert_right(Results(*VERBS["triton"].imitate(*arguments(*call))), *call)
    assert launches == ["imitate_kernel"]
    VERBS["triton"].score([e.z for e in entries[:4]])
    assert launches == ["imitate_kernel", "score_kernel"]


def test_logits_lie_behind_features_and_run_from_the_last_to_the_first(rng, monkeypatch):
    """So that the teacher's are read from where `score` stopped."""
    plain = torch.contiguous_format
    entries = entries_of(rng, [(torch.float32, plain, 4), (torch.float32, plain, 4), (torch.bfloat16, plain, 4)])
    terms = [Term("bce"), Term("mse"), Term("l1")]
    table = imitate.Table(*columns(entries, terms)[:-2])
    student, teacher = [e.x for e in entries], [e.z for e in entries]
    order, segments = imitate.segments_of(student, teacher, student, table, want_loss=True)
    assert order == [3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert [(s.loss, s.first, s.last) for s in segments] == [("mse", 0, 3), ("l1", 3, 6), ("bce", 6, 9)]
    seen: list[int] = []
    store = imitate.store_partial
    monkeypatch.setattr(
        imitate, "store_partial", lambda *args: (seen.append(int(args[2].handle.data[0])), store(*args))[1]
    )
    VERBS["triton"].imitate(*arguments(entries, terms, torch.rand(96, generator=rng), torch.ones(3)))
    assert seen == sorted(seen, reverse=True)


def test_an_entry_that_nobody_wants_has_no_program(rng, launches):
    plain = torch.contiguous_format
    entries = entries_of(rng, [(torch.float32, plain, 4)] * 2)
    terms = [Term("bce", want_grad=False), Term("mse")]
    call = (entries, terms, torch.rand(96, generator=rng), torch.ones(3), False)
    assert_right(Results(*VERBS["triton"].imitate(*arguments(*call))), *call)
    nothing = [Term("bce", want_grad=False)] * 2
    total, values, grads = VERBS["triton"].imitate(*arguments(entries, nothing, *call[2:]))
    assert (total.numel(), values.numel(), grads) == (0, 0, [])
    assert launches == ["imitate_kernel"]


def cut(packed: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """(N, P, C) as levels."""
    rows = packed.split([h * w for h, w in sizes], 1)
    return [x.unflatten(1, size).permute(0, 3, 1, 2) for x, size in zip(rows, sizes, strict=True)]


@pytest.mark.parametrize(
    ("channels", "dtype", "vector"),
    [(8, torch.float32, 4), (8, torch.bfloat16, 8), (12, torch.float32, 4), (12, torch.bfloat16, 1),
     (7, torch.float32, 1)],
)  # fmt: skip
def test_levels_of_a_packed_tensor_take_wide_loads(rng, channels, dtype, vector):
    """As channels_last ones do: where an image or a level begins between two multiples of 16 bytes, none does."""
    sizes = [(4, 8), (3, 5), (1, 1)]
    packed = torch.randn(2, sum(h * w for h, w in sizes), channels, generator=rng).to(dtype)
    levels_ = cut(packed, sizes)
    dense = [x.contiguous(memory_format=torch.channels_last) for x in levels_]
    terms, table = [Term("bce")], [[0, 1, 2], [0] * 3, [1.0] * 3, [0.0] * 3]
    columns_ = imitate.Table(*table, *([getattr(t, name) for t in terms] for name in Term._fields))
    for student, teacher in ((levels_, levels_), (dense, levels_), (levels_, dense)):
        _, (segment,) = imitate.segments_of(student, teacher, dense, columns_, want_loss=True)
        assert (segment.layout, segment.gaps, segment.vector) == ("nhwc", True, vector)
    _, (segment,) = score.segments_of(levels_)
    assert (segment.layout, segment.gaps, segment.vector) == ("nhwc", True, vector)
    _, (segment,) = score.segments_of(dense)
    assert (segment.layout, segment.gaps) == ("nhwc", False)
    assert levels.columns_of(dense, [segment]).strides is None


def test_lines_apart_are_no_reason_for_the_strided_body(rng):
    columns_ = torch.randn(2, 4, 48, generator=rng)[:, :, :32].unflatten(2, (4, 8))
    of_more = torch.randn(2, 12, 4, 8, generator=rng)[:, 4:8]
    _, (segment,) = score.segments_of([columns_, of_more])
    assert (segment.layout, segment.gaps, segment.vector) == ("nchw", True, 4)
    odd = torch.randn(2, 4, 37, generator=rng)[:, :, :32].unflatten(2, (4, 8))
    _, (segment,) = score.segments_of([columns_, odd])
    assert (segment.layout, segment.gaps, segment.vector) == ("nchw", True, 1)
    apart = torch.randn(2, 4, 4, 9, generator=rng)[..., :8]
    _, (segment,) = score.segments_of([columns_, apart])
    assert segment.layout == "strided"


@triton.jit
def decode(numbers, sizes, numbers_ptr, sizes_ptr):
    for i in tl.static_range(len(numbers)):
        tl.store(numbers_ptr + i, number_of(numbers[i][0], numbers[i][1]))
        tl.store(sizes_ptr + i, size_of(sizes[i]).to(tl.int64))


def test_numbers_reach_a_kernel_to_the_last_bit():
    numbers = [0.0, 1.0, 0.1, 0.005, -1 / 3, 5e-324, 2.2e-308, 1.7e308, math.pi, -math.inf, 2.0**31, 1 + 2.0**-52]
    sizes = [0, 1, 2, 15, 16, 1 << 20, (1 << 30) - 1, 1 << 31, 1 << 40, 3, 4, 5]
    found, counts = torch.empty(len(numbers), dtype=torch.float64), torch.empty(len(sizes), dtype=torch.int64)
    decode[(1,)](tuple(map(levels.halves, numbers)), levels.odd(sizes), found, counts)
    assert torch.equal(found.view(torch.int64), torch.tensor(numbers, dtype=torch.float64).view(torch.int64))
    assert counts.tolist() == sizes


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 15, 16, 20, 80, 91, 720, 1000])
@pytest.mark.parametrize("largest", [8, 16, 64])
def test_a_tile_fits_its_channels(channels, largest):
    block = levels.block_of(channels, largest)
    assert block <= min(channels, largest)
    assert block & (block - 1) == 0
    chunk = levels.chunk_of(channels, block, 64)
    assert chunk % block == 0
    assert 0 <= -(-channels // chunk) * chunk - channels < 2 * chunk


def in_the_compiler(script: str) -> None:
    """Run a script with tools/codegen.py at hand and without the interpreter."""
    pytest.importorskip("triton.backends.nvidia", reason="Triton comes with its compiler for NVIDIA on Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tools')\n{script}"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_other_sizes_and_numbers_compile_nothing_again():
    in_the_compiler("""
import torch, codegen
from codegen import GPUTarget, create_function_from_signature, make_backend
from frs_kernels.triton import imitate

def specialisation(n, sizes, weight, scale, eps, temperature, beta):
    student = [torch.zeros(n, c, h, w) for c in (256, 80) for h, w in sizes]
    scores = torch.zeros(n * sum(h * w for h, w in sizes))
    count = len(sizes)
    recorder, kernel = codegen.Recorder(None), imitate.imitate_kernel
    imitate.imitate_kernel = recorder
    imitate.imitate(student, student, scores, torch.ones(count), [*range(count)] * 2, [0] * count + [1] * count,
                    [scale] * 2 * count, [eps] * 2 * count, ["smooth_l1", "bce"], [weight] * 2, [torch.ones(()), None],
                    [temperature] * 2, [beta] * 2, [True] * 2, True)
    imitate.imitate_kernel = kernel
    ((args, kwargs),) = recorder.launches
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    return str(bind(*args, **kwargs)[1])

first = specialisation(1, [(8, 16), (4, 4), (3, 5)], 1.0, 1.0, 0.0, 2.0, 1.0)
assert first == specialisation(3, [(31, 47), (16, 16), (1, 1)], 0.005, 0.25, 1e-9, 0.5, 0.0)
assert first == specialisation(16, [(1, 1), (2, 1), (64, 64)], -16.0, 16.0, 2.0**40, 3.0, 16.0)
""")


def test_a_loss_without_its_maths_does_not_compile():
    in_the_compiler("""
import codegen
from frs_kernels.losses import LOSSES
LOSSES["quartic"] = LOSSES["mse"]
try:
    codegen.build(codegen.Case("imitate", "fp32", "fp32", "nchw", 16, "quartic", "loss+grad"))
except Exception as error:
    causes = []
    while error:
        causes.append(str(error))
        error = error.__cause__
    assert "a loss without its maths" in " ".join(causes), causes
else:
    raise AssertionError("it has compiled")
""")


def test_no_product_is_fused_where_student_and_teacher_may_agree():
    """A fused sigmoid(x) - sigmoid(z) is not 0 where x is z: the product of one is rounded, the other's is not."""
    in_the_compiler("""
import re, codegen
codegen.ARCHITECTURES = (90,)
kept = []
codegen.read = lambda case, architecture, cubin: kept.append(cubin)
compiled = codegen.triton.compile
codegen.triton.compile = lambda *args, **kwargs: kept.append(compiled(*args, **kwargs)) or kept[-1]
codegen.build(codegen.Case("imitate", "fp32", "fp32", "nchw", 16, "bce", "grad"))
ptx = kept[0].asm["ptx"]
products = dict(re.findall(r"mul\\.rn\\.f32 (%[rf]\\d+), (%[rf]\\d+),", ptx))
assert len(products) >= 16, len(products)
assert not re.search(r"fma\\.rn\\.f32", ptx), "the gradient alone has no sum of a product"
""")


def test_nothing_to_imitate_is_refused(launches):
    scores, norm = torch.zeros(3), torch.zeros(1)
    with pytest.raises(RuntimeError, match="imitate: student is empty; it needs at least one entry"):
        imitate.imitate([], [], scores, norm, *columns([], [Term("mse")]))
    assert not launches
