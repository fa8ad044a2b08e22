"""How the levels of a pyramid reach a kernel: all in one launch, a tuple of tensors and a few tuples of numbers.

A level of shape (N, C, H, W) is cut into tiles of BLOCK_C channels by BLOCK_P positions; a program owns one tile of
positions of one image and a chunk of channels. Programs are numbered level after level.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tile(NamedTuple):
    """What NUM_WARPS warps work on in one step."""

    channels: int
    positions: int


class Grid(NamedTuple):
    """The level table of a launch; the numbers of its tuples are encoded by `odd`."""

    programs: int
    total_positions: int
    starts: tuple[int, ...]  # first program of a level, then the number of programs
    positions: tuple[int, ...]  # first position of a level in the flat scores
    channels: tuple[int, ...]
    sizes: tuple[int, ...]  # H * W
    widths: tuple[int, ...]


def odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Encode sizes so that no kernel is compiled again for a new image size.

    Triton specialises the integers of a tuple on being 1 and on being a multiple of 16, and cannot be told not to
    (`do_not_specialize` does not reach into tuples). 2 n + 3 is neither, for any n >= 0. `size_of` decodes.
    """
    return tuple(2 * n + 3 for n in numbers)


@lru_cache(maxsize=256)
def grid_of(shapes: tuple[torch.Size, ...], tile: Tile, chunk: int) -> Grid:
    """The level table for levels of these shapes; `chunk` channels a program, 0 for all."""
    starts, positions = [0], [0]
    for n, c, h, w in shapes:
        chunks = triton.cdiv(c, chunk) if chunk else 1
        starts.append(starts[-1] + n * triton.cdiv(h * w, tile.positions) * chunks)
        positions.append(positions[-1] + n * h * w)
    return Grid(
        starts[-1],
        positions[-1],
        odd(starts),
        odd(positions[:-1]),
        odd([s[1] for s in shapes]),
        odd([s[2] * s[3] for s in shapes]),
        odd([s[3] for s in shapes]),
    )


def layout_of(*lists: Sequence[Tensor]) -> str:
    """The memory layout all these tensors share: "nchw", "nhwc", or "strided" for any other mix."""
    tensors = [t for levels in lists for t in levels]
    if all(t.is_contiguous() for t in tensors):
        return "nchw"
    if all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return "nhwc"
    return "strided"


def strides_of(levels: Sequence[Tensor], layout: str) -> tuple[tuple[int, ...], ...] | None:
    """The strides, an axis a tuple over the levels; only the "strided" kernels read them."""
    if layout != "strided":
        return None
    return tuple(odd(axis) for axis in zip(*(x.stride() for x in levels), strict=True))


def index_dtype(levels: Sequence[Tensor], tile: Tile, layout: str) -> tl.dtype:
    """int32 if no tile spans 2^31 elements: a row of channels (nchw) or of positions (nhwc) times the stride."""
    span = max(
        {"nchw": tile.channels * x.shape[2] * x.shape[3], "nhwc": tile.positions * x.shape[1]}.get(layout, 1 << 31)
        for x in levels
    )
    return tl.int32 if span < 1 << 31 else tl.int64


def max_registers(dtype: torch.dtype, layout: str, loss: str = "") -> int:
    """What a thread may take: five blocks of 128 threads a multiprocessor, four for fp64, kl and any strides.

    Left to itself ptxas spills a word or two here and there to fit one block more (docs/design-notes.md).
    """
    return 96 if dtype == torch.float32 and layout != "strided" and loss != "kl" else 128


def vector_width(layout: str, *lists: Sequence[Tensor]) -> int:
    """Elements of the narrowest dtype that fill 16 bytes, or 1 if a level does not begin on 16 bytes.

    The kernel picks a level's pointer at run time, so one that is not aligned takes the wide loads from all.
    """
    tensors = [x for levels in lists for x in levels]
    if layout == "strided" or any(x.data_ptr() % 16 for x in tensors):
        return 1
    return 16 // min(x.element_size() for x in tensors)


def is_dense(x: Tensor) -> bool:
    """True where x fills its memory without a gap, in whatever order of axes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.numel() == 0 or span == x.numel()


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make this the current device, whose current stream Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def size_of(number):
    return (number - 3) >> 1


@triton.jit
def pick(values, index):
    """values[index] of a tuple, with an index known only at run time."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def find_level(starts):
    """The level of this program, and its number within the level."""
    program = tl.program_id(0)
    level = 0
    for i in tl.static_range(1, len(starts) - 1):
        level += (program >= size_of(starts[i])).to(tl.int32)
    return level, program - size_of(pick(starts, level))


@triton.jit
def tile_start(n, c0, p0, channels, hw, strides, level, LAYOUT: tl.constexpr):
    """Offset of channel c0 and position p0 of image n: a 64-bit scalar, as a level may hold more than 2^31 elements.

    In the strided layout positions are not evenly spaced, so `tile_offsets` counts them from the image's first.
    """
    n = n.to(tl.int64)
    if LAYOUT == "nchw":
        return (n * channels + c0) * hw + p0
    elif LAYOUT == "nhwc":
        return (n * hw + p0) * channels + c0
    else:
        stride = size_of(pick(strides[1], level)).to(tl.int64)
        return n * size_of(pick(strides[0], level)) + c0 * stride


@triton.jit
def tile_offsets(c, p, p0, channels, hw, width, strides, level, LAYOUT: tl.constexpr, INDEX: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] of a tile from its start; c and p count from there.

    INDEX is int32 where the tile's span allows: 64-bit offsets for each element of an unaligned tile cost 96 registers.
    """
    c, p = c.to(INDEX), p.to(INDEX)
    if LAYOUT == "nchw":
        return (c * hw)[:, None] + p[None, :]
    elif LAYOUT == "nhwc":
        return (p * channels)[None, :] + c[:, None]
    else:
        p += p0
        y = p // width * size_of(pick(strides[2], level))
        x = p % width * size_of(pick(strides[3], level))
        return (c * size_of(pick(strides[1], level)))[:, None] + (y + x)[None, :]
