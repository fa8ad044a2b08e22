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

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS


@dataclass(frozen=True)  # not a NamedTuple: Triton takes a tuple for its own, and knows no string in those
class Segment:
    """Entries first to last - 1 of a launch, and what the compiler knows of them."""

    first: int
    last: int
    layout: str  # "nchw", "nhwc" or "strided"
    vector: int  # elements of the narrowest dtype that fill 16 bytes, or 1 where a line does not begin on 16 bytes
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
    gaps: bool = False  # images or lines lie further apart than they are long: their strides are read
    step: int = 0  # positions that are loaded at once, where a program walks over positions
    per_image: bool = False  # of losses along rows: a row is a channel of an image, else a channel of all


class Sizes(NamedTuple):
    """The shapes of a launch's entries, encoded by `odd`."""

    starts: tuple[int, ...]  # first program of an entry, then the number of programs
    channels: tuple[int, ...]
    areas: tuple[int, ...]  # H * W
    widths: tuple[int, ...]


class Columns(NamedTuple):
    """A tensor an entry, and where any is strided or has gaps their `strides_of`, an axis a tuple over the entries,
    encoded by `odd`."""

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


def strides_of(x: Tensor) -> tuple[int, int, int, int]:
    """Those of an axis of one element, which are arbitrary, are 0; that of W is also the positions' where W is 1."""
    n, c, h, w = (stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    return n, c, h, w if x.shape[3] > 1 else h


def has_lines(x: Tensor, layout: str) -> bool:
    """Whether x lies in lines without a gap, channels ("nchw") or positions ("nhwc"), each any distance from the last.

    So does a level that was cut out of (N, C, P) or (N, P, C), P the positions of all levels.
    """
    _, channels, height, width = x.shape
    _, c, h, w = strides_of(x)
    evenly = height <= 1 or h == width * w  # else p alone does not tell where a position is
    inner = height * width <= 1 or w == 1 if layout == "nchw" else channels == 1 or c == 1
    return x.numel() == 0 or (evenly and inner)


def layout_of(tensors: Sequence[Tensor]) -> str:
    """The memory layout all these tensors share: "nchw", "nhwc", or "strided" for any other mix."""
    for layout, memory_format in FORMATS.items():
        if all(x.is_contiguous(memory_format=memory_format) for x in tensors):
            return layout
    return next((layout for layout in FORMATS if all(has_lines(x, layout) for x in tensors)), "strided")


def gaps_of(tensors: Sequence[Tensor], layout: str) -> list[tuple[int, int]]:
    """Elements from one image to the next, and from one line, of every tensor; nothing where none has a gap there."""
    if layout == "strided" or all(x.is_contiguous(memory_format=FORMATS[layout]) for x in tensors):
        return []
    return [(n, c if layout == "nchw" else w) for n, c, _, w in map(strides_of, tensors)]


def columns_of(tensors: Sequence[Tensor], segments: Sequence[Segment]) -> Columns:
    if not any(segment.gaps or segment.layout == "strided" for segment in segments):
        return Columns(tuple(tensors), None)
    return Columns(tuple(tensors), tuple(odd(axis) for axis in zip(*map(strides_of, tensors), strict=True)))


def vector_width(layout: str, tensors: Sequence[Tensor], gaps: Sequence[tuple[int, int]]) -> int:
    """As in `Segment`. The kernel picks an entry's pointer at run time, so one that is not aligned counts for all."""
    width = 16 // min(x.element_size() for x in tensors)
    unaligned = any(x.data_ptr() % 16 for x in tensors) or any(stride % width for pair in gaps for stride in pair)
    return 1 if layout == "strided" or unaligned else width


def wide_index(
    shapes: Iterable[torch.Size], layout: str, gaps: Sequence[tuple[int, int]], block_c: int, block_p: int
) -> bool:
    """False if no tile spans 2^31 elements: a row of channels (nchw) or of positions (nhwc) times the stride."""
    if layout == "strided":
        return True
    rows, lines = (block_c, (s[2] * s[3] for s in shapes)) if layout == "nchw" else (block_p, (s[1] for s in shapes))
    return rows * max(*lines, 0, *(line for _, line in gaps)) >= 1 << 31


def max_registers(segments: Sequence[Segment]) -> int:
    """What a thread may take: five blocks of 128 threads a multiprocessor; four for fp64, kl, strides, losses along
    rows, many entries.

    Left to itself ptxas spills a word or two here and there to fit one block more (docs/design-notes.md).
    """
    heavy = any(s.double or s.layout == "strided" or s.loss in ("kl", "pkd", "cwd") for s in segments)
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
def stride_of(strides, AXIS: tl.constexpr, entry, SEGMENT: tl.constexpr):
    """An entry's stride, in as many bits as it takes. Of lines that are aligned the compiler is told that it is."""
    stride = size_of(pick(strides[AXIS], entry, SEGMENT))
    if SEGMENT.vector > 1:
        stride = stride // SEGMENT.vector * SEGMENT.vector
    return stride


@triton.jit
def tile_start(n, c0, p0, channels, hw, strides, entry, SEGMENT: tl.constexpr):
    """Offset of channel c0 and position p0 of image n: a 64-bit scalar, as an entry may hold more than 2^31 elements.

    In the strided layout positions are not evenly spaced, so `tile_offsets` counts them from the image's first.
    """
    n = n.to(tl.int64)
    if SEGMENT.gaps or SEGMENT.layout == "strided":
        start = n * stride_of(strides, 0, entry, SEGMENT) + c0 * channel_stride(hw, strides, entry, SEGMENT)
        if SEGMENT.layout == "nchw":
            start += p0
        elif SEGMENT.layout == "nhwc":
            start += p0 * stride_of(strides, 3, entry, SEGMENT).to(tl.int64)
        return start
    elif SEGMENT.layout == "nchw":
        return (n * channels + c0) * hw + p0
    else:
        return (n * hw + p0) * channels + c0


@triton.jit
def channel_stride(hw, strides, entry, SEGMENT: tl.constexpr):
    """Elements from one channel to the next, a 64-bit scalar."""
    if SEGMENT.layout == "nhwc":
        return tl.full((), 1, tl.int64)
    elif SEGMENT.gaps or SEGMENT.layout == "strided":
        return stride_of(strides, 1, entry, SEGMENT).to(tl.int64)
    else:
        return hw.to(tl.int64)


@triton.jit
def tile_offsets(c, p, p0, channels, hw, width, strides, entry, SEGMENT: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] of a tile from its start; c and p count from there.

    In 32 bits where the tile's span allows: 64-bit offsets for each element of an unaligned tile cost 96 registers.
    """
    INDEX: tl.constexpr = tl.int64 if SEGMENT.wide_index else tl.int32
    c, p = c.to(INDEX), p.to(INDEX)
    if SEGMENT.layout == "nchw":
        line = stride_of(strides, 1, entry, SEGMENT).to(INDEX) if SEGMENT.gaps else hw
        return (c * line)[:, None] + p[None, :]
    elif SEGMENT.layout == "nhwc":
        line = stride_of(strides, 3, entry, SEGMENT).to(INDEX) if SEGMENT.gaps else channels
        return (p * line)[None, :] + c[:, None]
    else:
        p += p0
        y = p // width * stride_of(strides, 2, entry, SEGMENT)
        x = p % width * stride_of(strides, 3, entry, SEGMENT)
        return (c * stride_of(strides, 1, entry, SEGMENT))[:, None] + (y + x)[None, :]


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
