"""The committed studies of denominators, masks and weights (examples/digits/studies) as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "digits" / "studies"
NAMES = {"digits": "the digits", "bccd": "BCCD, 364 photographs of blood cells"}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def column(how: dict[str, Any]) -> str:
    """What an arm's weights are."""
    if how["share"] is not None:
        return f"gradient share {how['share']:g}"
    return f"weights {how['feat_weight']:g}, {how['cls_weight']:g}"


def ap(arm: dict[str, Any]) -> str:
    return f"{arm['mean']['AP']:.1f} ± {arm['spread']['AP']:.1f}"


def studies() -> list[str]:
    return [line for name in NAMES for line in study(name, json.loads((FOLDER / f"{name}.json").read_text()))]


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
    yield from table(["`normalizer`", "mask", *columns], cells)
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
    yield from table(["`normalizer`", "term", *(f"stride {8 << i}" for i in levels)], shares)
    yield ""
