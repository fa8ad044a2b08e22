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
from frs_kernels.triton.checks import check_scale
from frs_kernels.triton.levels import size_of

BLOCK = 2048  # 16 elements a thread: two (bf16) or four (fp32) 16-byte accesses
MAX_PROGRAMS = 1024  # about 8 blocks of 128 threads for each of an H100's 132 multiprocessors


@triton.jit
def scale_run(ptr, at, size, factor):
    grad = tl.load(ptr + at, mask=at < size)
    tl.store(ptr + at, (grad.to(factor.dtype) * factor).to(ptr.dtype.element_ty), mask=at < size)


@triton.jit
def scale_level(ptr, size, factor, BLOCK: tl.constexpr):
    whole = size // 16 * 16  # the compiler sees the alignment: 16-byte accesses
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, tl.num_programs(0) * BLOCK):
        scale_run(ptr, start + tl.arange(0, BLOCK), whole, factor)
    if tl.program_id(0) == 0:
        scale_run(ptr, whole + tl.arange(0, 16), size, factor)


@triton.jit
def scale_kernel(grads, factor_ptr, sizes, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1:
        for i in tl.static_range(len(grads)):
            if grads[i].dtype.element_ty == tl.float64:
                scale_level(grads[i], size_of(sizes[i]).to(tl.int64), factor.to(tl.float64), BLOCK)
            else:
                scale_level(grads[i], size_of(sizes[i]).to(tl.int64), factor.to(tl.float32), BLOCK)


def scale_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Launch `scale_kernel` on the dense gradients; a gradient with gaps takes PyTorch's own multiplication.

    Raises:
        RuntimeError: before any launch, where the arguments do not fit each other.
    """
    check_scale(grads, factor)
    dense = [g for g in grads if lv.is_dense(g)]
    largest = max((g.numel() for g in dense), default=0)
    if largest:
        with lv.on_device(factor.device):
            scale_kernel[(min(triton.cdiv(largest, BLOCK), MAX_PROGRAMS),)](
                tuple(dense), factor, lv.odd([g.numel() for g in dense]), BLOCK=BLOCK, num_warps=lv.NUM_WARPS
            )
    for grad in grads:
        if not lv.is_dense(grad):
            grad.mul_(factor)
