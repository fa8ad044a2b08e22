"""Runs the cpu backend on tensors that end, or begin, where memory does: a byte further is a segmentation fault.

python fenced.py SEED            prints the instruction set that has run
python fenced.py SEED beyond     then reads one byte too many, to see that it is one
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys

import torch
from columns import Entry, Term, arguments, columns
from torch import Tensor

from frs_kernels.losses import LOSSES
from frs_kernels.ops import VERBS
from frs_kernels.row_losses import ROW_LOSSES

PAGE = mmap.PAGESIZE
SHAPES = ((2, 5, 7, 9), (1, 19, 3, 1), (1, 1, 1, 1), (1, 37, 33, 32), (2, 700, 1, 3))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)

libc = ctypes.CDLL(None, use_errno=True)
kept: list[mmap.mmap] = []


def fenced(values: Tensor, at_the_end: bool) -> Tensor:
    """The same tensor between two pages that nobody may touch, against one of them."""
    size = values.numel() * values.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(fence), PAGE, 0) == 0
    kept.append(memory)
    offset = PAGE + (pages * PAGE - size if at_the_end else 0)
    flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return flat.as_strided(values.shape, values.stride()).copy_(values)


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(int(sys.argv[1]))
    score, imitate, distill, scale_, moments, moments_backward = VERBS["cpu"]
    for dtype, memory_format, at_the_end in itertools.product(DTYPES, FORMATS, (False, True)):
        x, z = (
            [
                fenced(torch.randn(shape, generator=rng).to(dtype).contiguous(memory_format=memory_format), at_the_end)
                for shape in SHAPES
            ]
            for _ in range(2)
        )
        scores, mass = (fenced(v, at_the_end) for v in score(z))
        entries = [Entry(*pair, level, term) for level, pair in enumerate(zip(x, z, strict=True)) for term in range(2)]
        factor = fenced(torch.tensor(3.0), at_the_end)
        for loss in LOSSES:
            beta = 0.0 if loss == "softmax_kl" else 1.0
            terms = [Term(loss, temperature=2.0, beta=beta), Term(loss, 0.5, factor, beta=beta)]
            imitate(*arguments(entries, terms, scores, mass))
            distill(*arguments(entries, terms, scores, mass)[:2], z, *columns(entries, terms))
        for loss in ROW_LOSSES:
            _, _, rows = moments(x, z, loss, [1.0] * len(x), 1.0, factor, 2.0, 1e-6)
            moments_backward(x, z, fenced(rows, at_the_end), loss, 1.0, factor, 2.0)
        scale_(x, fenced(torch.tensor(3.0), at_the_end))
    print(torch.ops.frs_kernels.instructions())
    if sys.argv[2:] == ["beyond"]:
        ctypes.c_char.from_address(x[0].data_ptr() + x[0].numel() * x[0].element_size()).value  # noqa: B018


if __name__ == "__main__":
    main()
