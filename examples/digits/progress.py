"""One progress bar a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Told how much of a stage is done, and of how much once that is known."""

    def __call__(self, done: int, total: int | None = None, note: str | None = None) -> None: ...


def silent(done: int, total: int | None = None, note: str | None = None) -> None:
    """An `Advance` that shows nothing."""


@contextmanager
def stage(console: Console, title: str, total: int | None = None) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(done: int, total: int | None = None, note: str | None = None) -> None:
            progress.update(task, completed=done)
            if total is not None:
                progress.update(task, total=total)
            if note is not None:
                progress.update(task, note=note)

        yield advance
