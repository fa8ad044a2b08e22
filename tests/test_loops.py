"""What a loop does beside calling the loss: checkpoints, accumulation, hooks, export, threads, forks, many steps."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKENDS, each_backend, relative, same_bits
from environment import python_environment
from every_loss import Every, every_loss
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from toy_detectors import Detector, distiller, images, pair
from truth import Levels, Pyramid, pyramid

from frs_kernels import FeatureAdapter, FSRLoss, backends

SIZES = ((2, 6, 7), (2, 3, 4))
HELPERS = Path(__file__).parent / "helpers"
HERE = [name for name, device in BACKENDS if device == "cpu" and backends.why_not(name, device) is None]
each_here = pytest.mark.parametrize("backend", HERE)


def small(rng: torch.Generator, device: str = "cpu", **options: Any) -> Pyramid:
    return pyramid(rng, sizes=SIZES, channels=6, classes=8, device=device, **options)


@each_backend
@every_loss
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing_around_student_and_loss(rng, backend, device, loss, reentrant):
    p = small(rng, device)
    torch.manual_seed(0)
    convs = {6: nn.Conv2d(6, 6, 1).to(device), 8: nn.Conv2d(8, 8, 1).to(device)}
    used = [convs[channels] for channels in {v.shape[1]: 0 for v in loss.student(p)}]
    parameters = [parameter for conv in used for parameter in conv.parameters()]

    def step(*images: Tensor) -> Tensor:
        return loss.call([convs[v.shape[1]](v) for v in images], p, backend)

    images = [v.detach().requires_grad_() for v in loss.student(p)]
    right = torch.autograd.grad(step(*images), parameters)
    checkpoint(step, *images, use_reentrant=reentrant).backward()
    for parameter, grad in zip(parameters, right, strict=True):
        assert parameter.grad is not None
        assert relative(parameter.grad, grad) <= 1e-6


def gradients(loss: Every, p: Pyramid, backend: str) -> Levels:
    return list(torch.autograd.grad(loss.call(loss.student(p), p, backend), loss.student(p)))


@each_backend
@every_loss
def test_gradients_accumulate(rng, backend, device, loss):
    """Over calls, and beside other losses of the same tensors."""
    p, other = small(rng, device), small(rng, device)
    other = Pyramid(p.s, other.t, p.x, other.z)
    first, second = gradients(loss, p, backend), gradients(loss, other, backend)
    student = loss.student(p)
    (loss.call(student, p, backend) + sum(v.sum() for v in student)).backward()
    loss.call(student, other, backend).backward()
    for v, a, b in zip(student, first, second, strict=True):
        assert v.grad is not None
        assert relative(v.grad, a + b + 1) <= 1e-6


@each_backend
@every_loss
def test_hooks_see_the_gradients(rng, backend, device, loss):
    p = small(rng, device)
    right = gradients(loss, p, backend)
    seen: list[Tensor] = []
    doubled = [v * 1 for v in loss.student(p)]
    for v in doubled:
        v.register_hook(lambda grad: seen.append(grad) or 2 * grad)  # type: ignore[func-returns-value]
    grads = torch.autograd.grad(loss.call(doubled, p, backend), loss.student(p))
    assert len(seen) == len(right)
    for got, grad in zip(grads, right, strict=True):
        assert relative(got, 2 * grad) <= 1e-6


@each_backend
@every_loss
def test_a_graph_is_gone_through_twice(rng, backend, device, loss):
    """The second time with another upstream gradient; or it is an error, never another gradient."""
    p = small(rng, device)
    student = loss.student(p)
    right = gradients(loss, p, backend)
    value = loss.call(student, p, backend)
    for upstream in (1.0, -3.0):
        got = torch.autograd.grad(value, student, torch.tensor(upstream, device=device), retain_graph=upstream == 1)
        for a, b in zip(got, right, strict=True):
            assert relative(a, upstream * b) <= 1e-6


class Trained(nn.Module):
    """A student of one level, its adapter and its loss."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.neck, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.adapter = FeatureAdapter(4, 6, 1)
        self.distil = FSRLoss(0.1, 0.1, backend=backend)

    def forward(self, images: Tensor, t: Tensor, z: Tensor) -> Tensor:
        feats = [self.neck(images)]
        loss = self.distil(self.adapter(feats), [t], [self.head(feats[0])], [z])
        assert isinstance(loss, Tensor)
        return loss


