"""The most memory that a call takes beyond what was there before it, measured and not estimated."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_extra(call: Callable[[], object], device: str) -> int | None:
    """Bytes; None where the system does not tell (a CPU that is not Linux's).

    On a GPU what the allocator handed out at most; on the CPU the peak of the resident memory, which Linux forgets on
    request. Memory that an earlier call freed is given back first: reused, it would not show.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not STATUS.is_file():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
