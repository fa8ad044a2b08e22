"""`Beside`: in which order the teacher's stream and the student's wait for each other. tests/test_gpu.py runs it."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from toy_detectors import Normed, distiller, images

from frs_kernels.distill.beside import Beside

GPU = torch.device("cuda", 0)


class Stream:
    """Writes down what a CUDA stream is asked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"event on {self.name}")
        return "event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for the {event}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a GPU that is not there; tensors stay on the CPU."""
    found: list[str] = []
    current = [Stream("main", found)]

    @contextmanager
    def use(stream: Stream) -> Any:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "capture" in found)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", found))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: found.append(f"{len(self)} kept for {stream.name}")
    )
    found.append(f"now on {current[-1].name}")
    found.clear()
    return found


def teacher(log: list[str], x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    log.append(f"teacher on {torch.cuda.current_stream(x.device).name}")
    return [x[:3]], x[:1]


def test_who_waits_for_whom(log):
    beside, x = Beside(wanted=True), torch.zeros(4)
    for _ in range(2):
        beside.mark(GPU)
        found = beside.run(lambda given: teacher(log, given), x)
        beside.join(found)
        assert log == [
            "event on main", "side waits for the event", "4 kept for side", "teacher on side",
            "main waits for side", "3 kept for main", "main waits for side", "1 kept for main",
        ]  # fmt: skip
        log.clear()


@pytest.mark.parametrize("why", ["not wanted", "no GPU", "capture"])
def test_in_order_on_one_stream(log, why):
    beside, x = Beside(wanted=why != "not wanted"), torch.zeros(4)
    log += [why]
    beside.mark(torch.device("cpu") if why == "no GPU" else GPU)
    beside.join(beside.run(lambda given: teacher(log, given), x))
    assert log == [why, "teacher on main"]


def test_a_copy_makes_streams_of_its_own(log):
    beside = Beside(wanted=True)
    beside.mark(GPU)
    beside.run(lambda given: teacher(log, given), torch.zeros(4))
    for other in (copy.deepcopy(beside), pickle.loads(pickle.dumps(beside))):
        assert vars(other) == {"wanted": True, "_streams": {}, "_ready": None}


@pytest.mark.parametrize("source", [None, "neck"])
def test_a_distiller_marks_when_its_images_are_there(source, monkeypatch):
    """Before the student, or when a module is given them; the teacher's dtype is settled before, on the main stream."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    d = distiller(images=source, fast_teacher={"stream": True, "dtype": "auto"})
    seen = []
    monkeypatch.setattr(d.beside, "mark", lambda device: seen.append(("mark", next(d.teacher.parameters()).dtype)))
    monkeypatch.setattr(d.beside, "join", lambda found: seen.append("join"))
    d.student.neck.convs[0].register_forward_hook(lambda *_: seen.append("student"))
    d.teacher.neck.convs[0].register_forward_hook(lambda *_: seen.append("teacher"))
    d(images())
    mark = ("mark", torch.bfloat16)
    assert seen == [mark] * (1 if source is None else 2) + ["student", "teacher", "join"]
    assert d.beside.wanted
    assert not distiller().beside.wanted


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [{"stream": True}, {"stream": True, "compile": {"mode": "reduce-overhead"}}], ids=str)
def test_a_hundred_steps_on_a_gpu(fast, monkeypatch):
    """The bits of a teacher in order, while memory that was given back is filled with NaN."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    x = images(n=8, side=512).to(GPU)
    teacher = Normed(64)
    in_order = {"compile": fast["compile"]} if "compile" in fast else True
    plain, beside = (distiller(teacher=teacher, fast_teacher=options).to(GPU) for options in (in_order, fast))
    beside.load_state_dict(plain.state_dict())
    names = ("loss_frs_feat", "loss_frs_cls")
    right = [plain(x)[name] for name in names]
    for _ in range(100):
        losses = beside(x.clone())
        torch.full((1 << 24,), torch.nan, device=GPU)
        assert all(torch.equal(losses[name], value) for name, value in zip(names, right, strict=True))
        sum(losses.values()).backward()
