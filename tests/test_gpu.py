"""What only a GPU shows: native kernels, streams, graphs, memory, launches. Everything else runs on both."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FLOATS, assert_right, ids, relative, run, same_bits
from columns import Entry, Term, columns
from environment import python_environment
from torch import Tensor, nn
from truth import Pyramid, pyramid, truth

from frs_kernels import FeatureAdapter, FSRLoss, backends, fsr_loss, richness_mask
from frs_kernels.ops import VERBS

pytestmark = pytest.mark.gpu
MODES = pytest.mark.parametrize("grad_mode", ["forward", "backward"])
# An FPN of an image of 256 x 320: odd sizes at the coarse levels, channels that fill tiles and some that do not.
FPN = ((2, 32, 40), (2, 16, 20), (2, 8, 10), (2, 4, 5), (2, 2, 3))
WIDE = {"sizes": FPN, "channels": 64, "classes": 90, "device": "cuda"}


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


def step(p: Pyramid, backend: str, **options: Any) -> list[Tensor]:
    """Loss and gradients, on the current stream, with nothing that waits."""
    loss = fsr_loss(*p.inputs, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, p.student)]


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@MODES
def test_a_whole_pyramid_is_right(rng, backend, dtype, layout, grad_mode):
    assert_right(pyramid(rng, dtype=dtype, layout=layout, **WIDE), backend, grad_mode=grad_mode)


@pytest.mark.parametrize(("feat_loss", "cls_loss"), [("mse", "bce"), ("l1", "kl"), ("smooth_l1", "bce"), ("l1", "qfl")])
def test_gradcheck_natively(rng, backend, feat_loss, cls_loss):
    p = pyramid(rng, sizes=((2, 3, 3), (1, 1, 2)), channels=3, classes=5, dtype=torch.float64, device="cuda")

    def call(*leaves: Tensor) -> Tensor:
        losses = {"feat_loss": feat_loss, "cls_loss": cls_loss}
        return fsr_loss(list(leaves[:2]), p.t, list(leaves[2:]), p.z, backend=backend, **losses)

    # fp64 sums of 2^-53 leave room below the tolerance; the sums must also be the same every time.
    assert torch.autograd.gradcheck(call, p.student, nondet_tol=0.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_natively(rng, backend, layout):
    p = pyramid(rng, sizes=((2, 3, 5), (1, 1, 1)), layout=layout, device="cuda")
    x = [v.detach() for v in p.x]
    entries = [Entry(v, z, level, term) for term in range(2) for level, (v, z) in enumerate(zip(x, p.z, strict=True))]
    table = columns(entries, [Term("bce"), Term("smooth_l1", 0.5, torch.tensor(2.0, device="cuda"), want_grad=False)])
    scores, mass = VERBS[backend].score(p.z)
    verbs = VERBS[backend]
    torch.library.opcheck(verbs.score, (p.z,))
    torch.library.opcheck(verbs.imitate, (x + x, p.z + p.z, scores, mass, *table))
    torch.library.opcheck(verbs.distill, (x + x, p.z + p.z, p.z, *table))
    torch.library.opcheck(verbs.scale_, (x, torch.tensor(2.0, device="cuda")))


@MODES
def test_a_hundred_runs_give_the_same_bits(rng, backend, grad_mode):
    p = pyramid(rng, **WIDE)
    first = step(p, backend, grad_mode=grad_mode)
    for _ in range(100):
        assert all(same_bits(a, b) for a, b in zip(first, step(p, backend, grad_mode=grad_mode), strict=True))


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "every option": lambda: {
        "normalizer": "mass_channels", "eps": 1e-3, "level_weights": [1, 0.5, 2.0, 0, 1], "cls_loss": "kl",
        "feat_weight": torch.tensor(0.3, device="cuda"), "cls_weight": 0.1,
    },
    "other losses": lambda: {"feat_loss": "smooth_l1", "beta": 0.5, "cls_loss": "kl", "temperature": 2.0},
}  # fmt: skip


@MODES
@pytest.mark.parametrize("options", OPTIONS)
def test_the_host_never_waits(rng, backend, grad_mode, options):
    p, chosen = pyramid(rng, **WIDE), OPTIONS[options]()
    expected = step(p, backend, grad_mode=grad_mode, **chosen)  # kernels are compiled and loaded here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step(p, backend, grad_mode=grad_mode, **chosen)
        richness_mask(p.z, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))


@MODES
@pytest.mark.parametrize("options", OPTIONS)
def test_a_captured_graph_replays_with_other_inputs(rng, backend, grad_mode, options):
    p, chosen = pyramid(rng, **WIDE), OPTIONS[options]()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(p, backend, grad_mode=grad_mode, **chosen)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(p, backend, grad_mode=grad_mode, **chosen)
    for _ in range(3):
        other = pyramid(rng, **WIDE)
        with torch.no_grad():
            for levels, values in zip(p.inputs, other.inputs, strict=True):
                for level, value in zip(levels, values, strict=True):
                    level.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step(other, backend, grad_mode=grad_mode, **chosen), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_captured_step_of_an_optimizer_is_that_step(rng, backend, optimizer):
    """Forward, backward and a capturable optimizer in one graph: the weights are those of eager steps."""
    p = pyramid(rng, **WIDE)

    def made() -> tuple[FeatureAdapter, torch.optim.Optimizer]:
        torch.manual_seed(0)
        adapter = FeatureAdapter(64, 64, len(FPN)).cuda()
        return adapter, optimizer(adapter.parameters(), 1e-3, capturable=True)

    def train(adapter: FeatureAdapter, by: torch.optim.Optimizer) -> None:
        by.zero_grad(set_to_none=True)
        fsr_loss(adapter(p.s), p.t, p.x, p.z, backend=backend).backward()
        by.step()

    eager, captured = made(), made()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(*captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(*captured)
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        train(*eager)
    for a, b in zip(captured[0].parameters(), eager[0].parameters(), strict=True):
        assert relative(a.detach(), b.detach()) <= 1e-6


def test_two_streams_at_once_do_not_meet(rng, backend):
    """Each launch has slots and a counter of its own."""
    pyramids = [pyramid(rng, **WIDE) for _ in range(2)]
    expected = [step(p, backend) for p in pyramids]
    streams = [torch.cuda.Stream() for _ in pyramids]
    torch.cuda.synchronize()
    results: list[list[list[Tensor]]] = [[], []]
    for _ in range(50):
        for number, (p, stream) in enumerate(zip(pyramids, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[number].append(step(p, backend))
    torch.cuda.synchronize()
    for right, runs in zip(expected, results, strict=True):
        for actual in runs:
            assert all(same_bits(a, b) for a, b in zip(right, actual, strict=True))


def test_the_current_stream_is_used(rng, backend):
    """Inputs that a slow kernel on the same stream still has to make."""
    p = pyramid(rng, **WIDE)
    expected = step(p, backend)
    late = p.map(torch.zeros_like)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        for levels, values in zip(late.inputs, p.inputs, strict=True):
            for level, value in zip(levels, values, strict=True):
                level.copy_(value)
        with torch.enable_grad():
            actual = step(late, backend)
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one NVIDIA GPU only")
def test_another_device_than_the_current_one(rng, backend):
    p = pyramid(rng, **WIDE)
    other = p.map(lambda v: v.to("cuda:1"))
    with torch.cuda.device(0):
        actual = step(other, backend)
    assert all(v.device == torch.device("cuda:1") for v in actual)
    for a, b in zip(step(p, backend), actual, strict=True):
        assert relative(a.cpu(), b.cpu()) <= 4 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_level_of_more_than_2_to_the_31_elements(backend, layout):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of device memory")
    shape = (2, 512, 2048, 1032)
    s = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    t = torch.zeros_like(s)
    assert s.numel() > 1 << 31
    ends = [(0, 0, 0, 0), (0, -1, -1, -1), (1, 0, 0, 0), (1, 300, 1000, 500), (1, -1, -1, -1)]
    for number, place in enumerate(ends):
        s[place] = number + 1.0
    s.requires_grad_()
    z = torch.full((2, 1, *shape[2:]), -3.0, device="cuda")
    terms = fsr_loss([s], [t], None, [z], backend=backend, return_terms=True)
    share = 1.0 / (2 * shape[2] * shape[3])
    assert abs(terms.feat.item() - 55 * share) <= 1e-6 * 55 * share
    (grad,) = torch.autograd.grad(terms.loss, s)
    for number, place in enumerate(ends):
        expected = 2 * (number + 1.0) * share
        assert abs(grad[place].item() - expected) <= torch.finfo(torch.bfloat16).eps * expected
    assert sum(int(image.count_nonzero()) for image in grad) == len(ends)


def test_reduce_overhead(rng, backend):
    """torch.compile's CUDA graphs: several steps, so that they are recorded and replayed."""
    compiled = torch.compile(lambda *inputs: fsr_loss(*inputs, backend=backend), fullgraph=True, mode="reduce-overhead")
    p = pyramid(rng, **WIDE)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            for level in (*p.t, *p.z):
                level.add_(0.01)
        loss = compiled(*p.inputs)
        grads = [g.clone() for g in torch.autograd.grad(loss, p.student)]
        expected = run(p, backend)
        assert abs(loss.detach() - expected.loss) <= 1e-6 * expected.loss
        for a, b in zip(grads, expected.grads, strict=True):
            assert relative(a, b) <= 4 * torch.finfo(a.dtype).eps
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=ids)
def test_autocast_with_a_gradient_scaler(rng, backend, dtype):
    """The loss of a few steps falls, no step is skipped, and the gradients are those without scaling."""
    torch.manual_seed(0)
    neck, head, adapter = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 20, 1), FeatureAdapter(16, 8, 1)
    model = nn.ModuleList([neck, head, adapter]).cuda()
    distil = FSRLoss(1e-4, 1e-4, backend=backend)
    images, t, z = (torch.randn(2, c, 16, 20, generator=rng).cuda() for c in (3, 8, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0, enabled=dtype == torch.float16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            feats = [neck(images)]
            logits = [head(v) for v in feats]
            assert logits[0].dtype == dtype
            loss = distil(adapter(feats), [t], logits, [z])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(torch.isfinite(v.grad).all() and v.grad.any() for v in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if dtype == torch.float16:
        assert scaler.get_scale() == 65536.0


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_is_gradients_and_scores_and_a_megabyte(rng, backend, grad_mode, layout):
    # levels large enough that one more full-size tensor is more than the megabyte
    p = pyramid(rng, sizes=((2, 100, 168), (2, 50, 84)), channels=64, classes=80, layout=layout, device="cuda")
    step(p, backend, grad_mode=grad_mode)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = step(p, backend, grad_mode=grad_mode)
    torch.cuda.synchronize()
    extra = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    gradients = sum(v.numel() * v.element_size() for v in p.student)
    scores = sum(4 * z.shape[0] * z.shape[2] * z.shape[3] for z in p.z)
    assert extra <= gradients + scores + (1 << 20)
    assert len(result) == 1 + len(p.student)


def launches(call: Callable[[], object]) -> tuple[list[str], list[str]]:
    """The names of the kernels that a call launches, and of what fills memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    fills = [name for name in names if "Memset" in name or "FillFunctor" in name]
    return [name for name in names if name not in fills and "Memcpy" not in name], fills


FILLS = {"cuda": 1, "triton": 2}  # of a call's counters: Triton's score and imitate have a workspace each


@pytest.mark.parametrize("options", [{}, {"return_terms": True}, {"feat_loss": "l1", "cls_loss": "kl"}], ids=str)
def test_a_default_step_is_three_launches_and_a_fill(rng, backend, options):
    """score, imitate, scale_. The upstream gradient is given, or autograd would make it with one more fill."""
    p = pyramid(rng, **WIDE)
    one = torch.ones((), device="cuda")

    def call() -> None:
        loss = fsr_loss(*p.inputs, backend=backend, **options)
        torch.autograd.grad(loss.loss if options.get("return_terms") else loss, p.student, one)

    call()
    kernels, fills = launches(call)
    copies = 2 if options.get("return_terms") else 0  # the value of each term is a tensor of its own
    assert 0 < len(kernels) <= 3 + copies, kernels
    assert len(fills) <= FILLS[backend], fills


def test_features_of_another_dtype_add_a_launch(rng):
    if backends.why_not("cuda", "cuda") is not None:
        pytest.skip("no cuda backend")
    p, logits = (pyramid(rng, dtype=dtype, **WIDE) for dtype in (torch.float32, torch.bfloat16))
    one = torch.ones((), device="cuda")

    def call() -> None:
        loss = fsr_loss(p.s, p.t, logits.x, logits.z, backend="cuda")
        torch.autograd.grad(loss, [*p.s, *logits.x], one)

    call()
    kernels, fills = launches(call)
    assert 0 < len(kernels) <= 4, kernels
    assert len(fills) <= 1, fills


STEP = """
import sys, torch
from truth import pyramid
from frs_kernels import fsr_loss
rng = torch.Generator().manual_seed(int(sys.argv[1]))
sizes = ((2, 32, 40), (2, 16, 20), (2, 8, 10), (2, 4, 5), (2, 2, 3))
p = pyramid(rng, sizes=sizes, channels=64, classes=90, dtype=torch.bfloat16, device="cuda")

def step():
    loss = fsr_loss(*p.inputs, backend="cuda")
    return [loss.detach(), *torch.autograd.grad(loss, p.student)]

for _ in range(3):
    step()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
for _ in range(10):
    graph.replay()
    torch.cuda.synchronize()
    results = [[v.clone() for v in captured], step()]
torch.save([[v.cpu() for v in result] for result in results], sys.argv[2])
"""


def test_a_launch_that_begins_beside_the_one_before_changes_no_bit(rng, tmp_path):
    """Programmatic dependent launch, which FRS_PDL=0 switches off; eager, and from a graph."""
    if backends.why_not("cuda", "cuda") is not None:
        pytest.skip("no cuda backend")
    results = []
    for asked in ("1", "0"):
        command = [sys.executable, "-c", STEP, str(rng.initial_seed()), str(tmp_path / f"{asked}.pt")]
        environment = python_environment(FRS_PDL=asked)
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent / "helpers", env=environment
        )
        assert done.returncode == 0, done.stderr
        results += torch.load(tmp_path / f"{asked}.pt")
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_image_sizes_compile_nothing_again(rng):
    from frs_kernels.triton.imitate import imitate_kernel
    from frs_kernels.triton.score import score_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for k in (imitate_kernel, score_kernel) for cache in k.device_caches.values())

    step(pyramid(rng, **WIDE), "triton")
    before = compiled()
    for height, width in ((31, 47), (48, 16), (33, 33)):
        sizes = tuple((3, max(1, height >> i), max(1, width >> i)) for i in range(5))
        assert_right(pyramid(rng, **WIDE | {"sizes": sizes}), "triton")
    assert compiled() == before


def test_auto_takes_the_first_gpu_backend(rng):
    p = pyramid(rng, **WIDE)
    expected = truth(p.map(torch.Tensor.cpu)).loss
    loss = fsr_loss(*p.inputs).detach().cpu()
    assert abs(loss - expected) <= 1e-6 * expected
    assert backends.choose("auto", "cuda") in ("cuda", "triton")
    first = "cuda" if backends.why_not("cuda", "cuda") is None else "triton"
    assert same_bits(loss, fsr_loss(*p.inputs, backend=first).detach().cpu())
