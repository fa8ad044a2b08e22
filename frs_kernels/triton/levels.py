"""How the entries of a call reach a kernel: all in one launch, tuples of tensors and of numbers, an element an entry.

An entry of shape (N, C, H, W) is cut into tiles of BLOCK_C channels by BLOCK_P positions; a program owns one tile of
positions of one image and a chunk of its channels. Programs are numbered entry after entry. Entries that one body of
machine code serves are neighbours, a segment of the launch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
THREADS = 32 * NUM_WARPS


@dataclass(frozen=True)  # not a NamedTuple: Triton takes a tuple for its own, and knows no string in those
class Segment:
    """Entries first to last - 1 of a launch, and what the compiler knows of them."""

    first: int
    last: int
    layout: str  # "nchw", "nhwc" or "strided"
    vector: int  # elements of the narrowest dtype that fill 16 bytes, or 1 where an entry does not begin on 16 bytes
    wide_index: bool  # a tile spans 2^31 elements
    block_c: int
    block_p: int
    chunk: int  # channels a program walks over
    double: bool = False  # computed in fp64
    loss: str = ""
    masked: bool = False  # the loss of what does not exist, which is read as 0, is not 0
    term: int = 0
    tempered: bool = False
    want_grad: bool = False
    norms: int = 1  # of as many levels an entry's norm is the sum


class Sizes(NamedTuple):
    """The shapes of a launch's entries, encoded by `odd`."""

    starts: tuple[int, ...]  # first program of an entry, then the number of programs
    channels: tuple[int, ...]
    areas: tuple[int, ...]  # H * W
    widths: tuple[int, ...]


class Columns(NamedTuple):
    """A tensor an entry, and where any is strided the strides, an axis a tuple over the entries, encoded by `odd`."""

    pointers: tuple[Tensor, ...]
    strides: tuple[tuple[int, ...], ...] | None


def odd(numbers: Iterable[int]) -> tuple[int, ...]:
    """Encode sizes so that no kernel is compiled again for a new image size.

    Triton specialises the integers of a tuple on being 1 and on being a multiple of 16, and cannot be told not to
    (`do_not_specialize` does not reach into tuples). 2 n + 3 is neither, for any n >= 0. `size_of` decodes.
    """
    return tuple(2 * n + 3 for n in numbers)


@lru_cache(maxsize=1024)
def halves(number: float) -> tuple[int, int]:
    """Encode an fp64 number, which in a tuple would reach a kernel as fp32: its two words, so large that each takes
    64 bits whatever it is, and odd. `number_of` decodes."""
    high, low = struct.unpack(">II", struct.pack(">d", number))
    return 2 * high + 3 + (1 << 34), 2 * low + 3 + (1 << 34)


@lru_cache(maxsize=256)
def sizes_of(shapes: tuple[torch.Size, ...], segments: tuple[Segment, ...]) -> tuple[int, Sizes]:
    """The number of programs, and what they need to know of the entries."""
    starts = [0]
    for segment in segments:
        for n, c, h, w in shapes[segment.first : segment.last]:
            programs = n * cdiv(h * w, segment.block_p) * cdiv(c, segment.chunk)
            starts.append(starts[-1] + programs)
    return starts[-1], Sizes(
        odd(starts), odd(c for _, c, _, _ in shapes), odd(h * w for *_, h, w in shapes), odd(w for *_, w in shapes)
    )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_of(channels: int, largest: int) -> int:
    """The largest tile of channels that leaves at most a tenth of its rows empty, else one of four, or of one."""
    block = largest
    while block > 4 and (block > channels or cdiv(channels, block) * block > 1.1 * channels):
        block //= 2
    return block if channels >= 4 else 1


def chunk_of(channels: int, block: int, largest: int) -> int:
    """Channels of a program, whole tiles, so that an entry's programs have nearly the same."""
    return cdiv(cdiv(channels, cdiv(channels, largest)), block) * block


def layout_of(tensors: Sequence[Tensor]) -> str:
    """The memory layout all these tensors share: "nchw", "nhwc", or "strided" for any other mix."""
    if all(t.is_contiguous() for t in tensors):
        return "nchw"
    if all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return "nhwc"
    return "strided"


def columns_of(tensors: Sequence[Tensor], segments: Sequence[Segment]) -> Columns:
    if all(segment.layout != "strided" for segment in segments):
        return Columns(tuple(tensors), None)
    return Columns(tuple(tensors), tuple(odd(axis) for axis in zip(*(x.stride() for x in tensors), strict=True)))


def vector_width(layout: str, tensors: Sequence[Tensor]) -> int:
    """As in `Segment`. The kernel picks an entry's pointer at run time, so one that is not aligned counts for all."""
    if layout == "strided" or any(x.data_ptr() % 16 for x in tensors):
        return 1
    return 16 // min(x.element_size() for x in tensors)


