"""Other Python processes that import the same frs_kernels."""

from __future__ import annotations

import os
from pathlib import Path

import frs_kernels

ROOT = Path(frs_kernels.__file__).parents[1]


def python_environment(**changes: str | None) -> dict[str, str]:
    """This process's environment, the package found, one thread; a variable given as None is left out."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    merged = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}
    return {name: value for name, value in merged.items() if value is not None}
