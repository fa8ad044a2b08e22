"""Calls of `imitate` and `distill`: entries and terms, the columns made of them, and what they must give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from cases import condition, relative, ulp
from torch import Tensor
from truth import CANCELS, MOVES, Levels, Pyramid, eager_value, moves, size, value

from frs_kernels.levels import accumulate_dtype, level_slices
from frs_kernels.ops import VERBS


class Term(NamedTuple):
    loss: str = "mse"
    weight: float = 1.0
    factor: Tensor | None = None
    temperature: float = 1.0
    beta: float = 1.0
    want_grad: bool = True


@dataclass(frozen=True)
class Entry:
    x: Tensor
    z: Tensor
    level: int = 0
    term: int = 0
    scale: float = 1.0
    eps: float = 0.0


class Results(NamedTuple):
    total: Tensor
    values: Tensor
    grads: Levels


def columns(entries: Sequence[Entry], terms: Sequence[Term], want_loss: bool = True, joint: bool = False) -> list[Any]:
    """The table's columns, in the order of the schema."""
    of_entries = [[getattr(e, name) for e in entries] for name in ("level", "term", "scale", "eps")]
    return [*of_entries, *([getattr(t, name) for t in terms] for name in Term._fields), want_loss, joint]


def arguments(
    entries: Sequence[Entry], terms: Sequence[Term], scores: Tensor, norm: Tensor, want_loss: bool = True
) -> list[Any]:
    """All arguments of `imitate`."""
    return [[e.x for e in entries], [e.z for e in entries], scores, norm, *columns(entries, terms, want_loss)]


def imitate(backend: str, *args: Any, **kwargs: Any) -> Results:
    return Results(*VERBS[backend].imitate(*arguments(*args, **kwargs)))


def _computed(
    of: Callable[..., Tensor], entries: Sequence[Entry], terms: Sequence[Term], scores: Tensor, norm: Tensor
) -> Results:
    """Values, and the gradients of all entries, by autograd."""
    dtype = scores.dtype
    places = level_slices([e.x for e in entries], [e.level for e in entries], scores.numel())
    leaves = [e.x.detach().to(dtype).requires_grad_() for e in entries]
    values = []
    for entry, x in zip(entries, leaves, strict=True):
        term = terms[entry.term]
        denominator = norm[entry.level] + entry.eps
        mask = scores[places[entry.level]].view(x.shape[0], 1, *x.shape[2:])
        share = entry.scale * mask / denominator if denominator != 0 else torch.zeros_like(mask)
        values.append((share * of(term.loss, x, entry.z.to(dtype), term.temperature, term.beta)).sum())
    sums = [sum((v for v, e in zip(values, entries, strict=True) if e.term == t), norm.new_zeros(()))
            for t in range(len(terms))]  # fmt: skip
    weights = [t.weight * (1.0 if t.factor is None else t.factor.item()) for t in terms]
    total = sum(w * s for w, s in zip(weights, sums, strict=True))
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, leaves) if total.requires_grad else [torch.zeros_like(v) for v in leaves]
    return Results(total.detach(), torch.stack([*sums, *values]).detach(), list(grads))


def truth(entries: Sequence[Entry], terms: Sequence[Term], scores: Tensor, norm: Tensor) -> Results:
    return _computed(value, entries, terms, scores.double(), norm.double())


def assert_right(
    got: Results,
    entries: Sequence[Entry],
    terms: Sequence[Term],
    scores: Tensor,
    norm: Tensor,
    want_loss: bool = True,
) -> None:
    """Values within 1e-6 of fp64 truth, gradients within twice eager's error and one rounding to their dtype."""
    entries = [Entry(e.x.cpu(), e.z.cpu(), e.level, e.term, e.scale, e.eps) for e in entries]
    scores, norm = scores.cpu(), norm.cpu()
    right = truth(entries, terms, scores, norm)
    dtype = accumulate_dtype(*(v for e in entries for v in (e.x, e.z)))
    # the share is formed in the dtype of the scores, by definition
    eps = max(torch.finfo(v).eps for v in (dtype, scores.dtype))
    loosened = [condition(Pyramid(None, None, [e.x], [e.z]), terms[e.term].temperature) for e in entries]
    if want_loss:
        assert got.total.dtype == got.values.dtype == dtype
        plain = [t if t.loss == "kl" else t._replace(weight=abs(t.weight)) for t in terms]
        most = _computed(partial(size, eps=eps), entries, plain, scores.double(), norm.double())
        bound = (1e-13 if eps < 1e-10 else 1e-6) * max(loosened)
        assert got.total.shape == ()
        assert got.values.shape == right.values.shape
        assert abs(got.total.cpu() - right.total) <= bound * most.total.abs()
        assert ((got.values.cpu() - right.values).abs() <= bound * most.values.abs()).all()
    else:
        assert got.total.numel() == got.values.numel() == 0
    wanted = [i for i, e in enumerate(entries) if terms[e.term].want_grad]
    assert len(got.grads) == len(wanted)
    eager = _computed(eager_value, entries, terms, scores.to(dtype), norm.to(dtype))
    for i, grad in zip(wanted, got.grads, strict=True):
        entry, term = entries[i], terms[entries[i].term]
        assert grad.dtype == entry.x.dtype
        assert grad.shape == entry.x.shape
        assert grad.stride() == torch.empty_like(entry.x).stride()
        if not grad.numel():
            continue
        # of what is subtracted: for logits share * sigmoid(x)
        alone = Entry(entry.x, torch.full_like(entry.z, -1e4), 0, 0, entry.scale, entry.eps)
        places = level_slices([e.x for e in entries], [e.level for e in entries], scores.numel())
        of_level = scores[places[entry.level]], norm[entry.level : entry.level + 1]
        before = truth([alone], [term], *of_level).grads[0] if term.loss in ("bce", *CANCELS) else right.grads[i]
        if term.loss in MOVES:
            moved = _computed(partial(moves, eps=eps), [replace(entry, level=0, term=0)], [term],
                              *(v.double() for v in of_level)).grads[0]  # fmt: skip
            before = torch.maximum(before.abs(), moved.abs())
        sizes = [
            right.grads[i].abs().max(),
            2 * loosened[i] * eps * max(before.abs().max(), right.grads[i].abs().max()),
        ]
        error = max(relative(eager.grads[i], right.grads[i]) * sizes[0], sizes[1])
        allowed = 2 * error + ulp(right.grads[i], grad.dtype)
        assert ((grad.cpu().double() - right.grads[i]).abs() <= allowed).all(), f"entry {i}"
