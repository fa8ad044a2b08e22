"""Make the pictures that the small configs train on: `python -m examples.mmdet.data`, to runs/mmdet/data by default."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from examples.digits.digits import make_digits
from examples.digits.progress import stage

FOLDER = Path("runs/mmdet/data")
COUNTS = {"train": 3000, "val": 500}
SIDE = 128


def make(console: Console, folder: Path, counts: dict[str, int]) -> None:
    """COCO-format digits in `folder`; one that is there already is kept."""
    with stage(console, "make pictures", sum(counts.values())) as advance:
        make_digits(folder, counts=counts, image_size=SIDE, advance=advance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    make(Console(), options.out, COUNTS)


if __name__ == "__main__":
    main()
