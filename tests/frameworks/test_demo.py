"""The demonstration, at a size that shows only that every part works."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from readme import ROOT

for framework in ("torchvision", "ultralytics"):
    pytest.importorskip(framework, exc_type=(ImportError, RuntimeError))


def run(out):
    command = [sys.executable, "-m", "examples.frameworks", "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "YOLO_CONFIG_DIR": str(out)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "quick" / "results.json").read_text())["frameworks"]


def test_every_part_works_and_what_finished_is_kept(tmp_path):
    found = run(tmp_path)
    assert list(found["torchvision"]["arms"]) == ["teacher", "alone", "distilled"]
    assert list(found["ultralytics"]["arms"]) == ["teacher", "alone", "distilled", "preset", "built-in"]
    for framework in found.values():
        arms = framework["arms"]
        assert arms["distilled"]["parameters"] == arms["alone"]["parameters"] < arms["teacher"]["parameters"]
        assert all(arms[arm]["step_ms"] > 0 for arm in arms if arm != "teacher")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(stamps) >= 8
    run(tmp_path)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
