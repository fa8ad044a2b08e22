"""What is said where a library cannot be built or loaded, and what is built again."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from building import STEP, needs_compiler, needs_sources, report, run, try_to_build, unpack

from frs_kernels import native, version

pytestmark = needs_sources


def executable(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> str:
    """What a build sees of a torch."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return str(folder)


def test_without_libraries_the_wheel_is_pure_and_says_what_is_missing(sources):
    result = try_to_build(sources, FRS_BUILD="none")
    assert result.returncode == 0, result.stderr
    folder, _ = unpack(sources)
    assert folder.name == f"frs_kernels-{version.__version__}-py3-none-any"
    assert not list(folder.rglob("*.so"))
    lines = report(folder)
    assert "not available: it was left out of the build; set FRS_BUILD=auto" in lines["cpu"]
    assert "pip install --force-reinstall" in lines["cpu"]
    assert "backend='auto' takes 'torch' for cpu" in " ".join(lines.values())
    out = run(sys.executable, "-c", STEP, cwd=sources.parent, PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="")
    names, files = zip(*(line.split() for line in out.splitlines()), strict=True)
    assert {"torch", "auto"} <= set(names)
    assert not {"cpu", "cuda"} & set(names)
    assert set(files) == {str(folder / "frs_kernels/__init__.py")}


@pytest.mark.parametrize("torch_version", [torch.__version__, "2.9.1"])
def test_a_library_that_cannot_be_loaded_is_done_without(sources, torch_version):
    assert try_to_build(sources, FRS_BUILD="none").returncode == 0
    folder, record = unpack(sources)
    (folder / "frs_kernels/lib/libfrs_cpu.so").write_text("not a library")
    record["cpu"] = {"compiler": "", "targets": ["baseline"]}
    (folder / "frs_kernels/lib/build.json").write_text(json.dumps(record))
    code = (
        f"import torch\ntorch.__version__ = {torch_version!r}\n"
        "from frs_kernels import backends\nprint(backends.choose('auto', 'cpu'), backends.why_not('cpu', 'cpu'))"
    )
    out = run(sys.executable, "-c", code, cwd=sources.parent, PYTHONPATH=str(folder))
    if torch_version == "2.9.1":
        assert out.startswith("torch torch 2.9.1 is installed, torch 2.10 or later is needed; update torch")
    else:
        assert out.startswith("torch it could not be loaded (")
        assert "libfrs_cpu.so" in out
        assert "reinstall" in out


def nothing_on_the_path(tmp_path: Path) -> dict[str, str | None]:
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty"), "CXX": None}


def test_without_a_compiler_the_package_installs_and_says_how_to_get_one(sources, tmp_path):
    result = try_to_build(sources, **nothing_on_the_path(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler" in result.stdout
    folder, record = unpack(sources)
    assert folder.name.endswith("-py3-none-any")
    assert "missing" in record["cpu"]
    assert "missing" in record["cuda"]
    line = report(folder)["cpu"]
    for word in ("not available", "no C++ compiler", "install g++ 11", "pip install --force-reinstall"):
        assert word in line


def test_the_first_call_warns_once_where_it_takes_less_than_it_should(sources, tmp_path):
    """Not where whoever built it left the library out."""
    code = (
        "import torch, warnings\n"
        "from frs_kernels import fsr_loss\n"
        "x = [torch.zeros(1, 2, 3, 4, requires_grad=True)]\n"
        "with warnings.catch_warnings(record=True) as found:\n"
        "    warnings.simplefilter('always')\n"
        "    fsr_loss(x, x, x, x), fsr_loss(x, x, x, x), fsr_loss(x, x, x, x, backend='torch')\n"
        "print(*(f'{w.filename} {w.message}' for w in found), sep='\\n')"
    )
    assert try_to_build(sources, **nothing_on_the_path(tmp_path)).returncode == 0
    folder, _ = unpack(sources)
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(folder)).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("<string> backend='auto' takes 'torch', which is slower than 'cpu'; that is not here: ")
    for word in ("no C++ compiler", "install g++ 11", "pip install --force-reinstall"):
        assert word in lines[0]
    record = folder / "frs_kernels/lib/build.json"
    left_out = "it was left out of the build; set FRS_BUILD=auto instead of none"
    record.write_text(json.dumps({"cpu": {"missing": left_out}}))
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(folder)).strip() == ""


def test_what_was_built_before_does_not_stay(sources, tmp_path):
    library = sources / "frs_kernels/lib/libfrs_cpu.so"
    library.parent.mkdir()
    library.touch()
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=sources, **nothing_on_the_path(tmp_path))
    assert not library.exists()
    assert "missing" in json.loads((library.parent / "build.json").read_text())["cpu"]


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_what_is_asked_for_and_cannot_be_built_is_an_error(sources, tmp_path, choice):
    result = try_to_build(sources, FRS_BUILD=choice, **nothing_on_the_path(tmp_path))
    assert result.returncode != 0
    assert f"FRS_BUILD={choice}" in result.stderr
    assert "no C++ compiler" in result.stderr
    assert not list(sources.glob("dist/*.whl"))


