"""The cpu backend: its vector maths in every instruction set, threads, memory, and what its operators refuse."""

from __future__ import annotations

import ctypes
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FLOATS, close, ids, run, same_bits, ulp
from environment import ROOT, python_environment
from torch import Tensor
from truth import Pyramid, lay_out, pyramid

from frs_kernels import backends, fsr_loss
from frs_kernels.ops import SCHEMAS, VERBS

HERE = backends.why_not("cpu", "cpu")
needs_cpu = pytest.mark.skipif(HERE is not None, reason=f"cpu backend: {HERE}")

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

    def test_log1p_and_tail(self, probe):
        for e in (every(0.0, 1.0), torch.linspace(0, 1, 1 << 20)):
            wide = e.double()
            assert worst_ulps(apply(probe.probe_log1p, e), torch.log1p(wide)) <= 2
            assert worst_ulps(apply(probe.probe_tail, e), wide / (1 + wide)) <= 2

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
for dtype, layout in itertools.product(dtypes, ("contiguous", "channels_last", "sliced")):
    for cls_loss, grad_mode in (("bce", "forward"), ("kl", "backward")):
        p = pyramid(rng, sizes=sizes, classes=17, dtype=dtype, layout=layout)
        assert_right(p, "cpu", cls_loss=cls_loss, grad_mode=grad_mode)
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
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


@needs_cpu
@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_no_tensor_is_read_beyond_its_ends(rng, isa):
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    command = [sys.executable, str(Path(__file__).parent / "fenced.py"), str(rng.initial_seed())]
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


# Malformed calls


def junk(source: random.Random) -> Tensor:
    """A tensor that fits nowhere: another shape, dtype, layout or device."""
    make: list[Callable[[], Tensor]] = [
        lambda: torch.zeros(()),
        lambda: torch.zeros(source.randrange(1, 40)),
        lambda: torch.zeros([source.randrange(4) for _ in range(source.choice((2, 3, 5)))]),
        lambda: torch.zeros(1, 0, 2, 2),
        lambda: torch.zeros(1, source.randrange(1, 9), source.randrange(9, 12), 2),
        lambda: torch.zeros(1, 2, 3, 4, dtype=source.choice((torch.int32, torch.bool, torch.complex64, torch.int8))),
        lambda: torch.zeros(1, 2, 3, 4).to_sparse(),
        lambda: torch.zeros(1, 2, 3, 4, device="meta"),
        lambda: torch.zeros(7).as_strided((3, 2), (2, 1)),
        lambda: torch.tensor(math.nan, dtype=torch.float16),
    ]
    return source.choice(make)()


JUNK_NUMBERS = (None, math.nan, math.inf, -math.inf, -1.0, 0.0, "1", 1e400, torch.zeros(2))


def spoil(source: random.Random, arguments: list[Any]) -> list[Any]:
    """The same call with one thing wrong, or two."""
    spoiled = [list(v) if isinstance(v, list) else v for v in arguments]
    for _ in range(source.choice((1, 1, 2))):
        place = source.randrange(len(spoiled))
        value = spoiled[place]
        if isinstance(value, list) and source.random() < 0.8:
            change = source.randrange(4)
            if change == 0 and value:
                value.pop(source.randrange(len(value)))
            elif change == 1:
                value.insert(source.randrange(len(value) + 1), junk(source))
            elif value:
                value[source.randrange(len(value))] = junk(source) if change == 2 else source.choice((None, 3, "x"))
        elif isinstance(value, Tensor) and source.random() < 0.8:
            spoiled[place] = junk(source)
        elif isinstance(value, float):
            spoiled[place] = source.choice(JUNK_NUMBERS)
        else:
            spoiled[place] = source.choice((None, [], [None], "l1", 5, junk(source), [junk(source)]))
    return spoiled


