"""moments: losses along rows, and what their gradients need of each row; moments_backward: those gradients.

    value_l   = the mean over a level's rows of what the loss says of each        (row_losses.py)
    total     = weight factor sum_l value_l
    gradient  = weight factor (a f(s - s0) - b f(t - t0) + c)

A program takes a tile (row_tiles.py) and stores each channel's sums in slots of its own. Programs of one group have a
counter: the last of them adds up their slots, in fp64 and in one order, and where a row goes through several images the
last group of a block of rows those of the groups. It stores the rows' numbers and one value; the last of all adds up
the values. Rows are many: one program would take longer over them than all programs took over the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.levels import accumulate_dtype
from frs_kernels.row_losses import NUMBERS, ROW_LOSSES
from frs_kernels.triton import levels as lv
from frs_kernels.triton.checks import check_moments, check_moments_backward
from frs_kernels.triton.levels import is_in, number_of, pick, size_of
from frs_kernels.triton.pointwise import COMPILED
from frs_kernels.triton.row_losses import STORED, add_step, cwd_numbers, cwd_sums, pkd_numbers, pkd_sums, slope_of
from frs_kernels.triton.row_tiles import (
    address,
    call_of,
    is_aligned,
    load_step,
    place_of,
    row_of,
    rows_of,
    segments_of,
    tile_of,
    upstream_of,
)
from frs_kernels.triton.score import larger
from frs_kernels.triton.slots import comes_last, sum_entry


@triton.jit
def store_sums(
    student, teacher, slots_ptr, tile, rate,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Store the pivots and sums of a tile. The next positions are on their way while those before are added up."""
    ACC: tl.constexpr = tl.float64 if SEGMENT.double else tl.float32
    # A thread's neighbours are added up in fp32 as well.
    TOGETHER: tl.constexpr = SEGMENT.vector if ALIGNED and SEGMENT.layout == "nchw" else 1
    LOSS: tl.constexpr = SEGMENT.loss
    BLOCK_C: tl.constexpr = SEGMENT.block_c
    NOTHING: tl.constexpr = float("-inf") if LOSS == "cwd" else 0.0
    entry, _, _, p_first, p_last, _, _, _ = tile
    x_ptr, z_ptr = pick(student.pointers, entry, SEGMENT), pick(teacher.pointers, entry, SEGMENT)
    if LOSS == "cwd":
        # In the interpreter's numbers, or in the tensors' own: one instruction for two of 16 bits.
        OF_X: tl.constexpr = x_ptr.dtype.element_ty if COMPILED else ACC
        OF_Z: tl.constexpr = z_ptr.dtype.element_ty if COMPILED else ACC
        most_x, most_z = tl.full((BLOCK_C, STEP), NOTHING, OF_X), tl.full((BLOCK_C, STEP), NOTHING, OF_Z)
        x, z, _ = load_step(x_ptr, z_ptr, student, teacher, tile, p_first, NOTHING, SEGMENT, ALIGNED, STEP)
        for p0 in range(p_first, p_last, STEP):
            next_x, next_z, _ = load_step(
                x_ptr, z_ptr, student, teacher, tile, p0 + STEP, NOTHING, SEGMENT, ALIGNED, STEP
            )
            most_x, most_z = larger(most_x, x.to(OF_X)), larger(most_z, z.to(OF_Z))
            x, z = next_x, next_z
        pivot_x, pivot_z = tl.max(most_x.to(ACC), 1, keep_dims=True), tl.max(most_z.to(ACC), 1, keep_dims=True)
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
        sums = add_step(sums, x.to(ACC), z.to(ACC), mask, pivot_x, pivot_z, rate, LOSS)
        x, z, mask = next_x, next_z, following
    slots = slots_ptr + tl.arange(0, BLOCK_C)[:, None]
    tl.store(slots, pivot_x.to(tl.float64))
    tl.store(slots + STRIDE, pivot_z.to(tl.float64))
    for k in tl.static_range(len(sums)):
        of_threads = tl.sum(tl.reshape(sums[k], (BLOCK_C, STEP // TOGETHER, TOGETHER)), 2)
        tl.store(slots + (2 + k) * STRIDE, tl.sum(of_threads.to(tl.float64), 1, keep_dims=True))


@triton.jit
def store_rows(rows_ptr, blocks_ptr, counters_ptr, of_rows, value, row, here, index, blocks):
    """Store the numbers of a block of rows, and its value; True in the last of all blocks."""
    for k in tl.static_range(len(of_rows)):
        tl.store(rows_ptr + row * len(of_rows) + k, of_rows[k].to(rows_ptr.dtype.element_ty), mask=here)
    tl.store(blocks_ptr + index, tl.sum(tl.where(here, value, 0.0)))
    return comes_last(counters_ptr, blocks)


@triton.jit
def finish_group(
    slots, rows_ptr, blocks_ptr, counters_ptr, place, rows, call, SEGMENTS: tl.constexpr, INDEX: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Add up a group's slots, which begin at `slots`; where that finishes a block of rows, store it.

    True in the program that comes last of all: every block of rows has its value.
    """
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    LAST: tl.constexpr = SEGMENTS[len(SEGMENTS) - 1].last
    LOSS: tl.constexpr = SEGMENT.loss
    BLOCK_C: tl.constexpr = SEGMENT.block_c
    entry, n, _, block, tiles, blocks, channels, hw, _ = place
    apart = blocks.to(tl.int64) * (STORED * STRIDE)
    images = size_of(pick(rows.images, entry, SEGMENT)).to(tl.int64)
    scale = number_of(pick(rows.scales[0], entry, SEGMENT), pick(rows.scales[1], entry, SEGMENT))
    c = tl.arange(0, BLOCK_C)
    here = block * BLOCK_C + c < channels
    row = row_of(place, rows, SEGMENT) + c
    index = size_of(pick(rows.blocks, entry, SEGMENT)) + block
    all_blocks = size_of(rows.blocks[LAST])
    last = False
    if LOSS == "cwd":
        tau = number_of(call.tau[0], call.tau[1])
        most_s, most_t, sums = cwd_sums(slots, apart, tiles, tau, BLOCK_C, STRIDE)
        of_rows, value = cwd_numbers(most_s, most_t, sums, scale / (images * channels).to(tl.float64), tau)
        index += n * blocks
        last = store_rows(rows_ptr, blocks_ptr, counters_ptr, of_rows, value, row, here, index, all_blocks)
    else:
        # A row goes through all images. The sums of this one take the place of its first part's; its pivots stay.
        _, _, sums = pkd_sums(slots, apart, SEGMENT.block_p, hw, BLOCK_C, STRIDE)
        tl.debug_barrier()
        for k in tl.static_range(len(sums)):
            tl.store(slots + (2 + k) * STRIDE + c, sums[k])
        if comes_last(counters_ptr + 1 + size_of(rows.groups[LAST]) + index, images):
            apart *= tiles
            pivot_s, pivot_t, sums = pkd_sums(slots - n * apart, apart, hw, images * hw, BLOCK_C, STRIDE)
            eps, count = number_of(call.eps[0], call.eps[1]), (images * hw).to(tl.float64)
            share = scale / (count * channels)
            of_rows, value = pkd_numbers(pivot_s, pivot_t, sums, count, share, eps, rows_ptr.dtype.element_ty)
            last = store_rows(rows_ptr, blocks_ptr, counters_ptr, of_rows, value, row, here, index, all_blocks)
    return last


@triton.jit
def moments_segment(
    program, student, teacher, sizes, rows, call, slots_ptr, blocks_ptr, counters_ptr, rows_ptr,
    SEGMENTS: tl.constexpr, INDEX: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """As `finish_group`."""
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    # Where lines are not aligned each element has an address of its own: fewer of them, to save registers.
    NARROW: tl.constexpr = SEGMENT.step // 4
    place = place_of(program, sizes, SEGMENT)
    entry, n, tile, block, tiles, blocks, _, _, _ = place
    rate = number_of(call.rate[0], call.rate[1]).to(rows_ptr.dtype.element_ty)
    slots = slots_ptr + program.to(tl.int64) * (STORED * STRIDE)
    if is_aligned(place, SEGMENT):
        whole = tile_of(place, SEGMENT, True)
        store_sums(student, teacher, slots, whole, rate, SEGMENT, True, SEGMENT.step, STRIDE)
    else:
        any_tile = tile_of(place, SEGMENT, False)
        store_sums(student, teacher, slots, any_tile, rate, SEGMENT, False, NARROW, STRIDE)
    last = False
    group = size_of(pick(rows.groups, entry, SEGMENT)) + n * blocks + block
    if comes_last(counters_ptr + 1 + group, tiles):
        first = slots - (tile * blocks).to(tl.int64) * (STORED * STRIDE)
        last = finish_group(first, rows_ptr, blocks_ptr, counters_ptr, place, rows, call, SEGMENTS, INDEX, STRIDE)
    return last


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
    student, teacher, grad, numbers_ptr, tile, rate, upstream,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile; `numbers_ptr` points to the numbers of its first channel."""
    ACC: tl.constexpr = numbers_ptr.dtype.element_ty
    LOSS: tl.constexpr = SEGMENT.loss
    entry, _, c0, p_first, p_last, channels, _, _ = tile
    x_ptr, z_ptr = pick(student.pointers, entry, SEGMENT), pick(teacher.pointers, entry, SEGMENT)
    grad_ptr = pick(grad.pointers, entry, SEGMENT)
    x, z, mask = load_step(x_ptr, z_ptr, student, teacher, tile, p_first, 0.0, SEGMENT, ALIGNED, STEP)
    c, p = tl.arange(0, SEGMENT.block_c), tl.arange(0, STEP)
    of_channel, here = numbers_ptr + c[:, None] * NUMBERS, c[:, None] < channels - c0
    s0, t0 = tl.load(of_channel, mask=here, other=0.0), tl.load(of_channel + 1, mask=here, other=0.0)
    a = tl.load(of_channel + 2, mask=here, other=0.0) * upstream
    b = tl.load(of_channel + 3, mask=here, other=0.0) * upstream
    constant = tl.load(of_channel + 4, mask=here, other=0.0) * upstream
    for p0 in range(p_first, p_last, STEP):
        next_x, next_z, following = load_step(
            x_ptr, z_ptr, student, teacher, tile, p0 + STEP, 0.0, SEGMENT, ALIGNED, STEP
        )
        slope = slope_of(x.to(ACC), z.to(ACC), (s0, t0, a, b, constant), rate, LOSS)
        to = address(grad_ptr, grad.strides, tile, p0, c, p, SEGMENT)
        tl.store(to, slope.to(grad_ptr.dtype.element_ty), mask=mask)
        x, z, mask = next_x, next_z, following


@triton.jit
def slopes_segment(
    program, student, teacher, grad, sizes, rows, call, rows_ptr,
    SEGMENTS: tl.constexpr, INDEX: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    ACC: tl.constexpr = rows_ptr.dtype.element_ty
    NARROW: tl.constexpr = SEGMENT.step // 4
    place = place_of(program, sizes, SEGMENT)
    rate = number_of(call.rate[0], call.rate[1]).to(ACC)
    upstream = upstream_of(call, ACC)
    numbers = rows_ptr + row_of(place, rows, SEGMENT) * NUMBERS
    if is_aligned(place, SEGMENT):
        whole = tile_of(place, SEGMENT, True)
        store_slopes(student, teacher, grad, numbers, whole, rate, upstream, SEGMENT, True, SEGMENT.step, NUMBERS)
    else:
        any_tile = tile_of(place, SEGMENT, False)
        store_slopes(student, teacher, grad, numbers, any_tile, rate, upstream, SEGMENT, False, NARROW, NUMBERS)


@triton.jit
def moments_backward_kernel(
    student, teacher, grad, sizes, rows, call, rows_ptr, SEGMENTS: tl.constexpr, NUMBERS: tl.constexpr
):
    program = tl.program_id(0)
    for i in tl.static_range(len(SEGMENTS)):
        if is_in(program, sizes.starts, SEGMENTS, i):
            slopes_segment(program, student, teacher, grad, sizes, rows, call, rows_ptr, SEGMENTS, i, NUMBERS)


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
    groups, blocks, rows = rows_of(loss, student, scale, order, segments)
    # A level without positions has rows too, of zeros.
    new = torch.empty if all(x.numel() for x in student) else torch.zeros
    numbers = new((sum(map(ROW_LOSSES[loss].count, student)), NUMBERS), dtype=dtype, device=device)
    total, values = new((), dtype=dtype, device=device), new(1 + len(student), dtype=dtype, device=device)
    if programs:
        stride = max(segment.block_c for segment in segments)
        slots = torch.empty(programs * STORED.value * stride, dtype=torch.float64, device=device)
        values_of_blocks = torch.empty(blocks, dtype=torch.float64, device=device)
        counters = torch.zeros(1 + groups + blocks, dtype=torch.int32, device=device)
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
        _, _, of_levels = rows_of(loss, student, [1.0] * len(student), order, segments)
        with lv.on_device(rows.device):
            moments_backward_kernel[(programs,)](
                *(lv.columns_of([levels[i] for i in order], segments) for levels in (student, teacher, grads)),
                sizes, of_levels, call_of(weight, factor, temperature), rows,
                SEGMENTS=segments, NUMBERS=NUMBERS, num_warps=lv.NUM_WARPS, maxnreg=lv.max_registers(segments),
            )  # fmt: skip
    return grads
