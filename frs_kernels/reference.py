"""The verbs in plain PyTorch: the definition that every other backend is compared with.

    score     S_p = max_k sigmoid(z_pk),  M_l = sum_p S_p
    imitate   value_e = sum_p share_p sum_c value(x_pc, z_pc),  share_p = scale_e S_p / (norm_l + eps_e)
    distill   score, then imitate
    scale_    gradient *= factor
    moments   value_l = the mean over a level's rows of what row_losses.py says of each
    moments_backward  gradient = a f(s - s0) - b f(t - t0) + c

Run in fp64 this file is the truth of the tests. `torch.compile` may fuse it (`backend="torch"`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frs_kernels.levels import accumulate_dtype, entry_columns, level_slices, levels_in_turn, require_entries
from frs_kernels.losses import LOSSES, Grouped, group_size
from frs_kernels.row_losses import NUMBERS, ROW_LOSSES


def score(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of all levels, flat, level after level, each (N, H, W) row-major; and their sums.

    Args:
        logits: teacher class logits, one (N, K, H, W) tensor a level.

    Returns:
        scores (P,) and mass (L,), fp32, or fp64 if a level is fp64.
    """
    dtype = accumulate_dtype(*logits)
    levels = [torch.sigmoid(z.amax(1).to(dtype)).flatten() for z in logits]
    return torch.cat(levels), torch.stack([s.sum() for s in levels])


