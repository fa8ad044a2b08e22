"""Write committed results into the READMEs and docs.

    python tools/tables.py            rewrite what stands between <!-- name --> and <!-- /name -->
    python tools/tables.py --check    exit 1 if that would change a file

    digits, digits-short,
    teachers                examples/digits/results.json, which a run of `make demo DEMO_ARGS=--ablation` wrote
    mmdet, teachers         examples/mmdet/results.json, of `make demo-mmdet DEMO_ARGS="--ablation --seeds 0 1 2"`
    frameworks              examples/frameworks/results.json, of `make demo-frameworks`
    studies                 examples/digits/studies
    mutants                 tests/mutants.json, of `make mutants`
    which-loss              the losses-DATA.json there, of `make study`
    speed, speed-cpu, losses, losses-short,
    speed-short,
    targets, gpu-targets,
    ladder                  benchmarks/results, with its plots
    measured FOLDER         all of one folder there, on a page of its own, docs/measured/FOLDER.md

Nobody types them. A block that ends in -short has some rows of the other, for README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import report
from bench_host import TARGET, TRIVIAL
from demo_tables import EXAMPLES, digits, digits_short, frameworks, markdown, mmdet, studies, teachers
from grid import TITLES, Case
from loss_tables import which_loss
from mutant_tables import mutants

ROOT = EXAMPLES.parent
SHOWN = ("authors' form", "logits form", "torch.compile")


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


def images_of(step: dict[str, Any]) -> str:
    first = step["cases"][0]
    return "{0[0]}×{0[1]}, batch {1}".format(first["size"], first["batch"])


def ladder() -> list[str]:
    """A distilled step in units of the student's own, one option after another, on each machine that has it."""
    lines = []
    for folder in devices():
        step = report.read(folder, "step")
        if step is None or "teacher_bytes" not in next(iter(step["cases"][0]["arms"].values())):
            continue
        arms = {case["name"].partition("_r50")[0]: case["arms"] for case in step["cases"]}
        first = next(iter(arms.values()))
        body = []
        for arm, row in first.items():
            if arm in ("student alone", "teacher, forward"):
                continue
            ratios = [found[arm]["step"][0] / found["student alone"]["step"][0] for found in arms.values()]
            weights = row["teacher_bytes"]
            body.append([arm, *(f"{ratio:.2f}" for ratio in ratios), "" if weights is None else f"{weights / 1e6:.0f}"])
        lines += [f"{heading(step)}; {images_of(step)}.", "", *markdown(("", *arms, "MB"), body), ""]
    return lines[:-1]


