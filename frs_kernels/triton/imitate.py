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
from frs_kernels.triton.levels import find_level, pick, size_of, tile_offsets
from frs_kernels.triton.pointwise import pointwise
from frs_kernels.triton.slots import store_partial, sum_level, workspace


@triton.jit
def imitate_tile(
    x_ptr, z_ptr, grad_ptr, share, slope_scale, n, c0, c1, p, channels, hw, inner, width,
    x_strides, z_strides, grad_strides, level, inverse_temperature, temperature,
    LOSS: tl.constexpr, LAYOUT: tl.constexpr, WANT_LOSS: tl.constexpr, WANT_GRAD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    if LAYOUT == "nchw":
        hw = inner
    else:
        channels = inner
    sums = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for c_block in range(c0, c1, BLOCK_C):
        c = c_block + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (c < channels)[:, None] & (p < hw)[None, :]
        at = tile_offsets(n, c, p, channels, hw, width, x_strides, level, LAYOUT)
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        at_z = tile_offsets(n, c, p, channels, hw, width, z_strides, level, LAYOUT)
        z = tl.load(z_ptr + at_z, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        value, slope = pointwise(x, z, inverse_temperature, temperature, LOSS)
        if WANT_LOSS:
            sums += tl.where(mask, value, 0.0)
        if WANT_GRAD:
            at_g = tile_offsets(n, c, p, channels, hw, width, grad_strides, level, LAYOUT)
            grad = slope_scale[None, :] * slope
            tl.store(grad_ptr + at_g, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.sum(sums, 0) * share)


@triton.jit
def imitate_kernel(
    students, teachers, grads, scores_ptr, norm_ptr, factor_ptr, total_ptr, per_level_ptr, slots_ptr, counter_ptr,
    weight: tl.float64, temperature: tl.float64,
    starts, positions, channels, sizes, widths, student_strides, teacher_strides, grad_strides,
    LOSS: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
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
    n = (tile // (tiles * chunks)).to(tl.int64)
    c0 = tile % chunks * CHUNK
    c1 = tl.minimum(c0 + CHUNK, channel_count)
    p = (tile // chunks % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)

    upstream = tl.full((), weight, ACC)
    if factor_ptr is not None:
        upstream *= tl.load(factor_ptr).to(ACC)
    norm = tl.load(norm_ptr + level)
    s = tl.load(scores_ptr + size_of(pick(positions, level)) + n * hw + p, mask=p < hw, other=0.0)
    share = tl.where(norm == 0, 0.0, s / norm).to(ACC)
    tau = tl.full((), temperature, tl.float64)
    inverse_tau = (1.0 / tau).to(ACC)
    tau = tau.to(ACC)

    inner = hw if LAYOUT == "nchw" else channel_count
    if inner % VECTOR == 0:
        # x // VECTOR * VECTOR tells the compiler that rows are aligned: 16-byte loads
        partial = imitate_tile(
            x_ptr, z_ptr, grad_ptr, share, upstream * share, n, c0, c1, p, channel_count, hw,
            inner // VECTOR * VECTOR, width,
            student_strides, teacher_strides, grad_strides, level, inverse_tau, tau,
            LOSS, LAYOUT, WANT_LOSS, WANT_GRAD, ACC, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    else:
        partial = imitate_tile(
            x_ptr, z_ptr, grad_ptr, share, upstream * share, n, c0, c1, p, channel_count, hw,
            inner, width,
            student_strides, teacher_strides, grad_strides, level, inverse_tau, tau,
            LOSS, LAYOUT, WANT_LOSS, WANT_GRAD, ACC, BLOCK_C, BLOCK_P,
        )  # fmt: skip

    if WANT_LOSS:  # noqa: SIM102 - a constexpr: with `and` the sum would be stored where no slot is
        if store_partial(slots_ptr, counter_ptr, partial):
            total = tl.zeros((), tl.float64)
            for i in tl.static_range(len(students)):
                level_sum = sum_level(slots_ptr, starts, i, 512)
                tl.store(per_level_ptr + i, level_sum.to(ACC))
                total += level_sum
            tl.store(total_ptr, (total * upstream).to(ACC))
            tl.store(counter_ptr, 0)


def tile_of(layout: str, channels: int) -> tuple[lv.Tile, int]:
    """The tile, and the channels a program walks over (CHUNK).

    2,048 elements a step of 128 threads: 16 each, so both loads and the store are one or two (bf16) or four (fp32)
    16-byte accesses, and the kernel stays under 128 registers without a spill (docs/codegen.md).
    """
    if channels <= 4:
        return lv.Tile(4, 512, 4), 4
    if layout == "nhwc":
        return (lv.Tile(64, 32, 4), 256) if channels > 16 else (lv.Tile(16, 128, 4), 16)
    return lv.Tile(8, 256, 4), 64


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
    grads = [torch.empty_like(x) for x in student] if want_grad else []
    shapes = tuple(x.shape for x in student)
    layout = lv.layout_of(student, teacher, grads)
    tile, chunk = tile_of(layout, max(shape[1] for shape in shapes))
    grid = lv.grid_of(shapes, tile, chunk)
    new = torch.empty if grid.programs else torch.zeros
    total = new(() if want_loss else 0, dtype=dtype, device=device)
    per_level = new(len(student) if want_loss else 0, dtype=dtype, device=device)
    if grid.programs:
        with lv.on_device(device):
            imitate_kernel[(grid.programs,)](
                tuple(student), tuple(teacher), tuple(grads) or None, scores, norm, factor,
                *((total, per_level, *workspace(device, grid.programs)) if want_loss else (None,) * 4),
                weight, temperature,
                grid.starts, grid.positions, grid.channels, grid.sizes, grid.widths,
                *(lv.strides_of(x, layout) for x in (student, teacher, grads)),
                LOSS=loss, LAYOUT=layout, VECTOR=lv.vector_width(student, teacher), ACC=lv.TL_DTYPE[dtype],
                BLOCK_C=tile.channels, BLOCK_P=tile.positions, CHUNK=chunk, num_warps=tile.num_warps,
            )  # fmt: skip
    return total, per_level, grads
