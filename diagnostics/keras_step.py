"""A user's Keras train step with the tripwire around it.

The step is traced as it is. What it shows (`keras_taps`) is reduced to one flag
per check and one row of telemetry; nothing it writes stays if a flag is down:
its one optimizer update is gated (`keras_update`), or, under XLA, several
replicas or several updates, everything it wrote is put back. Nothing is raised
from inside the graph, and nothing but the flags and the row leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from diagnostics.guard import all_finite
from diagnostics.keras_names import LayerNames, StateNames, find_optimizers, native
from diagnostics.keras_probe import Plan, probe
from diagnostics.keras_readings import apart, extremes
from diagnostics.keras_taps import Recorder, Tap, recording
from diagnostics.keras_update import (
    Group,
    Update,
    exact_sight,
    global_norm,
    gradients_exempt,
    group_by_layer,
    guarded_update,
    new_state,
)
from diagnostics.keras_xla_sight import xla_all_finite, xla_sight
from diagnostics.protocol import Check, State, StepOutcome

INPUT, LABELS, SAMPLE_WEIGHTS = "input", "labels", "sample weights"
RUNAWAY_LOSS, RUNAWAY_GRADIENT = "loss beyond its limit", "gradient norm beyond its limit"


class Layout(NamedTuple):
    """Names of the flags and of the telemetry row that one trace returns.

    Attributes:
      hard: by check, whether it stops the run by itself. A NaN in the data that
        a model's own layer or loss deals with is told only if something else trips.
    """

    checks: tuple[Check, ...]
    hard: tuple[bool, ...]
    columns: tuple[str, ...]


class _Sight(NamedTuple):
    """Flags of one kind, in order, with whether each stops the run by itself."""

    checks: list[Check]
    passed: tf.Tensor  # bool [checks]
    hard: bool = True


class GuardedStep:
    """Stands in for a model's `train_step` while a guard is on.

    Returns {"logs": the user's result, "guard": {"layout", "passed", "telemetry",
    "before"}}.

    Attributes:
      layouts: of every trace so far; "layout" is the index.
      state: the variables that make up the state, once a first trace is there.
      layer_order: labels of layers and operations as the last trace called them.
      initial: their values before the first step, if `keep_initial` bytes allow it.
    """

    def __init__(self, model: Any, train_step: Callable[[Any], Any], keep_initial: int = 0) -> None:
        self.model = model
        self.layouts: list[Layout] = []
        self.state: StateNames | None = None
        self.initial: State | None = None
        self.layer_order: list[str] = []
        # Larger losses (by size) and gradient norms are refused like non-finite ones.
        self.limits = tf.Variable([np.inf, np.inf], trainable=False, dtype=tf.float32)
        self._train_step = train_step
        self._keep_initial = keep_initial
        self._plan: Plan | None = None

    def prepare(self, data: Any) -> None:
        """Builds what the first step would build, and keeps the state before it.

        Call it eagerly with the first batch; without it the first trace does the same,
        but cannot see the initial values yet.
        """
        # (Callbacks run outside the strategy's scope, so the model is asked for it.)
        if self.model.run_eagerly or self.model.distribute_strategy.num_replicas_in_sync > 1:
            _build_optimizers(self.model)
            self.state = StateNames(self.model)
        else:
            self._plan, self.state = probe(self.model, self._train_step, data, self._may_gate())
        if self.state.bytes() <= self._keep_initial:
            self.initial = self.state.arrays()

    def __call__(self, data: Any) -> dict[str, Any]:
        strategy = tf.distribute.has_strategy()
        if tf.executing_eagerly() or strategy:
            self.state = StateNames(self.model)
            self._plan = Plan(False, tuple(self.state.variables))
        elif self._plan is None:
            self._plan, self.state = probe(self.model, self._train_step, data, self._may_gate())
        assert self.state is not None and self._plan is not None
        return _Trace(self, self._plan, self.state).run(data)

    def _may_gate(self) -> bool:
        return not self.model.jit_compile

    def original(self, data: Any) -> Any:
        """The user's train step."""
        return self._train_step(data)

    def add_layout(self, layout: Layout) -> int:
        """Index of the layout, the same for equal ones."""
        if layout not in self.layouts:
            self.layouts.append(layout)
        return self.layouts.index(layout)


