"""Builds the two libraries of csrc/ into frs_kernels/lib, and one wheel that serves every CPython 3.

FRS_BUILD says what to build: auto (what this machine can; the default), cpu, cuda (which needs cpu too: it holds the
operators' schemas) or none. What was built, or why it was not, goes to frs_kernels/lib/build.json.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError, PlatformError

CSRC = Path("csrc")
# What was compiled, kept until what it is made from changes; a build with other flags in CXX wants a folder of its own.
BUILD = Path(os.environ.get("FRS_BUILD_DIR") or Path("build", "native"))

KERNELS = ("score", "imitate", "softmax", "scale", "moments")
GLUE = ("ops.cpp", "row_ops.cpp")
FLAGS = ["-std=c++20", f"-I{CSRC}", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
MATHS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# The oldest torch whose stable ABI is used: a library built against a later one runs on it too.
TORCH = (2, 10)
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"
# csrc/cpu/backend.cpp picks one of them when it runs.
INSTRUCTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
NVCC_FLAGS = ["-std=c++20", f"-I{CSRC}", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["--threads=0", "-Xfatbin=-compress-all"]  # architectures side by side; a quarter of the size
# Compute capability: the first CUDA whose nvcc knows it.
TARGETS = {80: (12, 0), 90: (12, 0), 100: (12, 8), 120: (12, 8)}
PTX = 100  # for what has no binary of its own: a later one could not serve the 110s

CHOICES = ("auto", "cpu", "cuda", "none")
CHOICE = os.environ.get("FRS_BUILD") or "auto"
if CHOICE not in CHOICES:
    raise OptionError(f"FRS_BUILD={CHOICE!r} is unknown; the valid values are {', '.join(CHOICES)}")


class Missing(Exception):
    """A library cannot be built here: why, and what to do."""


class Torch(NamedTuple):
    version: str
    cuda: str | None
    root: Path


class Compiler(NamedTuple):
    command: list[str]
    version: str


class Object(NamedTuple):
    name: str
    source: Path
    command: list[str]
    versions: str  # of the compiler and of the headers that are not ours


class Recipe(NamedTuple):
    compiler: str
    targets: list[str]
    objects: list[Object]
    link: list[str]
    libraries: list[str]
    cuda: str | None = None


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def output_of(command: list[str], stdin: str = "") -> str:
    """What a command prints; nothing if it fails or is not there."""
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def find_torch() -> Torch:
    """The installed torch, told from its files: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Missing(
            "the build does not see torch, whose headers it needs; install torch, or leave out --no-build-isolation"
        )
    root = Path(spec.origin).parent
    facts = runpy.run_path(str(root / "version.py"))
    found = Torch(facts["__version__"], facts.get("cuda"), root)
    if version(found.version) < TORCH:
        needed = ".".join(map(str, TORCH))
        raise Missing(f"torch {found.version} is installed, torch {needed} or later is needed; update torch")
    return found


def find_compiler() -> Compiler:
    asked = os.environ.get("CXX")
    commands = [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]
    here = [command for command in commands if shutil.which(command[0])]
    remedy = "install g++ 11 or later (or clang 16 or later)"
    if not here:
        raise Missing(f"there is no C++ compiler ({asked or 'c++, g++, clang++'} not found); {remedy}")
    for command in here:
        probe = [*command, "-std=c++20", "-x", "c++", "-dM", "-E", "-"]
        if "__cpp_lib_ranges " in output_of(probe, "#include <algorithm>\n"):
            return Compiler(command, output_of([*command, "--version"]).partition("\n")[0])
    name = output_of([*here[0], "--version"]).partition("\n")[0] or here[0][0]
    raise Missing(f"the C++ compiler ({name}) does not know C++20; {remedy}")


