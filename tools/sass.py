"""What a value costs: the instructions in the loops of the CUDA kernels, counted in machine code for sm_90.

    python tools/sass.py [FILE ...]     of cubins, or of the library that `make install` has built; no GPU needed

A loop is a branch backward to where its own way began. Counted is the longest way through it, whether an instruction's
predicate holds or not, without what calls a subroutine (a division's rare cases). Which walk of csrc/cuda/walks.cuh it
is, and which loss, is told by what it loads, stores and computes; a loop that is not found is a fault.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "frs_kernels" / "lib" / "libfrs_cuda.so"
ARCHITECTURE = 90
WALKS = ("lines", "run", "positions")  # that move packets; `numbers` moves one number at a time
SCORE = {"five": 5, "eight": 8}  # packets under way in the loops of `score`
ROW_VERBS = ("moments", "moments_backward")
ROW_WALKS = ("planar", "interleaved")  # that move packets, of csrc/cuda/row_walks.cuh; `ends` are a run's two ends
USUAL = ("mse", "bce")  # the losses of the kernels that know what is wanted
# The unit for exp and 1/x gives 16 results a clock and multiprocessor: a warp's 32 take as long as 8 instructions.
SLOTS_OF_MUFU = 8
# Instructions a value may take: of a loss, by the bits of the student's numbers and what is wanted, in the walk `lines`
# (issue 11). Where nothing is said of what is wanted, that of "both" holds.
BUDGETS = {
    ("bce", 16, "both"): 40,
    ("bce", 32, "both"): 42,
    ("bce", 16, "grad"): 29,
    ("mse", 16, "both"): 12,
    ("mse", 32, "both"): 17,
    ("score", 16, ""): 3,
    ("score", 32, ""): 3,
    ("moments", 16, "pkd"): 13,
    ("moments", 32, "pkd"): 14,
    ("moments", 16, "cwd"): 21,
    ("moments", 32, "cwd"): 22,
    ("moments_backward", 16, "pkd"): 11,
    ("moments_backward", 32, "pkd"): 13,
    ("moments_backward", 16, "cwd"): 17,
    ("moments_backward", 32, "cwd"): 19,
}
# What a packet may take beyond that: where it lies, and its shares from shared memory.
MORE = {"lines": 0, "run": 20, "positions": 32}


class Step(NamedTuple):
    """An instruction."""

    op: str
    always: bool  # no predicate
    target: int  # of a branch, the index of another, or -1


class Walk(NamedTuple):
    """One way over the numbers, in one kernel."""

    kernel: tuple[str, ...]  # as `signature` names it
    loss: str  # or nothing where it is not told apart
    walk: str
    values: int  # of an iteration
    instructions: int
    mufu: int
    loads: dict[int, int]  # by bits, from global memory
    stores: dict[int, int]
    before: int  # instructions on the longest way to the loop: what a tile costs, roughly

    @property
    def a_value(self) -> float:
        return self.instructions / self.values

    @property
    def unit(self) -> float:
        """The slots a value takes in the unit for exp and 1/x."""
        return SLOTS_OF_MUFU * self.mufu / self.values

    @property
    def slots(self) -> float:
        """What bounds it."""
        return max(self.a_value, self.unit)

    @property
    def bits(self) -> int:
        """Of the student's numbers, or of `score` the teacher's; 0 if any."""
        return {"half": 16, "bfloat16": 16, "float": 32, "double": 64}.get(self.kernel[1], 0)

    def key(self) -> tuple[str, int, str]:
        """Of its budget."""
        named = self.loss or self.kernel[0] in ROW_VERBS
        key = (self.loss or self.kernel[0], self.bits, self.kernel[-1] if named else "")
        return key if key in BUDGETS else (*key[:2], "both")

    def budget(self) -> float | None:
        most = BUDGETS.get(self.key())
        if most is None or self.walk not in (*MORE, *SCORE, *ROW_WALKS):
            return None
        return most + MORE.get(self.walk, 0) / packet(self.kernel)

    def fault(self) -> str:
        """Why this is not good enough, or an empty string."""
        most = self.budget()
        if most is None:
            return ""
        if self.a_value > most:
            return f"{self}: {self.a_value:.1f} instructions a value, {most:.1f} allowed"
        if self.unit > most:
            return f"{self}: {self.unit:.0f} slots of the unit for exp and 1/x a value, {most:.1f} allowed"
        return ""

    def __str__(self) -> str:
        return f"{self.kernel[0]}<{', '.join(self.kernel[1:])}> {self.loss} {self.walk}"


def enumerators(path: str, name: str) -> list[str]:
    """The names of an enum of csrc, in order."""
    found = re.search(rf"enum class {name}\b[^{{]*{{([^}}]*)}}", (ROOT / "csrc" / path).read_text())
    assert found, name
    return [word.strip() for word in found[1].split(",")]


_NAMES = enumerators("pointwise.h", "Loss")
LOSSES = _NAMES[: _NAMES.index("POINTWISE")]
ROW_LOSSES = enumerators("row_losses.h", "RowLoss")[:-1]
WANTS = enumerators("cuda/imitate.cu", "Want")


def signature(name: str) -> tuple[str, ...]:
    """The verb of a kernel's demangled name and its template arguments, in short."""
    found = re.search(
        r"(\w+)_kernel(?:<(.*)>)?\(", re.sub(r"frs::|cuda::|\(anonymous namespace\)::|__nv_|__", "", name)
    )
    assert found, name

    def losses(match: re.Match[str]) -> str:
        names = tuple(LOSSES[int(number)] for number in re.findall(r"\(Loss\)(\d+)", match[0]))
        return {USUAL: "usual", tuple(LOSSES): "every"}.get(names, "+".join(names))

    short = re.sub(r"Losses<[^>]*>", losses, found[2] or "")
    short = re.sub(r"\(Want\)(\d+)", lambda match: WANTS[int(match[1])], short)
    short = re.sub(r"\(RowLoss\)(\d+)", lambda match: ROW_LOSSES[int(match[1])], short)
    return found[1], *(word for word in short.split(", ") if word)