def test_an_unknown_choice_is_an_error(sources):
    result = try_to_build(sources, FRS_BUILD="gpu")
    assert result.returncode != 0
    assert "FRS_BUILD='gpu' is unknown; the valid values are auto, cpu, cuda, none" in result.stderr


# name: (what the machine is like, FRS_BUILD, what the message must say)
WRONG = {
    "an old compiler": (
        lambda folder: {
            "CXX": executable(folder / "g++", '[ "$1" = --version ] && echo "g++ (Some) 8.3.0" || exit 1'),
        },
        "cpu",
        ("g++ (Some) 8.3.0", "C++20", "install g++ 11"),
    ),
    "an old nvcc": (
        lambda folder: {
            "CUDA_HOME": str(Path(executable(folder / "bin/nvcc", 'echo "release 11.2, V11.2.67"')).parents[1])
        },
        "cuda",
        ("CUDA 11.2", "CUDA 12.0 or later is needed", "CUDA_HOME"),
    ),
    "an nvcc of a later CUDA than torch's": (
        lambda folder: {
            "CUDA_HOME": str(Path(executable(folder / "bin/nvcc", 'echo "release 14.1, V14.1.0"')).parents[1]),
            "PYTHONPATH": fake_torch(folder, "2.11.0+cu126", "12.6"),
        },
        "cuda",
        ("CUDA 14.1", "torch 2.11.0+cu126 of CUDA 12.6", "CUDA_HOME", "a CUDA 12 toolkit"),
    ),
    "no nvcc where CUDA_HOME points": (
        lambda folder: {"CUDA_HOME": str(folder)},
        "cuda",
        ("no nvcc", "CUDA_HOME=", "install the CUDA toolkit, 12.0 or later"),
    ),
    "an old torch": (
        lambda folder: {"PYTHONPATH": fake_torch(folder, "2.9.1+cpu")},
        "cpu",
        ("torch 2.9.1+cpu is installed", "torch 2.10 or later is needed"),
    ),
}


@needs_compiler
@pytest.mark.parametrize("machine", WRONG)
def test_a_wrong_version_is_named_beside_the_right_one(sources, tmp_path, machine):
    prepare, choice, words = WRONG[machine]
    result = try_to_build(sources, FRS_BUILD=choice, **prepare(tmp_path / "machine"))
    assert result.returncode != 0
    assert [word for word in words if word not in result.stderr] == [], result.stderr


@needs_compiler
def test_a_library_that_does_not_compile_is_done_without_or_an_error(compiled_sources):
    """The compiler's own words are shown, and kept."""
    with (compiled_sources / "csrc/cpu/scale.cpp").open("a") as file:
        file.write("\nint not_cpp = ;\n")
    result = try_to_build(compiled_sources)
    assert result.returncode == 0, result.stderr
    assert "int not_cpp = ;" in result.stdout
    folder, record = unpack(compiled_sources)
    assert not list(folder.rglob("*.so"))
    assert "could not be made (csrc/cpu/scale.cpp:" in record["cpu"]["missing"]
    assert "error: expected" in record["cpu"]["missing"]
    result = try_to_build(compiled_sources, FRS_BUILD="cpu")
    assert result.returncode != 0
    assert "error: expected" in result.stderr


@needs_compiler
def test_an_old_nvcc_leaves_the_cpu_library(compiled_sources, tmp_path):
    prepare, _, words = WRONG["an old nvcc"]
    result = try_to_build(compiled_sources, **prepare(tmp_path / "machine"))
    assert result.returncode == 0, result.stderr
    folder, record = unpack(compiled_sources)
    assert [path.name for path in folder.rglob("*.so")] == ["libfrs_cpu.so"]
    assert all(word in record["cuda"]["missing"] for word in words)


@needs_compiler
def test_only_what_has_changed_is_compiled_again(compiled_sources):
    def compiled() -> set[str]:
        result = try_to_build(compiled_sources, FRS_BUILD="cpu")
        assert result.returncode == 0, result.stderr
        return set(re.findall(r"build/native/([\w.]+)-\w+\.o$", result.stdout, flags=re.MULTILINE))

    compiled()
    assert compiled() == set()
    with (compiled_sources / "csrc/cpu/scale.cpp").open("a") as file:
        file.write("// changed\n")
    assert compiled() == {f"cpu.scale.{isa}" for isa in native.targets("cpu")}
