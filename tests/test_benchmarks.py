"""What the benchmarks promise: their byte model, that a wrong result gets no time, and what they compare."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not all(map(find_spec, ("matplotlib", "rich"))):
    pytest.skip("what the benchmarks show their results with is not installed", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_host
import bench_loss
import compare
import gpu_suite
import measure
import model
import report
from bench_loss import Truth, compiled_for, implementations, measure_case
from environment import python_environment
from grid import DTYPES, Case, loss_cases
from measure import interleaved, peak_extra, spread
from rich.console import Console

from frs_kernels import reference

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


class TestModel:
    def test_its_bytes_are_those_of_the_byte_model(self):
        for case in loss_cases("cuda", quick=False):
            parts = [part for _, parts in model.launches(case) for part in parts]
            size = DTYPES[case.dtype].itemsize
            assert sum(part.values * model.KERNELS[part.kernel].tensors * size for part in parts) == case.bytes

    @pytest.mark.parametrize(
        ("layout", "specials", "limit", "bce"),
        [
            ("contiguous", 4, "bytes", 1935.36),  # 3 tensors x 2 bytes x 32,256,000 logits / 1e11; others 1612.8, 806.4
            ("channels_last", 4, "instructions", 2016),  # 60 x 32,256,000 / (0.75 x 32 x 4 x 10 x 1e9)
            ("contiguous", 12, "specials", 2419.2),  # 12 x 32,256,000 / (16 x 10 x 1e9)
        ],
    )
    def test_by_hand(self, monkeypatch, layout, specials, limit, bce):
        """A device of 10 multiprocessors at 1 GHz; 44,800 positions of 720 logits and 256 features."""
        monkeypatch.setattr(model, "ISSUE", 0.75)
        monkeypatch.setattr(model, "LATENCY", 1e-6)
        monkeypatch.setattr(model, "DEVICES", {"toy": model.Device(10, 1e9, 2e11)})
        kernels = {
            "score": model.Kernel(1, {"bf16": (2, 2)}),
            "bce": model.Kernel(3, {"bf16": (48, 60)}, specials),
            "mse": model.Kernel(3, {"bf16": (12, 12)}),
            "scale_": model.Kernel(2, {"bf16": (2, 2)}),
        }
        monkeypatch.setattr(model, "KERNELS", kernels)
        case = Case("retinanet", 800, 1344, 2, "bf16", layout)
        found = model.predict(case, "a toy", 1e11)
        assert [part["kernel"] for part in found["parts"]] == ["score", "bce", "mse"]
        assert [part["limit"] for part in found["parts"]] == ["bytes", limit, "bytes"]
        score, mse = 645.12, 688.128  # 2 bytes x 32,256,000 / 1e11; 3 x 2 x 11,468,800 / 1e11
        assert found["seconds"] == pytest.approx(1e-6 * (5 + score + bce + mse))  # 5 launches: two fills and the verbs
        # Scaled: two more launches, and 2 tensors x 2 bytes x 43,724,800.
        scaled = model.predict(replace(case, scale=2.0), "a toy", 1e11)
        assert scaled["seconds"] == pytest.approx(1e-6 * (7 + score + bce + mse + 1748.992))
        assert model.predict(case, "another", 1e11) is None
        assert model.predict(replace(case, dtype="fp16"), "a toy", 1e11) is None

    def test_its_instructions_are_those_counted(self):
        """docs/codegen-cuda.md: contiguous levels take the walk `lines`, channels_last ones `positions`.

        Of the losses along rows these are `planar` and `interleaved`.
        """
        counted = {}
        for line in (BENCHMARKS.parent / "docs" / "codegen-cuda.md").read_text().splitlines():
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            if re.fullmatch(r"(bce|mse) (\w+), \2, \w+", name):
                counted[name] = (float(cells[0]), float(cells[2]))
            elif re.fullmatch(r"(pkd|cwd) (\w+), \2( backward)?", name):
                counted[name] = (float(cells[0]), float(cells[1]))
            elif name in ("float", "bfloat16", "half"):
                counted[f"score {name}"] = (float(cells[0]),) * 2
        names = {"fp32": "float", "bf16": "bfloat16", "fp16": "half"}
        wanted = {"": "both", "loss": "loss", "gradient": "grad"}
        for kernel, found in model.KERNELS.items():
            for dtype, instructions in found.instructions.items():
                loss, _, what = kernel.partition(", ")
                name = f"{loss} {names[dtype]}"
                if loss in model.ROW_LOSSES:
                    name += f", {names[dtype]}{' backward' if what else ''}"
                elif loss != "score":
                    name += f", {names[dtype]}, {wanted[what]}"
                if loss != "scale_":
                    assert instructions == counted[name], name

    @pytest.mark.parametrize("device", model.DEVICES)
    def test_nothing_is_faster_than_a_copy(self, device):
        for case in loss_cases("cuda", quick=False):
            found = model.predict(case, f"NVIDIA {device}", 3e12)
            assert found["seconds"] > case.bytes / 3e12

    def test_it_stands_beside_what_was_measured(self):
        """On a GPU, where the time is that of the replayed graph; a CPU has none."""
        part = {"launch": "imitate", "kernel": "bce", "limit": "instructions", "bytes": 1e-6, "instructions": 2e-6}
        measured = {
            "case": TINY.key(), "bytes": 300_000_000, "copy_bandwidth": 3e12, "student_bytes": 1,
            "model": {"seconds": 0.0002, "parts": [part]},
            "implementations": {
                "frs_kernels cuda": {"step": [0.0004] * 3, "graph": [0.00025, 0.00024, 0.00026]},
                "logits form": {"step": [0.0015] * 3},
            },
        }  # fmt: skip
        cells = {name: cells for _, name, cells in report.rows({"cases": [measured]})}
        column = report.COLUMNS.index("model, ms")
        assert cells["frs_kernels cuda"][0] == "0.250 [0.240–0.260], with the host 0.40"
        assert cells["frs_kernels cuda"][report.COLUMNS.index("% of copy")] == "40"
        assert cells["frs_kernels cuda"][column] == "0.200, took 1.25× (instructions)"
        assert cells["logits form"][column] == ""
        assert compare.timings({"cases": [measured]})[TINY.title, "frs_kernels cuda"] == (0.00025, 0.00024, 0.00026)
        measured["model"] = None
        assert not any(cells[column] for _, _, cells in report.rows({"cases": [measured]}))


def test_host_time_is_told_in_trivial_functions():
    losses = implementations(bench_host.CASE, "cpu", [])
    assert bench_host.CASE.shapes == [(1, 1, 1)] * 5
    found = bench_host.measure_host({"frs_kernels torch": losses["frs_kernels torch"]}, "cpu", 0.0)
    assert list(found) == [bench_host.TRIVIAL, "frs_kernels torch"]
    assert all(cost["seconds"] > 0 and cost["launches"] > 0 for cost in found.values())
    (_, trivial), (_, ours) = report.host_rows({"host": found})
    ratio = found["frs_kernels torch"]["seconds"] / found[bench_host.TRIVIAL]["seconds"]
    assert (trivial[1], ours[1]) == ("1.00", f"{ratio:.2f}")


def test_the_trivial_function_gives_each_student_its_gradient():
    inputs = bench_host.CASE.inputs("cpu")
    students = [*inputs[0], *inputs[2]]
    for student, grad in zip(students, torch.autograd.grad(bench_host.trivial(*inputs), students), strict=True):
        assert grad.shape == student.shape


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_torch_backend_is_right_in_blocks(monkeypatch, layout, dtype):
    """Its largest level in several blocks, over channels or rows."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    case = Case("retinanet", 128, 160, 3, dtype, layout)
    inputs = case.inputs("cpu")
    assert len(reference._blocks(inputs[2][0])) > 9
    assert Truth(case, inputs).fault(implementations(case, "cpu", [])["frs_kernels torch"], inputs) is None


