"""scale_: gradient *= factor in place, over all levels; nothing is read or written where factor is 1.

The gradients of `imitate` are dense, so a level is a flat run of numbers whatever its layout. A fixed number of
programs strides over all of them: when factor is 1 (no loss scaling, the usual case) the launch ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.triton import levels as lv
from frs_kernels.triton.levels import size_of

BLOCK = 2048  # 16 elements a thread: two (bf16) or four (fp32) 16-byte accesses
MAX_PROGRAMS = 1024  # about 8 blocks of 128 threads for each of an H100's 132 multiprocessors


@triton.jit
def scale_kernel(grads, factor_ptr, sizes, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1:
        for i in tl.static_range(len(grads)):
            ptr = grads[i]
            ACC: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32
            size = size_of(sizes[i]).to(tl.int64)
            whole = size // 16 * 16  # the compiler sees the alignment: 16-byte accesses
            for start in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, tl.num_programs(0) * BLOCK):
                at = start + tl.arange(0, BLOCK)
                grad = tl.load(ptr + at, mask=at < whole).to(ACC) * factor.to(ACC)
                tl.store(ptr + at, grad.to(ptr.dtype.element_ty), mask=at < whole)
            if tl.program_id(0) == 0:
                at = whole + tl.arange(0, 16)
                grad = tl.load(ptr + at, mask=at < size).to(ACC) * factor.to(ACC)
                tl.store(ptr + at, grad.to(ptr.dtype.element_ty), mask=at < size)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Launch `scale_kernel` on the dense gradients; a gradient with gaps takes PyTorch's own multiplication."""
    dense = [g for g in grads if lv.is_dense(g)]
    largest = max((g.numel() for g in dense), default=0)
    if largest:
        with lv.on_device(factor.device):
            scale_kernel[(min(triton.cdiv(largest, BLOCK), MAX_PROGRAMS),)](
                tuple(dense), factor, lv.odd([g.numel() for g in dense]), BLOCK=BLOCK, num_warps=4
            )
    for grad in grads:
        if not lv.is_dense(grad):
            grad.mul_(factor)
