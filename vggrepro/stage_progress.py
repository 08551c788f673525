"""Progress of long work in named stages, on standard error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

StageProgress = Callable[[str, int, int], None]  # stage, done, all


@contextmanager
def shown_progress() -> Iterator[StageProgress]:
    """Gives a function to call with (stage, done, all); a bar a stage, erased at the end.

    Where standard error is no terminal, nothing but the end of every stage is printed.
    """
    console = Console(stderr=True)
    lock = threading.Lock()
    tasks: dict[str, TaskID] = {}
    stage_name = TextColumn("{task.description}")
    columns = (stage_name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:

        def on_progress(stage: str, done: int, total: int) -> None:
            with lock:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done)
                if done == total and hidden:
                    console.print(f"{stage}: {done:,}", highlight=False)

        yield on_progress
