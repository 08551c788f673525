"""Non-finite values that were there before the step began: in its batch or in its state."""

from __future__ import annotations

import numpy as np

from diagnostics.culprits import Trials
from diagnostics.diagnosis import FirstNonfinite, InputRange
from diagnostics.protocol import Batch, Program, ReplayableRun, RunFacts, State, StepOutcome
from diagnostics.tensor_stats import TensorStats, describe

# Groups of the state that may hold infinities by design (a best error so far).
_BOOKKEEPING = ("schedule", "counters")
# A setting: what it breaks is the update.
_RATE = "optimizer/learning_rate"
_FLOATS = "fcV"  # numpy files bfloat16 under V


def in_batch(
    run: ReplayableRun,
    program: Program,
    state: State,
    batch: Batch,
    step: int,
    outcome: StepOutcome,
) -> FirstNonfinite | None:
    """A non-finite input, label or weight of an example, or a label out of range.

    A net may ignore such a value (a masked feature, a label that means 'none'),
    so it counts only where a check of the data failed, or where the compiled
    step passes once these rows are replaced by others, or these values by 0.
    """
    checked = any(check.stage == "data" for check in outcome.failed)
    names = run.example_names(batch)
    for name, bad in _suspects(run.facts, batch):
        rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)).tolist() if bad.ndim else []
        trials = Trials(program, state, batch, step)
        mended = {**batch, name: np.where(bad, np.zeros((), batch[name].dtype), batch[name])}
        if not (checked or trials.survives_without(rows) or trials.survives(mended)):
            continue
        stats = describe(batch[name])
        return FirstNonfinite(
            stage="data",
            layer=None,
            op=None,
            source=None,
            kind="inf" if stats.nan == 0 and not stats.finite else "nan",
            count=int(bad.sum()),
            size=batch[name].size,
            examples=tuple(names[row][0] for row in rows),
            example_names=tuple(names[row][1] for row in rows),
            inputs=(_range(name, batch[name], stats),),
        )
    return None


def _suspects(facts: RunFacts, batch: Batch) -> list[tuple[str, np.ndarray]]:
    """(array, bool of its shape) of the arrays that hold something out of order."""
    found = []
    for name, values in batch.items():
        if values.dtype.kind in _FLOATS:
            bad = ~np.isfinite(values)
        elif name == "labels" and facts.classes is not None:
            bad = (values < 0) | (values >= facts.classes)
        else:
            continue
        if bad.any():
            found.append((name, bad))
    return found


def in_state(facts: RunFacts, state: State) -> FirstNonfinite | None:
    """The first array, in order of layers, that was not finite before the step.

    `inputs` names it and the other arrays that are not finite.
    """
    order = {layer.name: place for place, layer in enumerate(facts.layers)}
    found = []
    for name, values in state.items():
        if name.partition("/")[0] in _BOOKKEEPING or name == _RATE:
            continue
        if values.dtype.kind not in _FLOATS:
            continue
        stats = describe(values)
        if not stats.finite:
            found.append((name, layer_of(name, facts), stats))
    if not found:
        return None
    # Python's sort is stable: within a layer, parameters come before their slots.
    found.sort(key=lambda item: order.get(item[1] or "", len(order)))
    _, layer, stats = found[0]
    return FirstNonfinite(
        stage="weights",
        layer=layer,
        op=None,
        source=None,
        kind="nan" if stats.nan else "inf",
        count=stats.nan + stats.pos_inf + stats.neg_inf,
        size=stats.size,
        inputs=tuple(_range(name, state[name], shown) for name, _, shown in found),
    )


def layer_of(name: str, facts: RunFacts) -> str | None:
    """The layer of a state array: 'fc1' for 'params/fc1/kernel'."""
    parts = f"/{name}/"
    matches = [layer.name for layer in facts.layers if f"/{layer.name}/" in parts]
    if matches:
        return max(matches, key=len)
    middle = name.split("/")[1:-1]
    return "/".join(middle) or None


def _range(name: str, values: np.ndarray, stats: TensorStats) -> InputRange:
    bad = stats.nan + stats.pos_inf + stats.neg_inf
    return InputRange(name, values.shape, stats.minimum, stats.maximum, bad)
