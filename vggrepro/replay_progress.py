"""What a person sees while a diagnosis replays: the stage, and how far it is."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_QUIET_SECONDS = 5.0  # between two lines where the output is no terminal


class ReplayProgress:
    """A callable (what, done, total) for `diagnostics.diagnose`; a context manager.

    On a terminal one live line on standard error, elsewhere a plain line every few
    seconds; nothing with `quiet`.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._spoke = time.monotonic()

    def __enter__(self) -> ReplayProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total or None)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._spoke > _QUIET_SECONDS:
            self._spoke = now
            text = f"{what} {f'{done}/{total}' if total else ''}".rstrip()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
