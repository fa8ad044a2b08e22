"""Make the digits data set: handwritten scans on photographs, written as a COCO folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from .progress import Advance, silent

DIGIT_SIDES = (20.0, 40.0)
"""Sides in pixels that part small, medium and large digits, whose scans measure 12 to 88 px."""
SPLIT_COLUMNS = {"train": (0, 400), "val": (420, 640)}
"""Columns of the photographs that each split crops: the splits share no pixel."""


def split_scans(seed: int = 0, val_share: float = 0.25) -> dict[str, np.ndarray]:
    """Indices into `load_digits()` of each split, disjoint, every class shared alike."""
    target = load_digits().target
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for digit in range(10):
        indices = rng.permutation(np.flatnonzero(target == digit))
        cut = round(len(indices) * val_share)
        parts["val"].append(indices[:cut])
        parts["train"].append(indices[cut:])
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def make_digits(
    folder: Path,
    *,
    counts: dict[str, int],
    image_size: int,
    seed: int = 0,
    advance: Advance = silent,
) -> None:
    """Write the digits data set to `folder`.

    A folder that an earlier call finished with the same arguments is left as it is.
    """
    wanted = {"counts": counts, "image_size": image_size, "seed": seed}
    stamp = folder / "made.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        advance(sum(counts.values()), note="kept")
        return
    stamp.unlink(missing_ok=True)
    digits, photos, scans = load_digits(), load_sample_images().images, split_scans(seed)
    done = 0
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / "annotations").mkdir(exist_ok=True)
        rng = np.random.default_rng((seed, ("train", "val").index(split)))
        first, last = SPLIT_COLUMNS[split]
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            photo = photos[rng.integers(len(photos))][:, first:last]
            canvas = _background(photo, image_size, rng)
            name = f"{index:05d}.jpg"
            images.append({"id": index + 1, "file_name": name, "width": image_size, "height": image_size})
            for scan, box in _place(canvas, digits.images, scans[split], rng):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": int(digits.target[scan]) + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                        "scan": int(scan),
                    }
                )
            picture = Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
            picture.save(folder / split / name, quality=92)
            done += 1
            advance(done)
        categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(truth))
    stamp.write_text(json.dumps(wanted))


def _background(photo: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A darkened square crop of `photo` (H, W, 3) as float (size, size, 3)."""
    side = int(rng.integers(96, min(photo.shape[:2]) + 1))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    resized = crop.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32) * rng.uniform(0.3, 0.7)


def _place(
    canvas: np.ndarray, scans: np.ndarray, choice: np.ndarray, rng: np.random.Generator
) -> Iterator[tuple[int, list[float]]]:
    """Blend about six digits into `canvas`; yield each scan's index and its box (x, y, w, h)."""
    size = canvas.shape[0]
    taken: list[tuple[int, int, int]] = []
    for _ in range(rng.poisson(6)):
        side = int(np.exp(rng.uniform(np.log(12), np.log(min(88, 2 * size // 3)))))
        scan = int(rng.choice(choice))
        spot = _free_spot(taken, side, size, rng)
        if spot is None:
            continue
        x, y = spot
        taken.append((x, y, side))
        glyph = Image.fromarray((scans[scan] * (255 / 16)).astype(np.uint8))
        ink = np.asarray(glyph.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        tint = rng.uniform(170, 255, size=3).astype(np.float32)
        alpha = (ink * rng.uniform(0.6, 1.0))[..., None]
        window = canvas[y : y + side, x : x + side]
        window += alpha * (tint - window)
        rows, columns = (np.flatnonzero((ink > 0.25).any(axis)) for axis in (1, 0))
        left, top = x + int(columns[0]), y + int(rows[0])
        width, height = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
        yield scan, [float(left), float(top), float(width), float(height)]


def _free_spot(
    taken: list[tuple[int, int, int]], side: int, size: int, rng: np.random.Generator
) -> tuple[int, int] | None:
    """A corner (x, y) where a square of `side` meets no other, or None after 20 tries."""
    for _ in range(20):
        x, y = (int(value) for value in rng.integers(0, size - side + 1, size=2))
        if all(x + side <= a or a + s <= x or y + side <= b or b + s <= y for a, b, s in taken):
            return x, y
    return None