def batch(rng: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, c, 6, 8, generator=rng) for c in (3, 6, 5))


@pytest.mark.usefixtures("compiler")
@each_here
def test_a_model_that_holds_the_loss_is_exported(rng, backend):
    torch.manual_seed(0)
    model, inputs = Trained(backend), batch(rng)
    right = model(*inputs)
    exported = torch.export.export(model, inputs).module()
    assert relative(exported(*inputs), right) <= 1e-6


@pytest.mark.filterwarnings("ignore:The tensor attributes self.terms")
def test_a_distiller_is_exported():
    """With its teacher; the distiller itself goes on as before. Alone, `distiller.student` is what to deploy."""
    d, x = distiller(), images()
    right = d(x)
    exported = torch.export.export(d, (x,), strict=False).module()
    for again in (exported(x), d(x)):
        assert again.keys() == right.keys()
        assert all(relative(again[name].detach(), right[name].detach()) <= 1e-6 for name in right)
    sum(d(x).values()).backward()
    assert all(p.grad is not None for p in d.adapter.parameters())


class Checkpointed(Detector):
    """Whose neck is computed a second time in the backward pass."""

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(checkpoint(self.neck, images, use_reentrant=False))
        return {"loss_cls": sum(z.square().mean() for z in logits)} if self.training else logits


def test_a_distiller_whose_student_saves_activations():
    student, teacher = pair()
    twin = Checkpointed()
    twin.load_state_dict(student.state_dict())
    plain, saving = distiller(student, teacher), distiller(twin, teacher)
    saving.load_state_dict(plain.state_dict())
    for _ in range(2):
        for d in (plain, saving):
            d.zero_grad()
            sum(d(images()).values()).backward()
        for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("whole", [True, False], ids=["distiller", "student"])
