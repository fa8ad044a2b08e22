"""What only a GPU shows of the losses along rows: the native kernels, streams, graphs, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from cases import FLOATS, ids, same_bits
from torch import Tensor

from frs_kernels import backends, cwd_loss, pkd_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.why_not("cuda", "cuda") is not None, reason="no cuda backend"),
]
# An FPN of an image of 256 x 320: rows of odd length at the coarse levels, channels that fill packets and some not.
FPN = ((2, 64, 32, 40), (2, 64, 16, 20), (2, 64, 7, 11), (2, 90, 4, 5), (2, 64, 1, 1))
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
LOSSES = pytest.mark.parametrize(
    "loss", [pkd_loss, cwd_loss, partial(cwd_loss, temperature=4.0)], ids=["pkd", "cwd", "cwd at 4"]
)
Levels = list[Tensor]
Loss = Callable[..., Tensor]


def levels(
    rng: torch.Generator,
    sizes: Sequence[tuple[int, ...]] = FPN,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Levels, Levels]:
    made = [torch.randn(size, generator=rng) for _ in range(2) for size in sizes]
    placed = [v.to("cuda", dtype).contiguous(memory_format=layout) for v in made]
    return [s.requires_grad_() for s in placed[: len(sizes)]], placed[len(sizes) :]


def step(loss: Loss, student: Levels, teacher: Levels, backend: str = "cuda") -> Levels:
    """Loss and gradients, on the current stream, with nothing that waits."""
    value = loss(student, teacher, backend=backend)
    return [value.detach(), *torch.autograd.grad(value, student)]


def same(a: Levels, b: Levels) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@LOSSES
@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
def test_a_whole_pyramid_is_right(rng, loss, layout, dtype):
    student, teacher = levels(rng, dtype=dtype, layout=layout)
    exact = [s.detach().double().requires_grad_() for s in student], [t.double() for t in teacher]
    found, truth = step(loss, student, teacher), step(loss, *exact, backend="torch")
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert abs(found[0] - truth[0]) <= 8 * wide * abs(truth[0])
    for actual, expected in zip(found[1:], truth[1:], strict=True):
        bound = 16 * wide * expected.abs().max() + torch.finfo(dtype).eps * expected.abs()
        assert ((actual.double() - expected).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


@LOSSES
@LAYOUTS
def test_gradcheck_natively(rng, loss, layout):
    student, teacher = levels(rng, ((2, 3, 3, 4), (1, 2, 1, 5)), torch.float64, layout)
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher, backend="cuda"), student, nondet_tol=0.0)


@LOSSES
@LAYOUTS
def test_a_hundred_runs_give_the_same_bits(rng, loss, layout):
    given = levels(rng, layout=layout)
    first = step(loss, *given)
    for _ in range(100):
        assert same(first, step(loss, *given))


@LOSSES
def test_the_host_never_waits(rng, loss):
    given, weight = levels(rng), torch.tensor(0.3, device="cuda")
    weighted = partial(loss, weight=weight)
    expected = step(weighted, *given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step(weighted, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(expected, actual)


@LOSSES
def test_a_captured_graph_replays_with_other_inputs(rng, loss):
    student, teacher = levels(rng)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(loss, student, teacher)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, student, teacher)
    for _ in range(3):
        other = levels(rng)
        with torch.no_grad():
            for to, value in zip([*student, *teacher], [*other[0], *other[1]], strict=True):
                to.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, step(loss, *other))


@LOSSES
def test_two_streams_at_once_do_not_meet(rng, loss):
    """Each launch has parts and counters of its own."""
    given = [levels(rng) for _ in range(2)]
    expected = [step(loss, *each) for each in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    results: list[list[Levels]] = [[], []]
    for _ in range(50):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[number].append(step(loss, *given[number]))
    torch.cuda.synchronize()
    for right, runs in zip(expected, results, strict=True):
        assert all(same(right, actual) for actual in runs)


@LOSSES
@LAYOUTS
def test_a_level_of_more_than_2_to_the_31_elements(loss, layout):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of device memory")
    shape = (2, 512, 2048, 1032)
    s = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    t = torch.zeros_like(s)
    assert s.numel() > 1 << 31
    for number, place in enumerate([(0, 0, 0, 0), (0, -1, -1, -1), (1, 300, 1000, 500), (1, -1, -1, -1)]):
        s[place] = number + 1.0
        t[place] = number + 3.0
    some = [0, 1, 300, 511]
    part = s[:, some].double().requires_grad_(), t[:, some].double()
    s.requires_grad_()
    value, grad = step(loss, [s], [t])
    expected, expected_grad = step(loss, [part[0]], [part[1]], backend="torch")
    expected, expected_grad = expected * len(some) / shape[1], expected_grad * len(some) / shape[1]
    # The other rows of student and teacher are equal. cwd's value is what is left of two logarithms of 2 million.
    assert abs(value - expected) <= 1e-5 * abs(expected) + 1e-8
    error = (grad[:, some].double() - expected_grad).abs()
    assert (error <= 1e-4 * expected_grad.abs().max() + torch.finfo(torch.bfloat16).eps * expected_grad.abs()).all()


@LOSSES
def test_a_step_is_two_launches_and_a_fill(rng, loss):
    """moments and moments_backward. The upstream gradient is given, or autograd would make it with one more fill."""
    student, teacher = levels(rng)
    one = torch.ones((), device="cuda")

    def call() -> None:
        torch.autograd.grad(loss(student, teacher, backend="cuda"), student, one)

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("moments" in name for name in names) == 2, names
    assert sum("Memset" in name for name in names) == 1, names
