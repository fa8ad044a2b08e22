"""Which backends are here, which one a call takes, and why not another."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import warnings

import torch
from torch.compiler import is_compiling

from frs_kernels import native

BACKENDS = ("cuda", "triton", "cpu", "torch")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton compiles a launcher in C for what it runs on a GPU.
_HAS_CC = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
# Triton reads the variable when its kernels are defined, so a later change of it does not count here either.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def available() -> dict[str, str | None]:
    """Each backend's name, and None where it can run on this machine, else why it cannot and what to do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: why_not(name, device) for name in BACKENDS}


def why_not(backend: str, device_type: str) -> str | None:
    """None if `backend` can take tensors of this device type, else the reason and the remedy."""
    if backend == "torch":
        return None
    if backend in native.LIBRARIES:
        return _why_not_native(backend, device_type)
    if torch.version.hip:
        return "ROCm lacks what the kernels' launches ask of Triton (programmatic launches); use backend='torch'"
    if not _HAS_TRITON:
        return "Triton is not installed; on Linux, pip install triton"
    if device_type == "cuda" and not _HAS_CC and not _INTERPRET:
        return "Triton needs a C compiler for its launchers; install gcc or clang and Python's headers"
    if device_type == "cuda" and not _INTERPRET and (reason := _why_too_old()) is not None:
        return reason
    if device_type != "cuda" and not _INTERPRET:
        return (
            f"Triton runs on CUDA tensors, not on {device_type!r} ones; move them to a GPU, or, for tests only, set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
        )
    return None


def _why_not_native(backend: str, device_type: str) -> str | None:
    reason = native.WHY_NOT[backend]
    if reason is not None:
        return reason
    if device_type != backend:
        return f"it takes {backend!r} tensors, not {device_type!r} ones; move them there or use backend='auto'"
    return _why_no_gpu() if backend == "cuda" else None


def _driver_version() -> int:
    """The newest CUDA that the driver knows, as in 13020 for 13.2; 0 where there is no driver.

    Asked of the driver itself: torch has no public name for it, and its private one is not in every release.
    """
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


@functools.cache
def _why_no_code() -> str | None:
    """Why the CUDA library has no code for a GPU in sight, if it has none."""
    driver = _driver_version()
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if (reason := native.why_no_code(10 * major + minor, driver)) is not None:
            return reason
    return None


def _why_no_gpu() -> str | None:
    return _why_no_code()


@functools.cache
def _oldest() -> tuple[int, int]:
    """The least compute capability of the GPUs in sight."""
    return min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())), default=(99, 0))


def _why_too_old() -> str | None:
    major, minor = _oldest()
    if major >= 8:
        return None
    return f"its kernels have instructions of sm_80 in them, this GPU is sm_{major}{minor}; use backend='torch'"


# torch.compile takes the result and does not look inside, at CUDA calls and a cache. This is all that
# torch.compiler.assume_constant_result does, but that imports the whole compiler first.
_why_no_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_of_less(best: str, chosen: str, reason: str) -> None:
    """Once a process; not where whoever built it left the library out."""
    if not reason.startswith(native.LEFT_OUT):
        warnings.warn(
            f"backend='auto' takes {chosen!r}, which is slower than {best!r}; that is not here: {reason}", stacklevel=6
        )


def choose(backend: str, device_type: str) -> str:
    """The backend that `backend` stands for on this device type.

    "auto" takes cuda, else triton, else torch for CUDA tensors; cpu, else torch for the rest. Where it takes less than
    the first, a warning says once why, and what to do.

    Raises:
        RuntimeError: the backend is not here; the message says why and what to do.
    """
    if backend == "auto":
        order = ("cuda", "triton", "torch") if device_type == "cuda" else ("cpu", "torch")
        chosen = next(name for name in order if why_not(name, device_type) is None)
        if chosen != order[0] and device_type in native.LIBRARIES and not torch.version.hip and not is_compiling():
            _warn_of_less(order[0], chosen, str(why_not(order[0], device_type)))
        return chosen
    reason = why_not(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return backend
