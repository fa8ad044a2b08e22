"""benchmarks/bench_losses.py: what is compared is the same loss, and a wrong one is seen."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench_losses
import report
from grid import Case
from rich.console import Console


@pytest.mark.parametrize("name", bench_losses.compared())
def test_each_is_its_published_form(name):
    loss = bench_losses.compared()[name]
    inputs = Case("gfl", 256, 256, 1, logits=loss.channels).inputs("cpu")[loss.of : loss.of + 2]
    assert bench_losses.fault(partial(loss.ours, backend="torch"), loss.published, *inputs) is None
    wrong = bench_losses.fault(lambda x, z: 1.01 * loss.published(x, z), loss.published, *inputs)
    assert wrong is not None
    assert wrong.startswith("loss off by 1.0e-02")
    off = bench_losses.fault(
        lambda x, z: loss.published([v.detach() + (v - v.detach()) * 1.01 for v in x], z), loss.published, *inputs
    )
    assert off is not None
    assert off.startswith("gradients off by")


def test_what_is_saved(monkeypatch, tmp_path):
    compared = bench_losses.compared()
    monkeypatch.setattr(bench_losses, "compared", lambda: dict(list(compared.items())[:1]))
    monkeypatch.setattr(bench_losses, "QUICK", Case("gfl", 256, 256, 1))
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    saved: list[dict[str, Any]] = []
    bench_losses.run("cpu", True, lambda what: True, saved.append)
    (measured,) = saved[-1]["losses"].values()
    assert {"eager", "torch.compile", "frs_kernels torch"} <= set(measured["implementations"])
    rows = report.losses_rows(saved[-1])
    assert [row[0] for row in rows] == [*saved[-1]["losses"], *[""] * (len(rows) - 1)]
    (tmp_path / "losses.json").write_text(json.dumps({"device": "a machine", **saved[-1]}))
    report.show(Console(quiet=True), tmp_path)
