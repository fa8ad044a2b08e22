"""imitate of softmax_kl: a group of channels is one softmax at every position; a launch a term.

    e_x = exp(x - max x), Z_x = sum e_x, p = e_x / Z_x      and so e_z, Z_z and q of z; logits in units of tau
    value  = sum q (log q - log p) = sum q (exp(t) - 1 - t)      t = log p - log q
    slope  = p - q

The second form of the value has no negative term, so that nothing cancels where student and teacher nearly agree
(docs/math.md). A program takes BLOCK_P positions of one group and goes over its channels twice: for the maxima and the
sums of exponentials, which are scaled anew where a maximum grows, and for value and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.levels import accumulate_dtype
from frs_kernels.losses import group_size
from frs_kernels.triton import levels as lv
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
from frs_kernels.triton.pointwise import exp_of_minus, log_of, magnitude
from frs_kernels.triton.slots import store_partial, workspace
from frs_kernels.triton.terms import Table, shares, store_values, upstream_of


@triton.jit
def excess(t):
    """exp(t) - 1 - t for |t| <= 1; in fp32 a polynomial fitted to 2^-26, in fp64 the series."""
    if t.dtype == tl.float64:
        rest = t * 0.0 + 1.0
        for i in tl.static_range(18):
            rest = 1.0 + t * rest / (20 - i)
        return t * t * rest * 0.5
    else:
        q = 2.772283083e-06 * t + 2.535482963e-05
        q = q * t + 1.984402424e-04
        q = q * t + 1.388545148e-03
        q = q * t + 8.333310485e-03
        q = q * t + 4.166673496e-02
        q = q * t + 1.666666716e-01
        q = q * t + 0.5
        return t * t * q


@triton.jit
def quotient(a, b):
    """a / b to the last bit, so that it is 1 where both are the same: fp32's own is off by an ulp or two."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def take(logits, most, total, inverse_tau):
    """The maxima and the sums of what lies below them, given more channels."""
    new = tl.maximum(most, tl.max(logits, 0))
    scaled = total * exp_of_minus((new - most) * inverse_tau)
    return new, scaled + tl.sum(exp_of_minus((new[None, :] - logits) * inverse_tau), 0)