def measured(folder: Path) -> list[str]:
    """All that was measured on a device."""
    record = report.read(folder, "loss")
    roofs = [case["copy_bandwidth"] / 1e9 for case in record["cases"]]
    roof = f"a copy moved {min(roofs):.1f} to {max(roofs):.1f} GB/s, from case to case"
    lines = [f"## {record['device']}", "", f"{heading(record)}; medians [quartiles]; {roof}.", ""]
    place = f"../../benchmarks/results/{folder.name}"
    lines += [f"![roofline]({place}/roofline.png)", f"![ratios]({place}/ratios.png)", ""]
    body, last = [], None
    for case, name, cells in report.rows(record):
        body.append(["" if case == last else case, name, *cells])
        last = case
    lines += [*markdown(("case", "implementation", *report.COLUMNS), body), ""]
    if record["host"]:
        lines += ["One position per level, fp32: what a step costs before it computes anything.", ""]
        unit = "kernels" if record["kind"] == "cuda" else "operators"
        columns = ("implementation", *report.HOST_COLUMNS[:-1], f"{unit} a step")
        lines += [*markdown(columns, [(name, *cells) for name, cells in report.host_rows(record)]), ""]
    if first := [
        (name, f"{result['first_seconds']:.1f}") for name, result in report.plain(record)[0]["implementations"].items()
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
        what = f"A whole training step of mmdetection, R50 taught by R101, {images_of(step)}, fp32, memory returned."
        lines += [what, "", heading(step), ""]
        body = [(pair if arm == "student alone" else "", arm, *cells) for pair, arm, cells in report.step_rows(step)]
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


def speed_table(cases: list[dict[str, Any]]) -> list[str]:
    """A line a case: what `auto` takes against the rivals."""
    body = []
    for measured in cases:
        timed = report.timed(measured["implementations"])
        ours = report.best_of_ours(measured["implementations"])
        roof = 100 * measured["bytes"] / timed[ours] / measured["copy_bandwidth"]
        rivals = (min((timed[n] for n in timed if n.startswith(rival)), default=None) for rival in SHOWN)
        body.append([
            Case(**measured["case"]).title, report.milliseconds(timed[ours]), f"{roof:.0f}",
            *("" if t is None else f"{report.milliseconds(t)} = {t / timed[ours]:.1f}×" for t in rivals),
        ])  # fmt: skip
    columns = ("forward + backward", "frs_kernels, ms", "% of copy", *(f"{rival}, ms" for rival in SHOWN))
    return markdown(columns, body)


def speed(kind: str | None = None) -> list[str]:
    """The main grid on the first device, or the first of a kind."""
    folder = next(each for each in devices() if kind in (None, report.read(each, "loss")["kind"]))
    record = report.read(folder, "loss")
    plot = f"![times of the rivals](../benchmarks/results/{folder.name}/ratios.png)"
    return [heading(record), "", *speed_table(report.plain(record)), "", plot]


TYPICAL = (800, 1344, 2)  # an image size that COCO is trained at, and a batch


def losses() -> list[str]:
    """The other losses on each machine that has them."""
    lines: list[str] = []
    for folder in devices():
        if record := report.read(folder, "losses"):
            size = "{height}×{width}, batch {batch}, {dtype}".format(**next(iter(record["losses"].values()))["case"])
            lines += [f"{heading(record)}; {size}.", ""]
            lines += [*markdown(report.LOSSES_COLUMNS, report.losses_rows(record)), ""]
    return lines[:-1]


class Known(NamedTuple):
    """A loss as README's table has it, and its name in losses.json."""

    measured: str
    loss: str
    source: str
    call: str


KNOWN = (
    Known("", "FRS", "Du et al., NeurIPS 2021", "`fsr_loss(s, t, x, z)`"),
    Known("pkd", "PKD", "Cao et al., NeurIPS 2022; mmrazor", "`pkd_loss(s, t)`"),
    Known("cwd, features, tau 1", "CWD", "Shu et al., ICCV 2021; mmrazor", "`cwd_loss(s, t)`"),
    Known(
        "quality focal, beta 1", "quality focal", "Li et al., NeurIPS 2020; CrossKD",
        "`quality_focal_distillation(x, z)`",
    ),
    Known(
        "localization distillation", "LD", "Zheng et al., CVPR 2022; mmdetection",
        "`localization_distillation(boxes, teacher_boxes, mask)`",
    ),
    Known(
        "softmax KL of 80 classes", "softmax KL", "Hinton et al., 2015; YOLOv6",
        '`masked_imitation_loss(x, z, mask, loss="softmax_kl")`',
    ),
)  # fmt: skip


def losses_short() -> list[str]:
    """What may be called, and what it costs beside eager PyTorch and its compiler, where that was measured."""
    record = next(filter(None, (report.read(folder, "losses") for folder in devices())))
    rows = []
    for known in KNOWN:
        cells = ["as above", ""]
        if known.measured:
            times = report.timed(record["losses"][known.measured]["implementations"])
            ours = times[str(report.best_of_ours(record["losses"][known.measured]["implementations"]))]
            cells = [f"{times[rival] / ours:.1f}×" for rival in ("eager", "torch.compile")]
        rows.append([known.loss, known.source, known.call, *cells])
    return [*markdown(("loss", "source", "call", "eager", "torch.compile"), rows), "", f"{heading(record)}."]


def speed_short() -> list[str]:
    """One size of that grid, each detector's."""
    record = report.read(devices()[0], "loss")
    cases = [Case(**measured["case"]) for measured in report.plain(record)]
    kept = [(case.height, case.width, case.batch) == TYPICAL for case in cases]
    return [heading(record), "", *speed_table(list(compress(report.plain(record), kept)))]


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
            lines += [f"A step on one position per level, at most {TARGET}× a trivial `autograd.Function`: {met}.", ""]
    return lines[:-1]


def gpu_targets() -> list[str]:
    """What was aimed at on a GPU, and what was seen."""
    lines: list[str] = []
    for folder in devices():
        record = report.read(folder, "loss")
        if record["kind"] != "cuda":
            continue
        body = []
        for measured in report.by_regime(record):
            case, timed = Case(**measured["case"]), report.timed(measured["implementations"])
            ours, triton = timed["frs_kernels cuda"], timed["frs_kernels triton"]
            roof, wanted = 100 * measured["bytes"] / ours / measured["copy_bandwidth"], None
            if case.height >= 800:
                wanted = 85 if case.dtype == "fp16" else 80 if case.batch == 2 else 90
            model = measured["bytes"] / measured["model"]["seconds"] / measured["copy_bandwidth"]
            compiled = [timed[name] for name in timed if name.startswith("torch.compile")]
            verdict = "" if wanted is None else " met" if roof >= wanted else f" of {wanted}, **missed**"
            body.append([
                case.title, f"{roof:.0f}{verdict}", f"{100 * model:.0f}",
                target(timed[SHOWN[0]] / ours, timed[SHOWN[0]] / ours >= 8) if SHOWN[0] in timed else "",
                target(min(compiled) / ours, min(compiled) / ours >= 1.5) if compiled else "",
                f"{triton / ours:.2f}× {'met' if triton <= 1.15 * ours else '**missed**'}",
            ])  # fmt: skip
        columns = (
            "", "% of copy", "predicted", "at least 8× the authors' form", "at least 1.5× torch.compile",
            "`triton` at most 1.15× `cuda`",
        )  # fmt: skip
        lines += [heading(record), "", *markdown(columns, body), ""]
        ratio = record["host"]["frs_kernels cuda"]["seconds"] / record["host"][TRIVIAL]["seconds"]
        met = target(ratio, ratio <= TARGET)
        lines += [f"A step on one position per level, at most {TARGET}× a trivial `autograd.Function`: {met}.", ""]
    return lines[:-1]


BLOCKS = {
    "speed": (speed, (ROOT / "docs" / "performance.md",)),
    "speed-cpu": (partial(speed, "cpu"), (ROOT / "docs" / "performance.md",)),
    "losses": (losses, (ROOT / "docs" / "performance.md",)),
    "losses-short": (losses_short, (ROOT / "README.md",)),
    "speed-short": (speed_short, (ROOT / "README.md",)),
    **{
        f"measured {folder.name}": (partial(measured, folder), (ROOT / "docs" / "measured" / f"{folder.name}.md",))
        for folder in devices()
    },
    "targets": (targets, (ROOT / "docs" / "performance.md",)),
    "gpu-targets": (gpu_targets, (ROOT / "docs" / "performance.md",)),
    "digits": (digits, (EXAMPLES / "digits" / "README.md",)),
    "digits-short": (digits_short, (ROOT / "README.md",)),
    "studies": (studies, (ROOT / "docs" / "math.md",)),
    "which-loss": (which_loss, (ROOT / "docs" / "which-loss.md",)),
    "mmdet": (mmdet, (EXAMPLES / "mmdet" / "README.md",)),
    "ladder": (ladder, (ROOT / "docs" / "step-cost.md",)),
    "teachers": (teachers, (ROOT / "docs" / "step-cost.md",)),
    "mutants": (mutants, (ROOT / "docs" / "mutants.md",)),
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
            if not page.exists():
                raise SystemExit(f"{page} is missing: write one like those beside it, and name it in mkdocs.yml")
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
