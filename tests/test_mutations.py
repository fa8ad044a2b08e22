"""The tool that plants small faults: what it changes, what it leaves alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import mutants
from mutations import MAKERS

PYTHON = '''\
"""Not 1 < 2."""
from typing import overload

@overload
def f(a: int = 1) -> int: ...

def f(a: int = 7, *, b: bool = True) -> int:
    """Where a < b and 3."""
    if a < len("a < 3") and not b:
        raise ValueError(f"{a} + 1")
    print("σ", a)
    return max(a, -a) if a is None else [v // 2 for v in (a,) if v != a][0]
'''.encode()
CPP = b"""\
// if (a < b) c = 1;
#define LESS(a, b) ((a) < (b) + 1)
template <class T, int N = 3>
static T f(const T& a, int64_t count) {
  static_assert(N > 2, "N > 2");
  T best = 0.5f;  // 2 < 3
  for (int64_t i = 0; i < count; ++i) best += a * b;
  if (best >= 1 && !done) return "x + y";
  store(best, 2);
  return true;
}
"""


def changes(source: bytes, suffix: str) -> set[tuple[int, str, str]]:
    return {(m.line(source), m.old, m.new) for m in MAKERS[suffix](source)}


def test_what_is_changed_in_python():
    assert changes(PYTHON, ".py") == {
        (7, "7", "(7 + 1)"), (7, "True", "False"),
        (9, "<", "<="), (9, "and", "or"), (9, "not ", ""),
        (9, 'a < len("a < 3") and not b', '(not (a < len("a < 3") and not b))'),
        (10, 'raise ValueError(f"{a} + 1")', "pass"),
        (11, 'print("σ", a)', "pass"),
        (12, "max", "min"), (12, "-", ""), (12, "is", "is not"), (12, "a is None", "(not (a is None))"),
        (12, "//", "%"), (12, "2", "(2 + 1)"), (12, "!=", "=="), (12, "v != a", "(not (v != a))"), (12, "0", "(0 + 1)"),
    }  # fmt: skip


def test_what_is_changed_in_cplusplus():
    assert changes(CPP, ".h") == {
        (6, "0.5f", "(0.5f * 2)"),
        (7, "0", "(0 + 1)"), (7, "<", "<="), (7, "+=", "-="), (7, "*", "/"),
        (8, ">=", ">"), (8, "1", "(1 + 1)"), (8, "&&", "||"), (8, "best >= 1 && !done", "!(best >= 1 && !done)"),
        (9, "2", "(2 + 1)"), (9, "store(best, 2);", ";"),
        (10, "true", "false"),
    }  # fmt: skip


@pytest.mark.parametrize("part", mutants.PARTS)
def test_there_are_mutants_of_every_part(part):
    """Hundreds, each of one place; those of Python are Python."""
    found = mutants.mutants_of(part, seed=1)
    assert len(found) > 200
    assert len({(m.file, m.mutation) for m in found}) == len(found)
    for mutant in found[:100]:
        source = (mutants.ROOT / mutant.file).read_bytes()
        changed = mutant.mutation.of(source)
        assert changed != source
        assert changed.startswith(source[: mutant.mutation.start])
        assert changed.endswith(source[mutant.mutation.stop :])
        if mutant.file.endswith(".py"):
            ast.parse(changed)


@pytest.mark.parametrize("part", mutants.PARTS)
def test_the_tests_of_a_part_are_there(part):
    for name in mutants.PARTS[part].tests:
        assert (mutants.ROOT / "tests" / f"test_{name}.py").is_file()
