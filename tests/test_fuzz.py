"""Random calls of every public function on every backend that is here, against fp64 truth. `make fuzz` makes many.

FUZZ_CASES is how many each of the four shares of a backend gets, FUZZ_KEEP a folder in which what fails is kept, to be
tried first the next time. What fails is printed as a test; it joins FOUND.
"""

from __future__ import annotations

import os
from typing import Any

import fuzzing
import pytest
import torch
from cases import BACKENDS, each_backend
from fuzzing import Case, check, look

from frs_kernels import backends, reference
from frs_kernels.ops import VERBS

COUNT = int(os.environ.get("FUZZ_CASES", "60"))
HERE = [case for case in BACKENDS if (case[1] == "cpu" or torch.cuda.is_available()) and not backends.why_not(*case)]

f64 = (torch.float64,)
FOUND = {
    "the truth kept too few digits of 1 - p": Case(
        "quality_focal_distillation", sizes=((1, 2, 2), (2, 2, 16)), classes=(7,), dtypes=f64, teacher_dtypes=f64,
        spread=20.0,
    ),
    "in plain PyTorch equal logits in other layouts did not agree": Case(
        "masked_imitation_loss", sizes=((1, 3, 7),), dtypes=f64, teacher_dtypes=f64,
        teacher_layouts=(((0, 3, 2, 1), 1, 0),), agree=True, mask="double", options={"loss": "qfl"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("share", range(4))
@pytest.mark.parametrize(("backend", "device"), HERE)
def test_any_call_is_right(backend, device, share):
    interpreted = backend == "triton" and device == "cpu"  # takes twenty times as long
    look(backend, device, max(1, COUNT // 20) if interpreted else COUNT, os.environ.get("FUZZ_KEEP"))


@each_backend
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_mended(backend, device, name):
    check(FOUND[name], backend, device)


def wide_fp16_gradients_off(*arguments: Any) -> Any:
    total, values, grads = reference.imitate(*arguments)
    return total, values, [g * 1.01 if g.dtype == torch.float16 and g.shape[1] > 32 else g for g in grads]


def test_a_planted_fault_is_found_shrunk_and_kept(monkeypatch, tmp_path):
    """What is printed fails as it stands, says what the fault is about, and is what the next run tries first."""

    def distill(student: Any, teacher: Any, logits: Any, *table: Any) -> Any:
        scores, mass = reference.score(reference.logits_of(teacher, logits, table))
        return scores, mass, *wide_fp16_gradients_off(student, teacher, scores, mass, *table)

    faulty = VERBS["torch"]._replace(imitate=wide_fp16_gradients_off, distill=distill)
    monkeypatch.setitem(VERBS, "torch", faulty)
    with pytest.raises(AssertionError) as caught:
        look("torch", "cpu", 2000, str(tmp_path))
    (printed,) = (note for note in caught.value.__notes__ if note.startswith("def test_found"))
    calls: list[Any] = []
    exec(f"{printed}\ntest_found()", vars(fuzzing) | {"check": lambda *call: calls.append(call)})
    ((case, *where),) = calls
    assert len(case.sizes) == 1, printed
    assert case.dtypes == (torch.float16,), printed
    assert 33 in case.channels + case.classes, printed
    with pytest.raises(AssertionError):
        check(case, *where)
    with pytest.raises(AssertionError):
        look("torch", "cpu", 1, str(tmp_path))
    monkeypatch.undo()
    check(case, *where)
