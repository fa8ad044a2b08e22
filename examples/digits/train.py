"""Train a detector, alone or taught; keep checkpoints and finished runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import frs_kernels
from frs_kernels.distill import GradientShare, fast_teacher, masks

from .coco import COCO_SIDES, Detections, Split, evaluate
from .detector import STRIDES, Detector, Outputs, Size, detect, detection_loss
from .progress import Advance, silent

MASKS = ("richness", "ones", "boxes")
TEACHERS: dict[str, dict[str, Any] | None] = {"folded": {}, "16 bits": {"dtype": "auto"}, "whole": None}
"""The options of `fast_teacher`; None is the teacher itself."""
GLIMPSE = 100
"""Validation pictures that the curve of AP over the iterations is measured on."""


@dataclass(frozen=True)
class Schedule:
    """AdamW with a cosine from `lr` to zero after a linear warm-up; gradients clipped."""

    iterations: int
    lr: float
    batch: int = 16
    warmup: int = 50
    check_every: int = 100


@dataclass(frozen=True)
class Distillation:
    """How a student is taught; a weight of zero leaves that term out altogether.

    All weights rise from zero over the first `ramp` iterations. `mask` is one of `MASKS`.
    With a `share` the weights are held where each term's gradient is that part of the rest's, at
    the features, at the logits and at the boxes; they begin at those given. `measure` keeps what
    they are. `teacher` is one of `TEACHERS`. `feat_loss` and `cls_loss` are those of `fsr_loss`;
    `box_weight` is that of `localization_distillation`, under the same mask and normalizer.
    """

    feat_weight: float
    cls_weight: float
    ramp: int
    mask: str = "richness"
    backend: str = "auto"
    normalizer: str = "mass"
    share: float | None = None
    measure: bool = False
    teacher: str = "folded"
    adapter_kernel: int = 3
    feat_loss: str = "mse"
    cls_loss: str = "bce"
    box_weight: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Those of the terms that are not left out."""
        every = {"feat": self.feat_weight, "cls": self.cls_weight, "box": self.box_weight}
        return {name: weight for name, weight in every.items() if weight}


@dataclass
class Run:
    """A finished training, or the state of one under way."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    """A value an iteration of each term: "detection", and those of the teaching, "feat", "cls", "box"."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Iterations done and the AP then on the first `GLIMPSE` validation pictures."""
    step_seconds: list[float] = field(default_factory=list)
    pull: dict[str, list[float]] = field(default_factory=dict)
    """Sums over the iterations, a number a level: the norm of the gradient at the features or the
    logits, of the term ("feat", "cls") and of the rest of the loss ("feat rest", "cls rest"). """
    weights: dict[str, list[float]] = field(default_factory=dict)
    """A value an iteration of each term whose share is held: its weight after it."""

    @property
    def step_ms(self) -> float:
        return 1000 * statistics.median(self.step_seconds)


class TeacherOutputs:
    """A teacher's outputs on the training pictures.

    They are kept in half precision if they take no more than `limit_gb`, and else computed anew
    for every batch. `kind` is one of `TEACHERS`.
    """

    def __init__(
        self,
        teacher: Detector,
        pictures: Tensor,
        limit_gb: float = 2.0,
        advance: Advance = silent,
        kind: str = "folded",
    ) -> None:
        self.teacher, self.pictures = teacher.eval(), pictures
        options = TEACHERS[kind]
        if options is not None:
            self.teacher = fast_teacher(self.teacher, lambda model: model(channels_last(pictures[:1])), **options)
        self.cached: Outputs | None = None
        values = sum(level[0].numel() for group in self._compute(pictures[:1]) for level in group)
        if 2 * values * len(pictures) <= limit_gb * 1e9:
            parts = []
            for start in range(0, len(pictures), 50):
                parts.append(self._compute(pictures[start : start + 50]))
                advance(min(start + 50, len(pictures)))
            self.cached = Outputs(*map(_join, zip(*parts, strict=True)))
        else:
            advance(len(pictures))

    @torch.no_grad()
    def _compute(self, pictures: Tensor) -> Outputs:
        outputs = self.teacher(channels_last(pictures))
        return Outputs(*([level.half() for level in group] for group in outputs))

    def batch(self, rows: Tensor) -> Outputs:
        """Those on the pictures of `rows`, in single precision."""
        if self.cached is None:
            found = self._compute(self.pictures[rows])
        else:
            found = Outputs(*([level[rows] for level in group] for group in self.cached))
        return Outputs(*([level.float() for level in group] for group in found))