def packet(kernel: tuple[str, ...]) -> int:
    """The numbers that a kernel moves at once."""
    return next(int(word) for word in kernel if word.isdigit())


def functions(listing: str) -> Iterator[tuple[tuple[str, ...], list[Step]]]:
    """The instructions of every function in a listing whose names are demangled."""
    for part in re.split(r"Function : ", listing)[1:]:
        name, _, body = part.partition("\n")
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", body)
        index = {int(address, 16): i for i, (address, *_) in enumerate(found)}
        code = []
        for _, predicate, op, rest in found:
            to = re.findall(r"0x([0-9a-f]+)", rest) if op.split(".")[0] == "BRA" else []
            code.append(Step(op, not predicate, index.get(int(to[-1], 16), -1) if to else -1))
        yield signature(name), code


def longest_way(code: list[Step], start: int, end: int, around: Iterable[int] = ()) -> list[int]:
    """The instructions on the longest way from one to another that never goes back; empty if there is none.

    A way through a subroutine is taken where there is no other, one through the instructions `around` never.
    """
    for calls in (False, True):
        before = {start: (0, -1)}  # how many, and from where
        for i in range(start, end):
            if i not in before:
                continue
            op = code[i].op.split(".")[0]
            ends = code[i].always and op in ("BRA", "EXIT", "RET")
            after = [] if ends or (op == "CALL" and not calls) else [i + 1]
            for j in (*after, code[i].target):
                if i < j <= end and j not in around and before[i][0] + 1 > before.get(j, (0, -1))[0]:
                    before[j] = (before[i][0] + 1, i)
        if end in before:
            way = [end]
            while way[-1] != start:
                way.append(before[way[-1]][1])
            return way[::-1]
    return []


def loops(code: list[Step]) -> Iterator[list[int]]:
    """The longest way through each loop."""
    ends: dict[int, int] = {}
    for i, step in enumerate(code):
        if 0 <= step.target < i:
            ends[step.target] = i
    for start, end in sorted(ends.items()):
        way = longest_way(code, start, end)
        if way:
            yield way


def widths(ops: Iterable[str], name: str) -> dict[int, int]:
    """How many accesses of each width in bits."""
    found = (re.search(r"\.[US]?(8|16|64|128)\b", op) for op in ops if op.split(".")[0] == name)
    return dict(Counter(int(width[1]) if width else 32 for width in found))


