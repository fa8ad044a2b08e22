"""imitate: the masked imitation losses of a table of entries and their gradients by the student, in one launch.

    share_p  = scale_e S_p / (norm_l + eps_e)           0 where norm_l + eps_e is 0; joint: norm_l = sum(norm)
    value_e  = sum_p share_p sum_c value(x_pc, z_pc)     (value, slope: pointwise.py)
    value_t  = sum of the values of the term's entries
    total    = sum_t weight_t factor_t value_t
    grad_e   = weight_t factor_t share_p slope(x_pc, z_pc)

A program takes BLOCK_P positions of one image and walks over a chunk of their channels. Programs run from the last
entry to the first, and logits come last among the entries: the teacher's are read from where `score` stopped reading.
Losses of groups have launches of their own, softmax.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.levels import accumulate_dtype, entry_columns
from frs_kernels.losses import LOSSES, Grouped, Pointwise
from frs_kernels.triton import levels as lv
from frs_kernels.triton.checks import check_imitate
from frs_kernels.triton.levels import (
    channel_stride,
    entry_of,
    inside,
    is_in,
    number_of,
    pick,
    size_of,
    tile_offsets,
    tile_start,
)
from frs_kernels.triton.pointwise import ZERO_AT_ZERO, pointwise
from frs_kernels.triton.slots import store_partial, workspace
from frs_kernels.triton.softmax import imitate_groups
from frs_kernels.triton.terms import Table, shares, store_values, upstream_of


@triton.jit
def imitate_tile(
    student, teacher, grad, terms, scores_at, norm_at, scale, eps,
    entry, n, c_first, c_last, p0, channels, hw, width,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr, WANT_LOSS: tl.constexpr,
):  # fmt: skip
    """A program's gradients, stored, and its loss. The next channels are on their way while these are computed."""
    BLOCK_P: tl.constexpr = SEGMENT.block_p
    LOSS: tl.constexpr = SEGMENT.loss  # Triton 3.6 takes no attribute that is a string for an argument
    x_ptr, z_ptr = pick(student.pointers, entry, SEGMENT), pick(teacher.pointers, entry, SEGMENT)
    grad_ptr = pick(grad.pointers, entry, SEGMENT)
    ACC: tl.constexpr = tl.float64 if SEGMENT.double else tl.float32
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    x_start = tile_start(n, c_first, p0, channels, hw, student.strides, entry, SEGMENT)
    z_start = tile_start(n, c_first, p0, channels, hw, teacher.strides, entry, SEGMENT)
    grad_start = tile_start(n, c_first, p0, channels, hw, grad.strides, entry, SEGMENT)
    x_at = tile_offsets(c, p, p0, channels, hw, width, student.strides, entry, SEGMENT)
    z_at = tile_offsets(c, p, p0, channels, hw, width, teacher.strides, entry, SEGMENT)
    grad_at = tile_offsets(c, p, p0, channels, hw, width, grad.strides, entry, SEGMENT)
    mask = inside(c, p, c_last - c_first, hw - p0, SEGMENT, ALIGNED)
    x = tl.load(x_ptr + x_start + x_at, mask=mask, other=0.0, eviction_policy="evict_first")
    z = tl.load(z_ptr + z_start + z_at, mask=mask, other=0.0, eviction_policy="evict_first")
    share = shares(scores_at + p, p < hw - p0, norm_at, eps, scale, SEGMENT.norms, ACC)
    numbers = terms.numbers[SEGMENT.term]
    tau, inverse_tau = number_of(numbers[2], numbers[3]).to(ACC), number_of(numbers[4], numbers[5]).to(ACC)
    beta, inverse_beta = number_of(numbers[6], numbers[7]).to(ACC), number_of(numbers[8], numbers[9]).to(ACC)
    upstream = upstream_of(terms, SEGMENT.term, ACC)
    coefficient = share * (upstream * tau if SEGMENT.tempered else upstream)
    sums = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for c0 in range(c_first, c_last, BLOCK_C):
        x_start += BLOCK_C * channel_stride(hw, student.strides, entry, SEGMENT)
        z_start += BLOCK_C * channel_stride(hw, teacher.strides, entry, SEGMENT)
        following = inside(c, p, c_last - c0 - BLOCK_C, hw - p0, SEGMENT, ALIGNED)
        next_x = tl.load(x_ptr + x_start + x_at, mask=following, other=0.0, eviction_policy="evict_first")
        next_z = tl.load(z_ptr + z_start + z_at, mask=following, other=0.0, eviction_policy="evict_first")
        a, b = x.to(ACC), z.to(ACC)
        if SEGMENT.tempered:
            a, b = a * inverse_tau, b * inverse_tau
        value, slope = pointwise(a, b, beta, inverse_beta, LOSS)
        if WANT_LOSS:
            sums += tl.where(mask, value, 0.0) if SEGMENT.masked else value
        if SEGMENT.want_grad:
            result = (coefficient[None, :] * slope).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + grad_start + grad_at, result, mask=mask)
            grad_start += BLOCK_C * channel_stride(hw, grad.strides, entry, SEGMENT)
        x, z, mask = next_x, next_z, following
    loss = tl.sum(sums * share[None, :])
    return (loss * (tau * tau) if SEGMENT.tempered else loss).to(tl.float64)


