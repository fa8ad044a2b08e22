"""score: S_p = max_k sigmoid(z_pk) = sigmoid(max_k z_pk), and each level's mass M_l = sum_p S_p.

A program takes BLOCK_P positions of one image and walks over all K logits. A NaN comes through the maximum.
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
from frs_kernels.triton.pointwise import sigmoid
from frs_kernels.triton.slots import store_partial, sum_level, workspace


@triton.jit
def max_over_channels(
    z_ptr, n, p0, channels, hw, inner, width, strides, level,
    LAYOUT: tl.constexpr, INDEX: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    if LAYOUT == "nchw":
        hw = inner
    else:
        channels = inner
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    in_level = p < hw - p0
    at = tile_offsets(c, p, p0, channels, hw, width, strides, level, LAYOUT, INDEX)
    best = tl.full((BLOCK_C, BLOCK_P), float("-inf"), ACC)
    for c0 in range(0, channels, BLOCK_C):
        start = tile_start(n, c0, p0, channels, hw, strides, level, LAYOUT)
        mask = (c < channels - c0)[:, None] & in_level[None, :]
        z = tl.load(z_ptr + start + at, mask=mask, other=float("-inf")).to(ACC)
        best = tl.where((z > best) | (z != z), z, best)  # tl.maximum has no NaN-keeping form for fp64
    found_nan = tl.max((best != best).to(tl.int32), 0)
    return tl.where(found_nan > 0, float("nan"), tl.max(best, 0))


@triton.jit
def score_kernel(
    logits, scores_ptr, mass_ptr, slots_ptr, counter_ptr,
    starts, positions, channels, sizes, widths, strides,
    LAYOUT: tl.constexpr, INDEX: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = scores_ptr.dtype.element_ty
    # Where rows are not aligned each element has an address of its own: fewer of them, to save registers.
    NARROW_C: tl.constexpr = (BLOCK_C + 3) // 4
    WIDE_C: tl.constexpr = BLOCK_C if VECTOR > 1 else NARROW_C
    level, tile = find_level(starts)
    z_ptr = pick(logits, level)
    k = size_of(pick(channels, level))
    hw = size_of(pick(sizes, level))
    width = size_of(pick(widths, level))
    tiles = tl.cdiv(hw, BLOCK_P)
    n = tile // tiles
    p0 = tile % tiles * BLOCK_P

    inner = hw if LAYOUT == "nchw" else k
    if inner % VECTOR == 0:
        # x // VECTOR * VECTOR tells the compiler that rows are aligned: 16-byte loads
        top = max_over_channels(
            z_ptr, n, p0, k, hw, inner // VECTOR * VECTOR, width, strides, level,
            LAYOUT, INDEX, ACC, WIDE_C, BLOCK_P,
        )  # fmt: skip
    else:
        top = max_over_channels(
            z_ptr, n, p0, k, hw, inner, width, strides, level, LAYOUT, INDEX, ACC, NARROW_C, BLOCK_P
        )

    p = p0 + tl.arange(0, BLOCK_P)
    s = tl.where(p < hw, sigmoid(top), 0.0)
    tl.store(scores_ptr + size_of(pick(positions, level)) + n.to(tl.int64) * hw + p, s, mask=p < hw)
    if store_partial(slots_ptr, counter_ptr, tl.sum(s)):
        for i in range(len(logits)):
            tl.store(mass_ptr + i, sum_level(slots_ptr, starts, i).to(ACC))


def tile_of(layout: str, channels: int, dtype: torch.dtype) -> lv.Tile:
    """2,048 logits a step of 128 threads: 16 each, one or two 16-byte loads in flight; fp64 half of it.

    The positions of a program are few, because it walks over all K alone and the coarse levels have few positions.
    """
    positions = 16 // (2 if dtype == torch.float64 else 1)
    if channels <= 4 and layout != "strided":
        return lv.Tile(4, 32 * positions)
    return lv.Tile(128, positions) if layout == "nhwc" else lv.Tile(32, 4 * positions)


def score(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Launch `score_kernel`; shapes as in `frs_kernels.reference.score`."""
    dtype, device = accumulate_dtype(*logits), logits[0].device
    layout = lv.layout_of(logits)
    tile = tile_of(layout, max(z.shape[1] for z in logits), dtype)
    grid = lv.grid_of(tuple(z.shape for z in logits), tile, chunk=0)
    scores = torch.empty(grid.total_positions, dtype=dtype, device=device)
    if not grid.programs:
        return scores, torch.zeros(len(logits), dtype=dtype, device=device)
    mass = torch.empty(len(logits), dtype=dtype, device=device)
    with lv.on_device(device):
        score_kernel[(grid.programs,)](
            tuple(logits), scores, mass, *workspace(device, grid.programs),
            grid.starts, grid.positions, grid.channels, grid.sizes, grid.widths, lv.strides_of(logits, layout),
            LAYOUT=layout, INDEX=lv.index_dtype(logits, tile, layout), VECTOR=lv.vector_width(layout, logits),
            BLOCK_C=tile.channels, BLOCK_P=tile.positions,
            num_warps=lv.NUM_WARPS, maxnreg=lv.max_registers(dtype, layout),
        )  # fmt: skip
    return scores, mass
