"""What the progress display shows, on a terminal and in a log file."""

import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from vggrepro.config import TrainConfig
from vggrepro.progress import ProgressDisplay, duration

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
INFO = {
    "parameter_count": 1_769_066,
    "train_images": 1000,
    "val_images": 200,
    "classes": 10,
    "device": "CPU, 2 cores",
    "guard_checks": 47,
}
METRICS = {
    "loss": 2.0,
    "top1_accuracy": 0.25,
    "grad_norm": 3.14159,
    "lr": 0.01,
    "images_per_second": 2000.0,
    "data_wait_share": 0.03,
    "headroom": 117.4,
    "headroom_layer": "block5_conv2",
}
EVALUATION = {"val_loss": 1.25, "val_top1_error": 52.5, "val_top5_error": 8.25, "val_images": 200}


class Run:
    """A display, what it wrote, and a clock that the test turns."""

    def __init__(self, steps: int, terminal_width: int = 0, first_step: int = 0) -> None:
        self.now = 0.0
        self.file = StringIO()
        console = Console(
            file=self.file,
            width=terminal_width or 80,
            height=30,
            force_terminal=terminal_width > 0,
            color_system=None,
        )
        self.display = ProgressDisplay(console, lambda: self.now)
        run = SimpleNamespace(path=Path("runs/one"))
        config = TrainConfig(steps=steps, data="/data/images")
        self.display.__enter__()
        self.display.on_start(run, config, first_step, INFO)

    def step(self, step: int, seconds: float, **changes: float) -> None:
        self.now += seconds
        self.display.on_step(step, None, {**METRICS, **changes})

    def text(self) -> str:
        self.display.__exit__(None, None, None)
        return ESCAPES.sub("", self.file.getvalue()).replace("\r", "")


def test_a_log_file_gets_whole_readable_lines():
    run = Run(steps=3)
    for step in range(3):
        run.step(step, 1.0)
    run.display.on_evaluation(3, EVALUATION)
    lines = run.text().splitlines()
    assert lines[:5] == [
        "net   A, width 0.25, glorot-uniform: 1,769,066 parameters, from new weights",
        "data  /data/images",
        "      1,000 training and 200 validation images, 10 classes",
        "on    CPU, 2 cores, float32, 32 pixels, batch 32; guard tested: 47 checks fired",
        "run   runs/one",
    ]
    assert lines[5:] == [
        "step 1/3  loss 2  top-1 25.0 %  grad norm 3.14  lr 0.01  images/s 2,000  "
        "data wait 3 %  headroom 117 bits block5_conv2  time left unknown",
        "step 3/3  loss 2  top-1 25.0 %  grad norm 3.14  lr 0.01  images/s 2,000  "
        "data wait 3 %  headroom 117 bits block5_conv2  took 0:00:02",
        "step 3: validation top-1 error 52.50 %, top-5 error 8.25 %, loss 1.25",
    ]


def test_lines_come_every_ten_seconds_and_more_rarely_in_long_runs():
    run = Run(steps=1_000_000)
    for step in range(100):
        run.step(step, 1.0)
    assert run.file.getvalue().count("\nstep ") == 10
    for step in range(100, 50_000):
        run.step(step, 1.0)
    written = [int(n) for n in re.findall(r"\nstep ([\d]+)", run.file.getvalue().replace(",", ""))]
    assert len(written) < 600
    assert written[-1] - written[-2] == pytest.approx(500, rel=0.05)


def test_the_time_left_follows_the_steps_of_this_process():
    run = Run(steps=1000, first_step=500)
    for step in range(500, 520):
        run.step(step, 2.0)
    assert "from step 500" in run.file.getvalue()
    # 485 steps of 2 s are left after the step that was drawn after 30 s.
    assert "step 516/1,000" in run.file.getvalue()
    assert "0:16:08 left" in run.file.getvalue()


def test_noisy_numbers_are_means_of_the_last_twenty_steps():
    run = Run(steps=40)
    for step in range(40):
        run.step(step, 0.1, loss=float(step), grad_norm=float(step))
    last = run.text().splitlines()[-1]
    assert "loss 29.5 " in last and "grad norm 39 " in last


def test_warnings_are_marked():
    run = Run(steps=1)
    run.display.on_message("warning", "step 3: loss [spike]")
    run.display.on_message("info", "[b]measuring")
    assert run.text().splitlines()[-2:] == ["warning: step 3: loss [spike]", "[b]measuring"]


@pytest.mark.parametrize("width, rows", [(80, 2), (120, 1)])
def test_the_panel_fits_the_terminal_and_shows_everything(width, rows):
    run = Run(steps=370_000, terminal_width=width)
    run.display.on_checkpoint(240_000)
    run.step(249_998, 1.0)
    run.step(249_999, 1.0)
    lines = run.text().splitlines()
    assert max(map(len, lines)) <= width
    frame = lines[-1 - 2 * rows :]
    assert frame[0].startswith("step 250,000/370,000 ━")
    assert frame[0].rstrip().endswith("1 day, 9:20:00 left")
    labels = " ".join(frame[1::2])
    values = " ".join(frame[2::2])
    assert re.split(r"\s{2,}", labels.strip()) == [
        *("loss", "top-1", "grad norm", "lr"),
        *("images/s", "data wait", "saved step", "headroom"),
    ]
    assert re.split(r"\s{2,}", values.strip()) == [
        *("2", "25.0 %", "3.14", "0.01"),
        *("2,000", "3 %", "240,000", "117 bits block5_conv2"),
    ]


def test_the_panel_is_drawn_at_most_four_times_a_second():
    run = Run(steps=1000, terminal_width=80)
    for step in range(200):
        run.step(step, 0.01)
    assert run.text().count("/1,000 ━") <= 9


def test_the_panel_shows_the_last_checkpoint_even_after_the_last_step():
    run = Run(steps=2, terminal_width=80)
    run.step(0, 1.0)
    run.step(1, 0.01)
    run.display.on_checkpoint(2)
    *_, values = run.text().splitlines()
    assert re.split(r"\s{2,}", values.strip())[2] == "2"


def test_a_validation_stays_on_the_screen_above_the_panel():
    run = Run(steps=10, terminal_width=80)
    run.step(0, 1.0)
    run.display.on_evaluation(1, EVALUATION)
    run.step(1, 1.0)
    text = run.text()
    assert text.count("validation top-1 error 52.50 %") == 1
    assert text.rindex("headroom") > text.index("validation top-1 error")


def test_a_closed_pipe_is_an_error_that_the_command_line_knows(monkeypatch):
    class ClosedPipe(StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", ClosedPipe())
    with pytest.raises(BrokenPipeError), ProgressDisplay() as display:
        display.on_message("info", "measuring")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0:00:00"), (65, "0:01:05"), (86_400 * 3 + 5, "3 days, 0:00:05")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