@triton.jit
def imitate_segment(
    program, student, teacher, grad, sizes, rows, terms, scores_ptr, norm_ptr,
    SEGMENTS: tl.constexpr, INDEX: tl.constexpr, WANT_LOSS: tl.constexpr,
):  # fmt: skip
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    # Where rows are not aligned each element has an address of its own: fewer of them, to save registers.
    NARROW_C: tl.constexpr = (SEGMENT.block_c + 3) // 4
    VECTOR: tl.constexpr = SEGMENT.vector
    entry, tile = entry_of(program, sizes.starts, SEGMENT)
    channels = size_of(pick(sizes.channels, entry, SEGMENT))
    hw = size_of(pick(sizes.areas, entry, SEGMENT))
    width = size_of(pick(sizes.widths, entry, SEGMENT))
    chunks = tl.cdiv(channels, SEGMENT.chunk)
    tiles = tl.cdiv(hw, SEGMENT.block_p)
    n = tile // (tiles * chunks)
    p0 = tile // chunks % tiles * SEGMENT.block_p
    c_first = tile % chunks * SEGMENT.chunk
    c_last = tl.minimum(c_first + SEGMENT.chunk, channels)
    scores_at = scores_ptr + size_of(pick(rows.first_positions, entry, SEGMENT)) + n.to(tl.int64) * hw + p0
    norm_at = norm_ptr if SEGMENT.norms > 1 else norm_ptr + size_of(pick(rows.levels, entry, SEGMENT))
    scale = number_of(pick(rows.scales[0], entry, SEGMENT), pick(rows.scales[1], entry, SEGMENT))
    eps = number_of(pick(rows.eps[0], entry, SEGMENT), pick(rows.eps[1], entry, SEGMENT))
    if VECTOR > 1 and (hw if SEGMENT.layout == "nchw" else channels) % VECTOR == 0:
        # x // VECTOR * VECTOR tells the compiler that rows are aligned: 16-byte loads and stores
        partial = imitate_tile(
            student, teacher, grad, terms, scores_at, norm_at, scale, eps, entry, n, c_first, c_last, p0,
            channels if SEGMENT.layout == "nchw" else channels // VECTOR * VECTOR,
            hw // VECTOR * VECTOR if SEGMENT.layout == "nchw" else hw, width,
            SEGMENT, True, SEGMENT.block_c, WANT_LOSS,
        )  # fmt: skip
    else:
        partial = imitate_tile(
            student, teacher, grad, terms, scores_at, norm_at, scale, eps, entry, n, c_first, c_last, p0,
            channels, hw, width, SEGMENT, False, NARROW_C, WANT_LOSS,
        )  # fmt: skip
    return partial


