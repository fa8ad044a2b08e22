"""The cpu backend: its vector maths in every instruction set, threads and memory."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import close, ids, run, same_bits, ulp
from environment import ROOT, python_environment
from torch import Tensor
from truth import Pyramid, lay_out, pyramid

from frs_kernels import backends, fsr_loss
from frs_kernels.ops import SCHEMAS

HERE = backends.why_not("cpu", "cpu")
needs_cpu = pytest.mark.skipif(HERE is not None, reason=f"cpu backend: {HERE}")

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# as setup.py compiles them, and the widest vectors in the oldest instructions, which any machine can run
ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}


def cpu_has(isa: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    order = ("DEFAULT", "AVX2", "AVX512")
    return order.index(capability) >= {"baseline": 0, "avx2": 1, "avx512": 2}[isa] if capability in order else False


@pytest.fixture(scope="module", params=ISA_FLAGS)
def probe(request, tmp_path_factory):
    isa = request.param
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    library = tmp_path_factory.mktemp("probe") / f"{isa}.so"
    command = [
        compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-Wno-psabi", "-ffp-contract=fast", "-fno-math-errno",
        "-fno-trapping-math", f"-DFRS_ISA={isa}", *ISA_FLAGS[isa], f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests/native/probe.cpp"), "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def apply(function: Any, values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    assert values.numel() % 16 == 0
    function(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(values.numel()))
    return out


def every(first: float, last: float, count: int = 1 << 20) -> Tensor:
    """`count` floats from first to last, evenly over their bit patterns: all exponents alike."""
    ends = torch.tensor([first, last]).view(torch.int32).tolist()
    return torch.linspace(*ends, count, dtype=torch.float64).to(torch.int32).view(torch.float32)


def worst_ulps(actual: Tensor, right: Tensor) -> float:
    info = torch.finfo(torch.float32)
    size = torch.maximum(ulp(right, torch.float32), torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64))
    return ((actual.double() - right).abs() / size).max().item()


class TestVectorMaths:
    def test_exp(self, probe):
        """Over all magnitudes, and densely where the result is neither 1 nor 0, subnormal ones included."""
        for a in (every(0.0, math.inf), torch.linspace(0, 106, 1 << 20), torch.linspace(87, 104, 1 << 20)):
            assert worst_ulps(apply(probe.probe_exp_neg, a), torch.exp(-a.double())) <= 2

    def test_log1p(self, probe):
        for e in (every(0.0, 1.0), torch.linspace(0, 1, 1 << 20)):
            assert worst_ulps(apply(probe.probe_log1p, e), torch.log1p(e.double())) <= 2

    def test_slope(self, probe):
        """sigmoid(x) - sigmoid(z) within 5 ulp of the larger of what is subtracted; 0 where they agree."""
        for x in (every(1e-30, 87.0), -every(1e-30, 87.0), torch.linspace(-80, 80, 1 << 20)):
            out = torch.empty(3, x.numel())
            probe.probe_slope(*(ctypes.c_void_p(v.data_ptr()) for v in (x, out)), ctypes.c_int64(x.numel()))
            tail = torch.sigmoid(-x.double().abs())
            for got, side in zip(out, (1, -1), strict=False):
                miss = torch.sigmoid(side * x.double().abs() / 2)
                right = torch.where(x >= 0, miss - tail, tail - miss)
                worst = ((got.double() - right).abs() / ulp(miss, torch.float32)).max().item()
                assert worst <= 5
            assert (out[2] == 0).all()

    def test_sigmoid(self, probe):
        for x in (every(0.0, 1e30), -every(0.0, 1e30), torch.linspace(-110, 110, 1 << 20)):
            assert worst_ulps(apply(probe.probe_sigmoid, x), torch.sigmoid(x.double())) <= 3

    def test_the_ends(self, probe):
        special = torch.tensor([0.0, math.inf, math.nan, 1e-45, 105.0, 104.0, 200.0, 3e38] * 2)
        got = apply(probe.probe_exp_neg, special)
        assert got[:3].tolist()[:2] == [1.0, 0.0]
        assert got[2].isnan()
        assert got[3:8].tolist() == torch.exp(-special[3:8].double()).float().tolist()
        x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0, 1.0, -1.0] * 2)
        got = apply(probe.probe_sigmoid, x)
        assert got[:2].tolist() == [1.0, 0.0]
        assert got[2:4].isnan().all()
        assert got[4:6].tolist() == [0.5, 0.5]

    @pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, 2), (torch.float16, 3)], ids=ids)
    def test_half_precision_there_and_back(self, probe, rng, dtype, code):
        """Every one of the 65,536 numbers widens exactly; every rounding is torch's."""
        narrow = (
            torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:-3]
        )  # an end that fills no vector
        wide = torch.empty(narrow.numel())
        size = ctypes.c_int64(narrow.numel())
        pointers = [ctypes.c_void_p(v.data_ptr()) for v in (narrow, wide)]
        probe.probe_widen(pointers[0], code, pointers[1], size)
        right = narrow.float()
        assert torch.equal(wide.isnan(), right.isnan())
        assert same_bits(wide.nan_to_num(), right.nan_to_num())
        between = torch.cat([
            torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=rng).to(torch.int32).view(torch.float32),
            right, right * (1 + 2**-11), right * (1 + 2**-8), right * (1 - 2**-12), every(1e-9, 1e-3),
        ])  # fmt: skip
        out = torch.empty(between.numel(), dtype=dtype)
        probe.probe_narrow(
            ctypes.c_void_p(between.data_ptr()), code, ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.numel())
        )
        assert torch.equal(out.isnan(), between.isnan())
        keep = ~between.isnan()
        assert same_bits(out[keep], between[keep].to(dtype))


