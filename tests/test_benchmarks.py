"""What the benchmarks promise: their byte model, that a wrong result gets no time, and what they compare."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not all(map(find_spec, ("matplotlib", "rich"))):
    pytest.skip("what the benchmarks show their results with is not installed", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_loss
import compare
import gpu_suite
import measure
import report
from bench_loss import Truth, compiled_for, implementations, measure_case
from environment import python_environment
from grid import Case, loss_cases
from measure import interleaved, peak_extra, spread
from rich.console import Console

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = Case("gfl", 64, 96, 2)


def test_the_byte_model_is_the_designs():
    """At 800x1344, batch 2: 44,800 positions; fp16 features 23 MB, RetinaNet's logits 64.5 MB, GFL's 7.2 MB."""
    retinanet, gfl = (Case(regime, 800, 1344, 2, "bf16") for regime in ("retinanet", "gfl"))
    assert abs(retinanet.positions - 44_800) < 50
    features, logits = retinanet.positions * 256 * 2, retinanet.positions * 720 * 2
    assert abs(features / 1e6 - 23) < 0.1
    assert abs(logits / 1e6 - 64.5) < 0.1
    assert retinanet.bytes == 4 * logits + 3 * features
    assert gfl.bytes == 4 * gfl.positions * 80 * 2 + 3 * features
    for late in (Case("retinanet", 800, 1344, 2, "fp16"), Case("retinanet", 800, 1344, 2, "bf16", scale=8.0)):
        assert late.bytes == 6 * logits + 5 * features
    p2 = Case("faster_rcnn", 800, 1344, 2, "fp16")
    assert abs(p2.positions * 256 * 2 / 1e6 - 92) < 0.5


@pytest.mark.parametrize("case", [TINY, Case("retinanet", 64, 64, 1, "bf16", "channels_last", 8.0)])
def test_inputs_are_what_the_case_says(case):
    s, t, x, z = case.inputs("cpu")
    for levels, channels, student in ((s, 256, True), (t, 256, False), (x, case.k, True), (z, case.k, False)):
        assert [(v.shape[0], *v.shape[2:]) for v in levels] == case.shapes
        assert all(v.shape[1] == channels and v.requires_grad == student for v in levels)
    memory = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    assert all(v.is_contiguous(memory_format=memory) for v in (*s, *z))


def test_the_grid_has_all_that_is_promised():
    for device in ("cpu", "cuda"):
        cases = list(loss_cases(device, quick=False))
        assert len(set(cases)) == len(cases)
        assert {c.regime for c in cases} == {"retinanet", "gfl", "faster_rcnn"}
        assert {c.dtype for c in cases} == {"fp32", "bf16", "fp16"}
        assert {c.layout for c in cases} == {"contiguous", "channels_last"}
        assert any(c.scale != 1 and c.dtype == "fp16" for c in cases)
        assert {c.memory for c in cases} == ({"kept", "returned"} if device == "cpu" else {"kept"})
        assert {name for c in cases for name in compiled_for(c, device, False)} == set(bench_loss.COMPILED)


@pytest.mark.parametrize("case", [TINY, Case("gfl", 64, 96, 1, "bf16"), Case("gfl", 64, 96, 1, "fp16", scale=1024.0)])
def test_right_ones_pass_and_wrong_ones_do_not(case):
    inputs = case.inputs("cpu")
    truth = Truth(case, inputs)
    losses = implementations(case, "cpu", [])
    ours = losses["frs_kernels torch"]
    for name, loss in losses.items():
        if case.dtype == "fp32" or "authors" not in name:
            assert truth.fault(loss, inputs) is None, name
    assert "loss off" in truth.fault(lambda *lists: 1.0001 * ours(*lists), inputs)
    # The right value, a wrong gradient of one tensor alone.
    for wrong in (0.1, float("nan")):
        faulty = lambda *lists, wrong=wrong: ours(*lists) + nothing(lists[0][-1], wrong)  # noqa: E731
        assert "gradients off" in truth.fault(faulty, inputs)
    assert "raises ValueError" in truth.fault(lambda s, t, x, z: ours(s[:-1], t, x, z), inputs)


def nothing(x: torch.Tensor, gradient: float) -> torch.Tensor:
    """0, with this gradient."""
    total = (x.float() - x.detach().float()).sum()
    total.register_hook(lambda g: g * gradient)
    return total


def test_a_wrong_result_has_no_time(monkeypatch):
    right = implementations(TINY, "cpu", [])
    faulty = {"frs_kernels torch": right["frs_kernels torch"], "wrong": lambda *lists: 2 * right["logits form"](*lists)}
    monkeypatch.setattr(bench_loss, "implementations", lambda *_: faulty)
    measured = measure_case(TINY, "cpu", [], 0.0, measure.copy_bandwidth("cpu", 1))
    assert "loss off" in measured["implementations"]["wrong"]["wrong"]
    assert "step" not in measured["implementations"]["wrong"]
    assert measured["implementations"]["frs_kernels torch"]["step"].median > 0
    record = {"device": "here", "cases": [json.loads(json.dumps(measured))], "host": {}}
    cells = {name: cells for _, name, cells in report.rows(record)}
    assert cells["wrong"][0].startswith("wrong: loss off")
    assert not any(cells["wrong"][1:])


def test_returned_memory_is_measured_in_a_process_of_its_own():
    measured = bench_loss.measure_returned(TINY, [], 0.0)
    assert measured["case"] == TINY.key()
    assert measured["implementations"]["frs_kernels torch"]["step"].median > 0


def test_runs_take_turns():
    seen = []
    steps = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    assert {name: len(runs) for name, runs in interleaved(steps, 0.0, least=3).items()} == {"a": 3, "b": 3}
    assert "".join(seen) == "aabb" * 3  # each turn an untimed run and one that counts


def test_quartiles():
    assert spread([5.0]) == (5, 5, 5)
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3, 2, 4)


@pytest.mark.skipif(not measure.STATUS.is_file(), reason="the peak of resident memory is Linux's")
def test_peak_memory_is_measured():
    size = 64 << 20

    def call() -> None:
        torch.ones(size // 4)

    assert 0.9 * size < peak_extra(call, "cpu") < 1.3 * size
    assert peak_extra(lambda: None, "cpu") < 4 << 20


KEPT = """
import torch, measure
sizes = []
for keep in (False, True):
    if keep:
        measure.keep_memory()
    torch.ones(32 << 20)
    sizes.append(measure._kilobytes("VmRSS"))
