"""torchvision's RetinaNet on a small ResNet, trained with a plain loop, alone or by a `Distiller`."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from examples.digits.coco import Detections, Split, evaluate
from examples.digits.digits import DIGIT_SIDES
from examples.digits.train import Schedule, batch_rows, rate
from frs_kernels import Distiller

SIDE = 128
TEACHER, STUDENT = {"width": 24, "fpn": 64}, {"width": 8, "fpn": 32}
SIZES = ((14, 20), (28, 40), (56, 80))
"""Sides of the anchors of strides 8, 16 and 32: the digits' are 12 to 88."""
ARMS: dict[str, dict[str, Any]] = {
    "alone": {},
    "distilled": {"normalizer": "total_mass", "feat_weight": 0.01, "cls_weight": 0.5, "warmup": 100},
}


class NoMore(ExtraFPNBlock):
    """No level beyond those of the trunk."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return results, names


def make(width: int, fpn: int, classes: int = 10) -> RetinaNet:
    """A ResNet of one block a stage, with levels of strides 8, 16 and 32."""
    stem = Conv2dNormActivation(3, width, stride=2)
    stages: list[tuple[str, nn.Module]] = [("stem", stem)]
    ins = width
    for number, outs in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
        down = nn.Sequential(nn.Conv2d(ins, outs, 1, 2, bias=False), nn.BatchNorm2d(outs))
        stages.append((f"layer{number}", BasicBlock(ins, outs, 2, down)))
        ins = outs
    channels = [2 * width, 4 * width, 8 * width]
    names = {f"layer{number}": str(number - 2) for number in (2, 3, 4)}
    trunk = nn.Sequential(OrderedDict(stages))
    backbone = BackboneWithFPN(trunk, names, channels, fpn, NoMore(), norm_layer=nn.BatchNorm2d)
    anchors = AnchorGenerator(SIZES, ((1.0, 2.0),) * len(SIZES))
    head = RetinaNetHead(fpn, anchors.num_anchors_per_location()[0], classes, partial(nn.GroupNorm, 8))
    return RetinaNet(
        backbone, classes, min_size=SIDE, max_size=SIDE, anchor_generator=anchors, head=head, score_thresh=0.01,
        detections_per_img=100,
    )  # fmt: skip


def batch(split: Split, rows: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures and targets as torchvision takes them."""
    targets = []
    for row in rows.tolist():
        here = split.labels[row] >= 0
        targets.append({"boxes": split.boxes[row][here], "labels": split.labels[row][here]})
    return list(split.pictures[rows].float() / 255), targets


@torch.no_grad()
def judge(model: RetinaNet, split: Split) -> dict[str, float | None]:
    model.eval()
    found = []
    for rows in torch.arange(len(split)).split(50):
        found += [Detections(f["boxes"], f["scores"], f["labels"]) for f in model(batch(split, rows)[0])]
    return evaluate(split, found, DIGIT_SIDES)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor], targets: Any) -> dict[str, Tensor]:
    """The loop of the README, with clipped gradients."""
    losses: dict[str, Tensor] = model(images, targets)
    optimizer.zero_grad()
    sum(losses.values(), torch.zeros(())).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    return losses


def distil(student: RetinaNet, teacher: RetinaNet, options: dict[str, Any]) -> Distiller:
    return Distiller(student, teacher, recipe="torchvision", **options)


def train(
    splits: tuple[Split, Split], arm: str, seed: int, schedule: Schedule, teacher: Path | None, out: Path
) -> dict[str, Any]:
    """One training, judged at its end; `arm` is "teacher" or one of `ARMS`."""
    torch.manual_seed(seed)
    model = make(**(TEACHER if arm == "teacher" else STUDENT))
    trained: nn.Module = model
    if options := ARMS.get(arm):
        assert teacher is not None
        trained = distil(model, load(teacher), {**options, "warmup": min(options["warmup"], schedule.iterations // 2)})
    optimizer = torch.optim.AdamW(trained.parameters(), schedule.lr, weight_decay=1e-4)
    started, losses = time.perf_counter(), {}
    for iteration in range(schedule.iterations):
        trained.train()
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * rate(schedule, iteration)
        rows = batch_rows(len(splits[0]), schedule.batch, iteration, seed)
        losses = step(trained, optimizer, *batch(splits[0], rows))
    seconds = time.perf_counter() - started
    torch.save(model.state_dict(), out)
    return {
        "metrics": judge(model, splits[1]),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "last_losses": {name: loss.item() for name, loss in losses.items()},
    }


def load(teacher: Path) -> RetinaNet:
    model = make(**TEACHER)
    model.load_state_dict(torch.load(teacher))
    return model


def steps(split: Split, teacher: Path, size: int) -> dict[str, Callable[[], Any]]:
    """A whole training step of each arm on the same pictures."""
    images, targets = batch(split, torch.arange(size))
    made: dict[str, Callable[[], Any]] = {}
    for arm, options in ARMS.items():
        student = make(**STUDENT)
        model = distil(student, load(teacher), options) if options else student
        optimizer = torch.optim.AdamW(model.train().parameters(), 1e-4)
        made[arm] = partial(step, model, optimizer, images, targets)
    return made
