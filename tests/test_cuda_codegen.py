"""The CUDA kernels compiled for sm_80, sm_90 and sm_100 with no GPU: registers, spills, width of loads and stores."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resources", ROOT / "tools" / "resources.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module
    spec.loader.exec_module(module)
    return module


resources = load_tool()
pytestmark = [
    pytest.mark.skipif(not resources.LIBRARY.exists(), reason="the CUDA library has not been built: no nvcc"),
    pytest.mark.skipif(resources.find_cuobjdump() is None, reason="no cuobjdump"),
]
DTYPES = {"float", "double", "bfloat16", "half"}


@pytest.fixture(scope="module")
def library():
    return list(resources.kernels())


@pytest.fixture(params=resources.VERBS)
def kernels(request, library):
    found = [k for k in library if k.verb == request.param]
    assert found
    return found


def test_the_page_in_docs_is_of_this_library(library):
    written = (ROOT / "docs" / "codegen-cuda.md").read_text()
    lines = {line.split("|")[1] for line in written.splitlines() if line.startswith("| ")}
    made = {line.split("|")[1] for line in resources.markdown(library).splitlines() if line.startswith("| ")}
    assert lines == made


def test_no_kernel_spills_and_aligned_rows_move_16_bytes_at_once(kernels):
    assert not [f"{k}: {k.fault()}" for k in kernels if k.fault()]


def test_every_architecture_has_every_kernel(kernels):
    """What is compiled is what the launchers choose from: no dtype is missing, nor is there more than is needed."""
    made = {a: {k.arguments for k in kernels if k.architecture == a} for a in resources.ARCHITECTURES}
    first = made[resources.ARCHITECTURES[0]]
    assert all(names == first for names in made.values())
    verb = kernels[0].verb
    if verb == "scale":
        assert first == {()}
        return
    native = {arguments[0] for arguments in first if arguments[-1] != "1"}
    assert native == DTYPES
    pairs = {arguments[:3] for arguments in first}
    if verb == "score":
        assert len(first) == 6  # four dtypes, and any dtype in fp32 and fp64
    else:
        assert len(pairs) == 8  # the four, two of fp32 from 16 bits, and any pair in fp32 and fp64
        assert len(first) == 4 * len(pairs)  # mse, bce, bce's gradient alone, kl


def test_every_load_of_a_round_is_wide(kernels):
    """At least as many 16-byte accesses in the code as a round keeps under way; fp32 from 16 bits has narrower z."""
    for k in kernels:
        if k.packet == 1:
            continue
        if k.verb == "score":
            assert k.wide_loads >= 8, str(k)
        elif k.verb == "imitate":
            packets = 4 if k.arguments[3] == "mse" or k.packet < 8 else 2
            operands = 1 if k.arguments[0] != k.arguments[1] else 2
            assert k.wide_loads >= packets * operands, str(k)
        else:
            assert min(k.wide_loads, k.wide_stores) >= 2 * len(DTYPES), str(k)


def test_a_kernel_over_the_limit_is_a_fault(kernels):
    """The report can fail: with a limit of 16 registers nothing passes, nor without wide loads or with a spill."""
    assert all("registers" in k.fault(most_registers=16) for k in kernels)
    wide = next(k for k in kernels if k.packet > 1)
    assert "load" in wide._replace(wide_loads=0).fault()
    assert "stack" in wide._replace(stack=8).fault()
    assert "spill" in wide._replace(spills=1).fault()