print(*sizes)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_kept_when_told_so():
    environment = python_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{BENCHMARKS}"
    done = subprocess.run([sys.executable, "-c", KEPT], env=environment, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after - before > 120 << 10  # KB: 128 MB were taken and given back in both


def test_differences_beyond_the_spread():
    assert compare.verdict((1.0, 0.9, 1.1), (1.3, 1.2, 1.4)) == "slower"
    assert compare.verdict((1.3, 1.2, 1.4), (1.0, 0.9, 1.1)) == "faster"
    assert compare.verdict((1.0, 0.9, 1.1), (1.1, 1.0, 1.2)) == "within the spread"
    assert compare.verdict((1.0, 0.9, 1.1), compare.WRONG) == "wrong"
    assert compare.merge([{("case", "a"): (1.0, 0.9, 1.1)}, {("case", "a"): compare.WRONG}]) == {
        ("case", "a"): compare.WRONG
    }
    runs = [{("case", "a"): (1.0, 0.9, 1.1)}, {("case", "a"): (3.0, 2.9, 3.1), ("case", "b"): (1.0, 1.0, 1.0)},
            {("case", "a"): (2.0, 1.9, 2.1)}]  # fmt: skip
    assert compare.merge(runs) == {("case", "a"): (2.0, 0.9, 3.1)}


def test_two_files_are_compared(tmp_path, monkeypatch, capsys):
    def file(name: str, ours: float | None, rival: float) -> str:
        implementations = {
            n: {"step": [v, 0.99 * v, 1.01 * v]} if v else {"wrong": "loss off"}
            for n, v in (("frs_kernels cpu", ours), ("logits form", rival))
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"cases": [{"case": TINY.key(), "implementations": implementations}]}))
        return str(path)

    a, slower, same = file("a", 1.0, 1.0), file("slower", 1.2, 1.0), file("same", 1.01, 5.0)
    wrong = file("wrong", None, 1.0)
    for other, code, word in ((slower, 1, "slower"), (same, 0, "within the spread"), (wrong, 1, "wrong")):
        monkeypatch.setattr(sys, "argv", ["compare.py", a, other])
        assert compare.main() == code
        shown = capsys.readouterr().out
        assert word in shown
        assert "logits form" not in shown


def test_tables_and_plots_of_the_committed_results(tmp_path):
    folders = [path.parent for path in (BENCHMARKS / "results").glob("*/loss.json")]
    assert folders
    for folder in folders:
        record = report.read(folder, "loss")
        assert {"device", "torch", "commit", "date"} <= set(record)
        assert not report.wrong_of_ours(folder)
        for part in ("loss", "scaling"):
            (tmp_path / f"{part}.json").write_text((folder / f"{part}.json").read_text())
        report.show(Console(quiet=True), tmp_path)
        report.plot(tmp_path)
        assert {path.name for path in tmp_path.glob("*.png")} == {"roofline.png", "ratios.png", "scaling.png"}


class TestGpuSuite:
    def test_how_a_command_ended(self, tmp_path):
        log = tmp_path / "log"
        python = [sys.executable, "-c"]
        assert gpu_suite.run([*python, "pass"], log, 60) == "passed"
        assert gpu_suite.run([*python, "raise SystemExit(3)"], log, 60) == "failed"
        assert gpu_suite.run(["no-such-program"], log, 60) == "absent"
        slow = "import time; print('said before', flush=True); time.sleep(60)"
        assert gpu_suite.run([*python, slow], log, 5) == "cut off"
        assert "said before" in log.read_text().splitlines()

    def test_no_part_takes_the_time_of_those_to_come(self, tmp_path, monkeypatch):
        given = {}
        monkeypatch.setattr(
            gpu_suite, "commands_of", lambda part, out, seconds, dry: given.update({part: seconds}) or []
        )
        options = "--dry-run --limit 100 --parts tests sanitizer bench"
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path), *options.split()])
        assert gpu_suite.main() == 0
        assert {part: round(seconds) for part, seconds in given.items()} == {"tests": 50, "sanitizer": 40, "bench": 100}
        assert set(json.loads((tmp_path / "suite.json").read_text())["parts"]) == set(given)

    def test_the_tests_marked_gpu_run_once_each(self, tmp_path):
        """Those of a huge level apart from the rest."""
        first, second = (
            command[command.index("-k") + 1] for command in gpu_suite.commands_of("tests", tmp_path, 9, False)
        )
        assert first == f"not {second}"
        assert second in (Path(__file__).parent / "test_gpu.py").read_text()

    def test_the_programs_under_the_tools_run(self, monkeypatch):
        """Here on the CPU, small."""
        for name in ("synchronize", "profiler.start", "profiler.stop"):
            monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
        here = (('"cuda", "triton"', '"cpu", "torch"'), ('"cuda"', '"cpu"'), ("800, 1344, 2", "64, 64, 1"))
        for program in (gpu_suite.SMALL_STEP, gpu_suite.PROFILED_STEP):
            for old, new in here:
                program = program.replace(old, new)
            exec(program, {})
