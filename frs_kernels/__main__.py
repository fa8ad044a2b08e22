"""`python -m frs_kernels`: which backends are here, and for each that is not, why and what to do."""

from __future__ import annotations

import platform

import torch

import frs_kernels
from frs_kernels import backends, native


def main() -> None:
    print(f"frs_kernels {frs_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    cuda = torch.cuda.is_available()
    print(f"device: {torch.cuda.get_device_name() if cuda else 'no CUDA device'}")
    for name, reason in backends.available().items():
        print(f"  {name:8}{'available' + _compiled_for(name) if reason is None else 'not available: ' + reason}")
    for device_type in ("cuda", "cpu") if cuda else ("cpu",):
        print(f"backend='auto' takes {backends.choose('auto', device_type)!r} for {device_type} tensors")


def _compiled_for(name: str) -> str:
    targets = ", ".join(native.targets(name))
    if name == "cpu":
        return f" (uses {torch.ops.frs_kernels.instructions()}, compiled for {targets})"
    return f" (compiled for {targets})" if targets else ""


if __name__ == "__main__":
    main()