@triton.jit
def softmax_tile(
    student, teacher, grad, terms, scores_at, norm_at, scale, eps,
    entry, n, c_first, p0, channels, hw, width,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, WANT_LOSS: tl.constexpr,
):  # fmt: skip
    """A program's gradients, stored, and its loss."""
    BLOCK_C: tl.constexpr = SEGMENT.block_c
    BLOCK_P: tl.constexpr = SEGMENT.block_p
    GROUP: tl.constexpr = SEGMENT.chunk
    ACC: tl.constexpr = tl.float64 if SEGMENT.double else tl.float32
    x_ptr, z_ptr = pick(student.pointers, entry, SEGMENT), pick(teacher.pointers, entry, SEGMENT)
    grad_ptr = pick(grad.pointers, entry, SEGMENT)
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    x_start = tile_start(n, c_first, p0, channels, hw, student.strides, entry, SEGMENT)
    z_start = tile_start(n, c_first, p0, channels, hw, teacher.strides, entry, SEGMENT)
    grad_start = tile_start(n, c_first, p0, channels, hw, grad.strides, entry, SEGMENT)
    x_at = tile_offsets(c, p, p0, channels, hw, width, student.strides, entry, SEGMENT)
    z_at = tile_offsets(c, p, p0, channels, hw, width, teacher.strides, entry, SEGMENT)
    grad_at = tile_offsets(c, p, p0, channels, hw, width, grad.strides, entry, SEGMENT)
    numbers = terms.numbers[SEGMENT.term]
    tau, inverse_tau = number_of(numbers[2], numbers[3]).to(ACC), number_of(numbers[4], numbers[5]).to(ACC)
    most_x = tl.full((BLOCK_P,), -float("inf"), ACC)
    most_z, total_x, total_z = most_x, tl.zeros((BLOCK_P,), ACC), tl.zeros((BLOCK_P,), ACC)
    x_from, z_from = x_start, z_start
    for c0 in range(0, GROUP, BLOCK_C):
        mask = inside(c, p, GROUP - c0, hw - p0, SEGMENT, ALIGNED)
        x = tl.load(x_ptr + x_from + x_at, mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + z_from + z_at, mask=mask, other=0.0).to(ACC)
        if GROUP % BLOCK_C != 0:
            is_channel = (c < GROUP - c0)[:, None]
            x, z = tl.where(is_channel, x, -float("inf")), tl.where(is_channel, z, -float("inf"))
        most_x, total_x = take(x, most_x, total_x, inverse_tau)
        most_z, total_z = take(z, most_z, total_z, inverse_tau)
        x_from += BLOCK_C * channel_stride(hw, student.strides, entry, SEGMENT)
        z_from += BLOCK_C * channel_stride(hw, teacher.strides, entry, SEGMENT)
    ratio = quotient(total_x, total_z)
    shift = (most_x - most_z) * inverse_tau + (log_of(total_x) - log_of(total_z))
    share = shares(scores_at + p, p < hw - p0, norm_at, eps, scale, SEGMENT.norms, ACC) / total_x
    coefficient = share * (upstream_of(terms, SEGMENT.term, ACC) * tau)
    sums = tl.zeros((BLOCK_P,), ACC)
    for c0 in range(0, GROUP, BLOCK_C):
        mask = inside(c, p, GROUP - c0, hw - p0, SEGMENT, ALIGNED)
        x = tl.load(x_ptr + x_start + x_at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        z = tl.load(z_ptr + z_start + z_at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        e_x = exp_of_minus((most_x[None, :] - x) * inverse_tau)
        q = exp_of_minus((most_z[None, :] - z) * inverse_tau) * ratio[None, :]
        slope = e_x - q
        if WANT_LOSS:
            t = (x - z) * inverse_tau - shift[None, :]
            t = tl.where(t > 3.4e38, 3.4e38, t)  # of a class that the teacher masks with -inf
            # tl.abs, which LLVM can see through, fails an assertion of its vectorizer here (Triton 3.7.1).
            value = tl.where(magnitude(t) < 1.0, q * excess(t), slope - q * t)
            sums += tl.sum(tl.where(mask, value, 0.0), 0)
        if SEGMENT.want_grad:
            result = (coefficient[None, :] * slope).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + grad_start + grad_at, result, mask=mask)
        x_start += BLOCK_C * channel_stride(hw, student.strides, entry, SEGMENT)
        z_start += BLOCK_C * channel_stride(hw, teacher.strides, entry, SEGMENT)
        grad_start += BLOCK_C * channel_stride(hw, grad.strides, entry, SEGMENT)
    return (tl.sum(sums * share) * (tau * tau)).to(tl.float64)


@triton.jit
def softmax_segment(
    program, student, teacher, grad, sizes, rows, terms, scores_ptr, norm_ptr,
    SEGMENTS: tl.constexpr, INDEX: tl.constexpr, WANT_LOSS: tl.constexpr,
):  # fmt: skip
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    VECTOR: tl.constexpr = SEGMENT.vector
    entry, tile = entry_of(program, sizes.starts, SEGMENT)
    channels = size_of(pick(sizes.channels, entry, SEGMENT))
    hw = size_of(pick(sizes.areas, entry, SEGMENT))
    width = size_of(pick(sizes.widths, entry, SEGMENT))
    groups = channels // SEGMENT.chunk
    tiles = tl.cdiv(hw, SEGMENT.block_p)
    n = tile // (tiles * groups)
    p0 = tile // groups % tiles * SEGMENT.block_p
    c_first = tile % groups * SEGMENT.chunk
    scores_at = scores_ptr + size_of(pick(rows.first_positions, entry, SEGMENT)) + n.to(tl.int64) * hw + p0
    norm_at = norm_ptr if SEGMENT.norms > 1 else norm_ptr + size_of(pick(rows.levels, entry, SEGMENT))
    scale = number_of(pick(rows.scales[0], entry, SEGMENT), pick(rows.scales[1], entry, SEGMENT))
    eps = number_of(pick(rows.eps[0], entry, SEGMENT), pick(rows.eps[1], entry, SEGMENT))
    if VECTOR > 1 and hw % VECTOR == 0:
        partial = softmax_tile(
            student, teacher, grad, terms, scores_at, norm_at, scale, eps, entry, n, c_first, p0,
            channels, hw // VECTOR * VECTOR, width, SEGMENT, True, WANT_LOSS,
        )  # fmt: skip
    else:
        partial = softmax_tile(
            student, teacher, grad, terms, scores_at, norm_at, scale, eps, entry, n, c_first, p0,
            channels, hw, width, SEGMENT, False, WANT_LOSS,
        )  # fmt: skip
    return partial


@triton.jit
def softmax_kernel(
    student, teacher, grad, sizes, rows, terms, scores_ptr, norm_ptr, total_ptr, values_ptr, slots_ptr, counter_ptr,
    SEGMENTS: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """The values of the entries and of the term; what the term adds to the total of the launches before."""
    WANT_LOSS: tl.constexpr = values_ptr is not None
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    partial = tl.zeros((), tl.float64)
    for i in tl.static_range(len(SEGMENTS)):
        if is_in(program, sizes.starts, SEGMENTS, i):
            partial = softmax_segment(
                program, student, teacher, grad, sizes, rows, terms, scores_ptr, norm_ptr, SEGMENTS, i, WANT_LOSS
            )
    if WANT_LOSS:  # noqa: SIM102 - a constexpr: with `and` the sum would be stored where no slot is
        if store_partial(slots_ptr, counter_ptr, program, partial):
            value = tl.zeros((), tl.float64)
            for i in tl.static_range(len(SEGMENTS)):
                value += store_values(values_ptr, slots_ptr, sizes, rows, SEGMENTS, i)
            tl.store(values_ptr + TERM, value.to(values_ptr.dtype.element_ty))
            total = tl.load(total_ptr).to(tl.float64) + upstream_of(terms, TERM, tl.float64) * value
            tl.store(total_ptr, total.to(total_ptr.dtype.element_ty))


def tile_of(layout: str, group: int, itemsize: int) -> tuple[int, int]:
    """Channels and positions of a step of 128 threads; one channel where positions are neighbours, so that no thread
    needs another's sums."""
    elements = lv.THREADS * (16 // max(itemsize, 4))
    block_c = 1
    while layout == "nhwc" and block_c < min(group, 64):
        block_c *= 2
    return block_c, max(elements // block_c, 1)


def segments_of(
    student: Sequence[Tensor], teacher: Sequence[Tensor], grads: Sequence[Tensor], table: Table, term: int
) -> tuple[list[int], tuple[lv.Segment, ...]]:
    """A term's entries in the order of the launch; its segments, those of one pair of dtypes and one group size."""
    kinds: dict[tuple[torch.dtype, torch.dtype, int], list[int]] = {}
    for e, (x, z, t) in enumerate(zip(student, teacher, table.term, strict=True)):
        if t == term:
            kinds.setdefault((x.dtype, z.dtype, group_size(table.beta[t], x.shape[1])), []).append(e)
    double = accumulate_dtype(*student, *teacher) == torch.float64
    order: list[int] = []
    segments: list[lv.Segment] = []
    for (*_, group), entries in kinds.items():
        tensors = [v for e in entries for v in (student[e], teacher[e], grads[e])]
        shapes = [student[e].shape for e in entries]
        layout = lv.layout_of(tensors)
        gaps = lv.gaps_of(tensors, layout)
        block_c, block_p = tile_of(layout, group, max(8 if double else 0, *(v.element_size() for v in tensors)))
        segments.append(
            lv.Segment(
                len(order), len(order) + len(entries), layout,
                lv.vector_width(layout, tensors, gaps) if layout == "nchw" else 1,
                lv.wide_index(shapes, layout, gaps, block_c, block_p), block_c, block_p, group, double,
                term=term, want_grad=table.want_grad[term], norms=table.norms, gaps=bool(gaps),
            )
        )  # fmt: skip
        order += entries
    return order, tuple(segments)


def imitate_groups(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    grads: Sequence[Tensor],
    scores: Tensor,
    norm: Tensor,
    table: Table,
    term: int,
    first_positions: Sequence[int],
    total: Tensor,
    values: Tensor,
) -> None:
    """Launch `softmax_kernel` for a term: its gradients, its values and its entries', what it adds to the total.

    Args:
        student, teacher, grads: an (N, C, H, W) tensor an entry of the call.
        scores, norm, table, total, values: as in `frs_kernels.triton.imitate`; total and values are empty where they
            are not wanted, else hold what the launches before have made, 0 where there was none.
        term: the number of the term; first_positions: where each level's scores begin.
    """
    order, segments = segments_of(student, teacher, grads, table, term)
    programs, sizes = lv.sizes_of(tuple(student[e].shape for e in order), segments)
    if not programs:
        return
    with lv.on_device(scores.device):
        softmax_kernel[(programs,)](
            *(lv.columns_of([tensors[e] for e in order], segments) for tensors in (student, teacher, grads)),
            sizes, table.rows(order, first_positions), table.terms(), scores, norm,
            *((total, values, *workspace(scores.device, programs)) if values.numel() else (None,) * 4),
            SEGMENTS=segments, TERM=term, num_warps=lv.NUM_WARPS, maxnreg=128,
        )  # fmt: skip
