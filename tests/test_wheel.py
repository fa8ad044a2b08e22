"""What is in the wheel and in the source distribution, and that it works where it is installed."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from building import HAS_NVCC, STEP, TORCH, command, needs_compiler, needs_sources, run

from frs_kernels import version

pytestmark = needs_sources


@needs_compiler
def test_the_wheel_is_for_every_python_3_of_the_platform_and_holds_both_libraries(wheel):
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert wheel.name == f"frs_kernels-{version.__version__}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(metadata).decode()
        requirements = archive.read(metadata.replace("WHEEL", "METADATA")).decode()
    libraries = {"frs_kernels/lib/libfrs_cpu.so"} | ({"frs_kernels/lib/libfrs_cuda.so"} if HAS_NVCC else set())
    assert {name for name in names if ".so" in name} == libraries
    assert not {name for name in names if not name.startswith(("frs_kernels/", "frs_kernels-"))}
    assert "Requires-Dist: torch>=2.10" in requirements


@needs_compiler
def test_the_wheel_runs_the_loss_where_it_is_installed(wheel, tmp_path):
    """In a new environment that has torch, and nothing of the checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    pip = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, *pip, wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))", cwd=tmp_path).strip())
    (site / "torch.pth").write_text(f"{TORCH.parent}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lines = run(python, "-c", STEP, cwd=elsewhere, TRITON_INTERPRET=None).splitlines()
    names, files = zip(*(line.split() for line in lines), strict=True)
    assert set(files) == {str(site / "frs_kernels/__init__.py")}
    assert {"cpu", "torch", "auto"} <= set(names)
    if torch.cuda.is_available() and HAS_NVCC:
        assert "cuda" in names


@needs_compiler
def test_a_plain_pip_install_builds_the_library(sources, tmp_path):
    """Isolated, as pip does by default: the torch of the build is another than the one that the library runs with."""
    found = command(
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "-d",
        tmp_path,
        f"torch=={torch.__version__}",
        cwd=tmp_path,
    )
    if found.returncode:
        pytest.skip(f"pip finds no torch=={torch.__version__}")
    (tmp_path / "constraints.txt").write_text(f"torch=={torch.__version__}\n")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", sources]
    limits = {
        "PIP_CONSTRAINT": str(tmp_path / "constraints.txt"),
        "PIP_BUILD_CONSTRAINT": str(tmp_path / "constraints.txt"),
    }
    run(sys.executable, *pip, cwd=tmp_path, FRS_BUILD="cpu", **limits)
    lines = run(sys.executable, "-c", STEP, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    assert {f"{name} {tmp_path}/site/frs_kernels/__init__.py" for name in ("cpu", "torch", "auto")} <= set(lines)


def test_the_source_distribution_can_be_built_from(sources):
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=sources)
    (archive,) = (sources / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, sources.parent / "unpacked")
    (root,) = (sources.parent / "unpacked").iterdir()
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    expected = {str(path.relative_to(sources)) for path in (sources / "csrc").rglob("*") if path.is_file()}
    assert expected | {"setup.py", "pyproject.toml", "frs_kernels/native.py"} <= files
    assert not {name for name in files if name.startswith(("frs_kernels/lib", "build"))}
    assert {"CHANGELOG.md", "CITATION.cff", "tests/conftest.py", "examples/digits/__main__.py"} <= files
    collect = (
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_errors.py",
        "tests/test_demo_digits.py",
    )
    assert "error" not in run(sys.executable, *collect, cwd=root, PYTHONPATH=str(root)).lower().splitlines()[-1]