def find_nvcc(torch: Torch) -> Compiler:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    toolkits = sorted(Path("/usr/local").glob("cuda-*"), key=lambda path: version(path.name), reverse=True)
    places = [home] if home else [None, "/usr/local/cuda", *toolkits]  # None: on the PATH
    found = (shutil.which("nvcc", path=place and str(Path(place, "bin"))) for place in places)
    nvcc = next(filter(None, found), None)
    needed = ".".join(map(str, min(TARGETS.values())))
    if nvcc is None:
        where = f"CUDA_HOME={home}" if home else "CUDA_HOME, PATH, /usr/local/cuda"
        raise Missing(f"there is no nvcc (looked in {where}); install the CUDA toolkit, {needed} or later")
    release = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    if release is None:
        raise Missing(f"{nvcc} --version names no release; set CUDA_HOME to a CUDA toolkit, {needed} or later")
    if version(release[1]) < min(TARGETS.values()):
        raise Missing(f"nvcc is of CUDA {release[1]} ({nvcc}), CUDA {needed} or later is needed; set CUDA_HOME to one")
    if torch.cuda and version(release[1])[0] > version(torch.cuda)[0]:
        raise Missing(
            f"nvcc is of CUDA {release[1]} ({nvcc}), torch {torch.version} of CUDA {torch.cuda}: a driver that serves "
            f"torch may be too old for it; set CUDA_HOME to a CUDA {torch.cuda.partition('.')[0]} toolkit"
        )
    return Compiler([nvcc], release[1])


def glue(library: str, torch: Torch, cxx: Compiler, source: str, *flags: str) -> Object:
    """What is written against torch's headers."""
    command = [*cxx.command, *FLAGS, *MATHS, STABLE_ABI, *flags, "-isystem", str(torch.root / "include")]
    return Object(f"{library}.{Path(source).stem}", CSRC / source, command, f"{cxx.version}, torch {torch.version}")


def cpu_recipe(torch: Torch, cxx: Compiler) -> Recipe:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    targets = list(INSTRUCTIONS) if x86 else ["baseline"]
    objects = [glue("cpu", torch, cxx, source) for source in (*GLUE, "cpu/backend.cpp")]
    for isa in targets:
        for kernel in KERNELS:
            command = [*cxx.command, *FLAGS, *MATHS, f"-DFRS_ISA={isa}", *INSTRUCTIONS[isa]]
            objects.append(Object(f"cpu.{kernel}.{isa}", CSRC / "cpu" / f"{kernel}.cpp", command, cxx.version))
    return Recipe(cxx.version, targets, objects, [*cxx.command, "-shared"], libtorch_cpu(torch))


def libtorch_cpu(torch: Torch) -> list[str]:
    # No path goes into the library: by its name the loader finds the libtorch_cpu that the process has loaded.
    return [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]


