"""Sums that come out bitwise the same every run, in the launch that makes them.

Every program stores its partial sum in a slot of its own. The program that finishes last, known by an integer
counter, adds each level's slots in a fixed order, in fp64. No float atomics, no second launch.
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
def store_partial(slots_ptr, counter_ptr, partial):
    """Store this program's sum; True in the program that comes last, which then sees all slots."""
    program = tl.program_id(0)
    tl.store(slots_ptr + program, partial.to(tl.float64))
    # The barrier and the release order this block's store before its count; the acquire, the reads after it.
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def sum_level(slots_ptr, starts, level):
    """The sum of a level's slots, in fp64 and in slot order."""
    BLOCK: tl.constexpr = 256
    first = size_of(pick(starts, level))
    last = size_of(pick(starts, level + 1))
    sums = tl.zeros((BLOCK,), tl.float64)
    for slot in range(first, last, BLOCK):
        slots = slot + tl.arange(0, BLOCK)
        # .cg: past L1, which may hold a line from before the others' stores
        sums += tl.load(slots_ptr + slots, mask=slots < last, other=0.0, cache_modifier=".cg")
    return tl.sum(sums)