@pytest.mark.skipif(not measure.STATUS.is_file(), reason="the peak of resident memory is Linux's")
def test_the_torch_backend_takes_no_more_memory_than_the_authors_loop():
    case = Case("retinanet", 256, 320, 1)
    losses = implementations(case, "cpu", [])
    steps = [measure.Step(losses[name], [case.inputs("cpu")], 1.0) for name in ("frs_kernels torch", "authors' form")]
    for step in steps:
        step()  # the first step of a process takes memory of its own, which a benchmark's check has taken before
    ours, authors = (peak_extra(step, "cpu") for step in steps)
    assert 2 * ours < authors


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
        own = tmp_path / folder.name
        own.mkdir()
        plots = {"roofline.png", "ratios.png"}
        for part in ("loss", "scaling"):
            if (folder / f"{part}.json").is_file():
                (own / f"{part}.json").write_text((folder / f"{part}.json").read_text())
                plots |= {"scaling.png"} if part == "scaling" else set()
        report.show(Console(quiet=True), own)
        report.plot(own)
        assert {path.name for path in own.glob("*.png")} == plots


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
            gpu_suite, "commands_of", lambda part, seconds, *options: given.update({part: seconds}) or []
        )
        options = "--dry-run --limit 100 --parts tests sanitizer bench"
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path), *options.split()])
        assert gpu_suite.main() == 0
        assert {part: round(seconds) for part, seconds in given.items()} == {"tests": 50, "sanitizer": 50, "bench": 100}
        assert set(json.loads((tmp_path / "suite.json").read_text())["parts"]) == set(given)

    def test_the_tests_marked_gpu_run_once_each(self):
        """Those of a huge level apart from the rest."""
        first, second = (command[command.index("-k") + 1] for command in gpu_suite.commands_of("tests", 9, False, []))
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
