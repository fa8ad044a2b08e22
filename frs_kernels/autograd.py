"""The autograd function outside the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from frs_kernels.levels import accumulate_dtype
from frs_kernels.ops import VERBS
from frs_kernels.options import Table


class Call(NamedTuple):
    """What a call is made of beside the student's tensors, which come in the order of the table's entries.

    T terms. Either logits, from which scores and norm are made, or scores and norm. Empty logits: the teachers of the
    first term.
    """

    backend: str
    table: Table
    teacher: Sequence[Tensor]
    logits: Sequence[Tensor]
    scores: Tensor | None
    norm: Tensor | None
    weight: list[float]  # (T,)
    factor: list[Tensor | None]  # (T,), 0-dim
    modes: list[str]  # (T,), "none", "forward" or "backward": where the gradient is computed
    want_values: bool


class Imitation(torch.autograd.Function):
    """The weighted sum of the imitation terms, and with `want_values` what it is made of.

    Outputs: the loss; with `want_values` also the value of each term, unweighted, and, without gradient, the values of
    the entries, and scores and mass where they were made here.

    A term's gradient is computed "forward", kept, and scaled in place by the upstream gradient, in the graph's last
    backward pass, or out of place where the graph is retained; or "backward" from the inputs, with the upstream
    gradient in the kernel's coefficient.
    """

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, ...]:
        # No parameter for each: where no gradient is wanted, Dynamo (AutogradFunctionVariable.call_apply of torch 2.13)
        # leaves ctx out if forward() has as many of them as apply() was given arguments.
        ctx, call, *student = given
        table, verbs = call.table, VERBS[call.backend]
        columns = (
            (), (), table.scale, table.eps, table.loss, call.weight, call.factor, table.temperature,
            table.beta, [mode == "forward" for mode in call.modes], True, table.joint,
        )  # fmt: skip
        scores, norm = call.scores, call.norm
        made: tuple[Tensor, ...] = ()
        if scores is None or norm is None:
            scores, norm, total, values, grads = verbs.distill(student, call.teacher, call.logits, *columns)
            made = (scores, norm)
        else:
            total, values, grads = verbs.imitate(student, call.teacher, scores, norm, *columns)
        ctx.table, ctx.backend, ctx.weight, ctx.modes = table, call.backend, call.weight, call.modes
        every = all(mode == "forward" for mode in call.modes) and all(ctx.needs_input_grad[1:])
        ctx.kept_alone = every and not call.want_values  # the usual step: a gradient is kept for every tensor
        if "backward" in call.modes:
            late = [e for t, entries in enumerate(table.entries) if call.modes[t] == "backward" for e in entries]
            inputs = [[student[e] for e in late], [call.teacher[e] for e in late]]
            save(ctx, grads=grads, scores=[scores, norm], factor=call.factor, student=inputs[0], teacher=inputs[1])
        else:
            save(ctx, grads=grads)
        ctx.set_materialize_grads(False)
        if not call.want_values:
            return (total,)
        terms = len(table.loss)
        others = (values[terms:], *made)
        ctx.mark_non_differentiable(*others)
        # Copies: a view that leaves the function could not be changed in place.
        return (total, *(values[t].clone() for t in range(terms)), *others)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None, *value_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not is_compiling():
            with torch.no_grad():
                results = _gradients(ctx, loss_grad, value_grads)
            return (None, *(None if g is None else once(g) for g in results))
        if ctx.kept_alone and loss_grad is not None and not is_compiling() and not _retained():
            # What _gradients would do, in 10 us less of the host's time for 5 levels.
            grads = ctx.saved_tensors
            VERBS[ctx.backend].scale_(grads, loss_grad)
            return (None, *grads)
        return (None, *_gradients(ctx, loss_grad, value_grads))


def _gradients(ctx: Any, loss_grad: Tensor | None, value_grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of every entry that needs one."""
    table: Table = ctx.table
    saved = load(ctx)
    compiling, retained = is_compiling(), _retained()
    results: list[Tensor | None] = [None] * table.entries[-1].stop
    to_scale: list[tuple[Tensor, list[Tensor]]] = []
    late: list[Late] = []
    kept, first = saved["grads"], 0
    for t, mode in enumerate(ctx.modes):
        entries = table.entries[t]
        value_grad = value_grads[t] if value_grads else None
        if mode == "forward":
            grads = list(kept[first : first + len(entries)])
            first += len(entries)
            factor = loss_grad if value_grad is None else _kept_factor(loss_grad, value_grad, ctx.weight[t])
            if factor is None:
                continue
            if compiling:
                # Changed in place, a saved tensor is cloned by the compiler first.
                dtype = accumulate_dtype(*grads)
                grads = [(g * factor.to(dtype)).to(g.dtype) for g in grads]
            else:
                grads = [g.clone() for g in grads] if retained else grads
                if to_scale and to_scale[-1][0] is factor:
                    to_scale[-1][1].extend(grads)
                else:
                    to_scale.append((factor, grads))
            results[entries.start : entries.stop] = grads
        elif mode == "backward":
            term = late_term(t, ctx.weight[t], saved["factor"][t], loss_grad, value_grad)
            late += [] if term is None else [term]
    _imitate_late(ctx, saved, late, results)
    for factor, grads in to_scale:
        VERBS[ctx.backend].scale_(grads, factor)
    wanted = ctx.needs_input_grad[1:]
    return results if all(wanted) else [g if want else None for g, want in zip(results, wanted, strict=True)]


