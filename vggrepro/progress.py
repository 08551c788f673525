"""What a person sees of a training run: a live panel, or plain lines in a log file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vggrepro.hooks import Hook, StateView
from vggrepro.remote_paths import shown

if TYPE_CHECKING:
    from vggrepro.config import TrainConfig
    from vggrepro.run_directory import RunDirectory

REFRESH_SECONDS = 0.25
LINE_SECONDS = 10.0
LINES_PER_RUN = 100  # about: the time between two lines grows with the run
SMOOTHED_STEPS = 20
SMOOTHED = ("loss", "top1_accuracy", "images_per_second", "data_wait_share")
WIDE_COLUMNS = 110
LOW_HEADROOM_BITS, LOW_HEADROOM_BITS_FLOAT16 = 24.0, 4.0  # of 128 bits, of 16


class _Console(Console):
    """Standard output; a closed pipe is an ordinary error, not rich's silent exit."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class ProgressDisplay(Hook):
    """Step, loss, accuracy, gradient norm, rate, speed, time left, headroom.

    Use as a context manager, so that the terminal is given back whatever happens.

    Args:
      console: where to draw; standard output if None.
      clock: seconds from any origin.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or _Console()
        self._clock = clock
        self._live = Live(console=self._console, auto_refresh=False)
        self._window: deque[Mapping[str, Any]] = deque(maxlen=SMOOTHED_STEPS)
        self._steps = 0
        self._step = 0
        self._checkpoint = 0
        self._skipped = 0
        self._low_headroom = LOW_HEADROOM_BITS
        self._first: tuple[int, float] | None = None  # first step of this process, when it ended
        self._next_draw = 0.0

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def on_start(
        self, run: RunDirectory, config: TrainConfig, first_step: int, info: Mapping[str, Any]
    ) -> None:
        self._steps = config.steps
        self._checkpoint = first_step
        if config.precision == "float16":
            self._low_headroom = LOW_HEADROOM_BITS_FLOAT16
        for line in start_lines(run, config, first_step, info):
            self._print(line)

    def on_step(self, step: int, state: StateView, metrics: Mapping[str, Any]) -> None:
        now = self._clock()
        self._step = step
        self._window.append(metrics)
        self._skipped += int(metrics.get("skipped", 0))
        if self._first is None:
            self._first = (step, now)
        if now < self._next_draw and step + 1 < self._steps:
            return
        if self._live.is_started:
            self._next_draw = now + REFRESH_SECONDS
            self._redraw(now)
        else:
            elapsed = now - self._first[1]
            self._next_draw = now + max(LINE_SECONDS, elapsed / LINES_PER_RUN)
            self._print(self._line(now))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._print(
            f"step {step:,}: validation top-1 error {metrics['val_top1_error']:.2f} %, "
            f"top-5 error {metrics['val_top5_error']:.2f} %, loss {metrics['val_loss']:.4g}"
        )

    def on_checkpoint(self, step: int) -> None:
        self._checkpoint = step
        if self._live.is_started and self._window:
            self._redraw(self._clock())

    def on_message(self, level: str, text: str) -> None:
        if level == "warning":
            self._print(Text(f"warning: {text}", style="yellow"))
        else:
            self._print(text)

    def _print(self, text: str | Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _redraw(self, now: float) -> None:
        cells_per_row = 8 if self._console.width >= WIDE_COLUMNS else 4
        self._live.update(self._panel(now, cells_per_row), refresh=True)

    def _panel(self, now: float, cells_per_row: int) -> RenderableType:
        done = self._step + 1
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(
            Text(f"step {done:,}/{self._steps:,}", style="bold"),
            ProgressBar(total=self._steps, completed=done),
            Text(self._times(now)),
        )
        # The headroom comes last, in the wide column: it names a layer.
        *others, headroom = self._cells()
        cells = [*others, ("saved step", Text(f"{self._checkpoint:,}")), headroom]
        body = Table.grid(padding=(0, 2), expand=True)
        for column in range(cells_per_row):
            body.add_column(ratio=2 if column + 1 == cells_per_row else 1, no_wrap=True)
        for first in range(0, len(cells), cells_per_row):
            row = cells[first : first + cells_per_row]
            body.add_row(*(Text(name, style="dim") for name, _ in row))
            body.add_row(*(value for _, value in row))
        return Group(Text(), head, body)

    def _line(self, now: float) -> str:
        cells = "  ".join(f"{name} {value}" for name, value in self._cells())
        return f"step {self._step + 1:,}/{self._steps:,}  {cells}  {self._times(now)}"

    def _cells(self) -> list[tuple[str, Text]]:
        """Names and values; the noisy ones are means of the last steps."""
        last = dict(self._window[-1])
        for name in SMOOTHED:
            last[name] = sum(metrics[name] for metrics in self._window) / len(self._window)
        headroom = last["headroom"]
        scaling = []
        if "loss_scale" in last:
            said = f"{last['loss_scale']:,.0f}, {self._skipped} skipped"
            scaling.append(("loss scale", Text(said)))
        return [
            ("loss", Text(f"{last['loss']:.4g}")),
            ("top-1", Text(f"{100 * last['top1_accuracy']:.1f} %")),
            ("grad norm", Text(f"{last['grad_norm']:.3g}")),
            ("lr", Text(f"{last['lr']:.3g}")),
            ("images/s", Text(f"{last['images_per_second']:,.0f}")),
            ("data wait", Text(f"{100 * last['data_wait_share']:.0f} %")),
            *scaling,
            (
                "headroom",
                Text(
                    f"{headroom:.0f} bits {last['headroom_layer']}",
                    style="bold red" if headroom < self._low_headroom else "",
                ),
            ),
        ]

    def _times(self, now: float) -> str:
        if self._first is None or self._step == self._first[0]:
            return "time left unknown"
        first_step, since = self._first
        if self._step + 1 == self._steps:
            return f"took {duration(now - since)}"
        seconds = (now - since) / (self._step - first_step) * (self._steps - self._step - 1)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """'0:01:05'; with days in front of long ones."""
    return str(timedelta(seconds=round(seconds)))


def start_lines(
    run: RunDirectory, config: TrainConfig, first_step: int, info: Mapping[str, Any]
) -> list[str]:
    """What is trained, on what, and where it is written."""
    origin = "inherited" if config.init_from else "new"
    start = f"from step {first_step:,}" if first_step else f"from {origin} weights"
    return [
        f"net   {config.arch}, width {config.width:g}, {config.init}: "
        f"{info['parameter_count']:,} parameters, {start}",
        f"data  {config.data}",
        f"      {info['train_images']:,} training and {info['val_images']:,} validation images, "
        f"{info['classes']:,} classes",
        f"on    {info['device']}, {config.precision}, {config.image_size} pixels, "
        f"batch {config.batch_size:,}; guard tested: {info['guard_checks']} checks fired",
        f"run   {shown(run.path)}",
    ]