@torch.no_grad()
def mask_difference(a: TeacherOutputs, b: TeacherOutputs, pictures: Tensor) -> float:
    """The largest difference of two teachers' richness scores."""
    largest = 0.0
    for part in pictures.split(50):
        logits = (each.teacher(channels_last(part)).logits for each in (a, b))
        scores = (frs_kernels.richness_mask(z).scores for z in logits)
        largest = max(largest, *(float((x - y).abs().max()) for x, y in zip(*scores, strict=True)))
    return largest


def _join(parts: tuple[list[Tensor], ...]) -> list[Tensor]:
    return [torch.cat(levels) for levels in zip(*parts, strict=True)]


def channels_last(pictures: Tensor) -> Tensor:
    """The layout that convolutions are fastest in, on processors as on most accelerators."""
    return pictures.contiguous(memory_format=torch.channels_last)


def fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@torch.no_grad()
def predict(model: Detector, pictures: Tensor) -> list[Detections]:
    """Detections in each of the pictures (N, 3, S, S)."""
    model.eval()
    found = []
    for part in pictures.split(50):
        found += detect(model(channels_last(part)), pictures.shape[-1])
    return found


class Teaching(nn.Module):
    """One way to teach one student: its terms, and what they pull with."""

    def __init__(self, how: Distillation, teacher: TeacherOutputs, channels: int, device: torch.device) -> None:
        super().__init__()
        self.how, self.teacher = how, teacher
        self.adapter: nn.Module | None = None
        if how.feat_weight:
            theirs = [level.shape[1] for level in teacher.batch(torch.tensor([0])).features]
            self.adapter = frs_kernels.FeatureAdapter(channels, theirs[0], len(theirs), how.adapter_kernel).to(device)
        self.shares = nn.ModuleDict()
        if how.share is not None or how.measure:
            self.shares.update({name: GradientShare(how.share, w).to(device) for name, w in how.weights.items()})

    def forward(self, outputs: Outputs, data: Split, rows: Tensor, ramp: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What is to be added to the detector's own loss, and the terms in it, without their weights."""
        how = self.how
        taught = self.teacher.batch(rows)
        watched = {
            name: self._share(name).watch(levels) if name in self.shares else levels
            for name, levels in zip(("feat", "cls", "box"), outputs, strict=True)
        }
        weights = {name: 1.0 if how.share is not None else ramp * weight for name, weight in how.weights.items()}
        mask = self._mask(taught.logits, data, rows)
        terms, losses = {}, []
        if how.feat_weight or how.cls_weight:
            fsr = frs_kernels.fsr_loss(
                self.adapter(watched["feat"]) if self.adapter else None,
                taught.features if self.adapter else None,
                watched["cls"] if how.cls_weight else None,
                taught.logits,
                feat_weight=weights.get("feat", 0.0),
                cls_weight=weights.get("cls", 0.0),
                feat_loss=how.feat_loss,
                cls_loss=how.cls_loss,
                mask=mask,
                backend=how.backend,
                normalizer=how.normalizer,
                return_terms=True,
            )
            terms |= {name: getattr(fsr, name) for name in ("feat", "cls") if name in weights}
            losses.append(fsr.loss)
        if how.box_weight:
            boxes = frs_kernels.localization_distillation(
                watched["box"],
                taught.distances,
                masks.richness(taught.logits) if mask is None else mask,
                weight=weights["box"],
                backend=how.backend,
                normalizer=how.normalizer,
                return_terms=True,
            )
            terms["box"] = boxes.value
            losses.append(boxes.loss)
        if how.share is not None:
            losses = [ramp * self._share(name).weight * terms[name] for name in self.shares]
        return torch.stack(losses).sum(), terms

    def _mask(self, logits: list[Tensor], data: Split, rows: Tensor) -> list[Tensor] | None:
        if self.how.mask == "boxes":
            found = [boxes[labels >= 0] for boxes, labels in zip(data.boxes[rows], data.labels[rows], strict=True)]
            return masks.boxes(found, logits, STRIDES)
        return masks.ones(logits) if self.how.mask == "ones" else None

    def _share(self, name: str) -> GradientShare:
        share = self.shares[name]
        assert isinstance(share, GradientShare)
        return share

    def update(self, run: Run, ramp: float) -> None:
        """After a backward pass: the weights of the next; what the gradients were, added to `run`."""
        for name in self.shares:
            share = self._share(name)
            share.update(ramp)
            for key, norms in ((name, share.term), (f"{name} rest", share.own)):
                if norms is not None:
                    before = run.pull.get(key, [0.0] * len(norms))
                    run.pull[key] = [a + b for a, b in zip(before, norms.tolist(), strict=True)]
            if self.how.share is not None:
                run.weights.setdefault(name, []).append(share.weight.item())


def train(
    size: Size,
    splits: tuple[Split, Split],
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    sides: tuple[float, float] = COCO_SIDES,
    how: Distillation | None = None,
    teacher: TeacherOutputs | None = None,
    advance: Advance = silent,
) -> tuple[Detector, Run]:
    """Train on the first split and judge on the second.

    `folder` keeps the checkpoint: a training that finished there is read back, one that was
    interrupted goes on. `advance` is told the iterations done. The student's first weights and
    the order of the pictures depend on `seed` alone, so that seeds compare pair by pair.
    """
    data, val = splits
    torch.manual_seed(seed)
    model = Detector(size, len(data.names)).to(memory_format=torch.channels_last).to(device)
    teaching = Teaching(how, teacher, size.fpn, device) if how and teacher else None
    whole = nn.ModuleList([model] + ([teaching] if teaching else []))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=schedule.lr, weight_decay=1e-4)

    run, first = Run(), 0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        whole.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        run, first = Run(**state["run"]), state["iteration"]
    note = "kept" if first == schedule.iterations else f"resumed at {first}" if first else ""
    advance(first, note=note)
    for iteration in range(first, schedule.iterations):
        start = time.perf_counter()
        model.train()
        rows = batch_rows(len(data), schedule.batch, iteration, seed)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * rate(schedule, iteration)
        outputs = model(channels_last(data.pictures[rows]))
        loss = detection_loss(outputs, data.boxes[rows], data.labels[rows])
        terms = {"detection": loss}
        ramp = min(1.0, (iteration + 1) / how.ramp) if how else 0.0
        if teaching:
            taught, more = teaching(outputs, data, rows, ramp)
            terms |= more
            loss = loss + taught
        optimizer.zero_grad()
        loss.backward()
        if teaching:
            teaching.update(run, ramp)
        nn.utils.clip_grad_norm_(whole.parameters(), 10.0)
        optimizer.step()
        for name, term in terms.items():
            run.losses.setdefault(name, []).append(term.item())
        run.step_seconds.append(time.perf_counter() - start)

        done = iteration + 1
        advance(done)
        if done % schedule.check_every == 0 or done == schedule.iterations:
            glimpse = evaluate(val, predict(model, val.pictures[:GLIMPSE]), sides)["AP"]
            run.curve.append((done, glimpse or 0.0))
            if done == schedule.iterations:
                run.metrics = evaluate(val, predict(model, val.pictures), sides)
            state = {"weights": whole.state_dict(), "optimizer": optimizer.state_dict()}
            save(state | {"run": asdict(run), "iteration": done}, checkpoint)
    return model.eval(), run


def batch_rows(pictures: int, batch: int, iteration: int, seed: int) -> Tensor:
    """The pictures of one iteration: a new order each epoch, the remainder left out."""
    batch = min(batch, pictures)
    epoch, place = divmod(iteration, pictures // batch)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(pictures, generator=generator)[place * batch : (place + 1) * batch]


def rate(schedule: Schedule, iteration: int) -> float:
    warm = min(1.0, (iteration + 1) / schedule.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * iteration / schedule.iterations))


def save(state: dict[str, Any], path: Path) -> None:
    """Write `path` in one go: a run that is stopped while writing leaves the old checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