def read_outcome(guarded: GuardedStep, shown: dict[str, Any]) -> StepOutcome:
    """What a guarded step returned, by names; finishes the refusal of a step under XLA.

    Checks of the data that do not stop a run by themselves are told where another
    check failed.
    """
    layout = guarded.layouts[int(shown["layout"])]
    passed = np.asarray(shown["passed"]) > 0.5
    applied = all(ok or not hard for ok, hard in zip(passed, layout.hard, strict=True))
    failed: list[Check] = []
    if not applied:
        assert guarded.state is not None
        for name, value in shown["before"].items():
            native(guarded.state.variables[name]).assign(value)
        down = [check for check, ok in zip(layout.checks, passed, strict=True) if not ok]
        failed = list(dict.fromkeys(down))
    row = np.asarray(shown["telemetry"], np.float32).tolist()
    return StepOutcome(applied, tuple(failed), dict(zip(layout.columns, row, strict=True)))


def guarded_function(
    model: Any, keep_initial: int = 0
) -> tuple[GuardedStep, Callable[[Any], dict[str, Any]]]:
    """A train function of Keras' own making around a guarded step; the model keeps its own.

    Returns:
      The step, and the function: give it an iterator over one batch.
    """
    step = GuardedStep(model, model.train_step, keep_initial)
    plain = model.train_function
    object.__setattr__(model, "train_step", step)
    try:
        model.make_train_function(force=True)
        return step, model.train_function
    finally:
        object.__delattr__(model, "train_step")
        model.train_function = plain


