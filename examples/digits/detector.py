"""A compact dense detector: five strided stages, an FPN, one head with sigmoid class logits.

A point is the centre of a cell of an FPN level. Every point predicts K class logits and its
distances to the four sides of a box: as four numbers, or, with `Size.bins`, as four distributions,
as GFL does (Li et al., Generalized Focal Loss, NeurIPS 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .coco import Detections

STRIDES = (8, 16, 32)
LEVEL_SIDE = 3.0
"""A level of stride s takes the objects up to 3 s wide (geometric mean); the last, all larger."""
CENTRE_RADIUS = 1.0
"""Points this many strides around an object's centre are trained to find it."""
REACH = 4.0
"""Strides from a point to the farthest side that distributions reach: at the last level 128 pixels."""


@dataclass(frozen=True)
class Size:
    """Channels of the stages of stride 2, 4, 8, 16, 32, and of the FPN and the head.

    `bins` is the number of bins of a side's distribution; with 0 a side is one number.
    """

    widths: tuple[int, int, int, int, int]
    fpn: int
    bins: int = 0


TEACHER = Size((24, 40, 64, 96, 96), 64)
STUDENT = Size((8, 12, 16, 24, 32), 16)


class Outputs(NamedTuple):
    """One tensor a level: features (N, C, H, W), logits (N, K, H, W), distances (N, 4, H, W).

    With bins, distances are (N, 4 bins, H, W), logits of a softmax over the bins of a side.
    """

    features: list[Tensor]
    logits: list[Tensor]
    distances: list[Tensor]


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.conv(x)
        return x + change


class Tower(nn.Sequential):
    """Two convolutions shared by the levels, whose statistics differ: hence GroupNorm."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.GroupNorm(max(1, width // 8), width),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Detector(nn.Module):
    def __init__(self, size: Size, classes: int) -> None:
        super().__init__()
        widths = size.widths
        self.stages = nn.ModuleList(
            nn.Sequential(conv(inputs, outputs, 2), Residual(outputs) if level else nn.Identity())
            for level, (inputs, outputs) in enumerate(zip((3, *widths[:-1]), widths, strict=True))
        )
        self.laterals = nn.ModuleList(nn.Conv2d(width, size.fpn, 1) for width in widths[2:])
        self.smooths = nn.ModuleList(nn.Conv2d(size.fpn, size.fpn, 3, padding=1) for _ in widths[2:])
        self.class_tower, self.box_tower = Tower(size.fpn), Tower(size.fpn)
        self.class_head = nn.Conv2d(size.fpn, classes, 3, padding=1)
        self.box_head = nn.Conv2d(size.fpn, 4 * max(1, size.bins), 3, padding=1)
        # Every point starts as background with a score of 0.01: nearly all of them are.
        nn.init.normal_(self.class_head.weight, std=0.01)
        assert self.class_head.bias is not None
        nn.init.constant_(self.class_head.bias, -4.6)

    def forward(self, pictures: Tensor) -> Outputs:
        """Predict on pictures (N, 3, S, S) of 0..255, S a multiple of 32."""
        x = (pictures.float() / 127.5 - 1).to(self.class_head.weight.dtype)
        stages = []
        for stage in self.stages:
            x = stage(x)
            stages.append(x)
        merged: list[Tensor] = []
        for lateral, stage in zip(reversed(self.laterals), reversed(stages[2:]), strict=True):
            level = lateral(stage)
            merged.insert(0, level + F.interpolate(merged[0], scale_factor=2) if merged else level)
        features = [smooth(level) for smooth, level in zip(self.smooths, merged, strict=True)]
        logits = [self.class_head(self.class_tower(feature)) for feature in features]
        distances = [self.box_head(self.box_tower(feature)) for feature in features]
        return Outputs(features, logits, distances)


def make_points(levels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Points (P, 2) as x, y and their strides (P,) of levels (N, ?, H, W), in `flatten`'s order."""
    points, strides = [], []
    for level, stride in zip(levels, STRIDES, strict=True):
        height, width = level.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append(torch.stack((x, y), -1).view(-1, 2) * float(stride) + stride / 2)
        strides.append(torch.full((height * width,), float(stride)))
    return torch.cat(points).to(levels[0].device), torch.cat(strides).to(levels[0].device)


def flatten(levels: list[Tensor]) -> Tensor:
    """Levels (N, C, H, W) as one (N, P, C)."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2).float()


def sides_of(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """The distances in strides from points (..., 2) to the sides of boxes (..., 4) around them."""
    sides = torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), -1)
    return sides / strides[..., None]


def encode(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (..., 4) around points (..., 2) as the logarithms of distances in strides."""
    return sides_of(points, strides, boxes).log()


