"""Tells bad examples from innocent ones under exploded weights.

That a few rows overflow first proves nothing: with weights about to overflow, the
brightest innocent image goes first. Three questions decide. Are the rows that did
not overflow about to? Does the step fail on other batches too, under the same
weights? Does it pass once the suspects are replaced by other rows of the batch?
"""

from __future__ import annotations

import math

import numpy as np

from diagnostics.culprits import Trials, leave_out_search, odd_rows
from diagnostics.diagnosis import FirstNonfinite
from diagnostics.errors import InputError
from diagnostics.op_domains import domain_fault
from diagnostics.op_records import HitDetails
from diagnostics.protocol import Batch, Program, ReplayableRun, State
from diagnostics.tensor_stats import largest_finite

OTHER_BATCHES = 3
# An example this many times larger (or less spread out) than the median one is odd
# as data; one within the smaller factor is like the others.
ODD_FACTOR, UNUSUAL_FACTOR = 100.0, 10.0
# Rows with less room than this share of the type's exponent range are about to
# overflow themselves: 32 of float32's 128 bits, 4 of float16's 16.
NEAR_LIMIT = 0.25


def examples_at_fault(
    run: ReplayableRun,
    program: Program,
    state: State,
    batch: Batch,
    step: int,
    place: FirstNonfinite,
    details: HitDetails | None,
) -> tuple[int, ...]:
    """Rows of the batch that are to blame; empty if the data is innocent.

    Args:
      place: where the step failed, as far as it is known without its examples.
      details: rows of the op at fault, if the op-by-op replay showed it.
    """
    odd, unusual = odd_rows(batch, ODD_FACTOR), odd_rows(batch, UNUSUAL_FACTOR)
    own, overflowed = _own_rows(details), _overflowed(place, details)
    # Ordinary numbers overflow only where the weights or the formula make them large.
    if overflowed and not unusual:
        return ()
    if own and not odd and _weights_exploded(details, own, overflowed):
        return ()
    trials = Trials(program, state, batch, step)
    if own and set(own) <= set(odd) and trials.survives_without(own):
        return own
    others_pass = _other_batches_pass(run, trials, batch, step)
    if others_pass is False:
        return ()
    for suspects in (own, odd):
        if suspects and len(suspects) < trials.rows and trials.survives_without(suspects):
            found = suspects
            break
    else:
        found = leave_out_search(trials)
    if overflowed and not set(found) & set(unusual):
        return ()
    # With no other batch to compare, only rows that are few or stick out are blamed.
    if others_pass is None and not set(found) <= set(odd) and 4 * len(found) > trials.rows:
        return ()
    return found


def _own_rows(details: HitDetails | None) -> tuple[int, ...] | None:
    """Rows of the op's output that are not finite; None where it has no rows."""
    if details is None or details.row_counts is None:
        return None
    return tuple(np.flatnonzero(details.row_counts).tolist())


def _overflowed(place: FirstNonfinite, details: HitDetails | None) -> bool:
    """Whether numbers grew too large, as opposed to a pole such as log(0) or 1/0."""
    if details is None or any(given.nonfinite for given in place.inputs):
        return False
    return domain_fault(place, half=details.dtype == np.float16) is None


def _weights_exploded(details: HitDetails | None, own: tuple[int, ...], overflowed: bool) -> bool:
    """Whether every row is at fault, or the other rows are about to overflow as well."""
    if details is None or details.row_absmax is None:
        return False
    rest = np.delete(details.row_absmax, own)
    if not rest.size:
        return True
    limit = math.log2(largest_finite(details.dtype))
    middle = float(np.median(rest))
    room = (limit - math.log2(middle)) / limit if middle > 0.0 else 1.0
    return overflowed and room < NEAR_LIMIT


def _other_batches_pass(run: ReplayableRun, trials: Trials, batch: Batch, step: int) -> bool | None:
    """Whether most neighbouring batches pass under the same weights; None without any."""
    wanted = [step + 1, step + 2, step - 1, step + 3]
    verdicts: list[bool] = []
    for other in [number for number in wanted if number >= 0][:OTHER_BATCHES]:
        try:
            neighbour = run.batch(other)
        except InputError:  # a damaged file of another step is not this step's affair
            continue
        if neighbour is None or _shapes(neighbour) != _shapes(batch):
            continue
        verdicts.append(trials.survives(neighbour))
        if 2 * verdicts.count(False) > OTHER_BATCHES or 2 * verdicts.count(True) > OTHER_BATCHES:
            break
    if not verdicts:
        return None
    return 2 * verdicts.count(True) > len(verdicts)


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in batch.items()}