class _Trace:
    """One trace of a guarded step (or one eager run of it)."""

    def __init__(self, step: GuardedStep, plan: Plan, state: StateNames) -> None:
        self._step = step
        self._plan = plan
        self._variables = {name: local(v) for name, v in state.variables.items()}
        self._names = LayerNames(step.model)
        self._optimizers = find_optimizers(step.model)
        self._updates: list[tuple[list[Group], Update]] = []
        self._rate: tf.Tensor | None = None
        self._sights: list[_Sight] = []

    def run(self, data: Any) -> dict[str, Any]:
        self._saved = {n: tf.identity(self._variables[n]) for n in self._plan.written}
        self._recorder = Recorder(self._names)
        self._recorder.on_apply = self._on_apply
        self._data_taps = data_taps(data)
        with recording(self._recorder, self._step.model, self._optimizers):
            logs = self._step.original(data)
        self._step.layer_order = self._recorder.layer_calls
        return {"logs": logs, "guard": self._finish()}

    def _on_apply(
        self, optimizer: Any, apply: Callable[..., Any], grads: list, variables: list
    ) -> None:
        groups = group_by_layer(self._names, optimizer, grads, variables)
        if self._rate is None:
            self._rate = tf.cast(optimizer.learning_rate, tf.float32)
        if not groups:
            return apply(grads, variables)
        touched = [native(v) for v in (*variables, *optimizer.variables)]
        if self._plan.gate:
            clear = self._all_clear(self._before_update())
            limit = self._step.limits[1]
            update = guarded_update(
                optimizer, lambda: apply(grads, variables), groups, clear, touched, limit
            )
        else:
            exempt = gradients_exempt(optimizer)
            xla = self._step.model.jit_compile and not tf.executing_eagerly()
            look, look_again = (xla_sight, xla_all_finite) if xla else (exact_sight, all_finite)
            gradients, weights, *norms = look(groups)
            apply(grads, variables)
            state = look_again(new_state(optimizer, groups, touched))
            applied = tf.constant(True)
            update = Update(applied, tf.logical_or(gradients, exempt), weights, state, *norms)
        self._updates.append((groups, update))
        return None

    def _before_update(self) -> list[_Sight]:
        """Flags of all that was traced so far, for the gate."""
        if not self._sights:
            self._data = _sight_of_taps(self._data_taps, hard=False)
            self._forward = _sight_of_taps(self._recorder.taps)
            labels = self._recorder.labels_valid
            self._sights = [
                self._data[0],
                _Sight([Check("data", "", LABELS)] * len(labels), _stacked(labels)),
                self._forward[0],
                self._statistics(),
                self._loss_within_limit(),
            ]
        return self._sights

    def _loss_within_limit(self) -> _Sight:
        if self._recorder.loss is None:
            return _Sight([], _stacked([]))
        self._loss = tf.cast(self._recorder.loss, tf.float32)
        if self._loss.shape.rank != 0:
            self._loss = tf.reduce_mean(self._loss)
        size = tf.abs(self._loss)
        # NaN is the business of the other check of the loss. (Not `~(size > limit)`: the
        # graph optimizer makes `size <= limit` of that, which is false for NaN.)
        within = tf.logical_or(size <= self._step.limits[0], tf.math.is_nan(size))
        return _Sight([Check("loss", "", RUNAWAY_LOSS)], tf.stack([within]))

    def _statistics(self) -> _Sight:
        """Flags of variables that are no weights, as moving means, after the forward pass."""
        by_layer: dict[str, list[tf.Tensor]] = {}
        for name, before in self._saved.items():
            kind, _, rest = name.partition("/")
            if kind == "statistics" and before.dtype.is_floating:
                after = tf.identity(self._variables[name])
                after = apart(after) if self._step.model.jit_compile else after
                # What was infinite by the user's own wish may stay so; nobody wishes for NaN.
                kept = tf.logical_or(tf.math.is_finite(after), tf.math.is_inf(before))
                by_layer.setdefault(rest.rpartition("/")[0], []).append(tf.reduce_all(kept))
        checks = [Check("forward", layer, "moving statistics") for layer in by_layer]
        flags = [tf.reduce_all(tf.stack(group)) for group in by_layer.values()]
        return _Sight(checks, _stacked(flags))

    def _all_clear(self, sights: Sequence[_Sight]) -> tf.Tensor:
        hard = [sight.passed for sight in sights if sight.hard]
        return tf.reduce_all(tf.concat(hard, 0)) if hard else tf.constant(True)

    def _finish(self) -> dict[str, Any]:
        """Puts back what must not stay, and assembles flags and telemetry."""
        data, labels, *forward = self._before_update()
        sights = [data, labels, *self._weight_sights(), *forward, *self._update_sights()]
        ok = self._all_clear(sights)
        context = tf.distribute.get_replica_context()
        passed = tf.cast(tf.concat([s.passed for s in sights], 0), tf.float32)
        if context is not None and context.num_replicas_in_sync > 1:
            failures = context.all_reduce(tf.distribute.ReduceOp.SUM, 1.0 - passed)
            passed = tf.cast(tf.equal(failures, 0.0), tf.float32)
            ok = tf.equal(context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~ok, tf.int32)), 0)
        before = self._put_back(ok)
        columns = self._telemetry()
        layout = Layout(
            tuple(check for s in sights for check in s.checks),
            tuple(s.hard for s in sights for _ in s.checks),
            tuple(columns),
        )
        row = tf.stack([tf.cast(value, tf.float32) for value in columns.values()])
        index = self._step.add_layout(layout)
        shown = {"layout": tf.constant(index), "passed": passed, "telemetry": row}
        return {**shown, "before": before}

    def _put_back(self, ok: tf.Tensor) -> dict[str, tf.Tensor]:
        """Restores in the graph; returns what the host must restore instead.

        Under XLA a selection beside the update of a moving mean changes how that is
        fused, and its bits: small variables leave the step as they were before it.
        """
        if tf.distribute.has_strategy():
            self._select(ok, {n: v for n, v in self._saved.items() if self._is_ours(n)})
            return {}
        if self._step.model.jit_compile and not tf.executing_eagerly():
            small = {n: v for n, v in self._saved.items() if not n.startswith(("params/", "opt"))}
            self._select(ok, {n: v for n, v in self._saved.items() if n not in small})
            return small

        def restore() -> tf.Tensor:
            for name, before in self._saved.items():
                self._variables[name].assign(before)
            return tf.constant(False)

        tf.cond(ok, lambda: tf.constant(True), restore)
        return {}

    def _is_ours(self, name: str) -> bool:
        """Whether this replica keeps the variable.

        One made outside the strategy's scope (a seed) is shared: the first replica was
        traced first, so it alone read the variable before any replica wrote it.
        """
        context = tf.distribute.get_replica_context()
        first = context is None or tf.get_static_value(context.replica_id_in_sync_group) == 0
        assert self._step.state is not None
        return first or hasattr(native(self._step.state.variables[name]), "values")

    def _select(self, ok: tf.Tensor, saved: dict[str, tf.Tensor]) -> None:
        for name, before in saved.items():
            variable = self._variables[name]
            variable.assign(tf.where(ok, tf.identity(variable), before))

    def _weight_sights(self) -> list[_Sight]:
        return [
            _Sight([Check("weights", group.layer, "weights") for group in groups], update.weights)
            for groups, update in self._updates
        ]

    def _update_sights(self) -> list[_Sight]:
        found = []
        for groups, update in self._updates:
            backward = [Check("backward", g.layer, "gradient") for g in reversed(groups)]
            written = [Check("update", g.layer, "new weights and slots") for g in groups]
            found.append(_Sight(backward, tf.reverse(update.gradients, [0])))
            norm = global_norm(update.gradient_norms)
            within = ~tf.logical_and(norm > self._step.limits[1], tf.math.is_finite(norm))
            found.append(_Sight([Check("backward", "", RUNAWAY_GRADIENT)], tf.stack([within])))
            found.append(_Sight(written, update.state))
        return found

    def _telemetry(self) -> dict[str, tf.Tensor]:
        """Columns of the step, by the names of `protocol.Telemetry`."""
        columns: dict[str, tf.Tensor] = {}
        if self._recorder.loss is not None:
            columns["loss"] = self._loss
        inputs = [i for i, tap in enumerate(self._data_taps) if tap.check.quantity == INPUT]
        if inputs:
            pairs = tf.gather(self._data[1], inputs)
            columns["input_max"] = tf.reduce_max(pairs[:, 0])
            columns["input_min"] = tf.reduce_min(pairs[:, 1])
        if self._rate is not None:
            columns["lr"] = self._rate
            norms = tf.concat([update.gradient_norms for _, update in self._updates], 0)
            columns["grad_norm"] = global_norm(norms)
        columns.update(self._activation_columns())
        for groups, update in self._updates:
            for index, group in enumerate(groups):
                gradient, weight = update.gradient_norms[index], update.weight_norms[index]
                columns[f"{group.layer}/gradient_norm"] = gradient
                columns[f"{group.layer}/weight_norm"] = weight
        return columns

    def _activation_columns(self) -> dict[str, tf.Tensor]:
        rows: dict[str, list[int]] = {}
        for index, tap in enumerate(self._recorder.taps):
            if tap.check.stage == "forward":
                rows.setdefault(tap.check.layer, []).append(index)
        columns = {}
        pairs = self._forward[1]
        for layer, indices in rows.items():
            own = tf.gather(pairs, indices)
            columns[f"{layer}/preactivation_max"] = tf.reduce_max(own[:, 0])
            columns[f"{layer}/preactivation_min"] = tf.reduce_min(own[:, 1])
        return columns


