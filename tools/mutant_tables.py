"""The table of the committed mutants, as lines of Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo_tables import markdown

RESULTS = Path(__file__).resolve().parents[1] / "tests" / "mutants.json"
PARTS = {
    "pointwise": "`pointwise.h`, `softmax.h`, `row_losses.h`",
    "cpu": "`csrc/cpu`, the operators",
    "cuda": "`csrc/cuda`, on the host",
    "triton": "`frs_kernels/triton`, interpreted",
    "python": "the functions, options, checks and the `torch` backend",
    "distill": "`frs_kernels/distill`",
}


def mutants() -> list[str]:
    held = json.loads(RESULTS.read_text())["mutants"]
    rows = [row(title, [m for m in held if m["part"] == part]) for part, title in PARTS.items()]
    return markdown(("sources", "mutants", "killed", "share", "the same code", "no code"), [*rows, row("all", held)])


def row(title: str, found: list[dict[str, Any]]) -> list[str]:
    counts = {end: sum(m["end"] == end for m in found) for end in ("killed", "survived", "same", "invalid")}
    judged = counts["killed"] + counts["survived"]
    share = f"{100 * counts['killed'] / judged:.0f} %" if judged else ""
    return [title, str(judged), str(counts["killed"]), share, str(counts["same"] or ""), str(counts["invalid"] or "")]
