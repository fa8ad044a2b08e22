"""The compiled libraries: what they need of torch and of the machine, and which GPUs the CUDA one is for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from building import CXX, TORCH, needs_binutils, needs_compiler, needs_sources, run
from environment import python_environment

from frs_kernels import backends, native

pytestmark = needs_sources


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
        assert {path.name.split(".")[1] for path in objects} == {"score", "imitate", "softmax", "scale", "moments"}
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
    names = ("score", "imitate", "distill", "scale_")
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


OLD = "it was compiled for GPUs from sm_80 on, this one is sm_75; use backend='auto'"
DRIVER = (
    "for sm_120 the driver has to compile it, and the driver is of CUDA 12.8, the library of CUDA 13.0; "
    "update the driver"
)
ALL = ["sm_80", "sm_90", "sm_100", "compute_100"]
# (the library's targets, the GPUs, the driver, why it cannot serve them)
GPUS: dict[str, tuple[list[str], list[tuple[int, int]], int, str | None]] = {
    "two that it was compiled for": (ALL, [(9, 0), (8, 0)], 13000, None),
    "one too old": (ALL, [(9, 0), (7, 5)], 13000, OLD),
    "a driver too old to": (ALL, [(9, 0), (12, 0)], 12080, DRIVER),
    "one between the generations": (["sm_80", "sm_100", "compute_100"], [(9, 0)], 13000, "it has no code for sm_90"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", GPUS)
def test_a_gpu_that_the_cuda_library_cannot_serve_is_another_backends(monkeypatch, compiler, compiled, case):
    targets, gpus, driver, why = GPUS[case]
    monkeypatch.setitem(native.WHY_NOT, "cuda", None)
    monkeypatch.setitem(native.RECORD, "cuda", {"targets": targets, "cuda": "13.0"})
    monkeypatch.setattr(backends, "_HAS_TRITON", True)
    monkeypatch.setattr(backends, "_HAS_CC", True)
    monkeypatch.setattr(backends, "_INTERPRET", False)
    monkeypatch.setattr(backends, "_driver_version", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    for cached in (backends._why_no_code, backends._oldest):
        cached.cache_clear()

    def choose(x: torch.Tensor) -> tuple[torch.Tensor, str, str | None]:
        return x + 1, backends.choose("auto", "cuda"), backends.why_not("cuda", "cuda")

    function = torch.compile(choose, backend="eager", fullgraph=True) if compiled else choose
    try:
        _, name, reason = function(torch.zeros(()))
    finally:
        for cached in (backends._why_no_code, backends._oldest):
            cached.cache_clear()
    others = "triton" if min(gpus) >= (8, 0) else "torch"  # Triton's kernels, too, are for sm_80 and later
    assert name == ("cuda" if why is None else others)
    assert reason is None if why is None else reason.startswith(why)


def test_the_drivers_version_is_asked_of_the_driver(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(to: Any) -> int:
            to._obj.value = 13020
            return 0

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(backends.ctypes, "CDLL", lambda name: {"libcuda.so.1": Driver}[name])
    assert backends._driver_version() == 13020
    monkeypatch.setattr(backends.ctypes, "CDLL", missing)
    assert backends._driver_version() == 0


def test_rocm_takes_torch_without_a_word(monkeypatch, recwarn):
    monkeypatch.setattr(torch.version, "hip", "7.0", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.choose("auto", "cuda") == "torch"
    assert "ROCm" in str(backends.why_not("triton", "cuda"))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("capability", "driver", "words"),
    [
        (80, 12000, None),
        (89, 12000, None),  # the binary of sm_80
        (103, 13000, None),
        (110, 13000, None),  # the PTX of compute_100
        (110, 12080, "the driver is of CUDA 12.8, the library of CUDA 13.0; update the driver"),
        (75, 13000, "compiled for GPUs from sm_80 on, this one is sm_75"),
        (90, 13000, "it has no code for sm_90"),
    ],
)
def test_what_the_cuda_library_has_no_code_for_is_told_before_a_launch(monkeypatch, capability, driver, words):
    targets = ["sm_80", "sm_100", "compute_100"]
    monkeypatch.setitem(native.RECORD, "cuda", {"targets": targets, "cuda": "13.0"})
    reason = native.why_no_code(capability, driver)
    assert reason is None if words is None else words in reason
