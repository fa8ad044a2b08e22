"""What is built, what is in it, and that it works where it is installed; and what is said where it cannot be built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from environment import python_environment

from frs_kernels import backends, native, version

CHECKOUT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
HAS_NVCC = bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists() or os.environ.get("CUDA_HOME"))

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="no nm or readelf")
pytestmark = pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="the sources are not beside the tests")


def command(*arguments: object, cwd: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in {**os.environ, "PYTHONPATH": None, **changes}.items() if v is not None}
    return subprocess.run([str(a) for a in arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def run(*arguments: object, cwd: Path, **changes: str | None) -> str:
    result = command(*arguments, cwd=cwd, **changes)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copy(CHECKOUT, tmp_path / "sources")


@pytest.fixture
def compiled_sources(wheel: Path, tmp_path: Path) -> Path:
    return copy(wheel.parents[1], tmp_path / "sources")


def copy(sources: Path, to: Path) -> Path:
    """What a build needs, and what it has compiled before, so that it takes seconds."""
    to.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(sources / name, to)
    for name in ("csrc", "frs_kernels", "build/native"):
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


# The symbols.


def undefined(library: Path) -> set[str]:
    out = run("nm", "-D", "--undefined-only", library, cwd=library.parent)
    return {line.split()[-1] for line in out.splitlines()}


def stable_abi() -> set[str]:
    """The functions that torch declares in the headers of its C shims, and in what they include of their own kind."""
    found: set[str] = set()
    todo = ["torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h"]
    seen = set(todo)
    while todo:
        text = (TORCH / "include" / todo.pop()).read_text()
        found |= set(re.findall(r"^[^/\n#]*?\b(\w*torch_\w+)\(", text, flags=re.MULTILINE))
        more = set(re.findall(r"#include <(torch/csrc/(?:inductor/aoti_torch/c|stable/c)/\w+\.h)>", text)) - seen
        seen |= more
        todo += more
    return found


def foreign(library: Path) -> set[str]:
    """The symbols a library needs that are neither the C++ runtime's nor in torch's stable ABI."""
    system = re.compile(r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+|_ITM_\w+|__gmon_start__|__cxa_finalize")
    return {name for name in undefined(library) - stable_abi() if not system.fullmatch(name)}


def needed(library: Path) -> set[str]:
    out = run("readelf", "-d", library, cwd=library.parent)
    assert "RPATH" not in out
    assert "RUNPATH" not in out
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", out))


def built(name: str) -> Path:
    library = Path(native.__file__).parent / "lib" / f"libfrs_{name}.so"
    if not library.exists():
        pytest.skip(native.RECORD.get(name, {}).get("missing", "not built"))
    return library


@needs_binutils
@pytest.mark.parametrize("name", native.LIBRARIES)
def test_a_library_needs_nothing_but_the_stable_abi(name):
    library = built(name)
    assert len(undefined(library) & stable_abi()) > 20
    assert foreign(library) == set()
    own = {"libtorch_cpu.so"} | ({"libtorch_cuda.so"} if name == "cuda" else set())
    system = r"(lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)|ld-linux[\w-]*)\.so\.\d+"
    assert own <= needed(library)
    assert not {each for each in needed(library) - own if not re.fullmatch(system, each)}


@needs_compiler
@needs_binutils
def test_a_symbol_outside_the_stable_abi_is_seen(tmp_path):
    (tmp_path / "other.cpp").write_text(
        "namespace at { int sum(int); }\n"
        'extern "C" { void* PyLong_FromLong(long); int aoti_torch_of_another_time(); int aoti_torch_get_dim(); }\n'
        "void* f() { return PyLong_FromLong(at::sum(aoti_torch_of_another_time() + aoti_torch_get_dim())); }\n"
    )
    run(CXX, "-shared", "-fPIC", "other.cpp", "-o", "other.so", cwd=tmp_path)
    assert foreign(tmp_path / "other.so") == {"PyLong_FromLong", "_ZN2at3sumEi", "aoti_torch_of_another_time"}


def merged(objects: Path) -> list[str]:
    """The symbols of an object that a linker may take from it for other objects: inline functions and their like."""
    out = run("nm", "-C", "--defined-only", objects, cwd=objects.parent)
    return [line for line in out.splitlines() if re.search(r" [WVuC] ", line)]


@needs_compiler
@needs_binutils
@pytest.mark.skipif(len(native.targets("cpu")) < 2, reason="compiled for one set of instructions")
def test_no_instruction_leaks_out_of_the_objects_that_may_use_it(wheel):
    for isa in set(native.targets("cpu")) - {"baseline"}:
        objects = list((wheel.parents[1] / "build/native").glob(f"cpu.*.{isa}-*.o"))
        assert {path.name.split(".")[1] for path in objects} == {"score", "imitate", "scale"}
        for path in objects:
            assert merged(path) == []
            out = run("nm", "-C", "--defined-only", "--extern-only", path, cwd=path.parent)
            names = [line.split(" ", 2)[2] for line in out.splitlines()]
            assert names
            assert all(name.startswith(f"frs::{isa}::") for name in names), names


@needs_compiler
@needs_binutils
def test_an_inline_function_that_would_leak_is_seen(tmp_path):
    (tmp_path / "leak.cpp").write_text(
        "#include <vector>\nvoid f(std::vector<int>& v, int n) { v.resize(n); }\n"
        "template <class T> T g(T x) { return x + 1; }\ntemplate int g(int);\n"
    )
    run(CXX, "-O3", "-c", "leak.cpp", "-o", "leak.o", cwd=tmp_path)
    assert any("g<int>" in line for line in merged(tmp_path / "leak.o"))


STAND_IN = """
import ctypes, sys, torch
torch.version.cuda = sys.argv[2]
ctypes.CDLL(sys.argv[1])
from frs_kernels import backends, native
if native.WHY_NOT["cuda"] is None:
    names = ("score", "imitate", "scale_")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"frs_kernels::{name}", "CUDA") for name in names)
    assert not torch.cuda.is_initialized()
    assert "libcuda.so" not in open("/proc/self/maps").read()
    print(backends.why_not("cuda", "cpu"))