def cuda_recipe(torch: Torch, cxx: Compiler) -> Recipe:
    nvcc = find_nvcc(torch)
    known = [target for target, first in TARGETS.items() if version(nvcc.version) >= first]
    portable = max(target for target in known if target <= PTX)
    targets = [f"sm_{target}" for target in known] + [f"compute_{portable}"]
    if len(known) < len(TARGETS):
        later = ", ".join(f"sm_{target}" for target in TARGETS if target not in known)
        print(f"frs_kernels: CUDA {nvcc.version} builds {', '.join(targets)} only; CUDA 12.8 or later also {later}")
    host = next(word for word in reversed(cxx.command) if not word.startswith("-"))  # of "ccache g++ -m64", g++
    command = [*nvcc.command, "-ccbin", host, *NVCC_FLAGS]
    for target in known:
        codes = f"[sm_{target},compute_{target}]" if target == portable else f"sm_{target}"
        command += ["-gencode", f"arch=compute_{target},code={codes}"]
    compiler = f"nvcc {nvcc.version}, {cxx.version}"
    objects = [
        Object(f"cuda.{name}", CSRC / "cuda" / f"{name}.cu", command, compiler) for name in (*KERNELS, "distill")
    ]
    objects += [glue("cuda", torch, cxx, source, "-DUSE_CUDA") for source in GLUE]
    # A torch without CUDA has no libtorch_cuda to link with, and only the name is needed: an empty library has it.
    stub = make("libtorch_cuda.so", [*cxx.command, "-shared", "-Wl,-soname,libtorch_cuda.so", "-x", "c", os.devnull])
    # nvcc knows where its static runtime is.
    link = [*command, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
    libraries = ["-Xlinker", f"--no-as-needed,{stub}", *libtorch_cpu(torch)]
    return Recipe(compiler, targets, objects, link, libraries, nvcc.version)


RECIPES = {"cpu": cpu_recipe, "cuda": cuda_recipe}


def make(name: str, command: list[str], made_from: Iterable[Path] = (), *versions: str) -> Path:
    """Run a command that makes one file, unless it was made before of the same things by the same command."""
    key = hashlib.sha256(repr((command, versions)).encode())
    for path in made_from:
        key.update(path.read_bytes())
    stem, _, suffix = name.rpartition(".")
    made = BUILD / f"{stem}-{key.hexdigest()[:16]}.{suffix}"
    if not made.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        print(shlex.join([*command, "-o", str(made)]) + "\n", end="", flush=True)  # one write: others print too
        result = subprocess.run([*command, "-o", part], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        print(result.stdout, end="", flush=True)
        if result.returncode:
            lines = result.stdout.splitlines() or [f"exit status {result.returncode}"]
            first = next((line for line in lines if "error" in line), lines[-1])
            raise Missing(f"{name} could not be made ({first.strip()}); see what `pip install --verbose` prints")
        for old in BUILD.glob(f"{stem}-*.{suffix}"):
            old.unlink()
        part.replace(made)
    return made


def compiled(each: Object) -> Path:
    beside = sorted(path for folder in {CSRC, each.source.parent} for path in folder.iterdir())
    headers = [path for path in beside if path.suffix in (".h", ".cuh")]
    return make(f"{each.name}.o", [*each.command, "-c", str(each.source)], [each.source, *headers], each.versions)


def accept(name: str, reason: Missing) -> Missing:
    """Do without a library, or fail if it was asked for."""
    if CHOICE != "auto":
        raise PlatformError(f"FRS_BUILD={CHOICE}, but there can be no {name} library: {reason}")
    return reason


def build(names: list[str]) -> dict[str, tuple[Recipe, Path] | Missing]:
    """Each library as it was made, or why it could not be. What fails does not stop the other."""
    recipes: dict[str, Recipe] = {}
    results: dict[str, tuple[Recipe, Path] | Missing] = {}
    for name in names:
        try:
            recipes[name] = RECIPES[name](find_torch(), find_compiler())
        except Missing as reason:
            results[name] = accept(name, reason)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = {name: [pool.submit(compiled, each) for each in recipe.objects] for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        try:
            files = [str(each.result()) for each in objects[name]]
            results[name] = recipe, make(f"libfrs_{name}.so", [*recipe.link, *files, *recipe.libraries])
        except Missing as reason:
            results[name] = accept(name, reason)
    return results


class Libraries(build_ext):
    """The libraries, beside the package that loads them; no Python extension among them."""

    built: tuple[str, ...] = ()

    def run(self) -> None:
        # nvcc takes longest, so it comes first.
        results = build({"none": [], "cpu": ["cpu"]}.get(CHOICE, ["cuda", "cpu"]))
        if isinstance(results.get("cpu"), Missing):
            results["cuda"] = results["cpu"]  # which the cuda library cannot do without
        record: dict[str, object] = {"FRS_BUILD": CHOICE}
        folder = Path("" if self.inplace else self.build_lib, "frs_kernels", "lib")
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("cpu", "cuda"):
            library = folder / f"libfrs_{name}.so"
            result = results.get(name, Missing(f"it was left out of the build; set FRS_BUILD=auto instead of {CHOICE}"))
            if isinstance(result, Missing):
                print(f"frs_kernels: no {name} library: {result}")
                library.unlink(missing_ok=True)
                record[name] = {"missing": str(result)}
            else:
                recipe, file = result
                part = Path(shutil.copy(file, f"{library}.{os.getpid()}"))
                part.replace(library)  # at once: another process may have the old one loaded
                self.built += (name,)
                record[name] = {"compiler": recipe.compiler, "cuda": recipe.cuda, "targets": recipe.targets}
        (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib, "frs_kernels", "lib")
        return [str(folder / name) for name in ("build.json", *(f"libfrs_{name}.so" for name in self.built))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One for every CPython 3 of the platform, since the libraries know nothing of Python; for any without them."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not self.get_finalized_command("build_ext").built
        return "py3", "none", super().get_tag()[2]


setup(
    # Not an extension: for the sources to be in an sdist, and for build_ext to be run.
    ext_modules=[Extension("frs_kernels.lib", sorted(str(path) for path in CSRC.rglob("*.*")))],
    cmdclass={"build_ext": Libraries, "bdist_wheel": Wheel},
)
