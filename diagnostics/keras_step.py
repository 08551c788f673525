"""A user's Keras train step with the tripwire around it.

The step is traced as it is. What it shows (`keras_taps`) is reduced to one flag
per check and one row of telemetry; nothing it writes stays if a flag is down:
its one optimizer update is gated (`keras_update`), or, under XLA, several
replicas or several updates, everything it wrote is put back. Nothing is raised
from inside the graph, and nothing but the flags and the row leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.guard import all_finite
from diagnostics.keras_bounds import Bounds
from diagnostics.keras_convolutions import Convolutions
from diagnostics.keras_names import LayerNames, StateNames, find_optimizers, local, native
from diagnostics.keras_norms import CarriedNorms
from diagnostics.keras_probe import Plan, probe
from diagnostics.keras_sights import (
    Layout,
    Sight,
    data_taps,
    loss_sight,
    range_sight,
    statistics_sight,
    taps_sight,
    telemetry_columns,
    update_sights,
    weight_sights,
)
from diagnostics.keras_taps import Recorder, recording
from diagnostics.keras_update import (
    Group,
    Update,
    bounded_by_carried,
    exact_sight,
    gradients_exempt,
    group_by_layer,
    guarded_update,
    new_state,
)
from diagnostics.keras_xla_sight import bounded_update, xla_all_finite, xla_sight
from diagnostics.protocol import Check, State, StepOutcome


class GuardedStep:
    """Stands in for a model's `train_step` while a guard is on.

    Returns {"logs": the user's result, "guard": {"layout", "passed", "telemetry",
    "before"}}.

    Attributes:
      layouts: of every trace so far; "layout" is the index.
      state: the variables that make up the state, once a first trace is there.
      layer_order: labels of layers and operations as the last trace called them.
      initial: their values before the first step, if `keep_initial` bytes allow it.
      bounds: what is known of weights and slots without looking at them.

    Args:
      bounded: under XLA, most is bounded instead of looked at. A step that is refused must then
        be run by a step that is not so.
    """

    def __init__(
        self,
        model: Any,
        train_step: Callable[[Any], Any],
        keep_initial: int = 0,
        bounded: bool = False,
    ) -> None:
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
        self.bounds = Bounds(under_xla=bounded and model.jit_compile)

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
            self._plan = Plan(False, tuple(self.state.variables), alone=False)
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
    model: Any, keep_initial: int = 0, bounded: bool = False
) -> tuple[GuardedStep, Callable[[Any], dict[str, Any]]]:
    """A train function of Keras' own making around a guarded step; the model keeps its own.

    Returns:
      The step, and the function: give it an iterator over one batch.
    """
    step = GuardedStep(model, model.train_step, keep_initial, bounded)
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
        self._norms: CarriedNorms | None = None
        self._sights: list[Sight] = []

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
        self._norms = self._carried(optimizer, groups)

        def update() -> Any:
            return apply(grads, variables)

        if self._plan.gate:
            clear = self._all_clear(self._before_update())
            limit = self._step.limits[1]
            shown = guarded_update(optimizer, update, groups, clear, touched, limit, self._norms)
        elif self._norms is not None and self._step.bounds.suffice(optimizer, touched):
            shown = bounded_update(optimizer, update, groups, self._norms)
        else:
            shown = self._looked_at(optimizer, update, groups, touched)
        self._updates.append((groups, shown))
        return None

    def _looked_at(
        self, optimizer: Any, update: Callable[[], Any], groups: list[Group], touched: list[Any]
    ) -> Update:
        """All of it, before and after; what must not stay is put back at the end."""
        exempt = gradients_exempt(optimizer)
        xla = self._step.model.jit_compile and not tf.executing_eagerly()
        look, look_again = (xla_sight, xla_all_finite) if xla else (exact_sight, all_finite)
        gradients, weights, *norms = look(groups)
        update()
        state = look_again(new_state(optimizer, groups, touched))
        return Update(tf.constant(True), tf.logical_or(gradients, exempt), weights, state, *norms)

    def _carried(self, optimizer: Any, groups: list[Group]) -> CarriedNorms | None:
        """None where something else than the update writes weights or slots."""
        fit = self._plan.alone and bounded_by_carried(optimizer)
        return self._step.bounds.of(groups) if fit else None

    def _before_update(self) -> list[Sight]:
        """Flags of all that was traced so far, for the gate."""
        if not self._sights:
            self._data = taps_sight(self._data_taps, hard=False)
            convolutions = Convolutions(self._norms) if self._plan.gate else None
            self._forward = taps_sight(self._recorder.taps, convolutions=convolutions)
            if convolutions is not None:
                convolutions.keep()
            self._loss = self._recorder.loss
            if self._loss is not None:
                loss = tf.cast(self._loss, tf.float32)
                self._loss = tf.reduce_mean(loss) if loss.shape.rank != 0 else loss
            under_xla = self._step.model.jit_compile
            self._sights = [
                self._data.sight,
                range_sight(self._recorder.in_range),
                self._forward.sight,
                statistics_sight(self._saved, self._variables, under_xla),
                loss_sight(self._loss, self._step.limits[0]),
            ]
        return self._sights

    def _all_clear(self, sights: Sequence[Sight]) -> tf.Tensor:
        hard = [sight.passed for sight in sights if sight.hard]
        return tf.reduce_all(tf.concat(hard, 0)) if hard else tf.constant(True)

    def _finish(self) -> dict[str, Any]:
        """Puts back what must not stay, and assembles flags and telemetry."""
        data, labels, *forward = self._before_update()
        updated = update_sights(self._updates, self._step.limits[1])
        sights = [data, labels, *weight_sights(self._updates), *forward, *updated]
        ok = self._all_clear(sights)
        context = tf.distribute.get_replica_context()
        passed = tf.cast(tf.concat([s.passed for s in sights], 0), tf.float32)
        if context is not None and context.num_replicas_in_sync > 1:
            failures = context.all_reduce(tf.distribute.ReduceOp.SUM, 1.0 - passed)
            passed = tf.cast(tf.equal(failures, 0.0), tf.float32)
            ok = tf.equal(context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~ok, tf.int32)), 0)
        before = self._put_back(ok)
        columns = telemetry_columns(
            self._data, self._forward, self._loss, self._rate, self._updates
        )
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


def _build_optimizers(model: Any) -> None:
    """Makes the slots now, so that a first step that fails can be undone."""
    for optimizer in find_optimizers(model)[:1]:
        if model.built and not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)
