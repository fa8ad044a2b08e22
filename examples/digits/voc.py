"""A Pascal VOC folder as the COCO folder that `--data` takes.

python -m examples.digits.voc BCCD_Dataset/BCCD runs/bccd --flips
"""

from __future__ import annotations

import argparse
import itertools
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from .progress import Advance, silent

SPLITS = {"train": "trainval", "val": "test"}
"""What is trained and judged on, and VOC's name of it."""
SIDES = ("xmin", "ymin", "xmax", "ymax")


def convert(voc: Path, out: Path, flips: bool = False, advance: Advance = silent) -> dict[str, int]:
    """Write annotations/<split>.json and the pictures under <split>/; the number of pictures of each split.

    `flips` adds the mirror images of every training picture, left to right, top to bottom, and both.
    """
    names = {split: (voc / "ImageSets" / "Main" / f"{of}.txt").read_text().split() for split, of in SPLITS.items()}
    roots = {name: ET.parse(voc / "Annotations" / f"{name}.xml").getroot() for each in names.values() for name in each}
    classes = sorted({_text(found, "name") for root in roots.values() for found in root.iter("object")})
    counts: dict[str, int] = {}
    for split, of_split in names.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (out / split).mkdir(parents=True, exist_ok=True)
        (out / "annotations").mkdir(exist_ok=True)
        for name in of_split:
            picture = Image.open(next((voc / "JPEGImages").glob(f"{name}.*")))
            ways = itertools.product((False, True), repeat=2) if flips and split == "train" else [(False, False)]
            for mirror, flip in ways:
                file = f"{name}{'-mirror' * mirror}{'-flip' * flip}.png"
                shown = ImageOps.mirror(picture) if mirror else picture
                (ImageOps.flip(shown) if flip else shown).save(out / split / file)
                for found in roots[name].iter("object"):
                    x0, y0, x1, y1 = (
                        float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
                    )
                    left, top = picture.width - x1 if mirror else x0, picture.height - y1 if flip else y0
                    label = classes.index(_text(found, "name"))
                    box = [left, top, x1 - x0, y1 - y0]
                    annotations.append({"image_id": len(images), "category_id": label, "bbox": box})
                images.append({"id": len(images), "file_name": file})
            advance(sum(counts.values()) + len(images))
        categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(content))
        counts[split] = len(images)
    return counts


def _text(element: ET.Element, path: str) -> str:
    return element.findtext(path) or ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.digits.voc", description=__doc__)
    parser.add_argument("voc", type=Path, help="folder with Annotations, ImageSets and JPEGImages")
    parser.add_argument("out", type=Path)
    parser.add_argument("--flips", action="store_true", help="add the mirror images of every training picture")
    options = parser.parse_args(argv)
    print(convert(options.voc, options.out, options.flips))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
