"""The pictures: richness masks, detections before and after distillation, training curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import frs_kernels

from .coco import Detections, Split
from .detector import STRIDES, Detector, assign, make_points, pairwise_iou, suppress
from .options import Arm
from .train import Run, channels_last, predict

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
COLOURS = {
    "alone": "#7f7f7f",
    "both": "#d1495b",
    "features": "#edae49",
    "head": "#00798c",
    "ones": "#66448c",
    "alone-long": "#7f7f7f",
    "both-long": "#d1495b",
}
"""Of the arms that curves are drawn of: those of other teachers and adapters lie on that of "both"."""
TRUTH, RIGHT, WRONG = "#7fffd4", "#ffe14d", "#ff4d4d"
SHOWN = 0.3
"""Detections are drawn from this score on."""


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; five bits a channel, which hardly shows, keep photographs small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor="white")
    picture = np.asarray(Image.open(buffer).convert("RGB"))
    Image.fromarray(picture & 0xF8 | picture >> 5).save(path, optimize=True)


def spread_rows(shown: Tensor, count: int) -> list[int]:
    """Evenly spaced pictures among those that `shown` (N,) says yes to: none is picked by hand."""
    rows = shown.nonzero().flatten().tolist()
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def _grid(rows: int, columns: int, foot: float = 0.0) -> tuple[Figure, Any]:
    """A figure of square pictures under a line of titles, `foot` inches left below."""
    size = (1.9 * columns, 1.9 * rows + 0.25 + foot)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axis: Axes, picture: Tensor) -> None:
    axis.imshow(picture.permute(1, 2, 0).cpu().numpy())
    axis.set_axis_off()


def _box(axis: Axes, box: list[float], text: str, colour: str) -> None:
    x0, y0, x1, y1 = box
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, lw=1.2))
    top = y0 < 0.07 * axis.get_ylim()[0]  # no room above the box
    place = (x0 + 1, y0 + 1) if top else (x0, y0 - 1)
    axis.text(*place, text, color=colour, fontsize=6.5, va="top" if top else "bottom")


def _draw_truth(axis: Axes, split: Split, row: int) -> None:
    for box, label in zip(split.boxes[row].tolist(), split.labels[row].tolist(), strict=True):
        if label >= 0:
            _box(axis, box, split.names[label], TRUTH)


def _draw_found(axis: Axes, split: Split, row: int, found: Detections) -> None:
    """The detections from `SHOWN` on, without those that overlap a better one of any class."""
    best = suppress(found.boxes, torch.zeros_like(found.labels), 0.6)
    best = best[found.scores[best] >= SHOWN]
    overlap = pairwise_iou(found.boxes[best], split.boxes[row].cpu())
    same = found.labels[best, None] == split.labels[row].cpu()
    right = ((overlap >= 0.5) & same).any(1).tolist()
    for index, hit in zip(best.tolist(), right, strict=True):
        text = f"{split.names[found.labels[index]]} {found.scores[index]:.1f}"
        _box(axis, found.boxes[index].tolist(), text, RIGHT if hit else WRONG)


@torch.no_grad()
def draw_masks(teacher: Detector, val: Split, path: Path, backend: str = "auto") -> None:
    """The teacher's richness score of every FPN level, over pictures that use most levels."""
    points, strides = make_points(teacher(channels_last(val.pictures[:1])).logits)
    found = assign(points, strides, val.boxes, val.labels) >= 0
    levels = torch.stack([found[:, strides == stride].any(1) for stride in STRIDES]).sum(0)
    rows = spread_rows(levels == levels.max(), 4)
    logits = teacher(channels_last(val.pictures[rows])).logits
    scores = frs_kernels.richness_mask(logits, backend=backend).scores
    side = val.pictures.shape[-1]
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(rows), 1 + len(scores), foot=0.2)
        for axis, title in zip(axes[0, 1:], STRIDES, strict=True):
            axis.set_title(f"stride {title}")
        axes[0, 0].set_title("ground truth")
        for line, row in enumerate(rows):
            _show(axes[line, 0], val.pictures[row])
            _draw_truth(axes[line, 0], val, row)
            grey = val.pictures[row].float().mean(0).byte().expand(3, -1, -1)
            for axis, score in zip(axes[line, 1:], scores, strict=True):
                _show(axis, grey)
                heat = score[line].float().cpu().numpy()
                axis.imshow(
                    heat,
                    cmap="inferno",
                    vmin=0,
                    vmax=1,
                    alpha=0.4 + 0.4 * heat,  # where nothing is rich, the picture shows through
                    extent=(0, side, side, 0),
                    interpolation="nearest",
                )
        shades = ScalarMappable(Normalize(0, 1), "inferno")
        figure.colorbar(shades, ax=axes, location="bottom", shrink=0.5, aspect=40, label="richness score")
        save(figure, path)


