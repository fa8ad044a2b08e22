"""The CUDA sources compiled by g++ and run on the host, a thread a CUDA thread, under sanitizers.

tests/native holds the CUDA of the host (cuda_runtime.h and the headers of the 16-bit dtypes), which g++ finds before
the real one, and the driver, which compares all verbs with loops written from the formulas. Then faults are
planted in copies of the sources: each has to be found, by the sanitizer whose work it is or by the comparison.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"
KERNELS = ("score", "imitate", "softmax", "distill", "scale", "moments")
FLAGS = (
    "-std=c++20", "-g1", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas",
    # Two warps a block: every barrier and shuffle is there, and a barrier of 64 host threads is quick enough. Four
    # blocks are enough for the device, so that a block of these small levels walks over several rounds.
    "-DFRS_THREADS=64", "-DFRS_BLOCKS=4",
)  # fmt: skip
SANITIZERS = {
    "address": (
        "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
        # twice the time to compile, for what the address sanitizer finds as well
        "-fno-sanitize=null,object-size,vptr,return",
    ),
    "thread": ("-O1", "-fsanitize=thread"),
    "none": ("-O0",),
}  # fmt: skip

pytestmark = [pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"), pytest.mark.timeout(600)]


class Fault(NamedTuple):
    """What a copy of a source says instead, who finds it and in which words, or which others after a |."""

    file: str
    old: str
    new: str
    finder: str
    report: str
    which: int = 0  # of several places with the same text
    of: str = ""  # the verb it is seen through, where the file is a header and it is not USED_BY's

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()} -> {self.new.strip() or 'nothing'} [{self.which}]"


BARRIERS = {"terms.cuh": 1, "score.cu": 1, "walks.cuh": 3, "slots.cuh": 4, "moments.cu": 6, "row_parts.cuh": 4}
# The object that has a fault in a header stands for all that use it.
USED_BY = {"walks.cuh": "imitate", "terms.cuh": "imitate", "slots.cuh": "score", "memory.cuh": "score"}
USED_BY |= dict.fromkeys(("row_walks.cuh", "row_parts.cuh", "row_plan.cuh"), "moments")
FAULTS = [
    # memory
    Fault("score.cu", "i < units * V && p0 + i < row.positions", "i < units * V", "address", "heap-buffer-overflow"),
    Fault("score.cu", "k + u * lanes < length ? u * step : 0", "u * step", "address", "heap-buffer-overflow"),
    Fault("score.cu", "maxima[WARPS][WARP * V];", "maxima[WARPS][WARP * V / 4];", "address", "out of bounds"),
    Fault("walks.cuh", "put<typename W::S, A, V>(grad, 0,", "put<typename W::S, A, V>(grad, V,", "address", "overflow"),
    Fault("walks.cuh", "min(tile.columns, row.positions) + V - 1", "MAX_SHARES + 2 * V", "address", "overflow"),
    Fault("walks.cuh", "if (inside) fetch(warp);", "fetch(warp);", "address", "heap-buffer-overflow"),
    Fault("levels.cuh", "(level.n == 1 || view.n % width == 0)", "true", "address", "misaligned", of="imitate"),
    Fault("scale.cu", "if (thread < rest)", "if (thread <= rest)", "address", "heap-buffer-overflow"),
    Fault("scale.cu", "if (factor == 1) return;", "", "address", "use-after-poison"),
    Fault("scale.cu", "to_aligned < size ? to_aligned : size", "0 * to_aligned", "address", "misaligned"),
    Fault("row_walks.cuh", "tile + 1 == level.tiles ? level.positions", "false ? 0", "address", "heap-buffer-overflow"),
    Fault("row_walks.cuh", "if (u > 0 && packet >= last) continue;", "", "address", "heap-buffer-overflow"),
    Fault("row_plan.cuh", "place(view) == place(like)", "place(view) + place(like) >= 0", "address", "misaligned"),
    # barriers
    *(
        Fault(file, "__syncthreads();", "", "thread", "data race|FAILED", which)
        for file, count in BARRIERS.items()
        for which in range(count)
        # Of the sums of the rows, which only imitate and moments read, and of the terms': where the result is wrong by
        # chance, and the sanitizer sees no race. What a block stores before it counts itself is read by another one,
        # which here runs later. On a GPU these are for compute-sanitizer.
        if (file, which) not in (("slots.cuh", 3), ("terms.cuh", 0), ("moments.cu", 0), ("moments.cu", 3))
    ),
    Fault("slots.cuh", "__syncthreads();\n  return sums;", "return sums;", "thread", "FAILED one", of="imitate"),
    # results
    Fault("memory.cuh", "return b > a || b != b ? b : a;", "return b > a ? b : a;", "none", "hides a NaN", 1),
    Fault("score.cu", "sum += score;", "sum += score * A(1.000001);", "none", "mass"),
    Fault("walks.cuh", "return denominator == 0 ? 0 : share;", "return share;", "none", "FAILED one"),
    Fault("walks.cuh", " + static_cast<N>(row.eps);", ";", "none", "FAILED one"),
    Fault("walks.cuh", "% row.positions;", "% (row.positions + 1);", "none", "FAILED one"),
    Fault("imitate.cu", "table.starts[index + 1] - 1 - blockIdx.x", "0", "none", "FAILED"),
    Fault("terms.cuh", "value += call.workspace.terms[term.number];", "", "none", "FAILED"),
    Fault("terms.cuh", "if (t < call.launch_terms) {", "if (t < 1) {", "none", "FAILED"),
    Fault("softmax.cu", "sum *= exp_neg((most - maximum) * inverse_temperature);", "", "none", "FAILED one"),
    Fault("softmax.cu", "line >= tile.lines || ", "", "address", "heap-buffer-overflow"),
    Fault("slots.cuh", "if (is_last) *workspace.counter = 0;", "", "none", "FAILED"),
    Fault("scale.cu", "widen(grad.at[i]) * factor", "widen(grad.at[i])", "none", "FAILED one"),
    Fault("row_walks.cuh", "last >= first ? end - last * SIZE : 0", "0", "none", "FAILED pkd one"),
    Fault("row_parts.cuh", "moved(sums, count,", "moved(sums, 0 * count,", "none", "FAILED pkd"),
    Fault("row_parts.cuh", "at[2] *= by_s, ", "at[2] += 0 * by_s, ", "none", "FAILED cwd one"),
    Fault("row_parts.cuh", "if (at[3] != 0) at[4] += at[3] * (e - d);", "", "none", "FAILED cwd one"),
    Fault(
        "moments.cu",
        "Of::raised(held[u], sums.at[0], sums.at[1],",
        "Of::raised(held[u], held[u].at[0], held[u].at[1],",
        "none",
        "FAILED cwd",
    ),
    Fault("moments.cu", "*counter = 0;", "", "none", "FAILED"),
    Fault("moments.cu", "double value = *call.workspace.total;", "double value = 0;", "none", "FAILED"),
]


def run(command: list[object], **more: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, check=False, capture_output=True, text=True, **more)  # type: ignore[call-overload]


def compile_object(source: Path, csrc: Path, sanitizer: str, cache: Path) -> Path:
    """The object of a source, made if the cache holds none of the same sources and flags."""
    flags = [*FLAGS, *SANITIZERS[sanitizer]]
    key = hashlib.sha256(repr(flags).encode())
    headers = [*csrc.glob("*.h"), *csrc.glob("cuda/*.cuh"), *NATIVE.glob("*.h")]
    for path in (source, *sorted(headers, key=lambda h: h.name)):
        key.update(path.read_bytes())
    name = f"{source.stem}-{sanitizer}"
    made = cache / f"{name}-{key.hexdigest()[:16]}.o"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second test worker waits for the first one's object
        if not made.exists():
            for old in cache.glob(f"{name}-*.o"):
                old.unlink()
            unfinished = made.with_suffix(".part")
            include = ["-I", NATIVE, "-I", csrc, "-I", csrc / "cuda"]
            done = run(["g++", *flags, *include, "-x", "c++", "-c", source, "-o", unfinished])
            assert done.returncode == 0, done.stderr[-4000:]
            unfinished.replace(made)
    return made


def link(objects: list[Path], sanitizer: str, to: Path) -> Path:
    done = run(["g++", *SANITIZERS[sanitizer], *objects, "-o", to, "-pthread"])
    assert done.returncode == 0, done.stderr[-4000:]
    return to


def run_driver(driver: Path, *arguments: object, seconds: float = 500) -> subprocess.CompletedProcess[str]:
    """What a shell's `timeout` would do where it hangs: status 124, and what it had said until then."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    try:
        done = run([driver, *arguments], env=environment, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        said = [(text or b"").decode(errors="replace") for text in (error.stdout, error.stderr)]
        done = subprocess.CompletedProcess([str(driver)], 124, *said)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not know this kernel's address space")
    return done


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects by the hash of their sources and flags, kept from run to run where pytest keeps anything."""
    keeper = getattr(request.config, "cache", None)
    return Path(keeper.mkdir("cuda_source")) if keeper else tmp_path_factory.mktemp("cuda_source")


@pytest.fixture(scope="session")
def has_sanitizer(tmp_path_factory: pytest.TempPathFactory):
    known: dict[str, bool] = {}

    def check(name: str) -> None:
        if name not in known:
            source = tmp_path_factory.mktemp("probe") / "probe.cpp"
            source.write_text("int main() {}\n")
            known[name] = run(["g++", *SANITIZERS[name], source, "-o", source.with_suffix("")]).returncode == 0
        if not known[name]:
            pytest.skip(f"g++ has no {name} sanitizer here")

    return check


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_all_cases_agree_with_the_formulas_and_no_sanitizer_objects(sanitizer, cache, has_sanitizer, tmp_path, rng):
    has_sanitizer(sanitizer)
    sources = [*(CSRC / "cuda" / f"{name}.cu" for name in KERNELS), NATIVE / "driver.cpp"]
    driver = link([compile_object(s, CSRC, sanitizer, cache) for s in sources], sanitizer, tmp_path / "driver")
    seed = int(torch.randint(1 << 31, (), generator=rng))
    done = run_driver(driver, seed)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-1000:]}{done.stderr[-6000:]}"
    checks = int(re.findall(r"(\d+) checks, 0 failures", done.stdout)[0])
    assert checks > 300_000


@pytest.mark.timeout(0)  # the driver gives each call its time
def test_random_calls_are_right(cache, has_sanitizer, tmp_path, rng):
    """`make fuzz` makes more of them. What fails says how it is run again."""
    has_sanitizer("address")
    sources = [*(CSRC / "cuda" / f"{verb}.cu" for verb in KERNELS), NATIVE / "driver.cpp"]
    driver = link([compile_object(s, CSRC, "address", cache) for s in sources], "address", tmp_path / "driver")
    seed, count = int(torch.randint(1 << 31, (), generator=rng)), int(os.environ.get("FUZZ_CASES", "20"))
    done = run_driver(driver, seed, "random", count, seconds=3600)
    assert done.returncode == 0, f"{done.stdout[-1000:]}{done.stderr[-6000:]}"


@pytest.mark.parametrize("sanitizer", ["address", "thread", "none"])
def test_the_small_case_is_right_without_a_fault(sanitizer, cache, has_sanitizer, tmp_path):
    """What the next test finds is its fault, and not there before."""
    has_sanitizer(sanitizer)
    sources = [*(CSRC / "cuda" / f"{name}.cu" for name in KERNELS), NATIVE / "driver.cpp"]
    driver = link([compile_object(s, CSRC, sanitizer, cache) for s in sources], sanitizer, tmp_path / "driver")
    done = run_driver(driver, 1, "one")
    assert done.returncode == 0, done.stderr[-4000:]


def test_offsets_have_64_bits(cache, tmp_path):
    """Images and channels more than 2^31 numbers apart, in memory of which only the pages in use exist."""
    sources = [*(CSRC / "cuda" / f"{name}.cu" for name in KERNELS), NATIVE / "driver.cpp"]
    driver = link([compile_object(s, CSRC, "none", cache) for s in sources], "none", tmp_path / "driver")
    done = run_driver(driver, 1, "far")
    if done.returncode == 77:
        pytest.skip("the system gives no address space of 100 GB")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_found(fault, cache, has_sanitizer, tmp_path):
    has_sanitizer(fault.finder)
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    target = csrc / "cuda" / fault.file
    parts = target.read_text().split(fault.old)
    assert fault.which < len(parts) - 1, f"{fault.file} no longer says {fault.old!r}"
    if fault.old == "__syncthreads();":
        assert len(parts) - 1 == BARRIERS[fault.file], "a new barrier wants a line in BARRIERS"
    target.write_text(fault.old.join(parts[: fault.which + 1]) + fault.new + fault.old.join(parts[fault.which + 1 :]))

    faulty = fault.of or USED_BY.get(fault.file, fault.file.removesuffix(".cu"))
    # First: of an inline function that several objects have, the linker keeps the first one's.
    objects = [compile_object(csrc / "cuda" / f"{faulty}.cu", csrc, fault.finder, tmp_path)]
    objects += [
        compile_object(CSRC / "cuda" / f"{name}.cu", CSRC, fault.finder, cache) for name in KERNELS if name != faulty
    ]
    objects.append(compile_object(NATIVE / "driver.cpp", CSRC, fault.finder, cache))
    driver = link(objects, fault.finder, tmp_path / "driver")
    # Without a barrier threads may also wait for ever before the race is seen.
    for _ in range(6):
        done = run_driver(driver, 1, "one", seconds=60)
        assert done.returncode != 0
        if any(words in done.stderr for words in fault.report.split("|")):
            return
    pytest.fail(done.stderr[-4000:] or "it hung and said nothing")