@triton.jit
def imitate_kernel(
    student, teacher, grad, sizes, rows, terms, scores_ptr, norm_ptr, total_ptr, values_ptr, slots_ptr, counter_ptr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    WANT_LOSS: tl.constexpr = values_ptr is not None
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    partial = tl.zeros((), tl.float64)
    for i in tl.static_range(len(SEGMENTS)):
        if is_in(program, sizes.starts, SEGMENTS, i):
            partial = imitate_segment(
                program, student, teacher, grad, sizes, rows, terms, scores_ptr, norm_ptr, SEGMENTS, i, WANT_LOSS
            )
    if WANT_LOSS:  # noqa: SIM102 - a constexpr: with `and` the sum would be stored where no slot is
        if store_partial(slots_ptr, counter_ptr, program, partial):
            total = tl.zeros((), tl.float64)
            for t in tl.static_range(len(terms.numbers)):
                value = tl.zeros((), tl.float64)
                for i in tl.static_range(len(SEGMENTS)):
                    if SEGMENTS[i].term == t:
                        value += store_values(values_ptr, slots_ptr, sizes, rows, SEGMENTS, i)
                tl.store(values_ptr + t, value.to(values_ptr.dtype.element_ty))
                total += upstream_of(terms, t, tl.float64) * value
            tl.store(total_ptr, total.to(total_ptr.dtype.element_ty))


# Elements of a thread in one step, by bytes of the widest number, and what differs by loss: as many as fit in the
# registers without a spill (docs/codegen.md).
ELEMENTS = {2: 8, 4: 8, 8: 2}
ELEMENTS_OF = {("mse", 2): 16, ("kl", 4): 4}


def tile_of(layout: str, channels: int, loss: str, itemsize: int) -> tuple[int, int, int]:
    """Channels and positions of a step of 128 threads, and the channels that a program walks over."""
    elements = lv.THREADS * ELEMENTS_OF.get((loss, itemsize), ELEMENTS[itemsize])
    largest, most = (64, 256) if layout == "nhwc" else (8, 64)
    # Four at least, of which one is left where rows are not aligned.
    block_c = max(4, lv.block_of(channels, largest))
    return block_c, elements // block_c, lv.chunk_of(channels, block_c, most)


def segments_of(
    student: Sequence[Tensor], teacher: Sequence[Tensor], grads: Sequence[Tensor], table: Table, want_loss: bool
) -> tuple[list[int], tuple[lv.Segment, ...]]:
    """The entries that have work, in the order of the launch; its segments, a term's entries of one pair of dtypes."""
    groups: dict[tuple[bool, int, torch.dtype, torch.dtype], list[int]] = {}
    for e, (x, z, t) in enumerate(zip(student, teacher, table.term, strict=True)):
        if (want_loss or table.want_grad[t]) and isinstance(LOSSES[table.loss[t]], Pointwise):
            groups.setdefault((LOSSES[table.loss[t]].takes_logits, t, x.dtype, z.dtype), []).append(e)
    double = accumulate_dtype(*student, *teacher) == torch.float64
    order: list[int] = []
    segments: list[lv.Segment] = []
    for (logits, t, *_), rows in sorted(groups.items(), key=lambda group: group[0][0]):
        tensors = [v for e in rows for v in (student[e], teacher[e], grads[e])]
        shapes = [student[e].shape for e in rows]
        layout = lv.layout_of(tensors)
        gaps = lv.gaps_of(tensors, layout)
        loss = table.loss[t]
        if (loss == "kl" and not want_loss) or (loss in ("qfl", "qfl_detached") and table.beta[t] == 0):
            loss = "bce"  # the same, or the same gradient: one kernel fewer to compile
        itemsize = max(8 if double else 0, *(v.element_size() for v in tensors))
        block_c, block_p, chunk = tile_of(layout, max(shape[1] for shape in shapes), loss, itemsize)
        segments.append(
            lv.Segment(
                len(order), len(order) + len(rows), layout, lv.vector_width(layout, tensors, gaps),
                lv.wide_index(shapes, layout, gaps, block_c, block_p), block_c, block_p, chunk, double,
                loss, loss not in ZERO_AT_ZERO, t, logits and table.temperature[t] != 1, table.want_grad[t],
                table.norms, bool(gaps),
            )
        )  # fmt: skip
        order += rows
    return order, tuple(segments)


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
    """Launch `imitate_kernel`; arguments and results as in `frs_kernels.reference.imitate`.

    Raises:
        RuntimeError: before any launch, where the arguments do not fit each other.
    """
    level, term, scale, eps = entry_columns(len(student), len(loss), level, term, scale, eps)
    table = Table(
        level, term, scale, eps, loss, weight, factor, temperature, beta, want_grad, norm.numel() if joint else 1
    )
    first_positions = check_imitate(student, teacher, scores, norm, table)
    device, dtype = scores.device, accumulate_dtype(*student, *teacher)
    wanted = [want_grad[t] for t in term]
    # Where no gradient is wanted the student's tensor keeps its place, and nothing is written.
    grads = [torch.empty_like(x) if w else x for x, w in zip(student, wanted, strict=True)]
    order, segments = segments_of(student, teacher, grads, table, want_loss)
    programs, sizes = lv.sizes_of(tuple(student[e].shape for e in order), segments)
    grouped = [t for t, name in enumerate(loss) if isinstance(LOSSES[name], Grouped)]
    new = torch.empty if programs and not grouped else torch.zeros
    total = new(() if want_loss else 0, dtype=dtype, device=device)
    values = new(len(loss) + len(student) if want_loss else 0, dtype=dtype, device=device)
    if programs:
        with lv.on_device(device):
            imitate_kernel[(programs,)](
                *(lv.columns_of([tensors[e] for e in order], segments) for tensors in (student, teacher, grads)),
                sizes, table.rows(order, first_positions), table.terms(), scores, norm,
                *((total, values, *workspace(device, programs)) if want_loss else (None,) * 4),
                SEGMENTS=segments, num_warps=lv.NUM_WARPS,
                maxnreg=lv.max_registers(segments),
            )  # fmt: skip
    for t in grouped:
        if want_loss or want_grad[t]:
            imitate_groups(student, teacher, grads, scores, norm, table, t, first_positions, total, values)
    return total, values, [grad for grad, w in zip(grads, wanted, strict=True) if w]
