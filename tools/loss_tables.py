"""The tables of the committed comparisons of losses, as lines of Markdown; none where there are none."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from demo_tables import NAMES, STUDIES, markdown, number, processor

PLANS = {"short": "student_iterations", "long": "long_iterations"}
STUDENT_T = {2: 12.7, 3: 4.3, 4: 3.2, 5: 2.8, 6: 2.6, 7: 2.4, 8: 2.4, 9: 2.3, 10: 2.3}
"""Standard errors, by the number of seeds, beyond which a mean difference is told from 0 with 95 % confidence."""

DUELS = (
    ("frs-ones", "The richness mask", "a mask of ones"),
    ("frs-boxes", "The richness mask", "the boxes as mask"),
    ("frs-mass", '"total_mass"', 'the paper\'s "mass"'),
    ("frs-ld", "FRS alone", "FRS with LD beside it"),
    ("cwd", "FRS", "CWD"),
)
"""What is told of FRS beside other ways of it."""


def which_loss() -> list[str]:
    found = {path.stem.removeprefix("losses-"): path for path in sorted(STUDIES.glob("losses-*.json"))}
    order = sorted(found, key=lambda name: (name != "digits", name))
    return [line for name in order for line in compared(name, json.loads(found[name].read_text()))]


def compared(name: str, results: dict[str, Any]) -> Iterator[str]:
    arms, settings, data = results["arms"], results["settings"], results["data"]
    yield f"On {NAMES.get(name, name)}; the teacher reaches {results['teacher']['AP']:.1f} AP."
    yield ""
    titles = [title for plan in PLANS.values() for title in (f"AP, {settings[plan]:,} iterations", "gain")]
    yield from markdown(("", "weights", *titles), map(row, arms.values()))
    yield ""
    yield (
        f"COCO AP on {data['pictures']['val']} pictures; ± is the standard deviation over {len(settings['seeds'])} "
        "seeds. Gain: over the student alone, seed by seed. Weights: those used, and in brackets which multiple they "
        "are of the weights at which each term's gradient equals the rest's; the best of three by the mean AP on the "
        f"same pictures after the short schedule with {len(settings['tuning_seeds'])} other seeds. Two are told apart, "
        "and one beats another, where 95 % confidence (Student's t) says so of their difference, seed by seed. "
        f"{processor(results['machine'])}."
    )
    yield ""
    yield from (f"- {line}" for line in meant(arms))
    yield ""


def row(arm: dict[str, Any]) -> list[str]:
    cells = [arm["label"], weights(arm) if "scale" in arm else ""]
    for plan in PLANS:
        mean, spread, gain = arm[plan]["mean"]["AP"], arm[plan]["spread"]["AP"], arm[plan].get("gain")
        cells += [number(mean, spread), number(gain["mean"], gain["spread"], "+.1f") if gain else ""]
    return cells


def weights(arm: dict[str, Any]) -> str:
    used = {name: arm["how"][f"{name}_weight"] for name in ("feat", "cls", "box")}
    shown = [f"{name} {weight:{'.0f' if weight > 10 else '.2g'}}" for name, weight in used.items() if weight]
    return f"{', '.join(shown)} (× {arm['scale']:.2g})"


def meant(arms: dict[str, Any]) -> Iterator[str]:
    """What the figures show, and what they do not."""
    for plan in PLANS:
        best = max(arms, key=lambda name: arms[name][plan]["mean"]["AP"])
        gain = arms[best][plan].get("gain", {"mean": 0.0})["mean"]
        said = [f"On the {plan} schedule the best is {arms[best]['label']}, {gain:+.1f} AP over the student alone."]
        near = [arm for name, arm in arms.items() if name != best and not told(differences(arms[best], arm, plan))]
        if near:
            said.append(f"Not told apart from it: {listed(near)}.")
        taught = [arm for name, arm in arms.items() if name != "alone"]
        if useless := [arm for arm in taught if told(differences(arm, arms["alone"], plan)) < 1]:
            said.append(f"Not shown to be better than alone: {listed(useless)}.")
        yield " ".join(said)
    for other, ours, theirs in DUELS:
        if {"frs", other} <= arms.keys():
            yield duel(arms["frs"], arms[other], ours, theirs)
    for which, end in (("smallest", min), ("largest", max)):
        tuned = [arm for arm in arms.values() if "scale" in arm]
        if tuned and (at_end := [a for a in tuned if a["scale"] == end(a["scale"] for a in tuned) != 1]):
            yield f"The {which} of the three weights was the best for {listed(at_end)}: beyond it may be better ones."


def duel(arm: dict[str, Any], other: dict[str, Any], ours: str, theirs: str) -> str:
    """Whether what FRS has earns anything against an alternative."""
    parts = []
    for plan, name in zip(PLANS, (theirs, "it"), strict=True):
        values = differences(arm, other, plan)
        verdict = {1: "beats", 0: "is not told apart from", -1: "loses to"}[told(values)]
        spread = statistics.stdev(values) if len(values) > 1 else None
        shown = number(statistics.fmean(values), spread, "+.1f")
        parts.append(f"{verdict} {name} on the {plan} schedule ({shown} AP, seed by seed)")
    return f"{ours} {', and '.join(parts)}."


def differences(arm: dict[str, Any], other: dict[str, Any], plan: str) -> list[float]:
    """AP, seed by seed."""
    theirs = other[plan]["seeds"]
    return [found["AP"] - theirs[seed]["AP"] for seed, found in arm[plan]["seeds"].items()]


def told(values: list[float]) -> int:
    """1 or -1 where the mean is told from 0 with 95 % confidence, else 0."""
    if len(values) < 2:
        return 0
    bound = STUDENT_T.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return 0 if abs(mean) <= bound else int(math.copysign(1, mean))


def listed(arms: Iterable[dict[str, Any]]) -> str:
    return ", ".join(arm["label"] for arm in arms)