def walks(kernel: tuple[str, ...], code: list[Step]) -> list[Walk]:
    """The walks of a kernel."""
    found = []
    for way in loops(code):
        ops = [code[i].op for i in way]
        loads, stores = widths(ops, "LDG"), widths(ops, "STG")
        named = name_of(kernel, ops, sum(loads.values()), 128 in loads, sum(stores.values()))
        if named:
            mufu = sum(op.startswith("MUFU") for op in ops)
            found.append((way[0], Walk(kernel, *named, len(way), mufu, loads, stores, 0)))
    if kernel[0] in ROW_VERBS:  # what follows a run's ends is its packets
        found = [
            (start, walk._replace(walk="interleaved") if walk.walk == "planar" and before.walk != "ends" else walk)
            for (_, before), (start, walk) in zip([found[-1], *found], found, strict=False)
        ]
    return [walk._replace(before=before(code, start)) for start, walk in found]


def before(code: list[Step], start: int) -> int:
    """The instructions on the longest way from a kernel's beginning to a walk's loop.

    A walk waits for the shares of its tile once; a way through another walk's code would wait twice.
    """
    waits = [i for i in range(start) if code[i].op.startswith("BAR")]
    return len(longest_way(code, 0, start, waits[:-1])) - 1


def name_of(
    kernel: tuple[str, ...], ops: list[str], loads: int, wide: bool, stores: int
) -> tuple[str, str, int] | None:
    """Loss, walk and values of an iteration, if this is the loop of a walk."""
    shared = sum(op.startswith("LDS") for op in ops)
    if kernel[0] == "score":
        values = loads * (packet(kernel) if wide else 1)
        if stores and not shared and loads == 8:
            return "", "few" if wide else "few numbers", values
        if stores or shared:
            return None
        if wide:
            return next((("", walk, values) for walk, packets in SCORE.items() if packets == loads), None)
        return ("", "numbers", 16) if loads >= 16 else None
    if kernel[0] in ROW_VERBS:
        if any("STRONG" in op for op in ops) or not loads or loads % 2 or (kernel[0] == "moments") == bool(stores):
            return None  # the sums of parts
        if loads == 2:
            return "", "ends", 1
        return "", "planar" if wide else "numbers", loads // 2 * (packet(kernel) if wide else 1)
    if kernel[0] != "imitate" or loads not in (4, 8):
        return None
    pairs, width = loads // 2, packet(kernel) if wide else 1
    known = "usual" in kernel
    if known and stores != (0 if kernel[-1] == "loss" else pairs):
        return None
    walk = {0: "lines", pairs: "positions", pairs * width: "run"}.get(shared) if wide else "numbers"
    if walk is None or (not wide and shared != pairs):
        return None
    loss = "" if not known else USUAL["MUFU.EX2" in ops]
    return loss, walk, pairs * width


def expected(kernel: tuple[str, ...]) -> Counter[tuple[str, str]]:
    """How many loops a kernel has of each loss and walk."""
    if kernel[0] == "score":
        names = ["numbers", "few numbers", *(["few", *SCORE] if packet(kernel) > 1 else [])]
        return Counter(("", name) for name in names)
    if kernel[0] in ROW_VERBS:
        names = ["numbers", "numbers", *(["ends", *ROW_WALKS] if packet(kernel) > 1 else [])]
        return Counter(("", name) for name in names)
    if kernel[0] != "imitate":
        return Counter()
    names = ["numbers", *(WALKS if packet(kernel) > 1 else [])]
    if "usual" in kernel:
        return Counter((loss, name) for loss in USUAL for name in names)
    return Counter({("", name): len(LOSSES) for name in names})


def missing(kernel: tuple[str, ...], found: Iterable[Walk]) -> str:
    """What differs from what is expected, or an empty string."""
    want, have = expected(kernel), Counter((w.loss, w.walk) for w in found)
    differs = [
        f"{have[key]} of {want[key]} loops of {' '.join(key).strip()}" for key in want | have if have[key] != want[key]
    ]
    return f"{kernel[0]}<{', '.join(kernel[1:])}>: {', '.join(differs)}" if differs else ""


