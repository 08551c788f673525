"""`locate`: the place of a failure on the toy run, injected and natural."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import toy_step
from toy_run import LAYERS, Fault, ToyConfig, ToyProgram, ToyRun, toy_batch
from toy_step import initial_state

from diagnostics import trace
from diagnostics.culprits import Trials
from diagnostics.diagnosis import FirstNonfinite
from diagnostics.errors import InputError, NothingToDiagnose
from diagnostics.op_trace import OpTrace
from diagnostics.protocol import Batch, Check, State, StepOutcome


class Counting(ToyProgram):
    """A toy program that counts its runs."""

    runs = 0

    def run(self, batch: Batch, step: int) -> StepOutcome:
        self.runs += 1
        return super().run(batch, step)


def located(config: ToyConfig) -> FirstNonfinite:
    """Trains the toy until the guard stops it, and locates."""
    run = ToyRun(config).train(30)
    step = run.stopped_at
    assert step is not None and run.trained is not None, "the run did not fail"
    return locate_with(run, run.trained, run.state_before(step), toy_batch(config, step), step)


def locate_with(
    run: ToyRun, program: ToyProgram, state: State, batch: Batch, step: int
) -> FirstNonfinite:
    program.load(state)
    return trace.locate(run, program, state, batch, step, program.run(batch, step))


def line_with(text: str) -> str:
    """'toy_step.py:<number>' of the only line that holds the text."""
    lines = Path(toy_step.__file__).read_text().splitlines()
    (number,) = [place for place, line in enumerate(lines, 1) if text in line]
    return f"toy_step.py:{number} in "


PLACES = [
    *(("forward", layer) for layer in LAYERS),
    ("loss", ""),
    *(("backward", layer) for layer in LAYERS),
    *(("update", layer) for layer in LAYERS),
]
KINDS = {"nan": "factor = one / one", "inf": "tf.where(hit, 3e38, 1.0)"}


def check_injected(stage: str, layer: str, kind: str) -> None:
    found = located(ToyConfig(fault=Fault(stage, layer, 0, kind)))
    assert (found.stage, found.layer or "", found.kind) == (stage, layer, kind)
    assert found.op == {"nan": "RealDiv", "inf": "Mul"}[kind]
    assert found.source is not None and found.source.startswith(line_with(KINDS[kind]))
    assert (found.count, found.size, found.examples) == (1, 1, ())
    assert found.seen_in == "compiled step"


@pytest.mark.parametrize(("place", "kind"), list(zip(PLACES, ["nan", "inf"] * 8, strict=True)))
def test_an_injected_fault_is_found_where_it_is(place, kind):
    check_injected(*place, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "kind"), list(zip(PLACES, ["inf", "nan"] * 8, strict=True)))
def test_the_other_kind_is_found_too(place, kind):
    check_injected(*place, kind)


def test_log_of_zero():
    found = located(ToyConfig(loss="log_of_zero", sigma=10.0))
    assert (found.stage, found.layer, found.op, found.kind) == ("loss", None, "Log", "inf")
    assert found.source == line_with("tf.math.log(probability)") + (
        "loss_of: per_example = -tf.math.log(probability)"
    )
    assert 1 <= found.count < found.size == 8
    (shown,) = found.inputs
    assert (shown.name, shown.shape, shown.minimum) == ("x", (8,), 0.0)
    # Other batches hit zero as well: the formula is at fault, not these examples.
    assert found.examples == ()


def test_square_root_of_zero_shows_only_backwards():
    found = located(ToyConfig(loss="sqrt_backward", poisoned={11: "zero"}))
    assert (found.stage, found.op, found.kind, found.count) == ("backward", "SqrtGrad", "inf", 1)
    assert found.source is not None
    assert found.source.startswith(line_with("tf.sqrt(tf.reduce_sum("))
    assert (found.examples, found.example_names) == ((11,), ("example-11",))


def test_odd_examples_are_blamed_even_if_every_batch_has_some():
    config = ToyConfig(loss="sqrt_backward", poisoned=dict.fromkeys(range(0, 64, 3), "zero"))
    batches = [toy_batch(config, step)["example_ids"] for step in range(4)]
    zeros = [tuple(int(e) for e in batch if e % 3 == 0) for batch in batches]
    assert all(zeros)
    assert located(config).examples == zeros[0]


def test_division_by_zero_variance():
    found = located(ToyConfig(loss="division_by_variance", poisoned={11: "constant"}))
    assert (found.stage, found.op, found.kind, found.examples) == ("loss", "RealDiv", "inf", (11,))
    assert [shown.name for shown in found.inputs] == ["x", "y"]
    assert found.inputs[1].minimum == 0.0


def poisoned_batch(config: ToyConfig, rows: dict[int, float]) -> Batch:
    """Step 0's batch with rows times a factor."""
    batch = toy_batch(config, 0)
    for row, factor in rows.items():
        batch["inputs"][row] *= np.float32(factor)
    return batch


