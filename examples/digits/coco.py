"""Read a COCO folder into memory, and judge detections by COCO's average precision."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from .progress import Advance, silent

METRICS = ("AP", "AP50", "AP75", "small", "medium", "large")
COCO_SIDES = (32.0, 96.0)
"""Sides in pixels that part COCO's small, medium and large objects."""


class DataError(ValueError):
    """A data folder that is missing or malformed; the message is one line."""


@dataclass(frozen=True)
class Split:
    """One split in memory, every picture letter-boxed to the same square.

    pictures (N, 3, S, S) uint8; boxes (N, G, 4) as corners x0, y0, x1, y1 in the letter-boxed
    picture; labels (N, G) in 0..K-1, -1 where a picture has fewer than G objects (crowds are
    left out); scales (N,): letter-boxed pixels to one of the file's; image_ids in COCO's terms.
    """

    pictures: Tensor
    boxes: Tensor
    labels: Tensor
    scales: Tensor
    image_ids: list[int]
    category_ids: list[int]
    names: list[str]
    truth: COCO
    fingerprint: str

    def __len__(self) -> int:
        return len(self.image_ids)


def read_split(folder: Path, split: str, image_size: int, advance: Advance = silent) -> Split:
    """Read `folder`/annotations/`split`.json and the pictures under `folder`/`split`."""
    path = folder / "annotations" / f"{split}.json"
    if not folder.is_dir():
        raise DataError(f"no data folder at {folder}")
    if not path.is_file():
        raise DataError(f"{path} is missing: {folder} is not a COCO folder as README.md lays out")
    text = path.read_bytes()
    try:
        dataset = _check(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is not a COCO annotation file: {reason}") from error
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    row_of = {image["id"]: row for row, image in enumerate(dataset["images"])}

    pictures = torch.zeros(len(row_of), 3, image_size, image_size, dtype=torch.uint8)
    scales = torch.ones(len(row_of))
    for row, image in enumerate(dataset["images"]):
        try:
            pictures[row], scales[row] = _letterbox(folder / split / image["file_name"], image_size)
        except OSError as error:
            raise DataError(f"cannot read {folder / split / image['file_name']}") from error
        advance(row + 1, len(row_of))

    objects: list[list[tuple[list[float], int]]] = [[] for _ in row_of]
    for item in dataset["annotations"]:
        x, y, width, height = item["bbox"]
        if not item["iscrowd"] and width > 0 and height > 0:
            corners = [x, y, x + width, y + height]
            objects[row_of[item["image_id"]]].append((corners, label_of[item["category_id"]]))
    most = max(map(len, objects))
    if most == 0:
        raise DataError(f"{path} has no object to detect")
    boxes = torch.zeros(len(objects), most, 4)
    labels = torch.full((len(objects), most), -1)
    for row, found in enumerate(objects):
        for column, (corners, label) in enumerate(found):
            boxes[row, column] = torch.tensor(corners) * scales[row]
            labels[row, column] = label

    truth = COCO()
    truth.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return Split(
        pictures=pictures,
        boxes=boxes,
        labels=labels,
        scales=scales,
        image_ids=list(row_of),
        category_ids=list(label_of),
        names=[str(category.get("name", category["id"])) for category in categories],
        truth=truth,
        fingerprint=hashlib.sha256(text + f"{image_size}".encode()).hexdigest()[:16],
    )


def _check(content: dict[str, Any]) -> dict[str, Any]:
    """The parts of a COCO annotation file that are used, completed; ValueError if malformed."""
    images = [{"id": image["id"], "file_name": image["file_name"]} for image in content["images"]]
    categories = [dict(category) for category in content["categories"]]
    image_ids = {image["id"] for image in images}
    category_ids = {category["id"] for category in categories}
    if not images or not categories:
        raise ValueError("it lists no image or no category")
    if len(image_ids) < len(images) or len(category_ids) < len(categories):
        raise ValueError("an image or category id occurs twice")
    annotations = []
    # Counted from 1: COCOeval takes a match with annotation id 0 for no match.
    for number, item in enumerate(content["annotations"], start=1):
        box = [float(value) for value in item["bbox"]]
        if len(box) != 4 or not np.isfinite(box).all():
            raise ValueError(f"annotation {number} has the box {item['bbox']}")
        if item["image_id"] not in image_ids or item["category_id"] not in category_ids:
            raise ValueError(f"annotation {number} names an unknown image or category")
        annotations.append(
            {
                "id": number,
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "bbox": box,
                "area": float(item.get("area", box[2] * box[3])),
                "iscrowd": int(item.get("iscrowd", 0)),
            }
        )
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _letterbox(path: Path, size: int) -> tuple[Tensor, float]:
    """The picture at `path` in the top left of a black square (3, size, size), and its scale."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    scale = size / max(picture.size)
    width, height = (max(1, round(extent * scale)) for extent in picture.size)
    square = np.zeros((size, size, 3), np.uint8)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    square[:height, :width] = np.asarray(picture)
    return torch.from_numpy(square).permute(2, 0, 1), scale


@dataclass(frozen=True)
class Detections:
    """Detections in one letter-boxed picture: boxes (D, 4), scores (D,), labels (D,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def evaluate(
    split: Split, detections: list[Detections], sides: tuple[float, float] = COCO_SIDES
) -> dict[str, float | None]:
    """COCO's AP in percent of the detections in the split's first pictures, one item each.

    `sides` part small, medium and large; a metric without any object is None.
    """
    rows = []
    for row, found in enumerate(detections):
        boxes = found.boxes.cpu() / split.scales[row]
        sizes = boxes[:, 2:] - boxes[:, :2]
        for corner, size, score, label in zip(
            boxes[:, :2].tolist(),
            sizes.tolist(),
            found.scores.tolist(),
            found.labels.tolist(),
            strict=True,
        ):
            rows.append([split.image_ids[row], *corner, *size, score, split.category_ids[label]])
    # COCOeval refuses an empty list: a detection of nothing stands for none.
    rows = rows or [[split.image_ids[0], 0.0, 0.0, 0.0, 0.0, 0.0, split.category_ids[0]]]
    results = [
        {"image_id": image, "bbox": [x, y, w, h], "score": score, "category_id": category}
        for image, x, y, w, h, score, category in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(split.truth, split.truth.loadRes(results), "bbox")
        judge.params.imgIds = split.image_ids[: len(detections)]
        small, large = (side**2 for side in sides)
        judge.params.areaRng = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
        judge.params.areaRngLbl = ["all", "small", "medium", "large"]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = judge.stats[: len(METRICS)].tolist()
    return {name: None if value < 0 else 100 * value for name, value in zip(METRICS, values, strict=True)}