def find_cuobjdump() -> Path | None:
    """cuobjdump on the PATH, in the newest toolkit under /usr/local, or the one that Triton carries."""
    places = [shutil.which("cuobjdump")]
    places += sorted(map(str, Path("/usr/local").glob("cuda*/bin/cuobjdump")), reverse=True)
    spec = find_spec("triton")  # found without importing it
    if spec and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((Path(p) for p in places if p and Path(p).is_file()), None)


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, check=True, capture_output=True, text=True).stdout


def cuobjdump(*arguments: object) -> str:
    """What cuobjdump prints, names demangled."""
    tool = find_cuobjdump()
    assert tool, "no cuobjdump"
    done = subprocess.run([tool, *map(str, arguments)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed:\n{done.stderr[-4000:]}")
    return demangle(done.stdout)


@functools.cache
def code_of(file: Path, architecture: int) -> dict[tuple[str, ...], list[Step]]:
    """Every kernel of a library or a cubin on an architecture."""
    return dict(functions(cuobjdump("-arch", f"sm_{architecture}", "-sass", file)))


def walks_of(code: dict[tuple[str, ...], list[Step]]) -> dict[tuple[str, ...], list[Walk]]:
    return {kernel: walks(kernel, steps) for kernel, steps in code.items()}


def faults(made: dict[tuple[str, ...], list[Walk]]) -> list[str]:
    """Every kernel where a walk is missing, and every walk over its budget."""
    lost = filter(None, (missing(kernel, found) for kernel, found in made.items()))
    return [*lost, *filter(None, (walk.fault() for found in made.values() for walk in found))]


COLUMNS = {
    "imitate": (*WALKS, "numbers", "values", "unit", "slots", "budget", "loads", "stores", "before"),
    "score": (*SCORE, "few", "numbers", "budget", "before"),
    "moments": (*ROW_WALKS, "ends", "numbers", "unit", "budget", "before"),
}


def cells(found: dict[str, Walk], first: Walk) -> dict[str, str]:
    """What the tables say of one loss in one kernel, by column; `first` stands for all its walks."""

    def accesses(of: dict[int, int]) -> str:
        return " + ".join(f"{count} × {bits // 8}" for bits, count in sorted(of.items(), reverse=True))

    return {name: f"{walk.a_value:.1f}" for name, walk in found.items()} | {
        "values": str(first.values),
        "unit": f"{first.unit:.0f}",
        "slots": f"{first.slots:.1f}",
        "budget": f"{first.budget():g}" if first.budget() else "",
        "loads": accesses(first.loads),
        "stores": accesses(first.stores),
        "before": str(first.before),
    }


def tables(made: dict[tuple[str, ...], list[Walk]]) -> dict[str, str]:
    """Instructions a value by verb: of the usual kernels of `imitate` by loss, of `score`, of the losses along rows."""
    lines: dict[str, list[str]] = {verb: [] for verb in COLUMNS}
    for kernel, all_found in made.items():
        for loss in USUAL if "usual" in kernel else ("",):
            found = {walk.walk: walk for walk in all_found if walk.loss == loss}
            of_rows = kernel[0] in ROW_VERBS
            first = found.get(WALKS[0] if loss else ROW_WALKS[0] if of_rows else next(iter(SCORE)))
            if first and (loss or of_rows or kernel[0] == "score"):
                verb = "moments" if of_rows else kernel[0]
                name = f"{loss} {kernel[1]}, {kernel[2]}, {kernel[-1]}" if loss else kernel[1]
                if of_rows:
                    name = f"{kernel[-1]} {kernel[1]}, {kernel[2]}{' backward' if kernel[0] != verb else ''}"
                row = cells(found, first)
                lines[verb].append(f"| {name} | {' | '.join(row.get(c, 'missing') for c in COLUMNS[verb])} |")
    heads = {verb: f"| {verb} | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|" for verb, names in COLUMNS.items()}
    return {verb: "\n".join([heads[verb], *sorted(body)]) + "\n" for verb, body in lines.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[LIBRARY])
    made = walks_of({k: v for file in parser.parse_args().files for k, v in code_of(file, ARCHITECTURE).items()})
    found = [f"FAULT {fault}" for fault in faults(made)]
    print(*tables(made).values(), *found, f"{sum(map(len, made.values()))} loops, {len(found)} faults", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