def ids(batch: Batch, *rows: int) -> tuple[int, ...]:
    return tuple(int(batch["example_ids"][row]) for row in rows)


@pytest.mark.parametrize("rows", [{3: 1e38}, {1: 1e38, 6: 1e38}])
def test_poisoned_examples_are_found_by_their_own_rows(rows):
    config = ToyConfig(sigma=3.0)
    batch = poisoned_batch(config, rows)
    found = locate_with(ToyRun(config), ToyProgram(config), initial_state(config), batch, 0)
    assert (found.stage, found.layer, found.op) == ("forward", "dense1", "MatMul")
    assert found.examples == ids(batch, *rows)


def test_two_examples_that_are_bad_in_different_ways_are_both_found():
    config = ToyConfig(sigma=3.0, loss="division_by_variance")
    batch = poisoned_batch(config, {6: 1e38})
    batch["inputs"][3] = 2.0  # no variance: the loss divides by 0
    found = locate_with(ToyRun(config), ToyProgram(config), initial_state(config), batch, 0)
    assert (found.stage, found.layer) == ("forward", "dense1")
    assert found.examples == ids(batch, 3, 6)


@pytest.mark.parametrize("rows", [{3: 1e22}, {1: 1e22, 6: 1e22}])
def test_poisoned_examples_are_found_by_leaving_them_out(rows, monkeypatch):
    # Products over the batch have no rows of their own.
    config = ToyConfig(loss="covariance")
    batch = poisoned_batch(config, rows)
    program = Counting(config)
    monkeypatch.setattr("diagnostics.example_blame.odd_rows", lambda batch, factor: tuple(range(8)))
    found = locate_with(ToyRun(config), program, initial_state(config), batch, 0)
    assert (found.stage, found.op, found.size) == ("loss", "MatMul", 16)
    assert found.examples == ids(batch, *rows)
    assert program.runs <= 1 + 3 + 14


def test_ordinary_examples_under_exploded_weights_are_innocent(monkeypatch):
    def needless(self: Trials, batch: Batch) -> bool:
        raise AssertionError("this can be told without running a step")

    monkeypatch.setattr(Trials, "survives", needless)
    for config in (ToyConfig(sigma=10.0), ToyConfig(sigma=3.0), ToyConfig(learning_rate=50.0)):
        found = located(config)
        assert found.stage == "forward" and found.op == "MatMul"
        assert found.count < found.size  # only some rows overflowed
        assert (found.examples, found.example_names) == ((), ())


def test_a_bright_example_under_exploded_weights_is_innocent():
    # It overflows alone, and other batches pass; but all others are about to overflow.
    config = ToyConfig()
    state, batch = initial_state(config), poisoned_batch(config, {3: 30.0})
    state["params/dense1/kernel"] *= 1e37
    state["params/dense2/kernel"] *= 1e-37
    found = locate_with(ToyRun(config), ToyProgram(config), state, batch, 0)
    assert (found.stage, found.layer, found.kind) == ("forward", "dense1", "inf")
    assert found.count < 17 and found.examples == ()


def test_an_ordinary_example_that_alone_meets_an_exploded_weight_is_innocent(monkeypatch):
    config = ToyConfig()
    batch = toy_batch(config, 0)
    batch["inputs"][:, 1] = 0.0
    neighbour = {name: values.copy() for name, values in batch.items()}
    batch["inputs"][2, 1] = 4.0
    batch["inputs"][5] *= 30.0  # unusual, and not at fault
    state = initial_state(config)
    state["params/dense1/kernel"][1, 0] = 3e38
    monkeypatch.setattr(ToyRun, "batch", lambda self, step: neighbour)
    program = Counting(config)
    found = locate_with(ToyRun(config), program, state, batch, 0)
    assert (found.stage, found.layer, found.count) == ("forward", "dense1", 1)
    assert found.examples == () and program.runs > 1


def test_an_innocent_batch_after_a_poisoned_one_is_innocent():
    # Example 11 is in step 4's batch; its gradients ruin the weights, step 5 fails.
    config = ToyConfig(poisoned={11: "huge"})
    run = ToyRun(config).train(10)
    assert run.stopped_at == 5 and 11 not in toy_batch(config, 5)["example_ids"]
    assert located(config).examples == ()