def _retained() -> bool:
    """Whether the graph of the backward pass under way stays; a compiler's is another one.

    AOTAutograd, too, asks this before it reuses what a graph has saved.
    """
    return not is_compiling() and bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _kept_factor(loss_grad: Tensor | None, value_grad: Tensor, weight: float) -> Tensor:
    """What a gradient of weight * value is multiplied by."""
    # By a tensor: a GPU divides by a number as a product with its reciprocal, and weight * value, the usual use, would
    # not come out as a factor of exactly 1, which scale_ does nothing for.
    value_grad = value_grad / torch.full_like(value_grad, weight)
    return value_grad if loss_grad is None else loss_grad + value_grad


class Late(NamedTuple):
    """A term whose gradient is computed in the backward pass; a factor of None is 1."""

    term: int
    weight: float
    factor: Tensor | None


def late_term(
    term: int, weight: float, factor: Tensor | None, loss_grad: Tensor | None, value_grad: Tensor | None
) -> Late | None:
    """None where no gradient comes to it."""
    if loss_grad is None:
        return None if value_grad is None else Late(term, 1.0, value_grad)
    upstream = loss_grad if factor is None else loss_grad * factor
    if value_grad is None:
        return Late(term, weight, upstream)
    return Late(term, 1.0, upstream * weight + value_grad)


def _imitate_late(ctx: Any, saved: dict[str, Sequence[Any]], late: list[Late], results: list[Tensor | None]) -> None:
    """Compute the gradients of these terms, in one call, into results."""
    if not late:
        return
    table: Table = ctx.table
    stored = [e for t, entries in enumerate(table.entries) if ctx.modes[t] == "backward" for e in entries]
    rows = [(stored.index(e), e) for term in late for e in table.entries[term.term]]
    scores, norm = saved["scores"]
    _, _, grads = VERBS[ctx.backend].imitate(
        [saved["student"][i] for i, _ in rows],
        [saved["teacher"][i] for i, _ in rows],
        scores,
        norm,
        (),
        (),
        [table.scale[e] for _, e in rows] if table.scale else (),
        [table.eps[e] for _, e in rows] if table.eps else (),
        [table.loss[term.term] for term in late],
        [term.weight for term in late],
        [term.factor for term in late],
        [table.temperature[term.term] for term in late],
        [table.beta[term.term] for term in late],
        [True] * len(late),
        False,
        table.joint,
    )
    for (_, e), grad in zip(rows, grads, strict=True):
        results[e] = grad


class _Once(torch.autograd.Function):
    """The identity, whose own gradient is an error.

    `once_differentiable` raises only where the upstream gradient requires a gradient itself; a gradient penalty beside
    another loss would lose its gradient without a word. That still happens where gradients are taken towards named
    tensors: the engine leaves out what does not lead to them, and a way to the student's would keep their memory.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("frs_kernels: the loss is differentiable once; its gradient has no gradient")


def once(grad: Tensor) -> Tensor:
    result: Tensor = _Once.apply(grad.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return result


def save(ctx: Any, **named: Sequence[Tensor | None]) -> None:
    """save_for_backward by name. It refuses the tensors of a teacher run in inference_mode; these are kept as they are,
    as outside of that mode nobody can change them."""
    ctx.sizes = {name: len(group) for name, group in named.items()}
    tensors = [t for group in named.values() for t in group]
    ctx.inference = {}
    if len(named) > 1 and not is_compiling():  # gradients, which are new, are none
        ctx.inference = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
        tensors = [None if i in ctx.inference else t for i, t in enumerate(tensors)]
    ctx.save_for_backward(*tensors)


def load(ctx: Any) -> dict[str, Sequence[Any]]:
    tensors = ctx.saved_tensors
    if ctx.inference:
        tensors = [ctx.inference.get(i, t) for i, t in enumerate(tensors)]
    named, first = {}, 0
    for name, size in ctx.sizes.items():
        named[name] = tensors[first : first + size]
        first += size
    return named


def imitation(call: Call, student: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`Imitation.apply`, typed."""
    outputs: tuple[Tensor, ...] = Imitation.apply(call, *student)  # type: ignore[no-untyped-call]
    return outputs
