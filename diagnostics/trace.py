"""Where a failing step first holds a non-finite value, and which examples are to blame.

The compiled step's verdict is the truth; the op-by-op replay adds the op, the
user's line and the numbers. The two may differ (eager and compiled kernels
round and fuse differently), so the search in the replay starts at the compiled
step's first failed check, and `seen_in` says which of the two showed the place.
Where the replay shows nothing there, the check itself is reported: op and
source are None, and count and size 0.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from diagnostics.diagnosis import FirstNonfinite
from diagnostics.errors import NothingToDiagnose
from diagnostics.example_blame import examples_at_fault
from diagnostics.op_records import Hit, OpRecord
from diagnostics.op_trace import OpTrace
from diagnostics.origins import first_origin
from diagnostics.protocol import Batch, Check, Program, ReplayableRun, State, StepOutcome
from diagnostics.standing_values import in_batch, in_state

COMPILED, OP_BY_OP = "compiled step", "op-by-op replay"


def locate(
    run: ReplayableRun,
    program: Program,
    state: State,
    batch: Batch,
    step: int,
    outcome: StepOutcome,
) -> FirstNonfinite:
    """The first non-finite value of a failing step, in order of execution.

    Leaves `program` with some state of its own making; load it before using it
    again.

    Args:
      program: the step as it trained. state, batch: what it failed on.
      outcome: what the compiled step showed.

    Raises:
      NothingToDiagnose: no check failed.
    """
    if not outcome.failed:
        raise NothingToDiagnose(f"step {step} holds no non-finite value", "Choose another step")
    standing = in_batch(run, program, state, batch, step, outcome) or in_state(run.facts, state)
    if standing is not None:
        return standing
    program.load(state)
    hit = first_origin(_trace(run, program, batch, step), outcome.failed)
    place = _by_check(outcome) if hit is None else _by_hit(hit, outcome)
    details = None if hit is None else hit.details
    rows = examples_at_fault(run, program, state, batch, step, place, details)
    names = run.example_names(batch)
    return dataclasses.replace(
        place,
        examples=tuple(names[row][0] for row in rows),
        example_names=tuple(names[row][1] for row in rows),
    )


def trace_healthy(run: ReplayableRun, program: Program, batch: Batch, step: int) -> list[OpRecord]:
    """Every op of a healthy step, with its layer, phase and largest absolute value.

    `program` must hold the state before the step, and keeps it. What is not finite
    in a healthy step is used by nothing (with op determinism, TensorFlow's
    cross-entropy makes NaN for labels out of range), and is left out.
    """
    records = _trace(run, program, batch, step).records
    return [record for record in records if math.isfinite(record.absmax)]


def _trace(run: ReplayableRun, program: Program, batch: Batch, step: int) -> OpTrace:
    layers = [layer.name for layer in run.facts.layers]
    tracer = OpTrace(layers=layers, batch_size=len(run.example_names(batch)))
    # An op that refuses its input (a label out of range) ends the replay early;
    # what was seen until then stands.
    try:
        with tracer:
            program.trace(batch, step, tracer)
    except tf.errors.InvalidArgumentError as error:
        tracer.ended_by = error.message
    return tracer


def _by_hit(hit: Hit, outcome: StepOutcome) -> FirstNonfinite:
    record, details = hit.record, hit.details
    layer = record.layer
    if record.phase == "update" and layer is None:
        layer = outcome.failed[0].layer or None
    confirmed = any(
        check.stage == record.phase and layer in (None, check.layer) for check in outcome.failed
    )
    return FirstNonfinite(
        stage=record.phase,
        layer=layer,
        op=record.op,
        source=None if record.line is None else str(record.line),
        kind=hit.kind,
        count=0 if details is None else details.count,
        size=0 if details is None else details.size,
        inputs=() if details is None else details.inputs,
        seen_in=COMPILED if confirmed else OP_BY_OP,
        dtype=None if details is None else details.dtype.name,
    )


def _by_check(outcome: StepOutcome) -> FirstNonfinite:
    check = outcome.failed[0]
    values = [outcome.telemetry.get(name, 0.0) for name in _columns(check)]
    infinite = any(map(math.isinf, values)) and not any(map(math.isnan, values))
    return FirstNonfinite(
        stage=check.stage,
        layer=check.layer or None,
        op=None,
        source=None,
        kind="inf" if infinite else "nan",
        count=0,
        size=0,
        seen_in=COMPILED,
    )


def _columns(check: Check) -> list[str]:
    """Telemetry columns that show the value a check looks at."""
    if check.stage == "loss":
        return ["loss"]
    ends = {
        "forward": ["preactivation_max", "preactivation_min"],
        "backward": ["gradient_norm"],
    }
    return [f"{check.layer}/{end}" for end in ends.get(check.stage, [])]
