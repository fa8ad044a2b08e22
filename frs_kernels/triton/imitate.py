"""imitate: the masked imitation loss of every level and its gradient by the student, in one pass.

    share_p    = S_p / norm_l                                     0 where norm_l is 0
    loss_l     = sum_p share_p sum_c value(x_pc, z_pc)            (value, slope: pointwise.py)
    total      = weight * factor * sum_l loss_l
    gradient   = weight * factor * share_p * slope(x_pc, z_pc)

A program takes BLOCK_P positions of one image and walks over a chunk of their channels. weight comes from the host,
factor (an upstream gradient, a weight kept on the device) and norm are read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.levels import accumulate_dtype
from frs_kernels.triton import levels as lv
from frs_kernels.triton.levels import find_level, pick, size_of, tile_offsets, tile_start
from frs_kernels.triton.pointwise import pointwise
from frs_kernels.triton.slots import store_partial, sum_level, workspace


@triton.jit
def imitate_tile(
    x_ptr, z_ptr, grad_ptr, share, upstream, n, c_first, c_last, p0, channels, hw, inner, width,
    x_strides, z_strides, grad_strides, level, inverse_temperature, temperature,
    LOSS: tl.constexpr, LAYOUT: tl.constexpr, INDEX: tl.constexpr, WANT_LOSS: tl.constexpr, WANT_GRAD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    if LAYOUT == "nchw":
        hw = inner
    else:
        channels = inner
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    in_level = p < hw - p0
    at_x = tile_offsets(c, p, p0, channels, hw, width, x_strides, level, LAYOUT, INDEX)
    at_z = tile_offsets(c, p, p0, channels, hw, width, z_strides, level, LAYOUT, INDEX)
    sums = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for c0 in range(c_first, c_last, BLOCK_C):
        mask = (c < channels - c0)[:, None] & in_level[None, :]
        start_x = tile_start(n, c0, p0, channels, hw, x_strides, level, LAYOUT)
        start_z = tile_start(n, c0, p0, channels, hw, z_strides, level, LAYOUT)
        x = tl.load(x_ptr + start_x + at_x, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        z = tl.load(z_ptr + start_z + at_z, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        value, slope = pointwise(x, z, inverse_temperature, temperature, LOSS)
        if WANT_LOSS:
            sums += tl.where(mask, value, 0.0)
        if WANT_GRAD:
            start = tile_start(n, c0, p0, channels, hw, grad_strides, level, LAYOUT)
            at = tile_offsets(c, p, p0, channels, hw, width, grad_strides, level, LAYOUT, INDEX)
            grad = (upstream * share)[None, :] * slope
            tl.store(grad_ptr + start + at, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.sum(sums, 0) * share)


@triton.jit
def imitate_kernel(
    students, teachers, grads, scores_ptr, norm_ptr, factor_ptr, total_ptr, per_level_ptr, slots_ptr, counter_ptr,
    weight: tl.float64, temperature: tl.float64, inverse_temperature: tl.float64,
    starts, positions, channels, sizes, widths, student_strides, teacher_strides, grad_strides,
    LOSS: tl.constexpr, LAYOUT: tl.constexpr, INDEX: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Where rows are not aligned each element has an address of its own: fewer of them, to save registers.
    NARROW_C: tl.constexpr = (BLOCK_C + 3) // 4
    WIDE_C: tl.constexpr = BLOCK_C if VECTOR > 1 else NARROW_C
    WANT_LOSS: tl.constexpr = per_level_ptr is not None
    WANT_GRAD: tl.constexpr = grads is not None
    level, tile = find_level(starts)
    x_ptr = pick(students, level)
    z_ptr = pick(teachers, level)
    grad_ptr = pick(grads, level) if WANT_GRAD else None
    channel_count = size_of(pick(channels, level))
    hw = size_of(pick(sizes, level))
    width = size_of(pick(widths, level))
    chunks = tl.cdiv(channel_count, CHUNK)
    tiles = tl.cdiv(hw, BLOCK_P)
    n = tile // (tiles * chunks)
    c_first = tile % chunks * CHUNK
    c_last = tl.minimum(c_first + CHUNK, channel_count)
    p0 = tile // chunks % tiles * BLOCK_P

    upstream = tl.full((), weight, ACC)
    if factor_ptr is not None:
        upstream *= tl.load(factor_ptr).to(ACC)
    norm = tl.load(norm_ptr + level)
    p = p0 + tl.arange(0, BLOCK_P)
    at = size_of(pick(positions, level)) + n.to(tl.int64) * hw + p
    share = tl.where(norm == 0, 0.0, tl.load(scores_ptr + at, mask=p < hw, other=0.0) / norm).to(ACC)
    tau = tl.full((), temperature, ACC)
    inverse_tau = tl.full((), inverse_temperature, ACC)

    inner = hw if LAYOUT == "nchw" else channel_count
    if inner % VECTOR == 0:
        # x // VECTOR * VECTOR tells the compiler that rows are aligned: 16-byte loads and stores
        partial = imitate_tile(
            x_ptr, z_ptr, grad_ptr, share, upstream, n, c_first, c_last, p0, channel_count, hw,
            inner // VECTOR * VECTOR, width,
            student_strides, teacher_strides, grad_strides, level, inverse_tau, tau,
            LOSS, LAYOUT, INDEX, WANT_LOSS, WANT_GRAD, ACC, WIDE_C, BLOCK_P,
        )  # fmt: skip
    else:
        partial = imitate_tile(
            x_ptr, z_ptr, grad_ptr, share, upstream, n, c_first, c_last, p0, channel_count, hw,
            inner, width,
            student_strides, teacher_strides, grad_strides, level, inverse_tau, tau,
            LOSS, LAYOUT, INDEX, WANT_LOSS, WANT_GRAD, ACC, NARROW_C, BLOCK_P,
        )  # fmt: skip

    if WANT_LOSS:  # noqa: SIM102 - a constexpr: with `and` the sum would be stored where no slot is
        if store_partial(slots_ptr, counter_ptr, partial):
            total = tl.zeros((), tl.float64)
            for i in range(len(students)):
                level_sum = sum_level(slots_ptr, starts, i)
                tl.store(per_level_ptr + i, level_sum.to(ACC))
                total += level_sum
            tl.store(total_ptr, (total * upstream).to(ACC))


# Positions of a tile by loss and by bytes of the widest input: 16 elements a thread for 2-byte mse, down to 2 for fp64.
# As many as fit in the registers without a spill (docs/codegen.md): at 16 elements bce took 161, fp64 up to 255.
POSITIONS = {
    "mse": {2: 256, 4: 128, 8: 32},
    "bce": {2: 128, 4: 128, 8: 32},
    "kl": {2: 128, 4: 64, 8: 32},
}


def tile_of(layout: str, channels: int, loss: str, itemsize: int) -> tuple[lv.Tile, int]:
    """The tile of 128 threads, and the channels a program walks over (CHUNK)."""
    positions = POSITIONS[loss][itemsize]
    small = lv.Tile(4, 2 * positions), 4
    if layout == "nhwc":
        return (lv.Tile(64, positions // 8), 256) if channels > 4 else small
    return (lv.Tile(8, positions), 64) if channels > 4 or layout == "strided" else small


def imitate(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scores: Tensor,
    norm: Tensor,
    factor: Tensor | None,
    weight: float,
    loss: str,
    temperature: float,
    want_loss: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Launch `imitate_kernel`; arguments and results as in `frs_kernels.reference.imitate`."""
    dtype, device = accumulate_dtype(*student, *teacher), scores.device
    if loss == "kl" and not want_loss:
        loss = "bce"  # the same gradient: one kernel fewer to compile
    grads = [torch.empty_like(x) for x in student] if want_grad else []
    shapes = tuple(x.shape for x in student)
    layout = lv.layout_of(student, teacher, grads)
    itemsize = max(student[0].element_size(), teacher[0].element_size())
    tile, chunk = tile_of(layout, max(shape[1] for shape in shapes), loss, itemsize)
    grid = lv.grid_of(shapes, tile, chunk)
    new = torch.empty if grid.programs else torch.zeros
    total = new(() if want_loss else 0, dtype=dtype, device=device)
    per_level = new(len(student) if want_loss else 0, dtype=dtype, device=device)
    if grid.programs:
        with lv.on_device(device):
            imitate_kernel[(grid.programs,)](
                tuple(student), tuple(teacher), tuple(grads) or None, scores, norm, factor,
                *((total, per_level, *workspace(device, grid.programs)) if want_loss else (None,) * 4),
                weight, temperature, 1.0 / temperature,
                grid.starts, grid.positions, grid.channels, grid.sizes, grid.widths,
                *(lv.strides_of(x, layout) for x in (student, teacher, grads)),
                LOSS=loss, LAYOUT=layout, INDEX=lv.index_dtype(student, tile, layout),
                VECTOR=lv.vector_width(layout, student, teacher, grads), ACC=lv.TL_DTYPE[dtype],
                BLOCK_C=tile.channels, BLOCK_P=tile.positions, CHUNK=chunk,
                num_warps=lv.NUM_WARPS, maxnreg=lv.max_registers(dtype, layout, loss),
            )  # fmt: skip
    return total, per_level, grads
