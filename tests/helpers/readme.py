"""The code in README.md and other pages, so that tests can run it as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
START = (ROOT / "docs" / "index.md").read_text()


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def code_after(words: str, page: str = PAGE) -> str:
    """The first block of Python after these words, which are on the page once.

    Raises:
        ValueError: they are not.
    """
    _, found, rest = page.partition(words)
    if not found or words in rest:
        raise ValueError(f"the page does not have {words!r} once")
    return blocks(rest)[0]
