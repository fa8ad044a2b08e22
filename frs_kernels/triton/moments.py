"""moments: losses along rows, and what their gradients need of each row; moments_backward: those gradients.

    value_l   = the mean over a level's rows of what the loss says of each        (row_losses.py)
    total     = weight factor sum_l value_l
    gradient  = weight factor (a f(s - s0) - b f(t - t0) + c)

A program takes BLOCK_C channels of one image and walks over BLOCK_P of their positions. It stores each channel's sums in
slots of its own. Programs of the same rows have a counter: the last of them adds up their slots, in fp64 and in one
order, and stores the rows' numbers and one value; the last of those adds up the values. Rows are many: one program
alone would take longer over them than all programs took over the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.levels import accumulate_dtype
from frs_kernels.row_losses import NUMBERS, ROW_LOSSES
from frs_kernels.triton import levels as lv
from frs_kernels.triton.checks import check_moments, check_moments_backward
from frs_kernels.triton.levels import entry_of, inside, is_in, number_of, pick, size_of, tile_offsets, tile_start
from frs_kernels.triton.row_losses import (
    STORED,
    add_step,
    cwd_numbers,
    cwd_sums,
    pkd_numbers,
    pkd_sums,
    slope_of,
)
from frs_kernels.triton.slots import comes_last, sum_entry


class Rows(NamedTuple):
    """What is known of a level beside its tensors, an element a level, encoded by `odd` and `halves`."""

    images: tuple[int, ...]
    firsts: tuple[int, ...]  # of its rows
    places: tuple[int, ...]  # of its value
    blocks: tuple[int, ...]  # the first of its blocks of rows, then the number of blocks
    scales: tuple[tuple[int, ...], ...]


class Call(NamedTuple):
    """The numbers of a call, encoded by `halves`, and its factor."""

    weight: tuple[int, int]
    tau: tuple[int, int]
    inverse_tau: tuple[int, int]
    eps: tuple[int, int]
    factor: Tensor | None


@triton.jit
def place_of(program, sizes, SEGMENT: tl.constexpr):
    """A program's level, image, tile of positions and block of channels; the tiles and blocks of an image; its size."""
    entry, tile = entry_of(program, sizes.starts, SEGMENT)
    channels = size_of(pick(sizes.channels, entry, SEGMENT))
    hw = size_of(pick(sizes.areas, entry, SEGMENT))
    width = size_of(pick(sizes.widths, entry, SEGMENT))
    blocks, tiles = tl.cdiv(channels, SEGMENT.block_c), tl.cdiv(hw, SEGMENT.block_p)
    return entry, tile // (tiles * blocks), tile // blocks % tiles, tile % blocks, tiles, blocks, channels, hw, width


@triton.jit
def aligned(channels, hw, SEGMENT: tl.constexpr):
    """Whether lines begin on 16 bytes; channels and hw, of which the compiler is told so: 16-byte loads and stores."""
    VECTOR: tl.constexpr = SEGMENT.vector
    if VECTOR == 1:
        return False, channels, hw
    elif SEGMENT.layout == "nchw":
        return hw % VECTOR == 0, channels, hw // VECTOR * VECTOR
    else:
        return channels % VECTOR == 0, channels // VECTOR * VECTOR, hw


@triton.jit
def address(ptr, strides, tile, p0, c, p, SEGMENT: tl.constexpr):
    """Of channels c and positions p0 + p of a tile."""
    entry, n, c0, _, channels, hw, width = tile
    start = tile_start(n, c0, p0, channels, hw, strides, entry, SEGMENT)
    return ptr + start + tile_offsets(c, p, p0, channels, hw, width, strides, entry, SEGMENT)


