"""Write the demonstrations' committed results into the READMEs.

    python tools/tables.py            rewrite what stands between <!-- name --> and <!-- /name -->
    python tools/tables.py --check    exit 1 if that would change a file

The figures of `digits` come from examples/digits/results.json, which a run of `make demo DEMO_ARGS=--ablation` wrote
to its output folder, those of `mmdet` and `frameworks` from results.json in examples/mmdet and examples/frameworks and
from `make demo-mmdet` and `make demo-frameworks`, those of `performance`, `speed` and `targets` from
benchmarks/results, with its plots, those of `studies` from examples/digits/studies. Nobody types them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import report
from bench_host import TARGET, TRIVIAL
from grid import TITLES, Case

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("authors' form", "logits form", "torch.compile")
EXAMPLES = ROOT / "examples"
STUDIES = EXAMPLES / "digits" / "studies"
NAMES = {"digits": "the digits", "bccd": "BCCD, 364 photographs of blood cells"}
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


def column(how: dict[str, Any]) -> str:
    """What an arm's weights are."""
    if how["share"] is not None:
        return f"gradient share {how['share']:g}"
    return f"weights {how['feat_weight']:g}, {how['cls_weight']:g}"


def ap(arm: dict[str, Any]) -> str:
    return number(arm["mean"]["AP"], arm["spread"]["AP"])


def studies() -> list[str]:
    return [line for name in NAMES for line in study(name, json.loads((STUDIES / f"{name}.json").read_text()))]


def study(name: str, results: dict[str, Any]) -> Iterator[str]:
    arms = {(a["how"]["normalizer"], a["how"]["mask"], column(a["how"])): a for a in results["arms"] if a["how"]}
    columns = list(dict.fromkeys(key[2] for key in arms))
    rows = list(dict.fromkeys(key[:2] for key in arms))
    settings, data, machine = results["settings"], results["data"], results["machine"]
    alone = next(a for a in results["arms"] if a["how"] is None)
    yield f"On {NAMES[name]}: the student alone {ap(alone)}, its teacher {results['teacher']['AP']:.1f}."
    yield ""
    cells = [
        [
            f'"{normalizer}"',
            mask,
            *(ap(arms[normalizer, mask, c]) if (normalizer, mask, c) in arms else "" for c in columns),
        ]
        for normalizer, mask in rows
    ]
    yield from markdown(["`normalizer`", "mask", *columns], cells)
    yield ""
    yield (
        f"COCO AP on {data['pictures']['val']} pictures after {settings['student_iterations']} iterations, mean ± "
        f"standard deviation over {len(settings['seeds'])} seeds. {machine['cpu']}, {machine['cores']} cores."
    )
    yield ""
    first = columns[0]
    levels = range(len(arms[(*rows[0], first)]["pull"]["feat"]))
    yield f"What the terms' gradients are of the rest's, a level, at {first}, the richness as mask:"
    yield ""
    shares = [
        [f'"{key[0]}"', term, *(f"{shown['pull'][pull][i] / shown['pull'][f'{pull} rest'][i]:.2f}" for i in levels)]
        for key, shown in arms.items()
        if key[1:] == ("richness", first)
        for pull, term in (("feat", "features, at the neck's output"), ("cls", "logits"))
    ]
    yield from markdown(["`normalizer`", "term", *(f"stride {8 << i}" for i in levels)], shares)
    yield ""


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


def frameworks() -> list[str]:
    """Teacher, student alone and distilled, of each framework."""
    results = json.loads((EXAMPLES / "frameworks" / "results.json").read_text())
    columns = ("", "", "AP", "AP50", "AP75", "gain", "parameters", "ms a step")
    body = []
    for name, found in results["frameworks"].items():
        arms, first = found["arms"], f"{name}, {found['detector']}"
        for arm, row in arms.items():
            ap, ms = row["mean"]["AP"], row["step_ms"]
            gain = "" if arm in ("teacher", "alone") else f"{ap - arms['alone']['mean']['AP']:+.1f}"
            cells = [number(ap, row["spread"]), *(number(row["mean"][m]) for m in ("AP50", "AP75")), gain]
            cells += [f"{row['parameters']:,}", "" if ms is None else f"{ms:.0f}"]
            body.append([first, row["label"], *cells])
            first = ""
    machine, versions, count = results["machine"], results["versions"], len(results["seeds"])
    shared = ", while other programs ran" if machine["shared"] else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    shown = (
        f"COCO AP on {results['pictures']['val']} pictures, mean ± standard deviation over {count} seeds. A step: a "
        f"whole training step of {results['batch']} pictures, the arms in turn{shared}; medians. {machine['cpu']} with "
        f"{machine['capability']}, {machine['cores']} cores, {threads} a process, "
        f"torch {versions['torch']}, torchvision {versions['torchvision']}, ultralytics "
        f"{versions['ultralytics']}."
    )
    return [*markdown(columns, body), "", shown]


