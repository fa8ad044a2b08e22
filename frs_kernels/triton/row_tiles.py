"""How levels are cut for the losses along rows, and how a tile of student and teacher is read.

A program takes BLOCK_C channels of one image and walks over BLOCK_P of their positions, STEP at once. Programs of the
same image and channels are a group; the channels of a program are rows, or parts of them, so that a block of rows has
one group (a row is a channel of an image), or one an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.levels import accumulate_dtype
from frs_kernels.row_losses import ROW_LOSSES
from frs_kernels.triton import levels as lv
from frs_kernels.triton.levels import entry_of, inside, number_of, pick, size_of, tile_offsets, tile_start


class Rows(NamedTuple):
    """What is known of a level beside its tensors, an element a level, encoded by `odd` and `halves`."""

    images: tuple[int, ...]
    firsts: tuple[int, ...]  # of its rows
    places: tuple[int, ...]  # of its value
    groups: tuple[int, ...]  # the first of its groups, then the number of groups
    blocks: tuple[int, ...]  # of blocks of rows the same
    scales: tuple[tuple[int, ...], ...]


class Call(NamedTuple):
    """The numbers of a call, encoded by `halves`, and its factor."""

    weight: tuple[int, int]
    tau: tuple[int, int]
    rate: tuple[int, int]  # log2(e) / tau
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
def row_of(place, rows, SEGMENT: tl.constexpr):
    """The first row of a program."""
    entry, n, _, block, _, _, channels, _, _ = place
    row = size_of(pick(rows.firsts, entry, SEGMENT)).to(tl.int64) + block * SEGMENT.block_c
    if SEGMENT.per_image:
        row += n.to(tl.int64) * channels
    return row


@triton.jit
def is_aligned(place, SEGMENT: tl.constexpr):
    """Whether the lines of a program's level begin on 16 bytes."""
    VECTOR: tl.constexpr = SEGMENT.vector
    _, _, _, _, _, _, channels, hw, _ = place
    return (hw if SEGMENT.layout == "nchw" else channels) % VECTOR == 0 if VECTOR > 1 else False


@triton.jit
def tile_of(place, SEGMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """A program's tile: level, image, first channel, first and last position; the size of the level."""
    VECTOR: tl.constexpr = SEGMENT.vector if ALIGNED else 1
    entry, n, tile, block, _, _, channels, hw, width = place
    # x // VECTOR * VECTOR tells the compiler that lines are aligned: 16-byte loads and stores
    if SEGMENT.layout == "nchw":
        hw = hw // VECTOR * VECTOR
    else:
        channels = channels // VECTOR * VECTOR
    p_first = tile * SEGMENT.block_p
    return entry, n, block * SEGMENT.block_c, p_first, tl.minimum(p_first + SEGMENT.block_p, hw), channels, hw, width


@triton.jit
def address(ptr, strides, tile, p0, c, p, SEGMENT: tl.constexpr):
    """Of a tile's channels c and of positions p0 + p."""
    entry, n, c0, _, _, channels, hw, width = tile
    start = tile_start(n, c0, p0, channels, hw, strides, entry, SEGMENT)
    return ptr + start + tile_offsets(c, p, p0, channels, hw, width, strides, entry, SEGMENT)


@triton.jit
def load_step(
    x_ptr, z_ptr, student, teacher, tile, p0, other,
    SEGMENT: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of student and of teacher at the positions from p0 on, and which of them exist."""
    _, _, c0, _, p_last, channels, _, _ = tile
    c, p = tl.arange(0, SEGMENT.block_c), tl.arange(0, STEP)
    mask = inside(c, p, channels - c0, p_last - p0, SEGMENT, ALIGNED)
    x = tl.load(address(x_ptr, student.strides, tile, p0, c, p, SEGMENT), mask=mask, other=other)
    z = tl.load(address(z_ptr, teacher.strides, tile, p0, c, p, SEGMENT), mask=mask, other=other)
    return x, z, mask


@triton.jit
def upstream_of(call, ACC: tl.constexpr):
    """weight * factor"""
    upstream = number_of(call.weight[0], call.weight[1]).to(ACC)
    if call.factor is not None:
        upstream *= tl.load(call.factor).to(ACC)
    return upstream


def shape_of(layout: str, channels: int, double: bool) -> tuple[int, int, int]:
    """Channels and positions of a tile of 128 threads, and positions of a step: 8 numbers a thread, in fp64 half.

    In 16 bits a thread adds up 32 numbers of a channel (nchw), or 8 of each of 8 (nhwc), before threads add up theirs.
    """
    block_c = lv.block_of(channels, 32 if layout == "nhwc" else 16)
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
        block_c, block_p, step = shape_of(layout, max(shape[1] for shape in shapes), double)
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
) -> tuple[int, int, Rows]:
    """The number of groups and of blocks of rows; what is known of the levels, in the order of the launch."""
    of = ROW_LOSSES[loss]
    firsts, groups, blocks = [0], [0], [0]
    for x in levels:
        firsts.append(firsts[-1] + of.count(x))
    for segment in segments:
        for i in order[segment.first : segment.last]:
            images, channels = levels[i].shape[:2]
            of_image = lv.cdiv(channels, segment.block_c) if levels[i].numel() else 0
            groups.append(groups[-1] + images * of_image)
            blocks.append(blocks[-1] + (images if of.per_image else 1) * of_image)
    return groups[-1], blocks[-1], Rows(
        lv.odd(levels[i].shape[0] for i in order), lv.odd(firsts[i] for i in order), lv.odd(1 + i for i in order),
        lv.odd(groups), lv.odd(blocks), tuple(zip(*(lv.halves(scale[i]) for i in order), strict=True)),
    )  # fmt: skip


def call_of(weight: float, factor: Tensor | None, temperature: float, eps: float = 0.0) -> Call:
    rate = math.log2(math.e) / temperature
    return Call(lv.halves(weight), lv.halves(temperature), lv.halves(rate), lv.halves(eps), factor)
