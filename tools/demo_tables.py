"""The tables of the demonstrations' and studies' committed results, as lines of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STUDIES = EXAMPLES / "digits" / "studies"
NAMES = {"digits": "the digits", "bccd": "BCCD, 364 photographs of blood cells"}
METRICS = ("AP", "AP50", "AP75", "small", "medium", "large")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, without the columns that have no cell: a CPU has no model."""
    body = list(rows)
    kept = [i for i in range(len(columns)) if any(row[i] for row in body)]
    lines = ([row[i] for i in kept] for row in (columns, *body))
    header, *others = (f"| {' | '.join(line)} |" for line in lines)
    return [header, "|---" * len(kept) + "|", *others]


def number(mean: float | None, spread: float | None = None, form: str = ".1f") -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:.1f}")


def table(arms: dict[str, Any]) -> list[str]:
    lines = ["| | AP | AP50 | AP75 | small | medium | large | gain | ms a step |", "|---|" + "---|" * 8]
    for arm in arms.values():
        mean, spread, gain = arm["mean"], arm["spread"], arm.get("gain")
        cells = [number(mean["AP"], spread["AP"]), *(number(mean[m]) for m in METRICS[1:])]
        cells.append(number(gain["mean"], gain["spread"], "+.1f") if gain else "")
        lines.append(f"| {arm['label'].strip()} | {' | '.join(cells)} | {mean['step_ms']:.0f} |")
    return lines


def judged(results: dict[str, Any]) -> str:
    """How the figures were come by."""
    small, large = results["data"]["small_medium_large_sides"]
    machine, size = results["machine"], results["parameters"]
    return (
        f"COCO AP on {results['data']['pictures']['val']} pictures, mean ± standard deviation over "
        f"{len(results['arms']['alone']['seeds'])} seeds; small, medium, "
        f"large: sides under {small:g} px, between, over {large:g} px; gain over alone on the same schedule. "
        f"{processor(machine)}; teacher {size['teacher']:,} parameters, students {size['student']:,}."
    )


def processor(machine: dict[str, Any]) -> str:
    shared = ", while other programs ran" if machine.get("shared") else ""
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} used{shared}"


def meant(results: dict[str, Any]) -> str:
    """What the figures show, and what they do not."""
    arms = results["arms"]
    ap = {name: arm["mean"]["AP"] for name, arm in arms.items()}
    gain = {name: arm["gain"]["mean"] for name, arm in arms.items() if "gain" in arm}
    ap50 = arms["ones"]["mean"]["AP50"] - arms["both"]["mean"]["AP50"]
    return (
        f"It shows that distilling with the loss works, {gain['both']:+.1f} AP, and not more: much of the gain is "
        f"faster convergence ({gain['both-long']:+.1f} AP on the long schedule), and an all-ones mask with the same "
        f"weights reaches {ap['ones']:.1f} AP against {ap['both']:.1f} ({ap50:+.1f} AP50), so it does not show the "
        "richness mask to be better than no mask."
    )


def digits() -> list[str]:
    results = json.loads((EXAMPLES / "digits" / "results.json").read_text())
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in results["loss_ms"].items())
    shown = f"{judged(results)} The loss alone, forward and backward, one batch: {times}."
    return [*table(results["arms"]), "", shown, "", meant(results)]


SHORT = ("teacher", "alone", "both", "ones")


def digits_short() -> list[str]:
    """Four arms; what `meant` says is of all."""
    results = json.loads((EXAMPLES / "digits" / "results.json").read_text())
    arms = results["arms"]
    body = []
    for arm in (arms[name] for name in SHORT):
        gain = arm.get("gain")
        cells = [number(arm["mean"]["AP"], arm["spread"]["AP"]), number(arm["mean"]["AP50"])]
        cells.append(number(gain["mean"], gain["spread"], "+.1f") if gain else "")
        body.append([arm["label"].strip(), *cells, f"{arm['mean']['step_ms']:.0f}"])
    shown = (
        f"COCO AP on {results['data']['pictures']['val']} pictures, mean ± standard deviation over "
        f"{len(arms['alone']['seeds'])} seeds; {processor(results['machine'])}."
    )
    return [*markdown(("", "AP", "AP50", "gain", "ms a step"), body), "", f"{shown} {meant(results)}"]


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
        f"{settings['iterations']} iterations{spread}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} used{', while other programs ran' if machine.get('shared') else ''}, "
        f"onedl-mmdetection {results['versions']['onedl-mmdetection']}, torch {results['versions']['torch']}."
    )
    return [*lines, "", shown]


TEACHERS = ("whole-teacher", "both", "16-bit-teacher", "small-adapter")


def teachers() -> list[str]:
    """AP with each kind of teacher, and with small adapters, in both demonstrations."""
    found = {name: json.loads((EXAMPLES / name / "results.json").read_text()) for name in ("digits", "mmdet")}
    titles = {"digits": "the digits' own detector", "mmdet": f"mmdetection, {found['mmdet']['detector'].upper()}"}
    body = []
    for label, arm in zip(("as it is", "folded", "16 bits", "folded, 1×1 adapters"), TEACHERS, strict=True):
        digits, mmdet = (results["arms"][arm] for results in found.values())
        body.append(
            [label, number(digits["mean"]["AP"], digits["spread"]["AP"]), number(mmdet["mean"]["AP"], mmdet["spread"])]
        )
    lines = markdown(("teacher", *titles.values()), body)
    seeds = {len(results["settings"]["seeds"]) for results in found.values()}
    kinds = {"digits": ("folded", "16 bits"), "mmdet": ("both", "16-bit-teacher")}
    differences = [
        "{}: {:.0e} folded, {:.0e} in 16 bits".format(titles[name], *map(results["mask_difference"].get, kinds[name]))
        for name, results in found.items()
    ]
    return [
        *lines,
        "",
        f"COCO AP, mean ± standard deviation over {' and '.join(map(str, seeds))} seeds. The largest difference of a "
        f"richness score on the validation pictures to that of the teacher as it is. {'; '.join(differences)}.",
    ]


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
