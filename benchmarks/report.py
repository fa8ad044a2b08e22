"""Tables and plots of the result files: on the terminal, as Markdown for the documents, as PNG.

python benchmarks/report.py FOLDER        shows a folder of results and plots it again
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench_host import TRIVIAL
from grid import TITLES, Case
from rich.console import Console
from rich.table import Table

OURS = "frs_kernels"
RIVALS = ("authors' form", "logits form", "torch.compile", "torch.compile, max-autotune")
COLOURS = {
    "authors' form": "#b0b7c3", "logits form": "#8a94a6", "torch.compile": "#e0a33e",
    "torch.compile, max-autotune": "#c77f1a", f"{OURS} torch": "#9cc7e8", f"{OURS} cpu": "#1f77b4",
    f"{OURS} cuda": "#1f77b4", f"{OURS} triton": "#4fa36a", f"{OURS}, level by level": "#7d6bb3",
}  # fmt: skip
MARKERS = {"retinanet": "o", "gfl": "^", "faster_rcnn": "D"}
COLUMNS = ("forward + backward, ms", "GB/s", "% of copy", "model, ms", "× authors", "× compile", "peak extra")
HOST_COLUMNS = ("µs a step", "× trivial", "launches")
MODELLED = (f"{OURS} cuda", f"{OURS} triton")  # what benchmarks/model.py counts the launches of

LOSSES_COLUMNS = ("loss", "implementation", "forward + backward, ms", "× the floor", "× eager", "× compile")
STEP_COLUMNS = ("ms", "× student alone", "% for distilling", "% without the teacher", "peak extra, MB", "teacher, MB")


def read(folder: Path, part: str) -> dict[str, Any] | None:
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def seconds_of(result: dict[str, Any]) -> list[float]:
    """Median and quartiles of a step: of replays of its graph where it has one, as in training the host is ahead."""
    found: list[float] = result.get("graph") or result["step"]
    return found


def timed(implementations: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step, of all that have a time."""
    return {name: seconds_of(result)[0] for name, result in implementations.items() if "step" in result}


def best_of_ours(implementations: dict[str, Any]) -> str | None:
    """The backend that `auto` takes: the fastest is not always it, but it is what users get."""
    for backend in ("cuda", "triton", "cpu", "torch"):
        if "step" in implementations.get(f"{OURS} {backend}", {}):
            return f"{OURS} {backend}"
    return None


