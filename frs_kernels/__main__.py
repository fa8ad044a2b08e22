"""`python -m frs_kernels [--json]`: which backends are here, and for each that is not, why and what to do."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

import frs_kernels
from frs_kernels import backends, native


def report() -> dict[str, Any]:
    """For a bug report."""
    cuda = torch.cuda.is_available()
    cpu = native.WHY_NOT["cpu"] is None
    return {
        "frs_kernels": frs_kernels.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else None,
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "instructions": torch.ops.frs_kernels.instructions() if cpu else None,
        "threads": torch.get_num_threads(),
        "why_not": backends.available(),
        "auto": {kind: backends.choose("auto", kind) for kind in (("cuda", "cpu") if cuda else ("cpu",))},
        "build": native.RECORD,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m frs_kernels", description="Which backends are here.")
    parser.add_argument("--json", action="store_true", help="more, for bug reports")
    if parser.parse_args().json:
        print(json.dumps(report(), indent=2))
        return
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
