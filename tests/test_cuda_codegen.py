"""The CUDA kernels compiled with no GPU: registers, spills, width of loads and stores, instructions a value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import resources
import sass

ROOT = sass.ROOT
pytestmark = [
    pytest.mark.skipif(not sass.LIBRARY.exists(), reason="the CUDA library has not been built: no nvcc"),
    pytest.mark.skipif(sass.find_cuobjdump() is None, reason="no cuobjdump"),
]
DTYPES = {"float", "double", "bfloat16", "half"}


@pytest.fixture(scope="module")
def library():
    return list(resources.kernels())


@pytest.fixture(scope="module")
def walks():
    return sass.walks_of(sass.code_of(sass.LIBRARY, sass.ARCHITECTURE))


@pytest.fixture(params=resources.KERNELS)
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
    if verb == "softmax":
        assert len(first) == 7  # as imitate, but fp64 one number at a time
        return
    assert {arguments[0] for arguments in first if sass.packet(arguments) > 1} == DTYPES
    if verb == "score":
        assert len(first) == 6  # four dtypes, and any dtype in fp32 and fp64
    elif verb in sass.ROW_VERBS:
        assert len({arguments[:3] for arguments in first}) == 8  # pairs of dtypes, as below
        assert {arguments[-1] for arguments in first} == set(sass.ROW_LOSSES)
        assert len(first) == 8 * len(sass.ROW_LOSSES)
    else:
        pairs = {arguments[:3] for arguments in first}
        assert len(pairs) == 8  # the four, two of fp32 from 16 bits, and any pair in fp32 and fp64
        usual = {arguments for arguments in first if "usual" in arguments}
        assert {arguments[-1] for arguments in usual} == set(sass.WANTS) - {"any"}
        assert len(usual) == 3 * (len(pairs) - 3)  # not in fp64, nor of any dtype
        assert {arguments[:3] for arguments in first - usual} == pairs


def test_a_kernel_over_the_limit_is_a_fault(kernels):
    """The report can fail: with a limit of 16 registers nothing passes, nor without wide loads or with a spill."""
    assert all("registers" in k.fault(most_registers=16) for k in kernels)
    wide = next(k for k in kernels if k.packet > 1)
    assert "load" in wide._replace(wide_loads=0).fault()
    assert "stack" in wide._replace(stack=8).fault()
    assert "spill" in wide._replace(spills=1).fault()
    if wide.verb not in ("score", "moments"):
        stores = next(k for k in kernels if k.packet > 1 and "loss" not in k.arguments)
        assert "store" in stores._replace(wide_stores=0).fault()


def test_every_walk_is_found_and_within_its_budget(walks):
    assert not sass.faults(walks)
    assert {walk.key() for found in walks.values() for walk in found if walk.budget()} == set(sass.BUDGETS)


def test_the_walks_and_losses_counted_are_those_of_the_sources():
    """One more, or one renamed, cannot go by uncounted."""
    assert sass.enumerators("cuda/walks.cuh", "Walk") == [*sass.WALKS, "numbers"]
    usual = ", ".join(f"Loss::{name}" for name in sass.USUAL)
    assert f"using Usual = Losses<{usual}>;" in (ROOT / "csrc" / "cuda" / "imitate.cu").read_text()
    lanes = (ROOT / "csrc" / "cuda" / "score.cu").read_text()
    assert "constexpr int UNROLL = V == 1 ? 16 : 8;" in lanes
    assert "lane_maxima<T, A, V, 5>" in lanes


def test_a_round_keeps_all_its_packets_under_way(walks):
    """A load of each operand for a packet, as wide as its dtype lets it be, and a store where a gradient is wanted."""
    for found in walks.values():
        for walk in found:
            if walk.walk not in sass.WALKS or not walk.loss:
                continue
            _, student, teacher, _, width, _, want = walk.kernel
            packets = 2
            narrow = {64: packets} if student != teacher else {}
            assert walk.loads == {128: packets if narrow else 2 * packets, **narrow}, str(walk)
            assert walk.stores == ({} if want == "loss" else {128: packets}), str(walk)
            assert walk.values == packets * int(width), str(walk)


def test_rows_keep_their_packets_under_way(walks):
    """Four packets of each operand, half as many where the registers would not do."""
    for kernel, found in walks.items():
        for walk in found:
            if walk.walk in sass.ROW_WALKS:
                sums = kernel[0] == "moments" and kernel[-1] == "pkd" and walk.walk == "interleaved" and walk.bits == 16
                packets = 2 if sums or walk.bits == 64 else 4
                assert sum(walk.loads.values()) == 2 * packets, str(walk)
                assert walk.stores == ({} if kernel[0] == "moments" else {128: packets}), str(walk)


@pytest.mark.parametrize("key", sass.BUDGETS)
def test_a_budget_passed_is_a_fault(walks, monkeypatch, key):
    """By instructions, then by the unit for exp and 1/x alone."""
    most = max(walk.a_value for found in walks.values() for walk in found if walk.budget() and walk.key() == key)
    monkeypatch.setitem(sass.BUDGETS, key, most * 0.5)
    assert any("instructions a value" in fault for fault in sass.faults(walks))
    if key == ("bce", 16, "grad"):  # the one whose instructions are fewer than the unit's slots
        monkeypatch.setitem(sass.BUDGETS, key, 23)
        assert any("slots of the unit" in fault for fault in sass.faults(walks))


def test_a_lost_walk_is_a_fault(walks):
    for kernel, found in walks.items():
        for walk in {(walk.loss, walk.walk): walk for walk in found}.values():
            rest = list(found)
            rest.remove(walk)
            assert walk.walk in sass.missing(kernel, rest)
            assert walk.walk in sass.missing(kernel, [*found, walk])