SWEEP = """
import itertools, sys
import torch
from cases import assert_right
from truth import pyramid
torch.set_num_threads(1)
rng = torch.Generator().manual_seed(int(sys.argv[1]))
sizes = ((2, 8, 12), (1, 1, 1), (1, 37, 31))
dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
for dtype, layout in itertools.product(dtypes, ("contiguous", "channels_last", "sliced", "rows")):
    for feat_loss, cls_loss, grad_mode in (("mse", "bce", "forward"), ("l1", "kl", "backward"),
                                           ("smooth_l1", "kl", "forward"), ("mse", "qfl", "forward"),
                                           ("l1", "qfl_detached", "forward")):
        p = pyramid(rng, sizes=sizes, classes=17, dtype=dtype, layout=layout)
        beta = 1.7 if "qfl" in cls_loss else 0.7
        assert_right(p, "cpu", feat_loss=feat_loss, beta=beta, cls_loss=cls_loss, grad_mode=grad_mode)
for dtype, layout in itertools.product(dtypes, ("contiguous", "channels_last")):
    # Gradients of more than 4 MB, written past the caches; rows begin at every alignment.
    p = pyramid(rng, sizes=((1, 45, 47),), channels=1003, classes=1003, dtype=dtype, layout=layout)
    assert_right(p, "cpu")
print(torch.ops.frs_kernels.instructions())
"""


@needs_cpu
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_every_instruction_set_is_right(rng, isa):
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    command = [sys.executable, "-c", SWEEP, str(rng.initial_seed())]
    environment = python_environment(FRS_CPU=isa)
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent / "helpers", env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


@needs_cpu
@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_no_tensor_is_read_beyond_its_ends(rng, isa):
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    command = [sys.executable, str(Path(__file__).parent / "helpers" / "fenced.py"), str(rng.initial_seed())]
    environment = python_environment(FRS_CPU=isa)
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]
    assert subprocess.run([*command, "beyond"], capture_output=True, env=environment).returncode == -signal.SIGSEGV


FLUSHED = """
import torch, frs_kernels
torch.set_flush_denormal(True)
x = torch.full((20,), 1e-5).half()
torch.ops.frs_kernels.scale_([x], torch.tensor(2.0))
print(x.float().min().item(), x.float().max().item())
"""