@triton.jit
def load_step(
    x_ptr, z_ptr, student, teacher, tile, p0, other,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Student and teacher at the positions from p0 on, and which of them exist."""
    _, _, c0, p_last, channels, _, _ = tile
    c, p = tl.arange(0, SEGMENT.block_c), tl.arange(0, STEP)
    mask = inside(c, p, channels - c0, p_last - p0, SEGMENT, ALIGNED)
    x = tl.load(address(x_ptr, student.strides, tile, p0, c, p, SEGMENT), mask=mask, other=other)
    z = tl.load(address(z_ptr, teacher.strides, tile, p0, c, p, SEGMENT), mask=mask, other=other)
    return x, z, mask


@triton.jit
def store_sums(
    student, teacher, slots_ptr, tile, p_first, inverse_tau,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Store the pivots and sums of a tile. The next positions are on their way while those before are added up."""
    ACC: tl.constexpr = tl.float64 if SEGMENT.double else tl.float32
    # A thread's neighbours are added up in fp32 as well.
    TOGETHER: tl.constexpr = SEGMENT.vector if ALIGNED and SEGMENT.layout == "nchw" else 1
    LOSS: tl.constexpr = SEGMENT.loss
    BLOCK_C: tl.constexpr = SEGMENT.block_c
    NOTHING: tl.constexpr = float("-inf") if LOSS == "cwd" else 0.0
    entry, _, c0, p_last, channels, _, _ = tile
    x_ptr, z_ptr = pick(student.pointers, entry, SEGMENT), pick(teacher.pointers, entry, SEGMENT)
    if LOSS == "cwd":
        most_x, most_z = tl.full((BLOCK_C, STEP), NOTHING, ACC), tl.full((BLOCK_C, STEP), NOTHING, ACC)
        x, z, _ = load_step(x_ptr, z_ptr, student, teacher, tile, p_first, NOTHING, SEGMENT, ALIGNED, STEP)
        for p0 in range(p_first, p_last, STEP):
            next_x, next_z, _ = load_step(
                x_ptr, z_ptr, student, teacher, tile, p0 + STEP, NOTHING, SEGMENT, ALIGNED, STEP
            )
            most_x, most_z = tl.maximum(most_x, x.to(ACC)), tl.maximum(most_z, z.to(ACC))
            x, z = next_x, next_z
        pivot_x, pivot_z = tl.max(most_x, 1, keep_dims=True), tl.max(most_z, 1, keep_dims=True)
    else:
        pivot_x, pivot_z, _ = load_step(x_ptr, z_ptr, student, teacher, tile, p_first, NOTHING, SEGMENT, False, 1)
        pivot_x, pivot_z = pivot_x.to(ACC), pivot_z.to(ACC)
    zero = tl.zeros((BLOCK_C, STEP), ACC)
    sums = (zero, zero, zero, zero, zero) if LOSS == "pkd" else (zero, zero, zero)
    x, z, mask = load_step(x_ptr, z_ptr, student, teacher, tile, p_first, NOTHING, SEGMENT, ALIGNED, STEP)
    for p0 in range(p_first, p_last, STEP):
        next_x, next_z, following = load_step(
            x_ptr, z_ptr, student, teacher, tile, p0 + STEP, NOTHING, SEGMENT, ALIGNED, STEP
        )
        sums = add_step(sums, x.to(ACC), z.to(ACC), mask, pivot_x, pivot_z, inverse_tau, LOSS)
        x, z, mask = next_x, next_z, following
    slots = slots_ptr + tl.arange(0, BLOCK_C)[:, None]
    tl.store(slots, pivot_x.to(tl.float64))
    tl.store(slots + STRIDE, pivot_z.to(tl.float64))
    for k in tl.static_range(len(sums)):
        of_threads = tl.sum(tl.reshape(sums[k], (BLOCK_C, STEP // TOGETHER, TOGETHER)), 2)
        tl.store(slots + (2 + k) * STRIDE, tl.sum(of_threads.to(tl.float64), 1, keep_dims=True))


@triton.jit
def finish_rows(
    slots_ptr, rows_ptr, entry, n, block, tiles, blocks, channels, hw, rows, call,
    SEGMENT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Store the numbers of a block of rows; its value. `slots_ptr` points to those of its first program."""
    LOSS: tl.constexpr = SEGMENT.loss
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    apart = blocks * STORED * STRIDE
    images = size_of(pick(rows.images, entry, SEGMENT)).to(tl.int64)
    tau, eps = number_of(call.tau[0], call.tau[1]), number_of(call.eps[0], call.eps[1])
    scale = number_of(pick(rows.scales[0], entry, SEGMENT), pick(rows.scales[1], entry, SEGMENT))
    c = block * SEGMENT.block_c + tl.arange(0, SEGMENT.block_c)
    row = size_of(pick(rows.firsts, entry, SEGMENT)).to(tl.int64) + c
    if SEGMENT.per_image:
        row += n.to(tl.int64) * channels
    if LOSS == "pkd":
        pivot_s, pivot_t, sums = pkd_sums(slots_ptr, images * tiles, apart, tiles, hw, SEGMENT, STRIDE)
        count = (images * hw).to(tl.float64)
        numbers, value = pkd_numbers(pivot_s, pivot_t, sums, count, scale / (count * channels), eps, DTYPE)
    else:
        most_s, most_t, sums = cwd_sums(slots_ptr, tiles, apart, tau, SEGMENT, STRIDE)
        numbers, value = cwd_numbers(most_s, most_t, sums, scale / (images * channels).to(tl.float64), tau)
    for k in tl.static_range(len(numbers)):
        tl.store(rows_ptr + row * len(numbers) + k, numbers[k].to(DTYPE), mask=c < channels)
    return tl.sum(tl.where(c < channels, value, 0.0))


@triton.jit
def moments_segment(
    program, student, teacher, sizes, rows, call, slots_ptr, blocks_ptr, counters_ptr, rows_ptr,
    SEGMENTS: tl.constexpr, INDEX: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """True in the program that comes last of all: every block of rows has its value."""
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    # Where lines are not aligned each element has an address of its own: fewer of them, to save registers.
    NARROW: tl.constexpr = SEGMENT.step // 4
    LAST: tl.constexpr = SEGMENTS[len(SEGMENTS) - 1].last
    PROGRAM: tl.constexpr = STORED * STRIDE
    entry, n, tile, block, tiles, blocks, channels, hw, width = place_of(program, sizes, SEGMENT)
    c0, p0 = block * SEGMENT.block_c, tile * SEGMENT.block_p
    p_last = tl.minimum(p0 + SEGMENT.block_p, hw)
    inverse_tau = number_of(call.inverse_tau[0], call.inverse_tau[1]).to(rows_ptr.dtype.element_ty)
    slots = slots_ptr + program.to(tl.int64) * PROGRAM
    wide, whole_channels, whole_hw = aligned(channels, hw, SEGMENT)
    if wide:
        place = (entry, n, c0, p_last, whole_channels, whole_hw, width)
        store_sums(student, teacher, slots, place, p0, inverse_tau, SEGMENT, True, SEGMENT.step, STRIDE)
    else:
        place = (entry, n, c0, p_last, channels, hw, width)
        store_sums(student, teacher, slots, place, p0, inverse_tau, SEGMENT, False, NARROW, STRIDE)
    index = size_of(pick(rows.blocks, entry, SEGMENT)) + block
    parts, before = tiles, tile
    if SEGMENT.per_image:
        index += n * blocks
    else:
        parts *= size_of(pick(rows.images, entry, SEGMENT))
        before += n * tiles
    last = False
    if comes_last(counters_ptr + 1 + index, parts):
        first = slots - (before * blocks).to(tl.int64) * PROGRAM
        value = finish_rows(
            first, rows_ptr, entry, n, block, tiles, blocks, channels, hw, rows, call, SEGMENT, STRIDE
        )
        tl.store(blocks_ptr + index, value)
        last = comes_last(counters_ptr, size_of(rows.blocks[LAST]))
    return last


@triton.jit
def upstream_of(call, ACC: tl.constexpr):
    """weight * factor"""
    upstream = number_of(call.weight[0], call.weight[1]).to(ACC)
    if call.factor is not None:
        upstream *= tl.load(call.factor).to(ACC)
    return upstream


@triton.jit
def store_values(values_ptr, blocks_ptr, rows, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    """The value of each level of a segment, stored; their sum."""
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    total = tl.zeros((), tl.float64)
    for entry in range(SEGMENT.first, SEGMENT.last):
        value = sum_entry(blocks_ptr, rows.blocks, entry, SEGMENT)
        tl.store(values_ptr + size_of(pick(rows.places, entry, SEGMENT)), value.to(values_ptr.dtype.element_ty))
        total += value
    return total


@triton.jit
def moments_kernel(
    student, teacher, sizes, rows, call, slots_ptr, blocks_ptr, counters_ptr, total_ptr, values_ptr, rows_ptr,
    SEGMENTS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    last = False
    for i in tl.static_range(len(SEGMENTS)):
        if is_in(program, sizes.starts, SEGMENTS, i):
            last = moments_segment(
                program, student, teacher, sizes, rows, call, slots_ptr, blocks_ptr, counters_ptr, rows_ptr,
                SEGMENTS, i, STRIDE,
            )  # fmt: skip
    if last:
        value = tl.zeros((), tl.float64)
        for i in tl.static_range(len(SEGMENTS)):
            value += store_values(values_ptr, blocks_ptr, rows, SEGMENTS, i)
        tl.store(values_ptr, value.to(values_ptr.dtype.element_ty))
        total = upstream_of(call, tl.float64) * value
        tl.store(total_ptr, total.to(total_ptr.dtype.element_ty))


@triton.jit
def store_slopes(
    student, teacher, grad, numbers_ptr, tile, p_first, inverse_tau, upstream,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile; `numbers_ptr` points to the numbers of its first channel."""
    ACC: tl.constexpr = numbers_ptr.dtype.element_ty
    LOSS: tl.constexpr = SEGMENT.loss
    NUMBERS: tl.constexpr = 5
    entry, _, c0, p_last, channels, _, _ = tile
    x_ptr, z_ptr = pick(student.pointers, entry, SEGMENT), pick(teacher.pointers, entry, SEGMENT)
    grad_ptr = pick(grad.pointers, entry, SEGMENT)
    x, z, mask = load_step(x_ptr, z_ptr, student, teacher, tile, p_first, 0.0, SEGMENT, ALIGNED, STEP)
    c, p = tl.arange(0, SEGMENT.block_c), tl.arange(0, STEP)
    of_channel, here = numbers_ptr + c[:, None] * NUMBERS, c[:, None] < channels - c0
    s0, t0 = tl.load(of_channel, mask=here, other=0.0), tl.load(of_channel + 1, mask=here, other=0.0)
    a = tl.load(of_channel + 2, mask=here, other=0.0) * upstream
    b = tl.load(of_channel + 3, mask=here, other=0.0) * upstream
    d = tl.load(of_channel + 4, mask=here, other=0.0) * upstream
    for p0 in range(p_first, p_last, STEP):
        next_x, next_z, following = load_step(
            x_ptr, z_ptr, student, teacher, tile, p0 + STEP, 0.0, SEGMENT, ALIGNED, STEP
        )
        slope = slope_of(x.to(ACC), z.to(ACC), (s0, t0, a, b, d), inverse_tau, LOSS)
        to = address(grad_ptr, grad.strides, tile, p0, c, p, SEGMENT)
        tl.store(to, slope.to(grad_ptr.dtype.element_ty), mask=mask)
        x, z, mask = next_x, next_z, following


@triton.jit
def slopes_segment(
    program, student, teacher, grad, sizes, rows, call, rows_ptr, SEGMENTS: tl.constexpr, INDEX: tl.constexpr
):
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    NARROW: tl.constexpr = SEGMENT.step // 4
    NUMBERS: tl.constexpr = 5
    entry, n, tile, block, _, _, channels, hw, width = place_of(program, sizes, SEGMENT)
    c0, p0 = block * SEGMENT.block_c, tile * SEGMENT.block_p
    p_last = tl.minimum(p0 + SEGMENT.block_p, hw)
    inverse_tau = number_of(call.inverse_tau[0], call.inverse_tau[1]).to(ACC)
    upstream = upstream_of(call, ACC)
    row = size_of(pick(rows.firsts, entry, SEGMENT)).to(tl.int64) + c0
    if SEGMENT.per_image:
        row += n.to(tl.int64) * channels
    numbers = rows_ptr + row * NUMBERS
    wide, whole_channels, whole_hw = aligned(channels, hw, SEGMENT)
    if wide:
        place = (entry, n, c0, p_last, whole_channels, whole_hw, width)
        store_slopes(student, teacher, grad, numbers, place, p0, inverse_tau, upstream, SEGMENT, True, SEGMENT.step)
    else:
        place = (entry, n, c0, p_last, channels, hw, width)
        store_slopes(student, teacher, grad, numbers, place, p0, inverse_tau, upstream, SEGMENT, False, NARROW)


@triton.jit
def moments_backward_kernel(student, teacher, grad, sizes, rows, call, rows_ptr, SEGMENTS: tl.constexpr):
    program = tl.program_id(0)
    for i in tl.static_range(len(SEGMENTS)):
        if is_in(program, sizes.starts, SEGMENTS, i):
            slopes_segment(program, student, teacher, grad, sizes, rows, call, rows_ptr, SEGMENTS, i)


def tile_of(layout: str, channels: int, double: bool) -> tuple[int, int, int]:
    """Channels and positions of a tile of 128 threads, and positions of a step: 8 numbers a thread, in fp64 half.

    A thread adds up 32 numbers of a channel (nchw), or 8 of each of 8 (nhwc), before threads add up theirs.
    """
    block_c = lv.block_of(channels, 64 if layout == "nhwc" else 16)
    return block_c, (8192 if layout == "nhwc" else 4096) // block_c, (512 if double else 1024) // block_c


def segments_of(
    loss: str, student: Sequence[Tensor], teacher: Sequence[Tensor], grads: Sequence[Tensor] | None
) -> tuple[list[int], tuple[lv.Segment, ...]]:
    """The levels in the order of the launch, those of one pair of dtypes together."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        groups.setdefault((s.dtype, t.dtype), []).append(i)
    double = accumulate_dtype(*student, *teacher) == torch.float64
    order: list[int] = []
    segments: list[lv.Segment] = []
    for levels in groups.values():
        tensors = [v[i] for v in (student, teacher, grads) if v is not None for i in levels]
        shapes = [student[i].shape for i in levels]
        layout = lv.layout_of(tensors)
        gaps = lv.gaps_of(tensors, layout)
        block_c, block_p, step = tile_of(layout, max(shape[1] for shape in shapes), double)
        segments.append(
            lv.Segment(
                len(order), len(order) + len(levels), layout, lv.vector_width(layout, tensors, gaps),
                lv.wide_index(shapes, layout, gaps, block_c, block_p), block_c, block_p, block_c, double, loss,
                gaps=bool(gaps), step=step, per_image=ROW_LOSSES[loss].per_image,
            )
        )  # fmt: skip
        order += levels
    return order, tuple(segments)


def rows_of(
    loss: str, levels: Sequence[Tensor], scale: Sequence[float], order: Sequence[int], segments: Sequence[lv.Segment]
) -> tuple[int, Rows]:
    """The number of blocks of rows, and what is known of the levels, in the order of the launch."""
    firsts, blocks = [0], [0]
    for x in levels:
        firsts.append(firsts[-1] + ROW_LOSSES[loss].count(x))
    for segment in segments:
        for i in order[segment.first : segment.last]:
            images, channels = levels[i].shape[:2]
            of_image = lv.cdiv(channels, segment.block_c) if levels[i].numel() else 0
            blocks.append(blocks[-1] + of_image * (images if segment.per_image else 1))
    return blocks[-1], Rows(
        lv.odd(levels[i].shape[0] for i in order), lv.odd(firsts[i] for i in order), lv.odd(1 + i for i in order),
        lv.odd(blocks), tuple(zip(*(lv.halves(scale[i]) for i in order), strict=True)),
    )  # fmt: skip


def call_of(weight: float, factor: Tensor | None, temperature: float, eps: float = 0.0) -> Call:
    return Call(*map(lv.halves, (weight, temperature, 1 / temperature, eps)), factor)


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
    """Launch `moments_kernel`; arguments and results as in `frs_kernels.reference.moments`.

    Raises:
        RuntimeError: before any launch, where the arguments do not fit each other.
    """
    check_moments(student, teacher, loss, scale, factor, temperature, eps)
    device, dtype = student[0].device, accumulate_dtype(*student, *teacher)
    order, segments = segments_of(loss, student, teacher, None)
    programs, sizes = lv.sizes_of(tuple(student[i].shape for i in order), segments)
    blocks, rows = rows_of(loss, student, scale, order, segments)
    # A level without positions has rows too, of zeros.
    new = torch.empty if all(x.numel() for x in student) else torch.zeros
    numbers = new((sum(map(ROW_LOSSES[loss].count, student)), NUMBERS), dtype=dtype, device=device)
    total, values = new((), dtype=dtype, device=device), new(1 + len(student), dtype=dtype, device=device)
    if programs:
        stride = max(segment.block_c for segment in segments)
        slots = torch.empty(programs * STORED.value * stride, dtype=torch.float64, device=device)
        values_of_blocks = torch.empty(blocks, dtype=torch.float64, device=device)
        counters = torch.zeros(1 + blocks, dtype=torch.int32, device=device)
        with lv.on_device(device):
            moments_kernel[(programs,)](
                *(lv.columns_of([levels[i] for i in order], segments) for levels in (student, teacher)),
                sizes, rows, call_of(weight, factor, temperature, eps), slots, values_of_blocks, counters,
                total, values, numbers,
                SEGMENTS=segments, STRIDE=stride, num_warps=lv.NUM_WARPS, maxnreg=lv.max_registers(segments),
            )  # fmt: skip
    return total, values, numbers


def moments_backward(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    rows: Tensor,
    loss: str,
    weight: float,
    factor: Tensor | None,
    temperature: float,
) -> list[Tensor]:
    """Launch `moments_backward_kernel`; arguments and results as in `frs_kernels.reference.moments_backward`.

    Raises:
        RuntimeError: before any launch, where the arguments do not fit each other.
    """
    check_moments_backward(student, teacher, rows, loss, factor, temperature)
    grads = [torch.empty_like(x) for x in student]
    order, segments = segments_of(loss, student, teacher, grads)
    programs, sizes = lv.sizes_of(tuple(student[i].shape for i in order), segments)
    if programs:
        _, of_levels = rows_of(loss, student, [1.0] * len(student), order, segments)
        with lv.on_device(rows.device):
            moments_backward_kernel[(programs,)](
                *(lv.columns_of([levels[i] for i in order], segments) for levels in (student, teacher, grads)),
                sizes, of_levels, call_of(weight, factor, temperature), rows,
                SEGMENTS=segments, num_warps=lv.NUM_WARPS, maxnreg=lv.max_registers(segments),
            )  # fmt: skip
    return grads
