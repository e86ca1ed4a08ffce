"""How far a long job is and how long it will still take: a bar on a terminal, else a line now and then for the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class Update(Protocol):
    def __call__(self, done: int, note: str = "") -> None:
        """`done` are finished; `note` says what else is worth knowing."""


@contextmanager
def progress(console: Console, name: str, total: int, *, completed: int = 0) -> Iterator[Update]:
    """Within, `update(done, note)` reports that `done` of `total` are finished; `note` says what else is worth knowing.

    Args:
        completed: already done before this run; not counted into the rate.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(name, total=total, completed=completed, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
    else:
        yield _lines(console, name, total, completed)


def _lines(console: Console, name: str, total: int, completed: int) -> Update:
    began = last = time.monotonic()

    def update(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        rate = (done - completed) / max(now - began, 1e-9)
        left = f", about {(total - done) / rate / 60:.1f} min left" if rate else ""
        console.print(f"{name}: {done} of {total}{left}" + (f", {note}" if note else ""), soft_wrap=True)

    return update