def draw_detections(val: Split, models: dict[str, Detector], path: Path, picture_count: int = 4) -> None:
    """Ground truth, then what each model detects in the same pictures."""
    rows = spread_rows((val.labels >= 0).any(1), picture_count)
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid(len(rows), 1 + len(models))
        axes[0, 0].set_title("ground truth")
        for line, row in enumerate(rows):
            _show(axes[line, 0], val.pictures[row])
            _draw_truth(axes[line, 0], val, row)
        for column, (title, model) in enumerate(models.items(), start=1):
            axes[0, column].set_title(title)
            for line, found in enumerate(predict(model, val.pictures[rows])):
                _show(axes[line, column], val.pictures[rows[line]])
                _draw_found(axes[line, column], val, rows[line], found)
        figure.supxlabel(
            f"detections from a score of {SHOWN} on; yellow: right class, IoU 0.5 up; red: not",
            fontsize=8,
        )
        save(figure, path)


def draw_curves(students: dict[str, tuple[Arm, dict[int, Run]]], path: Path) -> None:
    """AP and the detection loss over the iterations, mean over seeds, least to greatest shaded."""
    short = {name: pair for name, pair in students.items() if name in COLOURS and not pair[0].long}
    long = {name: pair for name, pair in students.items() if name in COLOURS and pair[0].long}
    with matplotlib.rc_context(STYLE):
        panels = 3 if long else 2
        figure = Figure(figsize=(3.7 * panels, 3.3), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _ap_panel(axes[0], short, "AP, first validation pictures")
        _loss_panel(axes[1], short)
        if long:
            _ap_panel(axes[2], long, "AP, long schedule")
        save(figure, path)


def _ap_panel(axis: Axes, students: dict[str, tuple[Arm, dict[int, Run]]], title: str) -> None:
    for name, (arm, runs) in students.items():
        steps = [step for step, _ in next(iter(runs.values())).curve]
        values = np.array([[ap for _, ap in run.curve] for run in runs.values()])
        _band(axis, np.array(steps), values, arm, COLOURS[name])
    axis.set(title=title, xlabel="iteration", ylim=(0, None))
    axis.legend(fontsize=8)


def _loss_panel(axis: Axes, students: dict[str, tuple[Arm, dict[int, Run]]]) -> None:
    """The detection loss, the one term that all arms share, in means of 25 iterations."""
    for name, (arm, runs) in students.items():
        values = np.array([run.losses["detection"] for run in runs.values()])
        block = min(25, values.shape[1])
        count = values.shape[1] // block
        means = values[:, : count * block].reshape(len(values), count, block).mean(2)
        _band(axis, (np.arange(count) + 0.5) * block, means, arm, COLOURS[name])
    axis.set(title="detection loss, training", xlabel="iteration", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def _band(axis: Axes, steps: np.ndarray, values: np.ndarray, arm: Arm, colour: str) -> None:
    axis.plot(steps, values.mean(0), color=colour, lw=1.6, label=arm.label.strip())
    axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
