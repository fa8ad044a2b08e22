"""Which backends are here, which one a call takes, and why not another."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch")

_NATIVE = "this version has no compiled core; use backend='auto', 'triton' or 'torch'"
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
    if backend in ("cuda", "cpu"):
        return _NATIVE
    if not _HAS_TRITON:
        return "Triton is not installed; on Linux, pip install triton"
    if device_type == "cuda" and not _HAS_CC and not _INTERPRET:
        return "Triton needs a C compiler for its launchers; install gcc or clang and Python's headers"
    if device_type != "cuda" and not _INTERPRET:
        return (
            f"Triton runs on CUDA tensors, not on {device_type!r} ones; move them to a GPU, or, for tests only, set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
        )
    return None


def choose(backend: str, device_type: str) -> str:
    """The backend that `backend` stands for on this device type.

    "auto" takes cuda, else triton, else torch for CUDA tensors; cpu, else torch for the rest.

    Raises:
        RuntimeError: the backend is not here; the message says why and what to do.
    """
    if backend == "auto":
        order = ("cuda", "triton", "torch") if device_type == "cuda" else ("cpu", "torch")
        return next(name for name in order if why_not(name, device_type) is None)
    reason = why_not(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return backend
