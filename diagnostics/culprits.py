"""Which examples of a batch are to blame, by running the step without them.

Rows left out are replaced by copies of other rows, so that shapes stay and the
compiled step can be used as it is. Rows that stay keep their places, because
dropout masks belong to places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diagnostics.errors import InputError
from diagnostics.protocol import Batch, Program, State

# More culprits than this, or more than half the batch, are not single bad
# examples; and the search stays at a few steps each.
MAX_CULPRITS = 8


class Trials:
    """Runs the failing step on altered batches; each one starts from the same state.

    Args:
      state, batch, step: what the step failed on.

    Attributes:
      runs: how many steps were run.
    """

    def __init__(self, program: Program, state: State, batch: Batch, step: int) -> None:
        self._program, self._state, self._batch, self._step = program, state, batch, step
        self._known: dict[frozenset[int], bool] = {}
        self.rows = batch_rows(batch)
        self.runs = 0

    def survives(self, batch: Batch) -> bool:
        """Whether the step passes on another batch of the same shapes."""
        self.runs += 1
        self._program.load(self._state)
        try:
            return self._program.run(batch, self._step).applied
        except InputError:  # an op of the program refuses it, as a matrix of equal rows
            return False

    def survives_with(self, kept: Sequence[int]) -> bool:
        """Whether the step passes with only these rows, copies filling the other places."""
        key = frozenset(kept)
        if not key:
            return False
        if key not in self._known:
            self._known[key] = self.survives(keep_rows(self._batch, sorted(key)))
        return self._known[key]

    def survives_without(self, rows: Sequence[int]) -> bool:
        """Whether the step passes once these rows are replaced."""
        return self.survives_with(sorted(set(range(self.rows)) - set(rows)))


def leave_out_search(trials: Trials) -> tuple[int, ...]:
    """The rows without which the step passes, each of them needed for that.

    Groups of rows are tried alone, halves first, until some group passes; the
    rows of the others are then added back by halves. One culprit costs about
    2 log2(rows) steps, k of them about k times that.

    Returns:
      Rows in ascending order; empty where no group passes, where too many rows
      are at fault for them to be exceptions, or where they do not explain it.
    """
    limit = min(MAX_CULPRITS, trials.rows // 2)
    innocent, suspect = _first_innocents(trials, limit)
    culprits: list[int] = []
    while suspect:
        group = suspect.pop(0)
        if trials.survives_with(innocent + group):
            innocent = innocent + group
        elif len(group) > 1:
            suspect[:0] = _halves(group)
        else:
            culprits += group
        if len(culprits) > limit:
            return ()
    explained = bool(culprits) and trials.survives_without(culprits)
    return tuple(sorted(culprits)) if explained else ()


def _first_innocents(trials: Trials, limit: int) -> tuple[list[int], list[list[int]]]:
    """(rows of a first group that passes alone, the other groups); ([], []) if none does."""
    groups = [list(range(trials.rows))]
    while len(groups) <= limit and len(groups[0]) > 1:
        groups = [half for group in groups for half in _halves(group)]
        for group in groups:
            if trials.survives_with(group):
                return group, [other for other in groups if other is not group]
    return [], []


def _halves(group: list[int]) -> list[list[int]]:
    middle = (len(group) + 1) // 2
    return [part for part in (group[:middle], group[middle:]) if part]


def batch_rows(batch: Batch) -> int:
    """Leading dimension that most arrays of a batch share; 0 for an empty batch."""
    counts = [values.shape[0] for values in batch.values() if values.ndim]
    return max(set(counts), key=counts.count, default=0)


def keep_rows(batch: Batch, kept: Sequence[int]) -> Batch:
    """The batch with every row that is not kept replaced by copies of those that are."""
    rows = batch_rows(batch)
    source = np.arange(rows)
    others = np.setdiff1d(source, kept)
    source[others] = np.resize(kept, others.size)
    return {
        name: values[source] if values.ndim and values.shape[0] == rows else values
        for name, values in batch.items()
    }


def odd_rows(batch: Batch, factor: float) -> tuple[int, ...]:
    """Rows that stick out as data: by `factor` larger than the median row, or more or less spread.

    Over floating-point arrays. A constant or an empty example is one of no spread;
    of single numbers (a regression target) only large ones are odd.
    """
    odd: set[int] = set()
    rows = batch_rows(batch)
    for values in batch.values():
        if values.ndim == 0 or values.shape[0] != rows or values.dtype.kind != "f":
            continue
        flat = values.reshape(rows, -1).astype(np.float64)
        largest = np.abs(flat).max(axis=1)
        odd.update(np.flatnonzero(largest > factor * _middle(largest)).tolist())
        if flat.shape[1] > 1:
            with np.errstate(invalid="ignore"):  # of infinities
                spread = flat.std(axis=1)
            for measure in (largest, spread):
                far = (measure > factor * _middle(measure)) | (measure < _middle(measure) / factor)
                odd.update(np.flatnonzero(far).tolist())
    return tuple(sorted(odd))


def _middle(measure: np.ndarray) -> float:
    """Median of the rows that are not 0 (sparse data would make it 0)."""
    positive = measure[measure > 0]
    return float(np.median(positive)) if positive.size else 0.0
