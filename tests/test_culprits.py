"""The search for culprits among the examples of a batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.culprits import (
    MAX_CULPRITS,
    Trials,
    batch_rows,
    keep_rows,
    leave_out_search,
    odd_rows,
)
from diagnostics.protocol import StepOutcome


class Fussy:
    """A program that refuses every batch in which it finds one of its bad values."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.loaded = 0

    def load(self, state):
        self.loaded += 1

    def run(self, batch, step):
        assert self.loaded > 0 and step == 7
        self.loaded = 0
        return StepOutcome(not self.bad & set(batch["values"].tolist()), (), {})


def trials(rows: int, bad: set[int]) -> Trials:
    return Trials(Fussy(bad), {}, {"values": np.arange(rows)}, 7)


def test_one_culprit_costs_logarithmically_many_steps():
    for culprit in (0, 100, 255):
        search = trials(256, {culprit})
        assert leave_out_search(search) == (culprit,)
        assert search.runs <= 2 * 8 + 2


@given(st.data())
def test_every_culprit_is_found_and_nobody_else(data):
    rows = data.draw(st.sampled_from([2, 3, 8, 16, 61]))
    most = min(MAX_CULPRITS, rows // 2)
    bad = data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=most))
    search = trials(rows, bad)
    assert leave_out_search(search) == tuple(sorted(bad))
    assert search.runs <= 4 * MAX_CULPRITS + 2 * len(bad) * (int(np.log2(rows)) + 1) + 2


def test_nobody_is_blamed_where_everybody_fails():
    search = trials(256, set(range(256)))
    assert leave_out_search(search) == ()
    assert search.runs <= 4 * MAX_CULPRITS


def test_nobody_is_blamed_where_most_fail():
    assert leave_out_search(trials(8, {0, 1, 2, 3, 4})) == ()


def test_a_batch_that_passes_has_no_culprits():
    assert leave_out_search(trials(8, set())) == ()


def test_one_row_alone_cannot_be_left_out():
    assert leave_out_search(trials(1, {0})) == ()


def test_rows_that_stay_keep_their_places():
    batch = {
        "values": np.arange(5),
        "pairs": np.arange(10).reshape(5, 2),
        "scalar": np.array(3.0),
        "table": np.ones([7, 2]),
    }
    assert batch_rows(batch) == 5
    kept = keep_rows(batch, [1, 3])
    assert kept["values"].tolist() == [1, 1, 3, 3, 1]
    assert kept["pairs"][4].tolist() == [2, 3]
    assert kept["scalar"] == 3.0 and kept["table"].shape == (7, 2)


def test_odd_rows():
    values = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    batch = {"x": values, "labels": np.arange(8) * 10**6}
    assert odd_rows(batch, 10.0) == ()
    values[2] *= 50.0
    values[5] = 0.7  # a constant example
    assert odd_rows(batch, 10.0) == (2, 5)
    assert odd_rows(batch, 100.0) == (5,)


def test_small_or_zero_targets_are_not_odd_and_a_huge_one_is():
    targets = np.array([0.0, 0.0, 0.0, 1.0, 1e-9, 2.0, 1e30, 1.5], np.float32)
    assert odd_rows({"y": targets}, 100.0) == (6,)
    assert odd_rows({"y": np.zeros(4, np.float32)}, 100.0) == ()
