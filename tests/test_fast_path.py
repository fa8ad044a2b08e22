"""Where a native operator checks the tensors, Python's checks run only after it has refused: nothing slips through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import same_bits
from test_errors import TABLE, Call, assert_says, fresh
from torch import Tensor
from truth import pyramid

from frs_kernels import FSRTerms, backends, checks, fsr_loss

HERE = backends.why_not("cpu", "cpu")
pytestmark = pytest.mark.skipif(HERE is not None, reason=f"cpu backend: {HERE}")
Z = torch.zeros
LARGE, SMALL = Z(2, 5, 3, 4), Z(2, 5, 1, 1)


def same_channels(**changes: Any) -> Call:
    return {name: [LARGE.clone(), SMALL.clone()] for name in fresh()} | changes


def features_only(**changes: Any) -> Call:
    return same_channels(student_logits=None) | changes


STACKED = Z(2, 2, 5, 3, 4)  # iterated over it is a list of two levels
BOTH_LARGE: Call = {name: [LARGE, LARGE] for name in fresh()}
SNEAKY: dict[str, tuple[Callable[[], Call], tuple[str, ...]]] = {
    "as many student's tensors as teacher's, at other levels": (
        lambda: same_channels(student_feats=[SMALL, LARGE, SMALL], student_logits=[LARGE]),
        ("student_feats has 3 levels, teacher_feats has 2",),
    ),
    "feats of two levels from logits of three": (
        lambda: features_only(teacher_logits=[LARGE, SMALL, SMALL]),
        ("teacher_feats has 2 levels, teacher_logits has 3",),
    ),
    "feats of two levels from logits of one": (
        lambda: features_only(teacher_logits=[LARGE]),
        ("teacher_feats has 2 levels, teacher_logits has 1",),
    ),
    "the levels in another order": (
        lambda: same_channels(student_logits=[SMALL, LARGE], teacher_logits=[SMALL, LARGE]),
        ("teacher_feats[0] (2, 5, 3, 4)", "teacher_logits[0] (2, 5, 1, 1)"),
    ),
    **{
        f"one tensor for {name}": (lambda name=name: BOTH_LARGE | {name: STACKED}, (name, "list", "Tensor"))
        for name in BOTH_LARGE
    },
    "one tensor for the logits of the mask": (
        lambda: BOTH_LARGE | {"student_logits": None, "teacher_logits": STACKED},
        ("teacher_logits must be a list", "Tensor"),
    ),
    "a set for a list": (lambda: same_channels(student_feats={LARGE, SMALL}), ("student_feats", "list", "set")),
    "a dict for a list": (
        lambda: same_channels(student_feats={0: LARGE, 1: SMALL}),
        ("student_feats must be a list", "dict"),
    ),
    "an iterator for the logits of the mask": (
        lambda: features_only(teacher_logits=iter([LARGE, SMALL])),
        ("teacher_logits must be a list", "iterator"),
    ),
    "text for a list": (lambda: same_channels(student_feats="ab"), ("student_feats[0]", "tensor", "str")),
    "a list of lists": (
        lambda: same_channels(teacher_logits=[[LARGE], [SMALL]]),
        ("teacher_logits[0] must be a tensor, got list",),
    ),
    "a list of arrays": (
        lambda: same_channels(student_feats=[LARGE.numpy(), SMALL.numpy()]),
        ("student_feats[0] must be a tensor, got ndarray",),
    ),
    "None for a level": (lambda: same_channels(student_feats=[LARGE, None]), ("student_feats[1]", "NoneType")),
    "all empty": (lambda: {name: [] for name in BOTH_LARGE}, ("student_feats is empty",)),
    "a level on another device": (
        lambda: same_channels(student_logits=[LARGE, SMALL.to("meta")]),
        ("student_logits[1] is on meta", "one device"),
    ),
    "a teacher's level of the mask on another device": (
        lambda: features_only(teacher_logits=[LARGE, SMALL.to("meta")]),
        ("teacher_logits[1] is on meta", "one device"),
    ),
    "a sparse level": (lambda: same_channels(student_feats=[LARGE, SMALL.to_sparse()]), ("student_feats[1]", "dense")),
    "a flag for a weight": (lambda: same_channels(feat_weight=True), ("feat_weight must be a number", "bool")),
    "no weight": (lambda: same_channels(cls_weight=None), ("cls_weight must be a number", "NoneType")),
    "a weight of one element": (lambda: same_channels(cls_weight=Z(1)), ("cls_weight", "0-dim", "(1,)")),
}  # fmt: skip


def refused(call: Call, **more: Any) -> Exception:
    with pytest.raises((TypeError, ValueError)) as error:
        fsr_loss(**call, **more)
    return error.value


@pytest.mark.parametrize("return_terms", [False, True])
@pytest.mark.parametrize("row", SNEAKY)
def test_what_an_operator_might_take_is_refused_in_the_same_words(row, return_terms):
    make, words = SNEAKY[row]
    ours = refused(make(), backend="cpu", return_terms=return_terms)
    assert_says(ours, words)
    first = refused(make(), backend="torch", return_terms=return_terms)
    assert type(ours) is type(first)
    assert str(ours) == str(first)


@pytest.mark.parametrize("row", [row for row in TABLE if "backend" not in row and "CPU" not in row])
def test_every_row_of_the_table_has_the_words_of_the_checks(row):
    change, kind, words = TABLE[row]
    found = []
    for backend in ("cpu", "torch"):
        call = fresh()
        change(call)
        found.append(refused(call, backend=backend))
    assert [type(error) for error in found] == [kind, kind]
    assert_says(found[0], words)
    if "generator" not in row:
        assert str(found[0]) == str(found[1])


class Levels(Sequence[Tensor]):
    """A sequence that is no list."""

    def __init__(self, levels: list[Tensor]) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: Any) -> Any:
        return self.levels[index]


@pytest.mark.parametrize("kind", [tuple, Levels, type("Subclass", (list,), {})], ids=["tuple", "sequence", "subclass"])
def test_any_sequence_is_a_list(rng, kind):
    p = pyramid(rng)
    expected = fsr_loss(*p.inputs, backend="cpu")
    assert same_bits(fsr_loss(*(kind(levels) for levels in p.inputs), backend="cpu").detach(), expected.detach())


def test_negated_and_conjugated_views_are_what_they_stand_for(rng):
    """Their memory holds other numbers, which the dispatcher knows and an operator does not."""
    p = pyramid(rng)
    t = [torch.complex(v, -v).conj().imag for v in p.t]
    assert all(v.is_neg() for v in t)
    expected = fsr_loss(p.s, [v.clone() for v in t], p.x, p.z, backend="cpu")
    assert same_bits(fsr_loss(p.s, t, p.x, p.z, backend="cpu").detach(), expected.detach())


def test_the_checks_do_not_run_where_all_is_right(rng, monkeypatch):
    """They take as long as the rest of a call on small levels."""
    ran = []
    monkeypatch.setattr(checks, "check_levels", lambda *_, **__: ran.append(1))
    p = pyramid(rng)
    fsr_loss(*p.inputs, backend="cpu").backward()
    assert isinstance(fsr_loss(*p.inputs, backend="cpu", return_terms=True), FSRTerms)
    assert not ran
    fsr_loss(*p.inputs, backend="torch")
    assert ran
