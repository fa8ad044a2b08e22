"""The compiled libraries: loads those that are here, and knows why another is not.

`setup.py` puts them into `lib/` beside this file, with a record of what was built and what could not be.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("cpu", "cuda")
OLDEST_TORCH = (2, 10)

_FOLDER = Path(__file__).parent / "lib"
_REINSTALL = "reinstall from the source folder: pip install --force-reinstall --no-deps ."
LEFT_OUT = "it was left out of the build"
"""How setup.py's reason begins where FRS_BUILD said so."""


def _read_record() -> dict[str, Any]:
    """What the build wrote down; nothing where there was none, as in a source folder on the path."""
    try:
        record = json.loads((_FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _load(name: str) -> str | None:
    """Load a library; None if that went well, else the reason and the remedy."""
    if name == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install a torch built with CUDA"
    built = RECORD.get(name, {"missing": "it has not been built; install g++ 11 or later (or clang 16 or later)"})
    if "missing" in built:
        return f"{built['missing']}, then {_REINSTALL}"
    if _major_minor(torch.__version__) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is installed, torch {needed} or later is needed; update torch"
    if name == "cuda" and torch.version.cuda:
        # A later CUDA's runtime may ask for a later driver than torch's does.
        if _major_minor(torch.version.cuda)[0] < _major_minor(built["cuda"])[0]:
            return (
                f"it was compiled with CUDA {built['cuda']}, torch {torch.__version__} with CUDA {torch.version.cuda}; "
                f"set CUDA_HOME to a toolkit like torch's, then {_REINSTALL}"
            )
        if (reason := WHY_NOT["cpu"]) is not None:
            return f"it needs the cpu library, which is not here: {reason}"
    try:
        torch.ops.load_library(_FOLDER / f"libfrs_{name}.so")
    except OSError as error:
        return f"it could not be loaded ({error.__cause__ or error}); {_REINSTALL}"
    return None


RECORD = _read_record()
WHY_NOT: dict[str, str | None] = {}
for _name in LIBRARIES:  # cpu first: it holds the operators' schemas
    WHY_NOT[_name] = _load(_name)


def targets(name: str) -> list[str]:
    """What a library was compiled for: sets of instructions, or GPU architectures."""
    found: list[str] = RECORD.get(name, {}).get("targets", [])
    return found


def why_no_code(capability: int, driver: int) -> str | None:
    """None if the CUDA library has code that a GPU can run, else the reason.

    Args:
        capability: of the GPU, as in sm_90.
        driver: the CUDA release of its driver, as in 13020 for 13.2.

    A binary serves later GPUs of its generation; PTX, which the driver compiles if it is not older than the compiler,
    serves all later ones.
    """
    binaries, ptx = _numbers("sm_"), _numbers("compute_")
    if any(b // 10 == capability // 10 and b <= capability for b in binaries):
        return None
    if capability < min((*binaries, *ptx), default=0):
        oldest = min((*binaries, *ptx))
        return f"it was compiled for GPUs from sm_{oldest} on, this one is sm_{capability}; use backend='auto'"
    compiler = str(RECORD.get("cuda", {}).get("cuda", "0.0"))
    major, minor = _major_minor(compiler)
    if not any(p <= capability for p in ptx):
        return f"it has no code for sm_{capability} ({', '.join(targets('cuda'))}); {_REINSTALL}"
    if driver < 1000 * major + 10 * minor:
        return (
            f"for sm_{capability} the driver has to compile it, and the driver is of CUDA {driver // 1000}."
            f"{driver % 1000 // 10}, the library of CUDA {compiler}; update the driver"
        )
    return None


def _numbers(prefix: str) -> list[int]:
    return [int(target.removeprefix(prefix)) for target in targets("cuda") if target.startswith(prefix)]
