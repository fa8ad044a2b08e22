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
from frs_kernels.triton.checks import check_score
from frs_kernels.triton.levels import entry_of, is_in, pick, size_of, tile_offsets, tile_start
from frs_kernels.triton.pointwise import COMPILED, sigmoid
from frs_kernels.triton.slots import store_partial, sum_entry, workspace


@triton.jit
def larger(best, z):
    """max(best, z), NaN where either is: one instruction, of 16-bit numbers one for two."""
    if COMPILED and z.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [best, z], tl.bfloat16, True, 2)
    elif COMPILED and z.dtype == tl.float16:
        return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [best, z], tl.float16, True, 2)
    elif COMPILED and z.dtype == tl.float32:
        return tl.maximum(best, z, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.where((z > best) | (z != z), z, best)


@triton.jit
def max_over_channels(
    z_ptr, n, p0, channels, hw, width, strides, entry,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The largest logit of each position; the next channels are on their way while these are compared.

    Nothing is masked. The last step begins where it ends with the last channel: the maximum is the same. A position
    that does not exist reads the tile's first, and nobody reads its maximum.
    """
    NARROW: tl.constexpr = z_ptr.dtype.element_ty if COMPILED else ACC
    BLOCK_P: tl.constexpr = SEGMENT.block_p
    WHOLE: tl.constexpr = SEGMENT.vector if ALIGNED and SEGMENT.layout == "nchw" else 1
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    p = tl.where(p // WHOLE * WHOLE < hw - p0, p, p % WHOLE)
    at = tile_offsets(c, p, p0, channels, hw, width, strides, entry, SEGMENT)
    z = tl.load(z_ptr + tile_start(n, 0, p0, channels, hw, strides, entry, SEGMENT) + at)
    best = tl.full((BLOCK_C, BLOCK_P), float("-inf"), NARROW)
    for c0 in range(BLOCK_C, channels, BLOCK_C):
        c0 = tl.minimum(c0, channels - BLOCK_C)
        following = tl.load(z_ptr + tile_start(n, c0, p0, channels, hw, strides, entry, SEGMENT) + at)
        best = larger(best, z.to(NARROW))
        z = following
    best = larger(best, z.to(NARROW)).to(ACC)
    found_nan = tl.max((best != best).to(tl.int32), 0)
    return tl.where(found_nan > 0, float("nan"), tl.max(best, 0))


@triton.jit
def score_segment(program, logits, scores_ptr, first_positions, sizes, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    """The scores of a program's positions, stored; their sum."""
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    ACC: tl.constexpr = scores_ptr.dtype.element_ty
    # Where rows are not aligned each element has an address of its own: fewer of them, to save registers.
    NARROW_C: tl.constexpr = (SEGMENT.block_c + 3) // 4
    VECTOR: tl.constexpr = SEGMENT.vector
    entry, tile = entry_of(program, sizes.starts, SEGMENT)
    z_ptr = pick(logits.pointers, entry, SEGMENT)
    k = size_of(pick(sizes.channels, entry, SEGMENT))
    hw = size_of(pick(sizes.areas, entry, SEGMENT))
    width = size_of(pick(sizes.widths, entry, SEGMENT))
    tiles = tl.cdiv(hw, SEGMENT.block_p)
    n = tile // tiles
    p0 = tile % tiles * SEGMENT.block_p
    inner = hw if SEGMENT.layout == "nchw" else k
    if VECTOR > 1 and inner % VECTOR == 0:
        # x // VECTOR * VECTOR tells the compiler that rows are aligned: 16-byte loads
        top = max_over_channels(
            z_ptr, n, p0, k if SEGMENT.layout == "nchw" else k // VECTOR * VECTOR,
            hw // VECTOR * VECTOR if SEGMENT.layout == "nchw" else hw, width, logits.strides, entry,
            SEGMENT, True, SEGMENT.block_c, ACC,
        )  # fmt: skip
    else:
        top = max_over_channels(z_ptr, n, p0, k, hw, width, logits.strides, entry, SEGMENT, False, NARROW_C, ACC)
    p = p0 + tl.arange(0, SEGMENT.block_p)
    s = tl.where(p < hw, sigmoid(top), 0.0)
    tl.store(scores_ptr + size_of(pick(first_positions, entry, SEGMENT)) + n.to(tl.int64) * hw + p, s, mask=p < hw)
    return tl.sum(s)


@triton.jit
def store_masses(mass_ptr, slots_ptr, levels, sizes, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    SEGMENT: tl.constexpr = SEGMENTS[INDEX]
    for entry in range(SEGMENT.first, SEGMENT.last):
        mass = sum_entry(slots_ptr, sizes.starts, entry, SEGMENT)
        tl.store(mass_ptr + size_of(pick(levels, entry, SEGMENT)), mass.to(mass_ptr.dtype.element_ty))


@triton.jit
def score_kernel(
    logits, scores_ptr, mass_ptr, slots_ptr, counter_ptr, first_positions, levels, sizes, SEGMENTS: tl.constexpr
):
    program = tl.program_id(0)
    partial = tl.zeros((), scores_ptr.dtype.element_ty)
    for i in tl.static_range(len(SEGMENTS)):
        if is_in(program, sizes.starts, SEGMENTS, i):
            partial = score_segment(program, logits, scores_ptr, first_positions, sizes, SEGMENTS, i)
    if store_partial(slots_ptr, counter_ptr, program, partial):
        for i in tl.static_range(len(SEGMENTS)):
            store_masses(mass_ptr, slots_ptr, levels, sizes, SEGMENTS, i)


def tile_of(layout: str, channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Channels and positions of a step of 128 threads: 8 logits each, one or two 16-byte loads; fp64 half of it.

    The positions of a program are few, because it walks over all K alone and the coarse levels have few positions.
    """
    block_c = lv.block_of(channels, 64 if layout == "nhwc" else 16)
    return block_c, (512 if dtype == torch.float64 else 1024) // block_c


def segments_of(logits: Sequence[Tensor]) -> tuple[list[int], tuple[lv.Segment, ...]]:
    """The levels in the order of the launch, those of one dtype together."""
    double = accumulate_dtype(*logits) == torch.float64
    order: list[int] = []
    segments: list[lv.Segment] = []
    for dtype in dict.fromkeys(z.dtype for z in logits):
        rows = [i for i, z in enumerate(logits) if z.dtype == dtype]
        levels = [logits[i] for i in rows]
        layout = lv.layout_of(levels)
        gaps = lv.gaps_of(levels, layout)
        block_c, block_p = tile_of(layout, min(z.shape[1] for z in levels), dtype)
        wide = lv.wide_index([z.shape for z in levels], layout, gaps, block_c, block_p)
        vector = lv.vector_width(layout, levels, gaps)
        most = max(z.shape[1] for z in levels)
        segments.append(
            lv.Segment(
                len(order), len(order) + len(rows), layout, vector, wide, block_c, block_p, most, double,
                gaps=bool(gaps),
            )
        )  # fmt: skip
        order += rows
    return order, tuple(segments)


def score(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Launch `score_kernel`; shapes as in `frs_kernels.reference.score`.

    Raises:
        RuntimeError: before any launch, where a level is none.
    """
    first_positions = check_score(logits)
    dtype, device = accumulate_dtype(*logits), logits[0].device
    scores = torch.empty(first_positions[-1], dtype=dtype, device=device)
    order, segments = segments_of(logits)
    levels = [logits[i] for i in order]
    programs, sizes = lv.sizes_of(tuple(z.shape for z in levels), segments)
    if not programs:
        return scores, torch.zeros(len(logits), dtype=dtype, device=device)
    mass = torch.empty(len(logits), dtype=dtype, device=device)
    with lv.on_device(device):
        score_kernel[(programs,)](
            lv.columns_of(levels, segments), scores, mass, *workspace(device, programs),
            lv.odd(first_positions[i] for i in order), lv.odd(order), sizes,
            SEGMENTS=segments, num_warps=lv.NUM_WARPS, maxnreg=lv.max_registers(segments),
        )  # fmt: skip
    return scores, mass