def by_regime(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases, one regime after another; they were measured in another order."""
    return sorted(record["cases"], key=lambda measured: list(TITLES).index(measured["case"]["regime"]))


def wrong_of_ours(folder: Path) -> list[str]:
    """What of ours was found wrong; a speed-up is not reported beside it."""
    cases = (read(folder, "loss") or {"cases": []})["cases"]
    return [
        f"{name}, {Case(**case['case']).title}: {result['wrong']}"
        for case in cases
        for name, result in case["implementations"].items()
        if name.startswith(OURS) and "wrong" in result
    ]


def rows(record: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(case, implementation, cells) of a loss.json, in the order of COLUMNS."""
    found = []
    for measured in by_regime(record):
        case, implementations = Case(**measured["case"]), measured["implementations"]
        times = timed(implementations)
        fused = [times[name] for name in times if name.startswith("torch.compile")]
        for name, r in implementations.items():
            if "wrong" in r:
                found.append((case.title, name, [f"wrong: {r['wrong']}", *[""] * (len(COLUMNS) - 1)]))
                continue
            median, low, high = seconds_of(r)
            speed = measured["bytes"] / median
            extra = "" if r.get("peak_extra") is None else f"{r['peak_extra'] / measured['student_bytes']:.1f}×"
            eager = f", with the host {1e3 * r['step'][0]:.2f}" if r.get("graph") else ""
            found.append((case.title, name, [
                f"{milliseconds(median)} [{milliseconds(low)}–{milliseconds(high)}]{eager}",
                f"{speed / 1e9:.1f}",
                f"{100 * speed / measured['copy_bandwidth']:.0f}",
                modelled(measured.get("model"), median) if name in MODELLED else "",
                f"{times[RIVALS[0]] / median:.1f}" if RIVALS[0] in times else "",
                f"{min(fused) / median:.1f}" if fused else "",
                extra,
            ]))  # fmt: skip
    return found


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds > 1e-3 else f"{1e3 * seconds:.3f}"


def modelled(model: dict[str, Any] | None, seconds: float) -> str:
    """What benchmarks/model.py predicts, how much longer it took, and what the longest part is said to wait for."""
    if model is None:
        return ""
    longest = max(model["parts"], key=lambda part: part[part["limit"]])
    return f"{milliseconds(model['seconds'])}, took {seconds / model['seconds']:.2f}× ({longest['limit']})"


def host_rows(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(implementation, cells) of a loss.json's host time, in the order of HOST_COLUMNS."""
    trivial = record["host"].get(TRIVIAL, {}).get("seconds")
    found = []
    for name, cost in record["host"].items():
        ratio = f"{cost['seconds'] / trivial:.2f}" if trivial else ""
        found.append((name, [f"{1e6 * cost['seconds']:.0f}", ratio, str(cost["launches"])]))
    return found


def show(console: Console, folder: Path) -> None:
    """One table of the loss, and the slopes of what was varied."""
    if record := read(folder, "loss"):
        caption = (
            "medians \\[quartiles]; GB/s by the byte model (benchmarks/grid.py); peak extra: × bytes of the gradients"
        )
        table = Table("", *COLUMNS, title=record["device"], caption=caption)
        last = None
        for case, name, cells in rows(record):
            if case != last:
                table.add_section()
                table.add_row(f"[bold]{case}")
            table.add_row(f"  {name}", *(cell.replace("[", "\\[") for cell in cells))
            last = case
        console.print(table)
        if record["host"]:
            table = Table("", *HOST_COLUMNS, title="one position a level: what a call costs before it computes")
            for name, cells in host_rows(record):
                table.add_row(name, *cells)
            console.print(table)
    if record := read(folder, "losses"):
        size = "{height}×{width}, batch {batch}, {dtype}".format(**next(iter(record["losses"].values()))["case"])
        table = Table(*LOSSES_COLUMNS, title=f"other losses, {size}")
        for cells in losses_rows(record):
            table.add_row(*cells)
        console.print(table)
    if record := read(folder, "scaling"):
        table = Table("varied", "implementation", "each more costs, µs", "at none, ms", title="how cost grows")
        for name, sweep in record["sweeps"].items():
            for implementation, line in sweep["implementations"].items():
                table.add_row(name, implementation, f"{1e6 * line['slope']:.3g}", f"{1e3 * line['intercept']:.2f}")
        console.print(table)

    if record := read(folder, "step"):
        size = "{0[0]}×{0[1]}".format(record["cases"][0]["size"])
        framework, batch = record.get("framework", "mmdetection"), record["cases"][0]["batch"]
        title = f"a training step of {framework}, {size}, batch {batch}, fp32"
        table = Table("", *STEP_COLUMNS, title=title)
        for name, arm, cells in step_rows(record):
            if arm == "student alone":
                table.add_section()
                table.add_row(f"[bold]{name}")
            table.add_row(f"  {arm}", *(cell.replace("[", "\\[") for cell in cells))
        console.print(table)


def losses_rows(record: dict[str, Any]) -> list[list[str]]:
    """Cells of a losses.json, in the order of LOSSES_COLUMNS."""
    found = []
    for name, measured in record["losses"].items():
        times = timed(measured["implementations"])
        for who, seconds in times.items():
            found.append([
                name, who, milliseconds(seconds), f"{seconds * measured['copy_bandwidth'] / measured['bytes']:.1f}",
                *(f"{times[rival] / seconds:.1f}" if rival in times else "" for rival in ("eager", "torch.compile")),
            ])  # fmt: skip
            name = ""
    return found


def step_rows(record: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(pair, arm, cells) of a step.json, in the order of STEP_COLUMNS.

    The loss's share is what is left of a distilled step without the student's own and the whole teacher's forward pass.
    """
    found = []
    for case in record["cases"]:
        arms = case["arms"]
        alone, teacher = (arms[name]["step"][0] for name in ("student alone", "teacher, forward"))
        for name, arm in arms.items():
            median, low, high = arm["step"]
            distilled = name not in ("student alone", "teacher, forward")
            whole = name.startswith(("authors", OURS))
            extra, weights = arm["peak_extra"], arm.get("teacher_bytes")
            found.append((case["name"], name, [
                f"{1e3 * median:.0f} [{1e3 * low:.0f}–{1e3 * high:.0f}]",
                f"{median / alone:.2f}",
                f"{100 * (median - alone) / median:.0f}" if distilled else "",
                f"{100 * (median - alone - teacher) / median:.0f}" if whole else "",
                "" if extra is None else f"{extra / 1e6:.0f}",
                "" if weights is None else f"{weights / 1e6:.0f}",
            ]))  # fmt: skip
    return found


def plot(folder: Path) -> None:
    """roofline.png and ratios.png of loss.json, scaling.png of scaling.json."""
    import matplotlib

    matplotlib.use("Agg")
    if record := read(folder, "loss"):
        _roofline(record, folder / "roofline.png")
        _ratios(record, folder / "ratios.png")
    if record := read(folder, "scaling"):
        _scaling(record, folder / "scaling.png")


def _style() -> Any:
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 130, "savefig.bbox": "tight",
    })  # fmt: skip
    return pyplot


def plain(record: dict[str, Any], memory: str = "kept") -> list[dict[str, Any]]:
    """The cases of the main grid: fp32, contiguous, no upstream scale."""
    usual = ("fp32", "contiguous", 1.0, memory)
    cases = ((Case(**measured["case"]), measured) for measured in by_regime(record))
    return [measured for case, measured in cases if (case.dtype, case.layout, case.scale, case.memory) == usual]


def _roofline(record: dict[str, Any], path: Path) -> None:
    """Bytes a second that each implementation makes of those that the loss must move, under the copy's bandwidth."""
    pyplot = _style()
    cases = plain(record)
    figure, axes = pyplot.subplots(figsize=(7.5, 3.6))
    names = [name for name in COLOURS if any("step" in c["implementations"].get(name, {}) for c in cases)]
    for name in names:
        for regime, marker in MARKERS.items():
            points = [(c["bytes"] / 1e6, c["bytes"] / seconds_of(c["implementations"][name])[0] / 1e9) for c in cases
                      if c["case"]["regime"] == regime and "step" in c["implementations"].get(name, {})]  # fmt: skip
            axes.plot(*zip(*points, strict=True), marker, color=COLOURS[name], markersize=5, linestyle="none")
        axes.plot([], [], "s", color=COLOURS[name], label=name)
    for regime, marker in MARKERS.items():
        axes.plot([], [], marker, color="black", markerfacecolor="none", label=TITLES[regime])
    roof = [c["copy_bandwidth"] / 1e9 for c in cases]
    axes.axhline(sorted(roof)[len(roof) // 2], color="black", linestyle="--", linewidth=1, label="copy, same run")
    axes.set(xscale="log", xlabel="MB that a step must move (4 L + 3 F)", ylabel="GB/s", ylim=(0, None))
    ticks = [
        x for x in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title(f"{record['device']}: a step of the loss against the memory's roof, fp32")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)
    pyplot.close(figure)


def _ratios(record: dict[str, Any], path: Path) -> None:
    """Time of each rival over that of the backend that `auto` takes."""
    pyplot = _style()
    cases = plain(record)
    figure, axes = pyplot.subplots(figsize=(max(7.5, 0.95 * len(cases)), 3.2))
    width = 0.8 / len(RIVALS)
    for column, rival in enumerate(RIVALS):
        heights, places = [], []
        for place, c in enumerate(cases):
            times, ours = timed(c["implementations"]), best_of_ours(c["implementations"])
            if ours and rival in times:
                places.append(place + (column - 1.5) * width)
                heights.append(times[rival] / times[ours])
        bars = axes.bar(places, heights, width, label=rival, color=COLOURS[rival])
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    labels = ["{}\n{height}×{width}\nbatch {batch}".format(TITLES[c["case"]["regime"]], **c["case"]) for c in cases]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="times as long as frs_kernels")
    axes.set_title(f"{record['device']}: forward + backward, fp32")
    axes.legend(ncols=4, fontsize=7, loc="upper left")
    axes.margins(y=0.2)
    figure.savefig(path)
    pyplot.close(figure)


def _scaling(record: dict[str, Any], path: Path) -> None:
    """A panel for each thing that was varied, with the fitted lines."""
    pyplot = _style()
    sweeps = record["sweeps"]
    figure, panels = pyplot.subplots(1, len(sweeps), figsize=(2.5 * len(sweeps), 2.6))
    for axes, (name, sweep) in zip(panels, sweeps.items(), strict=True):
        for implementation, line in sweep["implementations"].items():
            colour = "#1f77b4" if implementation == OURS else COLOURS[implementation]
            medians, lows, highs = ([1e3 * s[i] for s in line["seconds"]] for i in range(3))
            errors = [[m - low for m, low in zip(medians, lows, strict=True)],
                      [h - m for m, h in zip(medians, highs, strict=True)]]  # fmt: skip
            axes.errorbar(sweep["x"], medians, errors, fmt="o", color=colour, markersize=3, label=implementation)
            ends = [0, max(sweep["x"])]
            axes.plot(ends, [1e3 * (line["intercept"] + line["slope"] * x) for x in ends], color=colour, linewidth=1)
        axes.set(xlabel=name, xlim=(0, None), ylim=(0, None))
    panels[0].set_ylabel("ms a step")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    if not any(folder.glob("*.json")):
        parser.error(f"{folder} holds no results")
    show(Console(width=130), folder)
    plot(folder)


if __name__ == "__main__":
    main()
