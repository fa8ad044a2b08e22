"""A Pascal VOC folder as the COCO folder that `--data` takes.

python -m examples.digits.voc BCCD_Dataset/BCCD runs/bccd
"""

from __future__ import annotations

import argparse
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPLITS = {"train": "trainval", "val": "test"}
"""What is trained and judged on, and VOC's name of it."""


def convert(voc: Path, out: Path) -> dict[str, int]:
    """Write annotations/<split>.json and the pictures under <split>/; the number of pictures of each split."""
    names = {split: (voc / "ImageSets" / "Main" / f"{of}.txt").read_text().split() for split, of in SPLITS.items()}
    roots = {name: ET.parse(voc / "Annotations" / f"{name}.xml").getroot() for each in names.values() for name in each}
    classes = sorted({_text(found, "name") for root in roots.values() for found in root.iter("object")})
    for split, of_split in names.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (out / split).mkdir(parents=True, exist_ok=True)
        (out / "annotations").mkdir(exist_ok=True)
        for number, name in enumerate(of_split):
            picture = next((voc / "JPEGImages").glob(f"{name}.*"))
            shutil.copyfile(picture, out / split / picture.name)
            images.append({"id": number, "file_name": picture.name})
            for found in roots[name].iter("object"):
                x0, y0, x1, y1 = (float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
                annotations.append(
                    {
                        "image_id": number,
                        "category_id": classes.index(_text(found, "name")),
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                    }
                )
        categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return {split: len(of_split) for split, of_split in names.items()}


def _text(element: ET.Element, path: str) -> str:
    return element.findtext(path) or ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.digits.voc", description=__doc__)
    parser.add_argument("voc", type=Path, help="folder with Annotations, ImageSets and JPEGImages")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    print(convert(options.voc, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
