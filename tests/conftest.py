"""What every test stands on: the interpreter where there is no GPU, visible skips, a fresh seed, one thread."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Before anything imports triton: its kernels decide when they are defined whether they are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The helpers, and test files that others read; the checkout last, so that an installed frs_kernels is the one tested.
sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parent)]
sys.path.append(str(Path(__file__).parents[1]))

import building  # noqa: E402


def round_as_a_gpu_does() -> None:
    """Make Triton's interpreter round to nearest even where it narrows to bf16.

    It cuts the low bits off (or, told to round, drops the carry), and casts fp64 to bf16 as if to an integer. The
    tests compare values, so that would be seen as an error of the kernels, twice as large as the GPU's rounding.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, cast = interpreter._convert_float, interpreter.InterpreterBuilder.cast_impl

    def to_bf16(data: np.ndarray) -> np.ndarray:
        wide = torch.from_numpy(np.array(data, dtype=data.dtype, ndmin=1))
        return wide.to(torch.bfloat16).view(torch.uint16).numpy().reshape(data.shape)

    def convert_float(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return to_bf16(data)
        return convert(data, source, target, rounding)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float64 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.cast_impl = cast_impl


def prepare_once() -> None:
    """Spare half of the interpreter's time: it wraps all of triton.language again at every call between kernels."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang
    done: set[frozenset[str]] = set()

    def patch_lang(fn):
        if tl.core.is_builtin(tl.load):  # a launch begins: the last one has put everything back
            done.clear()
        modules = frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core)
        if modules in done:
            return interpreter._LangPatchScope()
        done.add(modules)
        return prepare(fn)

    interpreter._patch_lang = patch_lang


if os.environ.get("TRITON_INTERPRET") == "1":
    round_as_a_gpu_does()
    prepare_once()


def pytest_configure(config: pytest.Config) -> None:
    # Workers share the machine's cores; more threads than cores make the tests slower.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def rng() -> torch.Generator:
    """New numbers every run; the seed is in the output of a failing test, TEST_SEED=... repeats it."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def compiler() -> Iterator[None]:
    """A compiler that has compiled nothing, before and after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = building.copy(building.CHECKOUT, tmp_path_factory.mktemp("wheel") / "sources")
    pip = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "dist", ".")
    building.run(sys.executable, *pip, cwd=sources, FRS_BUILD="cuda" if building.HAS_NVCC else "cpu")
    (path,) = (sources / "dist").glob("*.whl")
    return path


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return building.copy(building.CHECKOUT, tmp_path / "sources")


@pytest.fixture
def compiled_sources(wheel: Path, tmp_path: Path) -> Path:
    return building.copy(wheel.parents[1], tmp_path / "sources")
