"""The training step of a Keras run, as it trained or with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from diagnostics.keras_batches import unflatten_batch
from diagnostics.keras_changes import (
    CLIP_PREDICTIONS,
    EPSILON,
    FROM_LOGITS,
    OTHER_SIGN,
    activated,
    compiled_losses,
    output_activation,
)
from diagnostics.keras_data_changes import changed_batch
from diagnostics.keras_domains import kept_in_domain
from diagnostics.keras_facts import activity_regularisers
from diagnostics.keras_layer_changes import LAYER_CHANGES, layer_settings
from diagnostics.keras_names import StateNames, find_optimizers
from diagnostics.keras_optimizer import inner_optimizer, rate_variable, without_loss_scale
from diagnostics.keras_phases import run_by_phases
from diagnostics.keras_step import guarded_function, read_outcome
from diagnostics.protocol import Batch, Change, State, StepOutcome

if TYPE_CHECKING:
    from diagnostics.op_trace import OpTrace

# Only these need a graph of their own; other changes are of state or data.
_RETRACED = (
    "clip_norm",
    "optimizer_epsilon",
    "optimizer_setting",
    "loss_formula",
    "domain",
    "precision",
    "constant_rate",
    "layer_epsilon",
    "layer_setting",
    "layer_scale",
    "finite_statistics",
    "loss_weights",
    "regulariser",
    "activation",
)


# What a foreign program may raise where a change does not suit it.
_CHANGE_DOES_NOT_FIT = (
    AttributeError,
    NotImplementedError,
    TypeError,
    ValueError,
    tf.errors.OpError,
)


class SharedModel:
    """One model whose variables several programs use in turn.

    A program that gives way keeps its state on the host until it runs again.
    """

    def __init__(self, model: Any, structure: Any) -> None:
        self.model = model
        self.structure = structure
        self.names: StateNames | None = None
        self._holder: KerasProgram | None = None
        self._functions: dict[str, tuple[Any, Any]] = {}

    def take(self, program: KerasProgram) -> None:
        """Makes `program` the one whose state the variables hold."""
        if self._holder is not program:
            if self._holder is not None and self.names is not None:
                self._holder.parked = self.names.arrays()
            self._holder = program

    def holds(self, program: KerasProgram) -> bool:
        return self._holder is program

    def function(self, change: Change | None) -> tuple[Any, Any]:
        """(guarded step, compiled function) for a change; made once."""
        retraced = change is not None and change.kind in _RETRACED
        key = f"{change.kind} {change.value}" if retraced and change is not None else ""
        if key not in self._functions:
            eagerly = self.model.run_eagerly
            # An op can be kept inside its domain in a graph only.
            self.model.run_eagerly = eagerly and not (retraced and _in_graph(change))
            try:
                self._functions[key] = guarded_function(self.model)
            finally:
                self.model.run_eagerly = eagerly
        return self._functions[key]


class KerasProgram:
    """Implements `diagnostics.protocol.Program`.

    Args:
      rate: the learning rate as recorded, for a warm-up.
    """

    def __init__(self, shared: SharedModel, change: Change | None, rate: float | None) -> None:
        self.parked: State | None = None
        self._shared, self._change, self._rate = shared, change, rate
        self._step, self._function = shared.function(change)

    def load(self, state: State) -> None:
        self._shared.take(self)
        self._names().load(state)
        self.parked = None
        if self._change is not None and self._change.kind == "learning_rate":
            rate_variable(self._shared.model).assign(self._change.value)

    def state(self) -> State:
        self._resume()
        return self._names().arrays()

    def run(self, batch: Batch, step: int) -> StepOutcome:
        self._resume()
        self._warm_up(step)
        data = self._distributed(batch)
        try:
            with self._settings():
                shown = self._function(iter([data]))["guard"]
        except _CHANGE_DOES_NOT_FIT as error:
            if self._change is None and not isinstance(error, tf.errors.OpError):
                raise
            reason = _reason(error)
            label = "" if self._change is None else f" with {self._change.label}"
            raise InputError(f"the model does not run{label}: {reason}") from error
        return read_outcome(self._step, shown)

    def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
        self._resume()
        self._warm_up(step)
        with self._settings():
            model = self._shared.model
            run_by_phases(model, self._names(), self._data(batch), tracer.phase)

    def release(self) -> None:
        """Gives up its state; the variables and the graphs belong to the shared model."""
        self.parked = None

    def _names(self) -> StateNames:
        if self._shared.names is None:
            self._shared.names = StateNames(self._shared.model)
        return self._shared.names

    def _resume(self) -> None:
        if not self._shared.holds(self):
            if self.parked is None:
                raise ValueError("load a state first")
            state = self.parked
            self.load(state)

    def _data(self, batch: Batch) -> Any:
        batch = changed_batch(batch, self._change)
        return unflatten_batch(self._shared.structure, batch, tf.constant)

    def _distributed(self, batch: Batch) -> Any:
        """The batch as a strategy hands it out: to every replica its part of the rows."""
        strategy = self._shared.model.distribute_strategy
        replicas = strategy.num_replicas_in_sync
        if replicas == 1:
            return self._data(batch)

        def parts(array: np.ndarray) -> Any:
            share = -(-len(array) // replicas) if array.ndim else 0
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.constant(_part(array, context.replica_id_in_sync_group, share))
            )

        batch = changed_batch(batch, self._change)
        return unflatten_batch(self._shared.structure, batch, parts)

    def _warm_up(self, step: int) -> None:
        if self._change is None or self._change.kind != "warmup" or self._rate is None:
            return
        share = min(1.0, (1.0 + step * (1.0 - 1.0 / self._change.value)) / self._change.value)
        rate_variable(self._shared.model).assign(self._rate * share)

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """While it runs, the model has the change that a trace must see."""
        change = self._change
        if change is None or change.kind not in _RETRACED:
            yield
            return
        undo = _apply(self._shared.model, change)
        if _in_graph(change):
            undo.append((self._shared.model, "run_eagerly", self._shared.model.run_eagerly))
            self._shared.model.run_eagerly = False
        inside: Any = nullcontext()
        if change.kind == "domain":
            optimizers = map(without_loss_scale, find_optimizers(self._shared.model))
            inside = kept_in_domain(change.value, list(optimizers))
        try:
            with inside:
                yield
        finally:
            for owner, name, value in reversed(undo):
                object.__setattr__(owner, name, value)


def _reason(error: Exception) -> str:
    """What an op said, without the traceback of its graph."""
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
    told = [i for i, line in enumerate(lines) if line.startswith("[[{{node")]
    return (lines[told[0] - 1] if told and told[0] else lines[0] if lines else "")[:200]


class LargerBatches(KerasProgram):
    """The program with so many of the run's batches, one after the other, as one.

    Args:
      batches: of the run, by step.
    """

    def __init__(
        self, shared: SharedModel, change: Change, batches: Callable[[int], Batch | None]
    ) -> None:
        super().__init__(shared, change, None)
        self._batches = batches

    def run(self, batch: Batch, step: int) -> StepOutcome:
        assert self._change is not None
        times = self._change.value
        parts = [self._batches(step * times + i) or batch for i in range(times)]
        joined = {n: np.concatenate([p[n] for p in parts]) for n, a in batch.items() if a.ndim}
        return super().run({**batch, **joined}, step)


def _in_graph(change: Change | None) -> bool:
    return change is not None and change.kind == "domain"


def _part(array: np.ndarray, replica: int, share: int) -> np.ndarray:
    return array[replica * share : (replica + 1) * share] if array.ndim else array


def _apply(model: Any, change: Change) -> list[tuple[Any, str, Any]]:
    """Sets what the change says; returns (owner, attribute, old value)."""
    optimizer = inner_optimizer(model)
    new: list[tuple[Any, str, Any]] = []
    if change.kind == "clip_norm":
        new = [
            (optimizer, "clipnorm", None),
            (optimizer, "clipvalue", None),
            (optimizer, "global_clipnorm", change.value),
        ]
    elif change.kind == "optimizer_epsilon":
        new = [(optimizer, "epsilon", change.value)]
    elif change.kind == "optimizer_setting":
        new = [(optimizer, *change.value)]
    elif change.kind == "regulariser":
        new = [(variable, "regularizer", None) for variable in model.trainable_variables]
        new += [(layer, "activity_regularizer", None) for layer in activity_regularisers(model)]
    elif change.kind in LAYER_CHANGES or change.kind == "precision":
        new = layer_settings(model, change)
    elif change.kind == "loss_weights":
        compiled = model._compile_loss
        new = [
            (
                compiled,
                "_flat_losses",
                [e._replace(loss_weights=None) for e in compiled._flat_losses],
            )
        ]
    elif change.kind == "activation":
        function = keras.activations.get(change.value)
        # A recurrent layer takes that of its cell.
        owners = [getattr(layer, "cell", layer) for layer in activated(model, change.value)]
        new = [(owner, "activation", function) for owner in owners]
    elif change.kind == "constant_rate":
        new = [(optimizer, "_learning_rate", lambda: change.value)]
    elif change.kind == "loss_formula" and change.value == FROM_LOGITS:
        layer = output_activation(model)
        new = [(layer, "activation", keras.activations.linear)] if layer is not None else []
        new += [
            (loss, "_fn_kwargs", {**loss._fn_kwargs, "from_logits": True})
            for loss in compiled_losses(model)
        ]
    elif change.kind == "loss_formula" and change.value == CLIP_PREDICTIONS:
        new = [(model, "_compile_loss", _Clipped(model._compile_loss))]
    elif change.kind == "loss_formula" and change.value == OTHER_SIGN:
        new = [(model, "_compile_loss", _Negated(model._compile_loss))]
    old = [(owner, name, getattr(owner, name)) for owner, name, _ in new]
    for owner, name, value in new:
        object.__setattr__(owner, name, value)
    return old


class _Instead:
    """Stands in for a compiled loss."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


class _Clipped(_Instead):
    """A compiled loss that is given predictions inside the open interval (0, 1)."""

    def __call__(self, y_true: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
        clipped = keras.tree.map_structure(
            lambda p: keras.ops.clip(p, EPSILON, 1.0 - EPSILON), y_pred
        )
        return self._loss(y_true, clipped, *args, **kwargs)


class _Negated(_Instead):
    """A compiled loss times -1."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return -self._loss(*args, **kwargs)