def imitate(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scores: Tensor,
    norm: Tensor,
    level: Sequence[int],
    term: Sequence[int],
    scale: Sequence[float],
    eps: Sequence[float],
    loss: Sequence[str],
    weight: Sequence[float],
    factor: Sequence[Tensor | None],
    temperature: Sequence[float],
    beta: Sequence[float],
    want_grad: Sequence[bool],
    want_loss: bool,
    joint: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The masked imitation losses of a table of entries, E rows of T terms, and their gradients.

        share_p  = scale_e S_p / (norm_l + eps_e)           0 where norm_l + eps_e is 0; with joint, norm_l = sum(norm)
        value_e  = sum_p share_p sum_c value(x_pc, z_pc)     value, slope: losses.py
        value_t  = sum of the values of the term's entries
        total    = sum_t weight_t factor_t value_t
        grad_e   = weight_t factor_t share_p slope(x_pc, z_pc)

    Dividing the score, not the sum, keeps a level whose mass is subnormal right: S_p <= M_l.

    Args:
        student, teacher: an (N, C, H, W) tensor an entry.
        scores: (P,) as `score` lays them out; norm: (L,), the masses.
        level, term: for each entry the level whose scores and norm it takes, and the term it belongs to. Every level
            has an entry. Both empty: the entries are the first term's levels, then the next one's.
        scale, eps: for each entry what its share is multiplied by, and what is added to its norm. Empty: 1 and 0.
        loss, weight, factor, temperature, beta, want_grad: for each term the name of its loss, a number, a 0-dim tensor
            (None for 1), what divides logits inside the loss (which is then multiplied by its square), the beta of
            "smooth_l1" and "qfl", or how many channels a group of "softmax_kl" has (0: all of the entry's), and whether
            its entries' gradients are wanted.
        want_loss: whether total and values are.
        joint: whether every entry's norm is the sum of all levels'.

    Returns:
        total (); values (T + E,), the terms' and then the entries'; both empty without want_loss. The gradients that
        are wanted, in the order of the entries, in the student's dtypes and strides.

    Raises:
        RuntimeError: the table does not fit the tensors.
    """
    level, term, scale, eps = entry_columns(len(student), len(loss), level, term, scale, eps)
    dtype = accumulate_dtype(*student, *teacher)
    slices = level_slices(student, level, scores.shape[0])
    require_entries(term, len(loss))
    for x, t in zip(student, term, strict=True):
        if isinstance(LOSSES[loss[t]], Grouped):
            group_size(beta[t], x.shape[1])
    if joint:
        norm = norm.sum().expand_as(norm)
    values: list[Tensor] = []
    grads: list[Tensor] = []
    for e, (x, z) in enumerate(zip(student, teacher, strict=True)):
        t = term[e]
        denominator = norm[level[e]] + eps[e] if eps[e] else norm[level[e]]
        mask = scores[slices[level[e]]].view(x.shape[0], 1, *x.shape[2:])
        share = torch.where(denominator == 0, 0.0, mask / denominator).to(dtype)
        share = share if scale[e] == 1 else share * scale[e]
        number, tensor = weight[t], factor[t]
        outer = (number if tensor is None else number * tensor.to(dtype)) if want_grad[t] else None
        value, grad = _imitate_entry(x, z, share, outer, loss[t], temperature[t], beta[t], want_loss)
        values += [] if value is None else [value]
        grads += [] if grad is None else [grad]
    if not want_loss:
        return scores.new_empty(0), scores.new_empty(0), grads
    entries = torch.stack(values)
    sums = [torch.stack([v for e, v in enumerate(values) if term[e] == t]).sum() for t in range(len(loss))]
    weighted = [w * s if f is None else w * f.to(dtype) * s for w, f, s in zip(weight, factor, sums, strict=True)]
    return torch.stack(weighted).sum(), torch.cat([torch.stack(sums), entries]), grads


def _imitate_entry(
    x: Tensor,
    z: Tensor,
    share: Tensor,
    outer: Tensor | float | None,
    loss: str,
    temperature: float,
    beta: float,
    want_loss: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """An entry's value, and its gradient times `outer`, which is None where no gradient is wanted.

    A block at a time: what is computed on the way is as large as a block, and stays in the caches.
    """
    at, takes_logits = LOSSES[loss]
    whole = isinstance(LOSSES[loss], Grouped)
    tau = temperature if takes_logits else 1.0
    grad = None if outer is None else torch.empty_like(x)
    coefficient = None if outer is None else share * (outer * tau)
    sums = []
    for x_b, z_b, share_b, coefficient_b, grad_b in _blocks(x, z, share, coefficient, grad, whole=whole):
        pair = [v.to(share.dtype) for v in (x_b, z_b)]
        if not torch.compiler.is_compiling() and pair[0].stride() != pair[1].stride():
            # On a CPU sigmoids of numbers in a row and of numbers apart differ in the last bit: equal logits would not
            # agree, and beta |d|^(beta-1) sign(d) of a d that is nearly 0 is not small.
            pair[1] = torch.empty_like(pair[0]).copy_(pair[1])
        value, slope = at(*(pair if tau == 1 else [v / tau for v in pair]), beta, want_loss)
        if value is not None:
            sums.append((value.sum(1, keepdim=True) * share_b).sum())
        if grad_b is not None:
            grad_b.copy_(slope.mul_(coefficient_b))
    if not want_loss:
        return None, grad
    total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return (total if tau == 1 else total * tau**2), grad


def _blocks(x: Tensor, *others: Tensor | None, whole: bool = False) -> list[Any]:
    """The same parts of several (N, C, H, W) tensors, C x's or 1; with `whole`, all channels of some rows. A compiler,
    which cuts by itself, sees them whole.

    On a CPU 65,536 values a thread. RetinaNet at 400x672 so takes 15 ms and 1.2 times the gradients' memory; with half
    of that 17 ms; whole, 17 ms where the process keeps its memory, 27 where it does not, and 3.3 times (Intel Xeon with
    AVX-512, 2 cores, fp32). On a GPU so many that a launch does not count: not measured.
    """
    if torch.compiler.is_compiling():
        return [(x, *others)]
    size = torch.get_num_threads() << 16 if x.device.type == "cpu" else 1 << 22
    if x.numel() <= size:
        return [(x, *others)]

    def cut(length: int, of_one: int) -> list[slice]:
        step = max(1, size // of_one)
        return [slice(i, i + step) for i in range(0, length, step)]

    n, c, h, w = x.shape
    every = [slice(None)]
    by_rows = whole or x.stride(1) < x.stride(2)  # channels_last
    channels, rows = (every, cut(h, c * w)) if by_rows else (cut(c, h * w), every)
    return [
        tuple(v if v is None else v[i, k if v.shape[1] == c else slice(None), r] for v in (x, *others))
        for i, k, r in itertools.product(cut(n, c * h * w), channels, rows)
    ]


def logits_of(teacher: Sequence[Tensor], logits: Sequence[Tensor], table: Sequence[Any]) -> Sequence[Tensor]:
    """What `distill` scores; the table's columns from level on.

    Raises:
        RuntimeError: there is nothing to score.
    """
    if logits:
        return logits
    level, term, _, _, loss = table[:5]
    if level or term:
        raise RuntimeError("distill: logits is empty; it needs (N, C, H, W) tensors, one a level")
    return teacher[: levels_in_turn(len(teacher), len(loss))]


def distill(
    student: Sequence[Tensor], teacher: Sequence[Tensor], logits: Sequence[Tensor], *table: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """`score` of the logits, then `imitate` with what it returned: scores, mass, total, values, gradients.

    Without logits those are the teachers of the first term, where level and term are empty.
    """
    scores, mass = score(logits_of(teacher, logits, table))
    return scores, mass, *imitate(student, teacher, scores, mass, *table)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient by the 0-dim factor, in place."""
    if factor.device.type == "cpu" and not torch.compiler.is_compiling() and factor == 1:
        return  # the usual case; on a GPU the host would have to wait to know
    for grad in grads:
        wide = accumulate_dtype(grad)
        if grad.dtype == wide or grad.device.type == "cpu":
            grad.mul_(factor.to(wide))
            continue
        for (part,) in _blocks(
            grad
        ):  # on a GPU mul_ casts a 0-dim tensor first: a loss scale of 65536 is infinite in fp16
            part.copy_(part.to(wide).mul_(factor))


def moments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    loss: str,
    scale: Sequence[float],
    weight: float,
    factor: Tensor | None,
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss along rows of a list of levels, and what its gradient needs of each row.

    Args:
        student, teacher: an (N, C, H, W) tensor a level.
        loss: a name in `frs_kernels.row_losses.ROW_LOSSES`, which says what a row is.
        scale: of each level, a number that its value is multiplied by.
        weight, factor: a number and a 0-dim tensor (None for 1) that the total is multiplied by.
        temperature, eps: of the loss.

    Returns:
        total (); values (1 + L,), their sum and then the levels', without weight and factor; rows (R, 5), the rows of
        all levels one after another. fp32, or fp64 if a tensor is fp64.
    """
    dtype = accumulate_dtype(*student, *teacher)
    of = ROW_LOSSES[loss].of
    found = [of(s.to(dtype), t.to(dtype), w, temperature, eps) for s, t, w in zip(student, teacher, scale, strict=True)]
    levels = torch.stack([value for value, _ in found])
    value = levels.sum()
    total = weight * value if factor is None else weight * factor.to(dtype) * value
    return total, torch.cat([value[None], levels]), torch.cat([rows for _, rows in found])


def moments_backward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    rows: Tensor,
    loss: str,
    weight: float,
    factor: Tensor | None,
    temperature: float,
) -> list[Tensor]:
    """The gradients of weight * factor * value by the student's tensors, in their dtypes and strides.

    Args:
        rows: as `moments` returned it for the same tensors.
        The others are as for `moments`.
    """
    of = ROW_LOSSES[loss]
    upstream = weight if factor is None else weight * factor.to(rows.dtype)
    grads = []
    for s, t, of_level in zip(student, teacher, rows.split([of.count(s) for s in student]), strict=True):
        n = s.shape[0] if of.per_image else 1
        s0, t0, a, b, c = of_level.view(n, s.shape[1], 1, 1, NUMBERS).unbind(-1)
        x, z = (v.to(rows.dtype) - v0 for v, v0 in ((s, s0), (t, t0)))
        if of.exponential:
            x, z = (v.div_(temperature).exp_() for v in (x, z))
        x.mul_(upstream * a).addcmul_(z, upstream * b, value=-1)
        grads.append(torch.empty_like(s).copy_(x if of.exponential else x.add_(upstream * c)))
    return grads
