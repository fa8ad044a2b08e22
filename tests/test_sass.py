"""The tool that counts instructions in loops, on listings written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import sass

SCORE = "void frs::cuda::(anonymous namespace)::score_kernel<float, float, 4>(frs::cuda::Table<int>)"
IMITATE = (
    "void frs::cuda::(anonymous namespace)::imitate_kernel<__nv_bfloat16, __nv_bfloat16, float, 8, "
    "frs::Losses<(frs::Loss)0, (frs::Loss)3>, (frs::cuda::(anonymous namespace)::Want)0>(frs::cuda::Table<int>)"
)


def listing(name: str, *lines: str) -> str:
    """As cuobjdump prints it: an address before each instruction, its encoding after it and on a line of its own."""
    body = "".join(
        f"        /*{16 * i:04x}*/   {line} ;   /* 0x0000 */\n     /* 0x0001 */\n" for i, line in enumerate(lines)
    )
    return f"\t\tFunction : {name}\n\t.headerflags\t@EF_CUDA_SM90\n{body}\t\t..........\n"


def code(*lines: str) -> list[sass.Step]:
    return next(iter(sass.functions(listing(SCORE, *lines))))[1]


FIVE = [
    "S2R R0, SR_TID.X",
    *["LDG.E.128.CONSTANT R4, [R2.64]"] * 5,  # the loop begins
    *["@P1 FMNMX.NAN R8, R8, R4, !PT"] * 20,
    "@P0 BRA 0x10",
    "EXIT",
    "BRA 0x1c0",  # on itself, as listings end
]


def test_a_loop_is_counted_with_what_its_predicates_switch_off():
    [(kernel, steps)] = sass.functions(listing(SCORE, *FIVE))
    assert kernel == ("score", "float", "float", "4")
    [walk] = sass.walks(kernel, steps)
    assert (walk.loss, walk.walk, walk.values, walk.instructions) == ("", "five", 20, 26)
    assert (walk.loads, walk.stores, walk.mufu, walk.before) == ({128: 5}, {}, 0, 1)
    assert walk.a_value == walk.slots == pytest.approx(1.3)
    assert not walk.fault()
    assert "5 of" not in sass.missing(kernel, [walk])
    assert "0 of 1 loops of eight" in sass.missing(kernel, [walk])


def test_a_walk_over_its_budget_is_a_fault(monkeypatch):
    [(kernel, steps)] = sass.functions(listing(SCORE, *FIVE))
    monkeypatch.setitem(sass.BUDGETS, ("score", 32, "both"), 0)  # of another key
    assert len(sass.faults(sass.walks_of({kernel: steps}))) == 1  # that walks are missing
    monkeypatch.setitem(sass.BUDGETS, ("score", 32, ""), 1.2)
    assert "1.3 instructions a value, 1.2 allowed" in sass.faults(sass.walks_of({kernel: steps}))[-1]


def test_names_are_short_whatever_their_commas():
    [(kernel, _)] = sass.functions(listing(IMITATE, "EXIT"))
    assert kernel == ("imitate", "bfloat16", "bfloat16", "float", "8", "usual", "both")
    assert sass.packet(kernel) == 8
    every = IMITATE.replace("(frs::Loss)3", ", ".join(f"(frs::Loss){i}" for i in range(1, len(sass.LOSSES)))).replace(
        "Want)0", "Want)3"
    )
    assert sass.signature(every)[-2:] == ("every", "any")
    assert sass.signature("frs::cuda::(anonymous namespace)::scale_kernel(frs::cuda::ScaleTable)") == ("scale",)


@pytest.mark.parametrize(
    ("shared", "exp", "name"),
    [(0, 0, ("mse", "lines")), (2, 1, ("bce", "positions")), (16, 1, ("bce", "run")), (3, 1, None)],
)
def test_a_walk_is_told_by_what_it_does(shared, exp, name):
    loop = ["LDG.E.128 R4, [R2.64]"] * 4 + ["LDS R8, [R9]"] * shared + ["MUFU.EX2 R1, R1"] * exp
    loop += ["STG.E.128 desc[UR8][R2.64], R4"] * 2 + ["@!P0 BRA 0x0", "EXIT"]
    [(kernel, steps)] = sass.functions(listing(IMITATE, *loop))
    walks = sass.walks(kernel, steps)
    assert [(walk.loss, walk.walk) for walk in walks] == ([name] if name else [])
    if exp and walks:
        assert walks[0].unit == sass.SLOTS_OF_MUFU / 16
    without_store = [step for step in steps if not step.op.startswith("STG")]
    assert not sass.walks(kernel, without_store)  # a gradient is wanted of this kernel


def test_the_longest_way_takes_one_of_two_arms_and_no_subroutine():
    steps = code(
        "@P0 BRA 0x40",  # to the longer arm
        "IADD3 R0",
        "BRA 0x70",
        "NOP",  # nobody comes here
        "IADD3 R1",
        "@P1 CALL.REL.NOINC 0x100",
        "IADD3 R2",
        "@P2 BRA 0x0",
        "EXIT",
    )
    assert sass.longest_way(steps, 0, 7) == [0, 1, 2, 7]  # the other arm's call is taken for a rare case
    assert list(sass.loops(steps)) == [[0, 1, 2, 7]]
    no_call = [step._replace(op="NOP") if step.op.startswith("CALL") else step for step in steps]
    assert sass.longest_way(no_call, 0, 7) == [0, 4, 5, 6, 7]
    assert sass.longest_way(no_call, 0, 7, around=[5]) == [0, 1, 2, 7]
    assert sass.longest_way(steps, 4, 7) == [4, 5, 6, 7]  # where there is no other way


def test_a_jump_back_that_its_target_does_not_lead_to_is_no_loop():
    """A rare case at the end of a function, which returns into its middle."""
    steps = code("@P0 BRA 0x40", "IADD3 R0", "EXIT", "NOP", "IADD3 R1", "BRA 0x10")
    assert list(sass.loops(steps)) == []


def test_the_way_to_a_loop_waits_once():
    loop = ["LDG.E.128 R4, [R2.64]"] * 4 + ["STG.E.128 [R2.64], R4"] * 2
    steps = ["@P0 BRA 0xb0", "IADD3 R0", "BAR.SYNC 0x0", *loop, "@P1 BRA 0x30", "NOP"]
    assert len(steps) == 11
    steps += ["BAR.SYNC 0x0", *loop, "@P1 BRA 0xc0", "EXIT"]
    [(kernel, found)] = sass.functions(listing(IMITATE, *steps))
    assert [walk.before for walk in sass.walks(kernel, found)] == [3, 2]