@pytest.mark.parametrize("error", [None, InputError("image 7 is damaged")])
def test_without_other_batches_only_few_or_odd_rows_are_blamed(monkeypatch, error):
    def batch(self: ToyRun, step: int) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(ToyRun, "batch", batch)
    assert located(ToyConfig(loss="log_of_zero", sigma=10.0)).examples == ()
    assert located(ToyConfig(loss="sqrt_backward", poisoned={11: "zero"})).examples == (11,)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_bad_input(kind):
    found = located(ToyConfig(poisoned={11: kind}))
    assert (found.stage, found.layer, found.op, found.kind) == ("data", None, None, kind)
    assert (found.count, found.size, found.examples) == (2, 48, (11,))
    (shown,) = found.inputs
    assert (shown.name, shown.nonfinite) == ("inputs", 2)


def test_a_label_out_of_range():
    found = located(ToyConfig(poisoned={11: "label", 26: "label"}))
    assert (found.stage, found.kind, found.count, found.size) == ("data", "nan", 1, 8)
    assert found.examples == (26,)  # the first of the two to be drawn
    (shown,) = found.inputs
    assert (shown.name, shown.maximum) == ("labels", 4.0)


class Ignoring(ToyProgram):
    """Drops every feature that is not finite before the step sees it."""

    def _fed(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        batch = {**batch, "inputs": np.nan_to_num(batch["inputs"], posinf=0.0, neginf=0.0)}
        return super()._fed(batch)


def test_a_value_that_the_net_ignores_is_not_the_place():
    config = ToyConfig(fault=Fault("forward", "dense3"))
    batch = poisoned_batch(config, {2: np.inf})
    found = locate_with(ToyRun(config), Ignoring(config), initial_state(config), batch, 0)
    assert (found.stage, found.layer) == ("forward", "dense3")


class Unguarded(ToyProgram):
    """Its guard does not look at the data."""

    def run(self, batch: Batch, step: int) -> StepOutcome:
        outcome = super().run(batch, step)
        failed = tuple(check for check in outcome.failed if check.stage != "data")
        return dataclasses.replace(outcome, failed=failed)


@pytest.mark.parametrize("rows", [[2], list(range(8))])
def test_bad_input_is_found_where_no_check_looks_at_it(rows):
    config = ToyConfig()
    batch = poisoned_batch(config, dict.fromkeys(rows, np.nan))
    program = Unguarded(config)
    found = locate_with(ToyRun(config), program, initial_state(config), batch, 0)
    assert (found.stage, found.count) == ("data", 6 * len(rows))
    assert found.examples == ids(batch, *rows)


@pytest.mark.parametrize("group", ["params", "momentum"])
def test_a_damaged_array_is_named(group):
    found = located(ToyConfig(overwritten=(3, f"{group}/dense2/kernel")))
    assert (found.stage, found.layer, found.op, found.kind) == ("weights", "dense2", None, "nan")
    assert (found.count, found.size) == (1, 16 * 14)
    assert [shown.name for shown in found.inputs] == [f"{group}/dense2/kernel"]


def test_damaged_arrays_come_in_order_of_layers():
    state = initial_state(ToyConfig())
    state["params/dense3/bias"][:] = np.inf
    state["momentum/dense2/kernel"][0] = -np.inf
    state["schedule/best"] = np.array(np.inf, np.float32)  # by design
    facts = ToyRun(ToyConfig()).facts
    found = trace.in_state(facts, dict(reversed(state.items())))
    assert found is not None
    assert (found.layer, found.kind, found.count) == ("dense2", "inf", 14)
    names = ["momentum/dense2/kernel", "params/dense3/bias"]
    assert [shown.name for shown in found.inputs] == names
    del state["params/dense3/bias"], state["momentum/dense2/kernel"]
    assert trace.in_state(facts, state) is None


class Silent(ToyProgram):
    """Its op-by-op replay does not show what the compiled step showed."""

    def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
        healthy = ToyProgram(dataclasses.replace(self._config, fault=None))
        healthy.load(self.state())
        healthy.trace(batch, step, tracer)


def test_a_replay_that_shows_nothing_leaves_the_failed_check():
    config = ToyConfig(fault=Fault("backward", "dense2"))
    found = locate_with(
        ToyRun(config), Silent(config), initial_state(config), toy_batch(config, 0), 0
    )
    assert (found.stage, found.layer, found.kind) == ("backward", "dense2", "nan")
    assert (found.op, found.source, found.count, found.size) == (None, None, 0, 0)
    assert found.seen_in == "compiled step"


class Blind(ToyProgram):
    """A compiled step that only looks at the loss."""

    def run(self, batch: Batch, step: int) -> StepOutcome:
        outcome = super().run(batch, step)
        failed = tuple(check for check in outcome.failed if check.stage == "loss")
        return dataclasses.replace(outcome, failed=failed)


def test_what_only_the_replay_shows_is_said_to_be_so():
    config = ToyConfig(fault=Fault("forward", "dense2"))
    found = locate_with(
        ToyRun(config), Blind(config), initial_state(config), toy_batch(config, 0), 0
    )
    assert (found.stage, found.layer) == ("forward", "dense2")
    assert found.seen_in == "op-by-op replay"


def test_a_check_decides_between_two_faults():
    # An op whose NaN the rest removes again comes first, but did not fail the step.
    class Harmless(ToyProgram):
        def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
            tracer.phase("forward")
            with tf.name_scope("dense1"):
                values = tf.constant([0.0, 1.0])
                tf.where(values > 0.5, tf.math.log(values), 0.0) + 1.0
            super().trace(batch, step, tracer)

    for stage, layer in (("forward", "dense1"), ("loss", ""), ("update", "logits")):
        config = ToyConfig(fault=Fault(stage, layer))
        batch = toy_batch(config, 0)
        found = locate_with(ToyRun(config), Harmless(config), initial_state(config), batch, 0)
        assert (found.stage, found.layer or "", found.op) == (stage, layer, "RealDiv")


def test_a_value_that_nothing_uses_does_not_mislead():
    class Idle(ToyProgram):
        def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
            tracer.phase("forward")
            with tf.name_scope("dense1"):
                tf.math.log([0.0])
            super().trace(batch, step, tracer)

    for stage, layer in (("forward", "dense3"), ("loss", ""), ("update", "logits")):
        config = ToyConfig(fault=Fault(stage, layer))
        batch = toy_batch(config, 0)
        found = locate_with(ToyRun(config), Idle(config), initial_state(config), batch, 0)
        assert (found.stage, found.layer or "", found.op) == (stage, layer, "RealDiv")


def test_a_layer_without_a_name_scope_is_found_by_its_stage():
    class Renamed(ToyProgram):
        def run(self, batch: Batch, step: int) -> StepOutcome:
            outcome = super().run(batch, step)
            failed = tuple(c._replace(layer="block7") for c in outcome.failed if c.layer)
            return dataclasses.replace(outcome, failed=failed)

    config = ToyConfig(fault=Fault("forward", "dense2"))
    batch = toy_batch(config, 0)
    found = locate_with(ToyRun(config), Renamed(config), initial_state(config), batch, 0)
    assert (found.stage, found.layer, found.op) == ("forward", "dense2", "RealDiv")
    assert found.seen_in == "op-by-op replay"


def test_an_op_that_refuses_its_input_ends_the_replay():
    class Refusing(ToyProgram):
        def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
            super().trace(batch, step, tracer)
            tf.nn.sparse_softmax_cross_entropy_with_logits([9], [[0.0, 1.0]])

    config = ToyConfig(fault=Fault("forward", "dense1"))
    batch = toy_batch(config, 0)
    found = locate_with(ToyRun(config), Refusing(config), initial_state(config), batch, 0)
    assert (found.stage, found.layer) == ("forward", "dense1")


def test_overflow_of_float16_is_found():
    found = located(ToyConfig(precision="float16", input_scale=1e4))
    assert (found.stage, found.op, found.kind) == ("forward", "MatMul", "inf")
    assert found.examples == ()


def test_a_healthy_step_is_nothing_to_locate():
    run = ToyRun(ToyConfig())
    with pytest.raises(NothingToDiagnose, match="step 0 holds no non-finite value"):
        program = run.program()
        locate_with(run, program, initial_state(run.config), toy_batch(run.config, 0), 0)


def test_a_healthy_step_is_traced_in_order():
    run = ToyRun(ToyConfig())
    program, batch = run.program(), toy_batch(run.config, 0)
    program.load(initial_state(run.config))
    before = program.state()
    records = trace.trace_healthy(run, program, batch, 0)
    after = program.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    forward = [r.layer for r in records if r.phase == "forward" and r.op == "MatMul"]
    backward = [r.layer for r in records if r.phase == "backward" and r.op == "MatMul"]
    assert forward == list(LAYERS)
    assert list(dict.fromkeys(backward)) == list(reversed(LAYERS))
    phases = list(dict.fromkeys(record.phase for record in records))
    assert phases == ["forward", "loss", "backward", "update"]
    assert all(math.isfinite(record.absmax) for record in records)
    recorded = program.run(batch, 0).telemetry["logits/preactivation_max"]
    logits = [r for r in records if r.layer == "logits" and r.op == "BiasAdd"]
    assert len(logits) == 1 and logits[0].absmax >= abs(recorded) > 0


def test_the_replay_never_names_a_check_that_did_not_fail():
    # Only the update failed; a forward value that the replay alone shows is not blamed.
    config = ToyConfig(fault=Fault("update", "dense4"))
    outcome = StepOutcome(False, (Check("update", "dense4", "new weights"),), {})
    run, program = ToyRun(config), ToyProgram(config)
    program.load(initial_state(config))
    batch = toy_batch(config, 0)
    found = trace.locate(run, program, initial_state(config), batch, 0, outcome)
    assert (found.stage, found.layer) == ("update", "dense4")