def calls(rng: torch.Generator) -> dict[str, list[Any]]:
    p = pyramid(rng, sizes=((1, 3, 5), (1, 2, 2)))
    x, z = ([v.detach() for v in levels] for levels in (p.x, p.z))
    scores, mass = VERBS["torch"].score(z)
    return {
        "score": [z],
        "imitate": [x, z, scores, mass, torch.tensor(2.0), 0.5, "bce", 2.0, True, True],
        "scale_": [x, torch.tensor(3.0)],
    }


@needs_cpu
@pytest.mark.parametrize("verb", ["score", "imitate", "scale_"])
def test_malformed_calls_of_an_operator_are_refused_and_write_nothing(rng, verb):
    """300 refused calls; one that happens to be well-formed does not count."""
    source = random.Random(int(torch.randint(1 << 30, (), generator=rng)))
    operator = getattr(torch.ops.frs_kernels, verb)
    messages: list[str] = []
    for _ in range(5000):
        arguments = spoil(source, calls(rng)[verb])
        tensors = [t for v in arguments for t in (v if isinstance(v, list) else [v])]
        plain = [t for t in tensors if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"]
        before = [t.clone() for t in plain]
        try:
            operator(*arguments)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            messages.append(str(error))
        else:
            continue
        for t, copy in zip(plain, before, strict=True):
            assert t.shape == copy.shape
            assert torch.equal(t.nan_to_num(), copy.nan_to_num()), messages[-1]
        if len(messages) == 300:
            break
    assert len(messages) == 300
    assert all(len(message) > 20 for message in messages)
    assert VERBS["cpu"].score(calls(rng)["score"][0])[0].isfinite().all()


@needs_cpu
@pytest.mark.parametrize(
    ("verb", "place", "value", "words"),
    [
        ("score", 0, [torch.zeros(1, 2, 3, 4), torch.zeros(2, 3)], ("score: logits[1] (2, 3)", "(N, C, H, W)")),
        ("score", 0, [torch.zeros(1, 2, 3, 4).int()], ("score: logits[0] (1, 2, 3, 4)", "bfloat16")),
        ("imitate", 1, [torch.zeros(1, 7, 3, 5), torch.zeros(1, 7, 2, 3)], ("student[1] (1, 7, 2, 2)", "(1, 7, 2, 3)")),
        ("imitate", 2, torch.zeros(19).half(), ("scores must be float32 or float64",)),
        ("imitate", 2, torch.zeros(38)[::2], ("scores (19)", "contiguous")),
        ("imitate", 2, None, ("scores is None",)),
        ("scale_", 1, None, ("factor is None",)),
        ("imitate", 3, torch.zeros(2).double(), ("scores and norm must have one dtype",)),
        ("imitate", 4, torch.zeros(1), ("factor must be 0-dim", "(1)")),
        ("imitate", 6, "l1", ("'l1' is unknown", "'mse', 'bce', 'kl'")),
        ("imitate", 7, 0.0, ("temperature must be positive and finite, got 0",)),
        ("scale_", 1, torch.tensor(3), ("factor must be float32",)),
    ],
)
def test_a_refusal_says_what_is_wrong(rng, verb, place, value, words):
    arguments = calls(rng)[verb]
    arguments[place] = value
    with pytest.raises(ValueError) as error:
        getattr(torch.ops.frs_kernels, verb)(*arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@needs_cpu
def test_a_gradient_with_an_overlap_is_not_a_run(dtype):
    """Four numbers in two places of memory, with a gap of two: as many places as numbers."""
    overlapping = torch.ones(8, dtype=dtype).as_strided((1, 1, 2, 2), (4, 4, 0, 3))
    other = torch.ones(1, 1, 2, 2, dtype=dtype)
    with pytest.raises(ValueError, match=r"grads\[1\] \(1, 1, 2, 2\) overlaps itself"):
        VERBS["cpu"].scale_([other, overlapping], torch.tensor(2.0))
    assert (overlapping == 1).all()
    assert (other == 1).all()