def wide_index(shapes: Iterable[torch.Size], layout: str, block_c: int, block_p: int) -> bool:
    """False if no tile spans 2^31 elements: a row of channels (nchw) or of positions (nhwc) times the stride."""
    if layout == "strided":
        return True
    return max(block_c * s[2] * s[3] if layout == "nchw" else block_p * s[1] for s in shapes) >= 1 << 31


def max_registers(segments: Sequence[Segment]) -> int:
    """What a thread may take: five blocks of 128 threads a multiprocessor; four for fp64, kl, strides, many entries.

    Left to itself ptxas spills a word or two here and there to fit one block more (docs/design-notes.md).
    """
    heavy = any(s.double or s.layout == "strided" or s.loss == "kl" for s in segments)
    return 128 if heavy or segments[-1].last > 16 else 96


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
def number_of(high, low):
    bits = (((high - 17179869187) >> 1) << 32) | ((low - 17179869187) >> 1)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def pick(values, entry, SEGMENT: tl.constexpr):
    """values[entry] of a tuple, with an entry of the segment known only at run time."""
    FIRST: tl.constexpr = SEGMENT.first
    LAST: tl.constexpr = SEGMENT.last
    value = values[FIRST]
    for i in tl.static_range(FIRST + 1, LAST):
        value = tl.where(entry == i, values[i], value)
    return value


@triton.jit
def is_in(program, starts, SEGMENTS: tl.constexpr, INDEX: tl.constexpr):
    """Whether the program's entry is one of a segment. Triton 3.6 takes no element of a tuple for a constant."""
    FIRST: tl.constexpr = SEGMENTS[INDEX].first
    LAST: tl.constexpr = SEGMENTS[INDEX].last
    return (program >= size_of(starts[FIRST])) & (program < size_of(starts[LAST]))


@triton.jit
def entry_of(program, starts, SEGMENT: tl.constexpr):
    """The entry of a program of the segment, and the program's number within the entry."""
    FIRST: tl.constexpr = SEGMENT.first
    LAST: tl.constexpr = SEGMENT.last
    entry = FIRST
    for i in tl.static_range(FIRST + 1, LAST):
        entry += (program >= size_of(starts[i])).to(tl.int32)
    return entry, program - size_of(pick(starts, entry, SEGMENT))


@triton.jit
def tile_start(n, c0, p0, channels, hw, strides, entry, SEGMENT: tl.constexpr):
    """Offset of channel c0 and position p0 of image n: a 64-bit scalar, as an entry may hold more than 2^31 elements.

    In the strided layout positions are not evenly spaced, so `tile_offsets` counts them from the image's first.
    """
    n = n.to(tl.int64)
    if SEGMENT.layout == "nchw":
        return (n * channels + c0) * hw + p0
    elif SEGMENT.layout == "nhwc":
        return (n * hw + p0) * channels + c0
    else:
        return n * size_of(pick(strides[0], entry, SEGMENT)) + c0 * channel_stride(hw, strides, entry, SEGMENT)


@triton.jit
def channel_stride(hw, strides, entry, SEGMENT: tl.constexpr):
    """Elements from one channel to the next, a 64-bit scalar."""
    if SEGMENT.layout == "nchw":
        return hw.to(tl.int64)
    elif SEGMENT.layout == "nhwc":
        return tl.full((), 1, tl.int64)
    else:
        return size_of(pick(strides[1], entry, SEGMENT)).to(tl.int64)


@triton.jit
def tile_offsets(c, p, p0, channels, hw, width, strides, entry, SEGMENT: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] of a tile from its start; c and p count from there.

    In 32 bits where the tile's span allows: 64-bit offsets for each element of an unaligned tile cost 96 registers.
    """
    INDEX: tl.constexpr = tl.int64 if SEGMENT.wide_index else tl.int32
    c, p = c.to(INDEX), p.to(INDEX)
    if SEGMENT.layout == "nchw":
        return (c * hw)[:, None] + p[None, :]
    elif SEGMENT.layout == "nhwc":
        return (p * channels)[None, :] + c[:, None]
    else:
        p += p0
        y = p // width * size_of(pick(strides[2], entry, SEGMENT))
        x = p % width * size_of(pick(strides[3], entry, SEGMENT))
        return (c * size_of(pick(strides[1], entry, SEGMENT)))[:, None] + (y + x)[None, :]


@triton.jit
def inside(c, p, c_count, p_count, SEGMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Which of a tile's elements exist. Where rows are aligned a vector lies inside or outside as a whole, and the
    compiler is told so: one comparison a vector instead of one an element."""
    WHOLE: tl.constexpr = SEGMENT.vector if ALIGNED else 1
    if SEGMENT.layout == "nchw":
        p = p // WHOLE * WHOLE
    else:
        c = c // WHOLE * WHOLE
    return (c < c_count)[:, None] & (p < p_count)[None, :]
