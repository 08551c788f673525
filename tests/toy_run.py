"""A tiny complete ReplayableRun: a TensorFlow MLP on made-up numbers, with faults to order.

Five dense layers, momentum SGD, a guard built on `diagnostics.guard`; a thousand
weights, milliseconds a step. `ToyRun(ToyConfig(...)).train(steps)` trains until the
guard refuses a step. Batches and initial weights follow from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from toy_step import (
    CLASSES,
    LAYERS,
    WIDTHS,
    Fault,
    ToyConfig,
    changed,
    faulty,
    forward,
    initial_state,
    loss_of,
    toy_batch,
    without_examples,
)

from diagnostics import guard
from diagnostics.guard import Forward, GuardLayout
from diagnostics.protocol import (
    Batch,
    Change,
    Check,
    LayerFacts,
    RunFacts,
    State,
    StepOutcome,
    Telemetry,
)

__all__ = ["CLASSES", "LAYERS", "Fault", "ToyConfig", "ToyProgram", "ToyRun", "toy_batch"]

LAYOUT = GuardLayout(LAYERS)
COLUMNS = tuple(name for name in LAYOUT.columns() if not name.startswith("top"))


class Proposal(NamedTuple):
    """What a step would do, and what the guard thinks of it.

    Attributes:
      new_state: parameters and momentum by name.
      passed: bool [checks]. numbers: float32 [columns].
    """

    new_state: dict[str, tf.Tensor]
    passed: tf.Tensor
    numbers: tf.Tensor


class ToyProgram:
    """The toy's step with its state in variables; see `diagnostics.protocol.Program`."""

    def __init__(self, config: ToyConfig, change: Change | None = None) -> None:
        self._config = changed(config, change)
        self._change = change
        self._variables = {
            name: tf.Variable(value, trainable=False)
            for name, value in initial_state(config).items()
        }
        self._refused = tf.Variable(False, trainable=False)
        self._compiled = tf.function(self._guarded_step, autograph=False)

    def load(self, state: State) -> None:
        for name, variable in self._variables.items():
            variable.assign(state[name])
        self._refused.assign(False)

    def state(self) -> State:
        return {name: np.array(variable.numpy()) for name, variable in self._variables.items()}

    def run(self, batch: Batch, step: int) -> StepOutcome:
        inputs, labels = self._fed(batch)
        applied, passed, numbers = self._compiled(inputs, labels, tf.constant(step, tf.int64))
        failed = [
            check for check, ok in zip(LAYOUT.checks(), passed.numpy(), strict=True) if not ok
        ]
        telemetry = dict(zip(COLUMNS, numbers.numpy().tolist(), strict=True))
        return StepOutcome(bool(applied), tuple(failed), telemetry)

    def trace(self, batch: Batch, step: int, tracer: Any) -> None:
        inputs, labels = self._fed(batch)
        self._proposal(inputs, labels, tf.constant(step, tf.int64), tracer.phase)

    def release(self) -> None:
        """Its thousand weights may stay where they are."""

    def _fed(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        if self._change is not None and self._change.kind == "without_examples":
            batch = without_examples(batch, self._change.value)
        scale = self._change.value if self._change and self._change.kind == "input_scale" else 1.0
        inputs = batch["inputs"] * np.float32(scale)
        return tf.constant(inputs), tf.constant(batch["labels"])

    def _guarded_step(
        self, inputs: tf.Tensor, labels: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        made = self._proposal(inputs, labels, step, lambda name: None)
        clear = tf.logical_and(tf.reduce_all(made.passed), ~self._refused.read_value())

        def write() -> tf.Tensor:
            for name, value in made.new_state.items():
                self._variables[name].assign(value)
            self._variables["counters/step"].assign_add(1)
            return tf.constant(True)

        def refuse() -> tf.Tensor:
            self._refused.assign(True)
            return tf.constant(False)

        return tf.cond(clear, write, refuse), made.passed, made.numbers

    def _proposal(
        self, inputs: tf.Tensor, labels: tf.Tensor, step: tf.Tensor, enter: Callable[[str], None]
    ) -> Proposal:
        """Computes the step and writes nothing; `enter` is told each phase."""
        enter("forward")
        names = [f"{layer}/{part}" for layer in LAYERS for part in ("kernel", "bias")]
        weights = {name: self._variables[f"params/{name}"].read_value() for name in names}
        velocities = {name: self._variables[f"momentum/{name}"].read_value() for name in names}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(list(weights.values()))
            logits, seen = forward(self._config, weights, inputs, step)
            enter("loss")
            loss, valid = loss_of(self._config, logits, inputs, labels, step)
        enter("backward")
        gradients = dict(zip(names, tape.gradient(loss, list(weights.values())), strict=True))
        enter("update")
        norms = _norms(gradients)
        rate = self._rate(step)
        new_state = self._momentum_step(weights, velocities, gradients, rate, norms, step)
        shown = Forward(guard.extremes(inputs), valid, tf.stack(seen), tf.cast(loss, tf.float32))
        passed = guard.passed_vector(
            shown,
            guard.all_finite(_by_layer(weights)),
            guard.all_finite(_by_layer(gradients)),
            guard.all_finite(_by_layer(new_state)),
        )
        numbers = _numbers(shown, rate, norms, _norms(weights), _norms(velocities))
        return Proposal(new_state, passed, numbers)

    def _rate(self, step: tf.Tensor) -> tf.Tensor:
        rate = tf.constant(self._config.learning_rate, tf.float32)
        if self._config.warmup_steps:
            ramp = (tf.cast(step, tf.float32) + 1.0) / self._config.warmup_steps
            rate *= tf.minimum(1.0, ramp)
        return rate

    def _momentum_step(
        self,
        weights: Mapping[str, tf.Tensor],
        velocities: Mapping[str, tf.Tensor],
        gradients: Mapping[str, tf.Tensor],
        rate: tf.Tensor,
        norms: tf.Tensor,
        step: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        config = self._config
        if config.clip_norm:
            rate *= tf.minimum(1.0, config.clip_norm / tf.maximum(tf.norm(norms), 1e-30))
        new_state = {}
        for name, weight in weights.items():
            velocity = config.momentum * velocities[name] - rate * gradients[name]
            velocity = faulty(config, "update", name.partition("/")[0], velocity, step)
            new_state[f"params/{name}"] = weight + velocity
            new_state[f"momentum/{name}"] = velocity
        return new_state


def _by_layer(tensors: Mapping[str, tf.Tensor]) -> list[list[tf.Tensor]]:
    return [[t for name, t in tensors.items() if layer in name.split("/")] for layer in LAYERS]


def _norms(tensors: Mapping[str, tf.Tensor]) -> tf.Tensor:
    return tf.stack([guard.exact_norm(group) for group in _by_layer(tensors)])


def _numbers(
    shown: Forward, rate: tf.Tensor, norms: tf.Tensor, weights: tf.Tensor, velocities: tf.Tensor
) -> tf.Tensor:
    """float32 [columns], in the order of COLUMNS."""
    scalars = [shown.loss, rate, tf.norm(norms), *tf.unstack(shown.input_extremes)]
    extremes = shown.preactivation_extremes
    ratio = tf.math.divide_no_nan(velocities, weights)
    parts = [tf.stack(scalars), extremes[:, 0], extremes[:, 1], norms, weights, ratio]
    return tf.concat(parts, axis=0)


class ToyRun:
    """A toy training run; see `diagnostics.protocol.ReplayableRun`.

    Attributes:
      config: as asked for. stopped_at: the refused step, or None.
      outcome: the StepOutcome of the last step that was run.
      trained: the program that ran it; spares a test the time to compile another.
    """

    name = "toy"

    def __init__(self, config: ToyConfig, checkpoint_every: int = 8) -> None:
        self.config = config
        self.stopped_at: int | None = None
        self.outcome: StepOutcome | None = None
        self.trained: ToyProgram | None = None
        self._every = checkpoint_every
        self._states: dict[int, State] = {0: initial_state(config)}
        self._rows: list[list[float]] = []
        self.facts = toy_facts(config)

    def train(self, steps: int) -> ToyRun:
        """Runs up to `steps` steps; stops where the guard refuses one."""
        program = self.trained = self.program()
        program.load(self._states[0])
        for step in range(steps):
            state = self._overwrite(step, program)
            if step % self._every == 0:
                self._states[step] = state
            self.outcome = program.run(toy_batch(self.config, step), step)
            self._rows.append([self.outcome.telemetry[name] for name in COLUMNS])
            if not self.outcome.applied:
                self._states[step] = state
                self.stopped_at = step
                break
        return self

    def _overwrite(self, step: int, program: ToyProgram) -> State:
        state = program.state()
        if self.config.overwritten is not None and self.config.overwritten[0] == step:
            state[self.config.overwritten[1]].reshape(-1)[0] = np.nan
            program.load(state)
        return state

    def incident_step(self) -> int | None:
        return self.stopped_at

    def recorded_failures(self) -> tuple[Check, ...]:
        return self.outcome.failed if self.outcome and self.stopped_at is not None else ()

    def telemetry(self) -> Telemetry:
        rows = np.array(self._rows, np.float32).reshape(-1, len(COLUMNS))
        return Telemetry(np.arange(len(rows)), COLUMNS, rows)

    def state_steps(self) -> Sequence[int]:
        return sorted(self._states)

    def state_before(self, step: int) -> State:
        return {name: value.copy() for name, value in self._states[step].items()}

    def batch(self, step: int) -> Batch | None:
        return toy_batch(self.config, step)

    def example_names(self, batch: Batch) -> list[tuple[int, str]]:
        return [(int(number), f"example-{number:02d}") for number in batch["example_ids"]]

    def program(self, change: Change | None = None) -> ToyProgram:
        return ToyProgram(self.config, change)

    def start_state(self, change: Change | None = None) -> State:
        state = initial_state(changed(self.config, change))
        if change is not None and change.kind == "init_scale":
            for name in state:
                if name.startswith("params/"):
                    state[name] *= np.float32(change.value)
        return state

    def changes(self, step: int, suspects: Sequence[int]) -> Sequence[Change]:
        config = self.config
        rates = [config.learning_rate / factor for factor in (3.0, 10.0, 100.0)]
        made = [Change("learning_rate", r, f"learning rate {r:.3g}", rank=2) for r in rates]
        made += [
            Change("clip_norm", 1.0, "gradients clipped to norm 1", rank=1),
            Change("warmup", 20, "warm-up over 20 steps", from_start=True, rank=1),
            Change("init", None, "He's initialiser", from_start=True, rank=2),
            Change("init_scale", 0.1, "initial weights times 0.1", from_start=True, rank=3),
            Change("input_scale", 1.0 / 128.0, "inputs divided by 128", from_start=True, rank=3),
        ]
        for precision in ("float32", "bfloat16", "float16"):
            if precision != config.precision:
                made.append(Change("precision", precision, f"{precision} activations", rank=3))
        if suspects:
            label = "without examples " + ", ".join(map(str, suspects))
            made.append(Change("without_examples", tuple(suspects), label, rank=0))
        if config.loss != "xent":
            made.append(Change("loss_formula", "xent", "cross-entropy from logits", rank=1))
        return made

    def command(self, change: Change) -> str:
        return f"toy train --{change.kind.replace('_', '-')} {change.value}"

    def environment(self) -> Mapping[str, Any]:
        return {"tensorflow": tf.__version__}

    def conditions(self) -> Sequence[str]:
        return []


def toy_facts(config: ToyConfig) -> RunFacts:
    """The facts of a toy run."""
    layers = tuple(
        LayerFacts(
            layer,
            "dense",
            f"params/{layer}/kernel",
            fan_in=WIDTHS[layer][0],
            fan_out=WIDTHS[layer][1],
            activation="linear" if layer == "logits" else "relu",
        )
        for layer in LAYERS
    )
    return RunFacts(
        layers=layers,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        clip_norm=config.clip_norm,
        momentum=config.momentum,
        optimizer="momentum SGD",
        precision=config.precision,
        init="he-normal" if config.sigma is None else f"normal:{config.sigma:g}",
        loss=config.loss,
        classes=CLASSES,
        chance_loss=math.log(CLASSES) if config.loss == "xent" else None,
        batch_size=config.batch_size,
    )