else:
    print(native.WHY_NOT["cuda"])
"""


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for Linux")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: the tests marked gpu use the library")
def test_the_cuda_library_loads_by_the_names_of_torchs_libraries_and_without_a_driver(tmp_path):
    """Beside a stand-in for libtorch_cuda, in a folder that the library does not know."""
    built("cuda")
    (tmp_path / "cuda.c").write_text("int aoti_torch_get_current_cuda_stream(int i, void** s) { return 1; }\n")
    flags = ("-shared", "-fPIC", "-x", "c", "-Wl,-soname,libtorch_cuda.so", "-o", "libtorch_cuda.so")
    run(CXX, *flags, "cuda.c", cwd=tmp_path)
    environment = python_environment()

    def load(cuda: str) -> str:
        arguments = (sys.executable, "-c", STAND_IN, tmp_path / "libtorch_cuda.so", cuda)
        return run(*arguments, cwd=tmp_path, PYTHONPATH=environment["PYTHONPATH"])

    compiled = native.RECORD["cuda"]["cuda"]
    assert load(compiled).startswith("it takes 'cuda' tensors, not 'cpu' ones")
    older = f"{int(compiled.partition('.')[0]) - 1}.9"
    message = load(older)
    assert f"compiled with CUDA {compiled}" in message
    assert f"CUDA {older}" in message
    assert "CUDA_HOME" in message


# The wheel.


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = copy(CHECKOUT, tmp_path_factory.mktemp("wheel") / "sources")
    pip = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist", ".")
    run(sys.executable, *pip, cwd=sources, FRS_BUILD="cuda" if HAS_NVCC else "cpu")
    (path,) = (sources / "dist").glob("*.whl")
    return path


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


def test_the_source_distribution_can_be_built_from(sources):
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=sources)
    (archive,) = (sources / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, sources.parent / "unpacked")
    (root,) = (sources.parent / "unpacked").iterdir()
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    expected = {str(path.relative_to(sources)) for path in (sources / "csrc").rglob("*") if path.is_file()}
    assert expected | {"setup.py", "pyproject.toml", "frs_kernels/native.py"} <= files
    assert not {name for name in files if name.startswith(("frs_kernels/lib", "build"))}


# What cannot be built.


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
    assert "pip install --no-build-isolation" in lines["cpu"]
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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("gpus", "chosen"), [([(9, 0), (8, 0)], "cuda"), ([(9, 0), (7, 5)], "triton")], ids=str)
def test_a_gpu_too_old_for_the_cuda_library_is_another_backends(monkeypatch, compiler, compiled, gpus, chosen):
    monkeypatch.setitem(native.WHY_NOT, "cuda", None)
    monkeypatch.setitem(native.RECORD, "cuda", {"targets": ["sm_80", "sm_100", "compute_100"]})
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_HAS_CC", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    backends._oldest_gpu.cache_clear()

    def choose(x: torch.Tensor) -> tuple[torch.Tensor, str, str | None]:
        return x + 1, backends.choose("auto", "cuda"), backends.why_not("cuda", "cuda")

    function = torch.compile(choose, backend="eager", fullgraph=True) if compiled else choose
    try:
        _, name, reason = function(torch.zeros(()))
    finally:
        backends._oldest_gpu.cache_clear()
    assert name == chosen
    expected = "it was compiled for GPUs from sm_80 on, this one is sm_75; use backend='auto'"
    assert reason == (None if chosen == "cuda" else expected)


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
    for word in ("not available", "no C++ compiler", "install g++ 11", "pip install --no-build-isolation"):
        assert word in line


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