def _build_optimizers(model: Any) -> None:
    """Makes the slots now, so that a first step that fails can be undone."""
    for optimizer in find_optimizers(model)[:1]:
        if model.built and not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)


def local(variable: Any) -> Any:
    """This replica's part of a variable; itself without replicas."""
    variable = native(variable)
    context = tf.distribute.get_replica_context()
    parts = getattr(variable, "values", None)
    if parts is None or context is None:
        return variable
    return parts[int(tf.get_static_value(context.replica_id_in_sync_group))]


def data_taps(data: Any) -> list[Tap]:
    """Inputs, labels and sample weights of a batch, as far as they are floating-point."""
    taps = []
    parts = keras.utils.unpack_x_y_sample_weight(data)
    for quantity, part in zip((INPUT, LABELS, SAMPLE_WEIGHTS), parts, strict=True):
        for tensor in keras.tree.flatten(part):
            dense = getattr(tensor, "flat_values", getattr(tensor, "values", tensor))
            if not tf.is_tensor(dense):
                continue
            # Integer inputs are shown in the telemetry; integer labels are no scale.
            if dense.dtype.is_floating or (dense.dtype.is_integer and quantity == INPUT):
                taps.append(Tap(Check("data", "", quantity), dense))
    return taps


def _sight_of_taps(taps: Sequence[Tap], hard: bool = True) -> tuple[_Sight, tf.Tensor]:
    """Flags, and the extremes float32 [taps, 2], of tensors."""
    checks = [tap.check for tap in taps]
    if not taps:
        return _Sight([], _stacked([]), hard), tf.zeros([0, 2], tf.float32)
    pairs = tf.stack([extremes(tap.tensor) for tap in taps])
    finite = tf.math.is_finite(pairs)
    lenient = tf.constant([tap.lenient for tap in taps])
    low = tf.logical_or(finite[:, 1], tf.logical_and(lenient, pairs[:, 1] == -np.inf))
    high = tf.logical_or(finite[:, 0], tf.logical_and(lenient, pairs[:, 0] == -np.inf))
    return _Sight(checks, tf.logical_and(low, high), hard), pairs


def _stacked(flags: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.stack(flags) if flags else tf.zeros([0], tf.bool)
