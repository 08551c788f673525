"""The terminal report: one screen, complete in a pipe, and no name can drive the terminal."""

import dataclasses
import io
import math
import re
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import (
    SAMPLES,
    Sample,
    changed,
    facts,
    founding,
    poisoned,
    telemetry,
    with_names,
)
from rich.console import Console

from diagnostics.command_wrap import wrap_command
from diagnostics.diagnosis import Cause, Counterfactual, Recommendation
from diagnostics.protocol import RunFacts, Telemetry
from diagnostics.report_story import headroom, story
from diagnostics.report_terminal import render
from diagnostics.report_words import bits, flatten, number, printable

SCREEN = 44


def shown(sample: Sample, width: int = 100, terminal: bool = True, encoding: str = "utf-8") -> str:
    """What is printed, without trailing blanks."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=file, width=width, height=45, force_terminal=terminal, color_system=None)
    console.print(render(*sample))
    text = file.buffer.getvalue().decode(encoding)
    return "\n".join(line.rstrip() for line in text.splitlines())


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_founding_case_tells_all_on_one_screen():
    text = shown(founding())
    assert len(text.splitlines()) <= SCREEN
    for part in (
        "Inf at step 1, first in block4_conv2",
        "failed again with the same bits",
        "op Conv2D",
        "vggrepro/model.py:143 in _convolution",
        "3,402,117 of 6,422,528 (53 %) not finite, seen in the compiled step",
        "16 x 28 x 28 x 512, from 0 to 5e34, all finite",
        "It began at step 0 in block1_conv1",
        "the initialiser 97 % sure",
        "sigma = 0.1. The authors' own code uses sigma = 0.01.",
        "normal:0.01 instead of normal:0.1 ✓ yes 20 6.89 smallest fix",
        "he-normal ✗ no 2 8e14 NaN at step 2",
        "verified: this very command was replayed and survived",
        "--seed 0 --steps 20",
    ):
        assert part in flat(text), part


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_fits_its_screen(name, width):
    lines = shown(SAMPLES[name](), width).splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= width


def crowded(count: int) -> Sample:
    """As many of everything as a diagnosis may hold; the last replay is the fix."""
    tried = [
        Counterfactual(f"change-{index}.", "lr", index, False, 3, 0, 1.0, note="NaN")
        for index in range(count)
    ]
    fix = Counterfactual("the one that works", "init", "x", True, 20, 0, 2.0, minimal=True)
    return changed(
        founding(),
        cause=Cause("init", 0.9, tuple(f"evidence {index}, " * 9 for index in range(count))),
        counterfactuals=(*tried, fix),
        notes=tuple(f"note {index}" for index in range(count)),
    )


def test_on_a_screen_each_replay_has_one_line():
    note = "step 1: pre-activation of block4_conv2 not finite"
    tried = tuple(
        dataclasses.replace(one, note=note) for one in founding().diagnosis.counterfactuals
    )
    sample = changed(founding(), counterfactuals=tried)
    lines = [line for line in shown(sample).splitlines() if "step 1: " in line]
    assert len(lines) == len(tried) and all(line.endswith("…") for line in lines)
    assert flat(shown(sample, terminal=False)).count("not finite") > len(tried)
    assert "pre-activation of bl" in shown(sample, encoding="ascii")


@pytest.mark.parametrize("width", [80, 90, 100, 140])
def test_a_pipe_gets_every_word_of_a_remark(width):
    note = "step 1: pre-activation of block3_conv2 not finite"
    tried = tuple(
        Counterfactual(change, "init", 1, False, 10, 0, 1.9e14, note=note)
        for change in ("nothing changed (control)", "gradient norm clipped to 10", "init x")
    )
    text = shown(changed(founding(), counterfactuals=tried), width, terminal=False)
    table = text[text.index("\ntried") : text.index("\ndo ")]
    assert max(map(len, text.splitlines())) <= width
    for word in note.split():
        assert len(re.findall(rf"(?<![\w-]){word}(?![\w-])", table)) == len(tried), word


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("count", [5, 12, 40])
def test_long_lists_are_cut_to_the_screen_but_not_the_fix(count, width):
    text = shown(crowded(count), width)
    assert len(text.splitlines()) <= SCREEN
    assert "the one that works" in flat(text) and "smallest fix" in flat(text)
    assert "evidence 0" in text and "more in report.html" in text
    assert "--steps 20" in text


def test_a_pipe_gets_everything():
    text = flat(shown(crowded(40), 80, terminal=False))
    assert "more in report.html" not in text
    for index in range(40):
        assert f"change-{index}." in text
        assert f"evidence {index}," in text and f"note {index} " in text


def test_a_pipe_gets_no_terminal_commands():
    file = io.StringIO()
    Console(file=file, width=80).print(render(*founding()))
    assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
def test_an_ascii_terminal_gets_ascii(name):
    sample = SAMPLES[name]()
    sample = changed(sample, run_dir="runs/Köln")
    text = shown(sample, encoding="ascii")
    assert "runs/K\\xf6ln" in text
    assert ("+ yes" in text) == any(one.survived for one in sample.diagnosis.counterfactuals)


def test_a_poisoned_example_is_named():
    text = flat(shown(poisoned()))
    assert "NaN at step 212, first in the input data" in text
    assert "examples n01440764/n01440764_10029.JPEG (example 8817)" in text
    assert "not verified" in text


def test_a_stalled_run_shows_its_faintest_layer_not_its_headroom():
    text = flat(shown(SAMPLES["stalled"]()))
    assert "Stalled: after step 4,999" in text and "and stayed there" in text
    assert re.search(r"4,999 6\.909 \S+ 1\.2e-7 block5_conv3", text)
    assert "headroom" not in text and "not finite" not in text


def test_an_unknown_cause_gets_no_confidence_and_no_command():
    text = flat(shown(SAMPLES["unknown"]()))
    assert "why no cause found • Two replays" in text
    assert "% sure" not in text and "vggrepro" not in text
    assert "40 NaN - not finite" in text


def test_nothing_recorded_is_no_obstacle():
    empty = Telemetry(np.zeros(0, np.int64), (), np.zeros((0, 0), np.float32))
    text = flat(shown(Sample(founding().diagnosis, empty, RunFacts(()))))
    assert "It began at step 0" in text and "least headroom" not in text


def test_code_is_recommended_line_by_line():
    code = "optimizer = SGD(0.001)\nmodel.compile(optimizer, 'mse')"
    text = shown(changed(founding(), recommendation=Recommendation(code, False)), terminal=False)
    assert "        optimizer = SGD(0.001)\n        model.compile(optimizer, 'mse')" in text


hostile_text = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["[red]x[/red]", "\x1b[2J", "a\nb", "\r", "\x9b31m", "\u202eevil", "\udc80", ":smiley:"]
    ),
)


@given(name=hostile_text)
def test_no_name_can_drive_the_terminal(name):
    text = shown(with_names(founding(), name), terminal=False)
    assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text
    visible = printable(name)
    if visible.strip() and len(visible) < 12 and not re.search(r"\s|\W", visible):
        assert visible in text


def test_brackets_of_a_name_are_shown():
    assert "[red]x[/red] (example 3)" in shown(with_names(founding(), "[red]x[/red]"))


words = st.text("abc-=/.:'\" ", min_size=1, max_size=15).map(shlex.quote)
commands = st.lists(words | st.sampled_from(["--lr", "--init", "-n"]), min_size=1).map(" ".join)


@given(command=commands, width=st.integers(20, 100))
def test_a_wrapped_command_means_the_same(command, width):
    # As a shell does; `shlex` keeps the newline after a backslash.
    joined = "\n".join(wrap_command(command, width)).replace("\\\n", "")
    assert shlex.split(joined) == shlex.split(command)


@given(
    values=st.lists(st.tuples(st.sampled_from(["--lr", "--init"]), st.integers(0, 10**6))),
    width=st.integers(30, 60),
)
def test_a_command_is_cut_before_its_options(values, width):
    command = " ".join(["vggrepro train", *(f"{name} {value}" for name, value in values)])
    lines = wrap_command(command, width)
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith("  --") for line in lines[1:])


@given(value=st.floats(width=32))
def test_numbers_are_short_and_true(value):
    text = number(value)
    assert len(text) <= 9
    again = float(text)
    assert math.isnan(again) if math.isnan(value) else math.isclose(again, value, rel_tol=0.05)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6.9078, "6.908"),
        (4e8, "4e8"),
        (-3.71e-5, "-3.7e-5"),
        (0, "0"),
        (10000.0, "1e4"),
        (9999.99, "1e4"),
        (1234.5, "1234"),
        (-math.inf, "-Inf"),
        (None, "-"),
    ],
)
def test_number_examples(value, text):
    assert number(value) == text


def test_bits_of_every_kind():
    values = [66.4, -math.inf, math.inf, math.nan, None]
    assert [bits(value) for value in values] == ["66 bits", "none", "all 0", "-", "-"]


def test_nested_values_become_rows():
    value = {"code": {"commit": None, "dirty": False}, "devices": ["CPU", "GPU"], "n": 3}
    assert flatten(value) == [
        ("code.commit", "-"),
        ("code.dirty", "False"),
        ("devices", "CPU, GPU"),
        ("n", "3"),
    ]


def test_the_story_keeps_the_onset_and_the_end():
    sample = SAMPLES["exploding"]()
    rows = story(sample.diagnosis, sample.telemetry, headroom(sample.telemetry, sample.facts))
    assert [row.step for row in rows] == [0, 9199, 9200, 9201, *range(9396, 9401)]
    assert [row.remark for row in rows if row.remark] == ["onset", "not finite"]


def test_the_story_ends_with_the_step_that_was_asked_for():
    sample = changed(SAMPLES["exploding"](), step=50, onset=None, first_nonfinite=None)
    rows = story(sample.diagnosis, sample.telemetry, headroom(sample.telemetry, sample.facts))
    assert [row.step for row in rows] == [0, 46, 47, 48, 49, 50]


@pytest.mark.parametrize(
    ("precision", "of_one"),
    [("float32", 128), ("bfloat16", 128), ("float16", 16), ("mixed_float16", 16)],
)
def test_headroom_is_that_of_the_number_format(precision, of_one):
    recorded = telemetry([1.0], [1.0], np.array([[1.0, 4.0, 0.0, np.inf]]), "abcd")
    room = headroom(recorded, facts("abcd", precision=precision))
    assert room.layers == ("a", "b", "c", "d")
    np.testing.assert_allclose(room.bits[:2, 0], [of_one, of_one - 2], atol=1e-2)
    assert room.bits[2:, 0].tolist() == [math.inf, -math.inf]
    assert room.absmax(room.bits[1, 0]) == pytest.approx(4.0)