@needs_cpu
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_subnormal_fp16_survives_where_fp32_flushes_its_own(isa):
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    environment = python_environment(FRS_CPU=isa)
    result = subprocess.run([sys.executable, "-c", FLUSHED], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    right = (2 * torch.tensor(1e-5).half().float()).item()
    assert [float(word) for word in result.stdout.split()] == [right, right]


@needs_cpu
@pytest.mark.parametrize(("asked", "works"), [("", True), ("sse9", False)])
def test_an_unknown_instruction_set_is_refused(asked, works):
    code = "import torch, frs_kernels; print(torch.ops.frs_kernels.instructions())"
    environment = python_environment(FRS_CPU=asked)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode == 0) == works
    if not works:
        assert "FRS_CPU='sse9' is unknown; the valid ones are baseline, avx2, avx512" in result.stderr


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_any_number_of_threads_gives_the_same_bits(rng, layout, dtype):
    p = pyramid(rng, sizes=((2, 60, 70), (2, 9, 9), (2, 1, 1)), channels=19, classes=40, layout=layout, dtype=dtype)
    answers = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(run(p, "cpu"))
    finally:
        torch.set_num_threads(before)
    first, *others = [[*a.grads, *a.mask, a.loss, a.mass, a.feat_per_level, a.cls_per_level] for a in answers]
    for other in others:
        assert all(same_bits(v, w) for v, w in zip(first, other, strict=True))


@needs_cpu
@pytest.mark.parametrize("grad_mode", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_beyond_the_gradients_is_scores_and_little(rng, grad_mode, layout):
    """Everything that torch's allocator gives out during a step, whether given back meanwhile or not."""
    p = pyramid(rng, sizes=((2, 100, 120), (2, 25, 30)), channels=64, classes=80, layout=layout)
    fsr_loss(*p.inputs, backend="cpu", grad_mode=grad_mode).backward()
    for v in p.student:
        v.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fsr_loss(*p.inputs, backend="cpu", grad_mode=grad_mode).backward()
    taken = sum(event.self_cpu_memory_usage for event in profile.events() if event.name == "[memory]"
                and event.self_cpu_memory_usage > 0)  # fmt: skip
    taken = taken or sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    grads = sum(v.numel() * v.element_size() for v in p.student)
    scores = 4 * sum(z[:, 0].numel() for z in p.z)
    assert grads + scores <= taken <= grads + scores + (1 << 20)


@needs_cpu
def test_the_schemas_are_those_of_the_other_backends():
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        native = torch._C._dispatch_dump(f"frs_kernels::{name}")
        assert f"schema: frs_kernels::{schema}" in native.replace("\n", " ")


@needs_cpu
@pytest.mark.parametrize("packed", ["student", "teacher", "both"])
@pytest.mark.parametrize(("layout", "dense"), [("rows", "channels_last"), ("columns", "contiguous")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_levels_of_a_packed_tensor_are_walked_as_dense_ones(rng, dtype, layout, dense, packed):
    """The same tiles and rows: another walk would add in another order."""
    sizes = ((2, 30, 35), (2, 9, 9), (2, 1, 3))  # of one position contiguous is channels_last
    p = pyramid(rng, sizes=sizes, channels=19, classes=91, dtype=dtype, layout=dense)
    changed = {"student": "sx", "teacher": "tz", "both": "stxz"}[packed]
    other = Pyramid(*(
        [lay_out(v.detach(), layout).requires_grad_(v.requires_grad) for v in levels] if name in changed else levels
        for name, levels in zip("stxz", p.inputs, strict=True)
    ))  # fmt: skip
    a, b = run(p, "cpu"), run(other, "cpu")
    for v, w in zip([*a.grads, *a.mask, a.loss, a.mass], [*b.grads, *b.mask, b.loss, b.mass], strict=True):
        assert same_bits(v, w)
    assert all(g.is_contiguous(memory_format=FORMATS[dense]) for g in b.grads)


@needs_cpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_layouts_of_student_and_teacher_may_differ_level_by_level(rng, layout):
    layouts = ["contiguous", "channels_last", "transposed"]
    p = pyramid(rng, sizes=((2, 5, 7), (2, 4, 4), (1, 1, 9)), layout=layout)
    mixed = Pyramid(*(
        None if levels is None else [
            lay_out(v.detach(), layouts[(i + j) % 3]).requires_grad_(v.requires_grad) for i, v in enumerate(levels)
        ] for j, levels in enumerate(p.inputs)
    ))  # fmt: skip
    plain, other = run(p, "cpu"), run(mixed, "cpu")
    assert close(plain.loss, other.loss)
    for a, b in zip(plain.grads, other.grads, strict=True):
        assert close(a, b, 8)
