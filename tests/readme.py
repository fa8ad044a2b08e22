"""The code in README.md, so that tests can run it as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def code_after(words: str) -> str:
    """The first block of Python after these words, which are on the page once.

    Raises:
        ValueError: they are not.
    """
    _, found, rest = PAGE.partition(words)
    if not found or words in rest:
        raise ValueError(f"README.md does not have {words!r} once")
    block: str = re.findall(r"```python\n(.*?)```", rest, flags=re.DOTALL)[0]
    return block