def test_a_moving_average_in_mid_run(whole):
    """Of student and adapter, or of the student alone; the distiller goes on, and so does the averaged copy."""
    d = distiller()
    averaged = AveragedModel(d if whole else d.student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD((p for p in d.parameters() if p.requires_grad), 0.1)
    means = [p.detach().clone() for p in (d if whole else d.student).parameters()]
    for step in range(3):
        optimizer.zero_grad()
        sum(d(images(step)).values()).backward()
        optimizer.step()
        averaged.update_parameters(d if whole else d.student)
        now = [p.detach() for p in (d if whole else d.student).parameters()]
        means = [p.clone() if step == 0 else (m + p) / 2 for m, p in zip(means, now, strict=True)]
    for p, mean in zip(averaged.module.parameters(), means, strict=True):
        assert relative(p.detach(), mean) <= 1e-6
    losses = averaged.module.train()(images())
    assert sum(losses.values()).isfinite()
    assert ("loss_frs_feat" in losses) == whole


@each_here
def test_a_step_taken_up_from_a_checkpoint_is_the_same_step(rng, backend, tmp_path):
    torch.manual_seed(0)
    model, inputs = Trained(backend), batch(rng)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(*inputs)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(2):
        step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    right = [step(model, optimizer) for _ in range(2)]
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    again = Trained(backend)
    again.load_state_dict(kept["model"])
    optimizer = torch.optim.AdamW(again.parameters())
    optimizer.load_state_dict(kept["optimizer"])
    assert all(same_bits(step(again, optimizer), loss) for loss in right)


@each_here
@every_loss
def test_eight_threads_at_once_give_the_bits_of_one(rng, backend, loss):
    if backend == "triton":
        pytest.skip("Triton's interpreter keeps its state in globals")
    pyramids = [small(rng) for _ in range(8)]

    def answer(p: Pyramid) -> Levels:
        value = loss.call(loss.student(p), p, backend)
        return [value.detach(), *torch.autograd.grad(value, loss.student(p))]

    right = [answer(p) for p in pyramids]
    wrong: set[int] = set()

    def work(number: int) -> None:
        for _ in range(20):
            if not all(same_bits(a, b) for a, b in zip(answer(pyramids[number]), right[number], strict=True)):
                wrong.add(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


BEFORE = """
import os, sys, torch
from truth import pyramid
from frs_kernels import fsr_loss
backend = sys.argv[1]
p = pyramid(torch.Generator().manual_seed(1), sizes=((2, 40, 50), (2, 20, 25)), channels=16, classes=20)

def step():
    loss = fsr_loss(*p.inputs, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, p.student)]

"""
# A child of fork has torch's threads' state and not the threads, so torch asks for one thread in it.
FORK = """
torch.set_num_threads(1)
right = step()
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(right, step())) else 3)
status = os.waitpid(child, 0)[1]
assert os.waitstatus_to_exitcode(status) == 0, status
assert all(torch.equal(a, b) for a, b in zip(right, step()))
"""
SHUTDOWN = """
kept = fsr_loss(*p.inputs, backend=backend)
fsr_loss(*p.inputs, backend=backend).backward()
"""


@each_here
@pytest.mark.parametrize("what", [FORK, SHUTDOWN], ids=["fork", "shutdown with a graph alive"])
def test_processes(backend, what):
    if what is FORK and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    command = [sys.executable, "-c", BEFORE + what, backend]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HELPERS, env=python_environment(), timeout=240, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class Scored(torch.utils.data.Dataset[Tensor]):
    """A worker that makes the mask."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        from frs_kernels import richness_mask

        z = torch.linspace(-4, 4, 2 * 5 * 6 * 7).view(2, 5, 6, 7) + index
        return richness_mask([z], backend=self.backend).scores[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_loader(context):
    if context == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    scored = Scored("auto")
    loader = torch.utils.data.DataLoader(scored, batch_size=None, num_workers=1, multiprocessing_context=context)
    for index, scores in enumerate(loader):
        assert same_bits(scores, scored[index])


class Malloc(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    ))  # fmt: skip


def in_use() -> int:
    """Bytes that malloc has given out; 0 where the C library does not tell."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = Malloc
    found = ask()
    return int(found.uordblks + found.hblkhd)


def resident() -> int:
    """Kilobytes of the process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


@each_here
@every_loss
def test_ten_thousand_steps_leave_nothing_behind(rng, backend, loss):
    """Memory, open files and the inputs' bits; each step makes and frees a graph and gradients.

    A string argument of an operator once left 48 bytes, too few for resident memory to show.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("Linux tells the memory")
    steps = 10_000 if backend == "cpu" else 200 if backend == "torch" else 3
    p = small(rng)
    before = p.map(torch.clone)

    def train(count: int) -> None:
        for _ in range(count):
            gradients(loss, p, backend)

    train(max(1, steps // 10))
    for _ in range(3):  # a leak grows every time; what other tests left behind in the allocator does not
        memory, bytes_before, files = resident(), in_use(), os.listdir("/proc/self/fd")
        train(steps)
        grown, left = resident() - memory, (in_use() - bytes_before) / steps
        assert len(os.listdir("/proc/self/fd")) == len(files)
        if grown <= 4096 and left <= 8:
            break
    assert grown <= 4096  # kB; a leak of one gradient a step would be 20 MB and more
    assert left <= 8 or steps < 10_000  # bytes a step; a few thousand in all are noise
    for given, kept in zip(p.inputs, before.inputs, strict=True):
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(given, kept, strict=True))
