"""Sums that come out bitwise the same every run, in the launch that makes them.

Every program stores its partial sum in a slot of its own. The program that finishes last, known by an integer
counter, adds each entry's slots in a fixed order, in fp64. No float atomics, no second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from frs_kernels.triton.levels import pick, size_of


def workspace(device: torch.device, programs: int) -> tuple[Tensor, Tensor]:
    """One fp64 slot a program, and the counter, zeroed, for one launch.

    Not kept from launch to launch, though that would save the fill: docs/design-notes.md.
    """
    slots = torch.empty(programs, dtype=torch.float64, device=device)
    return slots, torch.zeros(1, dtype=torch.int32, device=device)


@triton.jit
def store_partial(slots_ptr, counter_ptr, slot, partial):
    """Store a program's sum; True in the program that comes last, which then sees all slots."""
    tl.store(slots_ptr + slot, partial.to(tl.float64))
    return comes_last(counter_ptr, tl.num_programs(0))


@triton.jit
def comes_last(counter_ptr, count):
    """Count this program; True in the last of `count`, which then sees what the others have stored."""
    # The barrier and the release order this block's stores before its count; the acquire, the reads after it.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1


@triton.jit
def sum_entry(slots_ptr, starts, entry, SEGMENT: tl.constexpr):
    """The sum of an entry's slots, in fp64 and in one order; a thread loads eight before it adds the first."""
    BLOCK: tl.constexpr = 1024
    first = size_of(pick(starts, entry, SEGMENT))
    last = first
    FIRST: tl.constexpr = SEGMENT.first
    LAST: tl.constexpr = SEGMENT.last
    for i in tl.static_range(FIRST, LAST):
        last = tl.where(entry == i, size_of(starts[i + 1]), last)
    sums = tl.zeros((BLOCK,), tl.float64)
    for slot in range(first, last, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        # .cg: past L1, which may hold a line from before the others' stores
        sums += tl.load(slots_ptr + slots, mask=slots < last, other=0.0, cache_modifier=".cg")
    return tl.sum(sums)
