"""Builds of the package in copies of its sources, and what a machine must have for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
HAS_NVCC = bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists() or os.environ.get("CUDA_HOME"))

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="no nm or readelf")
needs_sources = pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="the sources are not beside the tests")

STEP = """
import torch, frs_kernels
from frs_kernels import backends, fsr_loss

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
levels = [[torch.randn(2, c, h, w, generator=generator).to(device) for h, w in ((7, 5), (1, 1))] for c in (4, 4, 6, 6)]

def step(backend):
    s, t, x, z = [[v.clone().requires_grad_(i % 2 == 0) for v in level] for i, level in enumerate(levels)]
    loss = fsr_loss(s, t, x, z, backend=backend)
    loss.backward()
    return [loss.detach(), *(v.grad for v in s + x)]

expected = step("torch")
for name in [name for name, reason in backends.available().items() if reason is None] + ["auto"]:
    for a, b in zip(step(name), expected, strict=True):
        torch.testing.assert_close(a, b)
    print(name, frs_kernels.__file__)
"""


def command(*arguments: object, cwd: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in {**os.environ, "PYTHONPATH": None, **changes}.items() if v is not None}
    return subprocess.run([str(a) for a in arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def run(*arguments: object, cwd: Path, **changes: str | None) -> str:
    result = command(*arguments, cwd=cwd, **changes)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy(sources: Path, to: Path) -> Path:
    """What a build needs, and what it has compiled before, so that it takes seconds."""
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(sources / name, to)
    for name in ("csrc", "frs_kernels", "build/native", "tests", "examples"):
        if (sources / name).exists():
            shutil.copytree(sources / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    return to


def try_to_build(sources: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """What pip does to make a wheel, in dist/."""
    code = "import setuptools.build_meta; setuptools.build_meta.build_wheel('dist')"
    return command(sys.executable, "-c", code, cwd=sources, **{"FRS_BUILD": None, **changes})


def unpack(sources: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """The one wheel in dist/, as a folder to import from, and the record of its build."""
    (wheel,) = (sources / "dist").glob("*.whl")
    folder = sources.parent / wheel.stem
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder, json.loads((folder / "frs_kernels/lib/build.json").read_text())


def report(folder: Path) -> dict[str, str]:
    """The lines of `python -m frs_kernels` for a package in `folder`, by their first word."""
    out = run(sys.executable, "-m", "frs_kernels", cwd=folder.parent, PYTHONPATH=str(folder), TRITON_INTERPRET=None)
    return {line.split()[0]: line for line in out.splitlines()}