def devices() -> list[Path]:
    """The folders of results: GPUs first, then the newest."""
    folders = [path.parent for path in (ROOT / "benchmarks" / "results").glob("*/loss.json")]
    records = {folder: report.read(folder, "loss") for folder in folders}
    folders.sort(key=lambda folder: records[folder]["date"], reverse=True)
    return sorted(folders, key=lambda folder: records[folder]["kind"] != "cuda")


def heading(record: dict[str, Any]) -> str:
    return (
        f"{record['device']}, {record['threads']} threads, torch {record['torch']}; commit {record['commit']}, "
        f"{record['date'][:10]}"
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, without the columns that have no cell: a CPU has no model."""
    body = list(rows)
    kept = [i for i in range(len(columns)) if any(row[i] for row in body)]
    lines = ([row[i] for i in kept] for row in (columns, *body))
    header, *others = (f"| {' | '.join(line)} |" for line in lines)
    return [header, "|---" * len(kept) + "|", *others]


def performance() -> list[str]:
    """All that was measured, a section a device."""
    lines: list[str] = []
    for folder in devices():
        record = report.read(folder, "loss")
        roofs = [measured["copy_bandwidth"] / 1e9 for measured in record["cases"]]
        roof = f"a copy moved {min(roofs):.1f} to {max(roofs):.1f} GB/s, from case to case"
        lines += [f"### {record['device']}", "", f"{heading(record)}; medians [quartiles]; {roof}.", ""]
        place = f"../benchmarks/results/{folder.name}"
        lines += [f"![roofline]({place}/roofline.png)", f"![ratios]({place}/ratios.png)", ""]
        body, last = [], None
        for case, name, cells in report.rows(record):
            body.append(["" if case == last else case, name, *cells])
            last = case
        lines += [*markdown(("case", "implementation", *report.COLUMNS), body), ""]
        if record["host"]:
            lines += ["One position a level, fp32: what a step costs before it computes anything.", ""]
            unit = "kernels" if record["kind"] == "cuda" else "operators"
            columns = ("implementation", *report.HOST_COLUMNS[:-1], f"{unit} a step")
            lines += [*markdown(columns, [(name, *cells) for name, cells in report.host_rows(record)]), ""]
        if first := [
            (name, f"{result['first_seconds']:.1f}")
            for name, result in report.plain(record)[0]["implementations"].items()
        ]:
            lines += ["Time to the first result, with its check, of the first case.", ""]
            lines += [*markdown(("implementation", "s"), first), ""]
        if scaling := report.read(folder, "scaling"):
            lines += ["How cost grows: time of a step = a + b · x, fitted.", "", f"![scaling]({place}/scaling.png)", ""]
            fits = [
                (x, name, f"{1e3 * line['intercept']:.2f}", f"{1e6 * line['slope']:.3g}")
                for x, sweep in scaling["sweeps"].items()
                for name, line in sweep["implementations"].items()
            ]
            lines += [*markdown(("x", "implementation", "a, ms", "b, µs"), fits), ""]
            lines += threads(scaling.get("threads"))
        if step := report.read(folder, "step"):
            size = "{0[0]}×{0[1]}, batch {1}".format(step["cases"][0]["size"], step["cases"][0]["batch"])
            lines += [f"A whole training step of mmdetection, R50 taught by R101, {size}, fp32, memory returned.", ""]
            lines += [heading(step), ""]
            body = [
                (pair if arm == "student alone" else "", arm, *cells) for pair, arm, cells in report.step_rows(step)
            ]
            lines += [*markdown(("pair", "", *report.STEP_COLUMNS), body), ""]
    return lines[:-1]


def threads(record: dict[str, Any] | None) -> list[str]:
    if not record:
        return []
    counts = record["threads"]
    body = [
        (TITLES[regime], name, *(f"{1e3 * s[0]:.2f}" for s in spreads), f"{spreads[0][0] / spreads[-1][0]:.2f}")
        for regime, found in record.items()
        if regime != "threads"
        for name, spreads in found.items()
    ]
    columns = ("", "implementation", *(f"{n} threads, ms" for n in counts), "speed-up")
    return ["400×672, batch 1, by threads.", "", *markdown(columns, body), ""]


def speed() -> list[str]:
    """The main grid in a line a case: what `auto` takes against the rivals, on one device."""
    lines: list[str] = []
    for folder in devices()[:1]:
        record = report.read(folder, "loss")
        body = []
        for measured in report.plain(record):
            timed = report.timed(measured["implementations"])
            ours = report.best_of_ours(measured["implementations"])
            roof = 100 * measured["bytes"] / timed[ours] / measured["copy_bandwidth"]
            rivals = (min((timed[n] for n in timed if n.startswith(rival)), default=None) for rival in SHOWN)
            body.append([
                Case(**measured["case"]).title, f"{1e3 * timed[ours]:.2f}", f"{roof:.0f}",
                *("" if t is None else f"{1e3 * t:.1f} = {t / timed[ours]:.1f}×" for t in rivals),
            ])  # fmt: skip
        columns = ("forward + backward", "frs_kernels, ms", "% of copy", *(f"{rival}, ms" for rival in SHOWN))
        lines += [heading(record), "", *markdown(columns, body), ""]
        lines += [f"![times of the rivals](benchmarks/results/{folder.name}/ratios.png)", ""]
    return lines[:-1]


def target(value: float, met: bool) -> str:
    return f"{value:.1f}× {'met' if met else '**missed**'}"


def targets() -> list[str]:
    """What was aimed at on two cores, and what was seen."""
    lines: list[str] = []
    for folder in devices():
        record = report.read(folder, "loss")
        if record["kind"] != "cpu":
            continue
        body = []
        for measured in [*report.plain(record), *report.plain(record, "returned")]:
            implementations = measured["implementations"]
            timed = report.timed(implementations)
            ours = timed[report.best_of_ours(implementations)]
            compiled = [timed[name] for name in timed if name.startswith("torch.compile")]
            over, ahead = ours * measured["copy_bandwidth"] / measured["bytes"], timed[SHOWN[0]] / ours
            cells = [target(over, over <= 2.5), target(ahead, ahead >= 8)]
            cells.append(target(min(compiled) / ours, min(compiled) / ours >= 2) if compiled else "")
            plain, authors = implementations["frs_kernels torch"], implementations[SHOWN[0]]
            slower = plain["step"][0] / authors["step"][0]
            cells.append(target(slower, slower <= 1))
            larger = plain["peak_extra"] / authors["peak_extra"] if authors["peak_extra"] else None
            cells.append("" if larger is None else target(larger, larger <= 1))
            body.append([Case(**measured["case"]).title, *cells])
        columns = (
            "", "at most 2.5× the floor", "at least 8× the authors' form", "at least 2× torch.compile",
            "`torch` backend at most 1× the authors' time", "and memory",
        )  # fmt: skip
        lines += [heading(record), "", *markdown(columns, body), ""]
        host, trivial = (record["host"].get(name) for name in ("frs_kernels cpu", TRIVIAL))
        if host and trivial:
            ratio = host["seconds"] / trivial["seconds"]
            met = target(ratio, ratio <= TARGET)
            lines += [f"A step on one position a level, at most {TARGET}× a trivial `autograd.Function`: {met}.", ""]
    return lines[:-1]


BLOCKS = {
    "speed": (speed, (ROOT / "README.md",)),
    "performance": (performance, (ROOT / "docs" / "performance.md",)),
    "targets": (targets, (ROOT / "docs" / "performance.md",)),
    "digits": (digits, (ROOT / "README.md", EXAMPLES / "digits" / "README.md")),
    "studies": (studies, (ROOT / "docs" / "math.md",)),
    "mmdet": (mmdet, (EXAMPLES / "mmdet" / "README.md",)),
    "frameworks": (frameworks, (EXAMPLES / "frameworks" / "README.md",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if something would change")
    check = parser.parse_args().check
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
                if not check:
                    page.write_text(new)
    if check and stale:
        print(f"stale: {', '.join(stale)}; run python tools/tables.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
