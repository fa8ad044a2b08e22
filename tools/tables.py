"""Write the demonstrations' committed results into the READMEs.

    python tools/tables.py            rewrite what stands between <!-- name --> and <!-- /name -->
    python tools/tables.py --check    exit 1 if that would change a file

The figures of `digits` come from examples/digits/results.json, which a run of `make demo DEMO_ARGS=--ablation` wrote
to its output folder, those of `mmdet` from examples/mmdet/results.json and `make demo-mmdet`. Nobody types them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
METRICS = ("AP", "AP50", "AP75", "small", "medium", "large")


def number(mean: float | None, spread: float | None = None, form: str = ".1f") -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:.1f}")


def table(results: dict[str, Any]) -> list[str]:
    arms = results["arms"]
    lines = ["| | AP | AP50 | AP75 | small | medium | large | gain | ms a step |", "|---|" + "---|" * 8]
    for arm in arms.values():
        mean, spread, gain = arm["mean"], arm["spread"], arm.get("gain")
        cells = [number(mean["AP"], spread["AP"]), *(number(mean[m]) for m in METRICS[1:])]
        cells.append(number(gain["mean"], gain["spread"], "+.1f") if gain else "")
        lines.append(f"| {arm['label'].strip()} | {' | '.join(cells)} | {mean['step_ms']:.0f} |")
    return lines


def reading(results: dict[str, Any]) -> list[str]:
    """What the figures show, and what they do not."""
    arms, data = results["arms"], results["data"]
    seeds = len(arms["alone"]["seeds"])
    ap = {name: arm["mean"]["AP"] for name, arm in arms.items()}
    gain = {name: arm["gain"]["mean"] for name, arm in arms.items() if "gain" in arm}
    ap50 = arms["ones"]["mean"]["AP50"] - arms["both"]["mean"]["AP50"]
    small, large = data["small_medium_large_sides"]
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in results["loss_ms"].items())
    machine, size = results["machine"], results["parameters"]
    shown = (
        f"COCO AP on {data['pictures']['val']} pictures, mean ± standard deviation over {seeds} seeds; small, medium, "
        f"large: sides under {small:g} px, between, over {large:g} px; gain over alone on the same schedule. "
        f"{machine['cpu']}, {machine['cores']} cores; teacher {size['teacher']:,} parameters, students "
        f"{size['student']:,}. The loss alone, forward and backward, one batch: {times}."
    )
    meant = (
        f"It shows that distilling with the loss works, {gain['both']:+.1f} AP, and not more: much of the gain is "
        f"faster convergence ({gain['both-long']:+.1f} AP on the long schedule), and an all-ones mask with the same "
        f"weights reaches {ap['ones']:.1f} AP against {ap['both']:.1f} ({ap50:+.1f} AP50), so it does not show the "
        "richness mask to be better than no mask."
    )
    return [shown, "", meant]


def digits() -> list[str]:
    results = json.loads((EXAMPLES / "digits" / "results.json").read_text())
    return [*table(results), "", *reading(results)]


def mmdet() -> list[str]:
    results = json.loads((EXAMPLES / "mmdet" / "results.json").read_text())
    arms, settings, machine = results["arms"], results["settings"], results["machine"]
    lines = ["| | AP | AP50 | AP75 | gain | parameters | ms a step |", "|---|" + "---|" * 6]
    for name, arm in arms.items():
        gain = "" if name in ("teacher", "alone") else f"{arm['mean']['AP'] - arms['alone']['mean']['AP']:+.1f}"
        cells = [number(arm["mean"]["AP"], arm["spread"]), *(number(arm["mean"][m]) for m in ("AP50", "AP75")), gain]
        lines.append(f"| {arm['label']} | {' | '.join(cells)} | {arm['parameters']:,} | {arm['step_ms']:.0f} |")
    seeds = len(settings["seeds"])
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    shown = (
        f"{results['detector'].upper()}, COCO AP on {settings['pictures']['val']} pictures after "
        f"{settings['iterations']} iterations{spread}. {machine['cpu']}, {machine['threads']} threads, "
        f"onedl-mmdetection {results['versions']['onedl-mmdetection']}, torch {results['versions']['torch']}."
    )
    return [*lines, "", shown]


BLOCKS = {
    "digits": (digits, (ROOT / "README.md", EXAMPLES / "digits" / "README.md")),
    "mmdet": (mmdet, (EXAMPLES / "mmdet" / "README.md",)),
}


def main() -> int:
    stale = []
    for name, (write, pages) in BLOCKS.items():
        block = "\n".join([f"<!-- {name} -->", "", *write(), "", f"<!-- /{name} -->"])
        for page in pages:
            old = page.read_text()
            new, found = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, old, flags=re.DOTALL)
            if found != 1:
                raise SystemExit(f"{page} needs one <!-- {name} --> ... <!-- /{name} -->")
            if new != old:
                stale.append(str(page.relative_to(ROOT)))
                if "--check" not in sys.argv:
                    page.write_text(new)
    if "--check" in sys.argv and stale:
        print(f"stale: {', '.join(stale)}; run python tools/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