def decode(points: Tensor, strides: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4): the inverse of `encode`, or the expectations of distributions (..., 4 bins)."""
    if distances.shape[-1] == 4:
        sides = distances.clamp(-6, 6).exp()
    else:
        shares = distances.unflatten(-1, (4, -1)).softmax(-1)
        sides = shares @ torch.linspace(0, REACH, shares.shape[-1], device=shares.device)
    sides = sides * strides[..., None]
    return torch.cat((points - sides[..., :2], points + sides[..., 2:]), -1)


def distribution_loss(distances: Tensor, sides: Tensor) -> Tensor:
    """GFL's distribution focal loss (D,): the cross entropy to the two bins beside each side.

    distances (D, 4 bins); sides (D, 4) in strides, those beyond the last bin taken for it.
    """
    logs = distances.unflatten(-1, (4, -1)).log_softmax(-1)
    last = logs.shape[-1] - 1
    place = sides.clamp(0, REACH) * (last / REACH)
    low = place.long().clamp(max=last - 1)
    beside = logs.gather(-1, torch.stack((low, low + 1), -1))
    upper = place - low
    return -(beside * torch.stack((1 - upper, upper), -1)).sum(-1).mean(-1)


def assign(points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """The object (N, P) that each point is trained to find, -1 for none.

    points (P, 2), strides (P,), boxes (N, G, 4), labels (N, G) with -1 where there is no object.
    """
    corners = boxes[:, None]
    offset = points[:, None] - (corners[..., :2] + corners[..., 2:]) / 2
    near = (offset.abs() < CENTRE_RADIUS * strides[:, None, None]).all(-1)
    low, high = points[:, None] - corners[..., :2], corners[..., 2:] - points[:, None]
    inside = (torch.minimum(low, high) > 0).all(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None]
    side = area.sqrt() / LEVEL_SIDE
    # The first level also takes what is smaller than its own lower bound, the last what is larger.
    floor = torch.where(strides == STRIDES[0], torch.zeros_like(strides), strides / 2)
    ceiling = torch.where(strides == STRIDES[-1], torch.full_like(strides, 1e9), strides)
    fits = (side > floor[:, None]) & (side <= ceiling[:, None])
    cost = area.masked_fill(~(near & inside & fits & (labels[:, None] >= 0)), float("inf"))
    smallest, index = cost.min(-1)
    return index.masked_fill(smallest.isinf(), -1)


def detection_loss(outputs: Outputs, boxes: Tensor, labels: Tensor) -> Tensor:
    """3 focal loss (gamma 1, alpha 0.5) + GIoU loss, over boxes (N, G, 4) and labels (N, G).

    With bins + 1/4 distribution focal loss.
    """
    points, strides = make_points(outputs.logits)
    logits, distances = flatten(outputs.logits), flatten(outputs.distances)
    found = assign(points, strides, boxes, labels)
    picture, point = torch.nonzero(found >= 0, as_tuple=True)
    column = found[picture, point]
    positives = max(1, len(picture))

    target = torch.zeros_like(logits)
    target[picture, point, labels[picture, column]] = 1
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = 0.5 * ((logits.sigmoid() - target).abs() * entropy).sum() / positives
    place, told, wanted = (points[point], strides[point]), distances[picture, point], boxes[picture, column]
    loss = 3 * focal + (1 - generalized_iou(decode(*place, told), wanted)).sum() / positives
    if told.shape[-1] > 4:
        loss = loss + 0.25 * distribution_loss(told, sides_of(*place, wanted)).sum() / positives
    return loss


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (D,) of boxes (D, 4) pair by pair."""
    shared, union = _overlap(a, b)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(-1)
    return shared / union - (hull - union) / hull


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU (A, B) of boxes (A, 4) and (B, 4)."""
    shared, union = _overlap(a[:, None], b[None])
    return shared / union


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union areas of boxes (..., 4), broadcast."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return shared, (areas[0] + areas[1] - shared).clamp(min=1e-6)


@torch.no_grad()
def detect(outputs: Outputs, image_size: int, *, threshold: float = 0.05, candidates: int = 200) -> list[Detections]:
    """Decode, clip to the picture, and suppress non-maxima class by class (IoU 0.6)."""
    points, strides = make_points(outputs.logits)
    scores = flatten(outputs.logits).sigmoid().cpu()
    boxes = decode(points, strides, flatten(outputs.distances)).clamp(0, image_size).cpu()
    detections = []
    for score, box in zip(scores, boxes, strict=True):
        top, order = score.flatten().topk(min(candidates, score.numel()))
        order = order[top > threshold]
        label, candidate = order % score.shape[1], box[order // score.shape[1]]
        keep = suppress(candidate, label, 0.6)[:100]
        detections.append(Detections(candidate[keep], top[keep], label[keep]))
    return detections


def suppress(boxes: Tensor, labels: Tensor, limit: float) -> Tensor:
    """Indices of the boxes (D, 4), best first, that overlap no better one of their class."""
    rivals = ((pairwise_iou(boxes, boxes) > limit) & (labels[:, None] == labels[None])).numpy()
    alive = torch.ones(len(boxes), dtype=torch.bool).numpy()
    for index in range(len(boxes)):
        if alive[index]:
            alive[index + 1 :] &= ~rivals[index, index + 1 :]
    return torch.from_numpy(alive).nonzero().flatten()
