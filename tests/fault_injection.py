"""Puts non-finite values at a chosen place of a training step, without touching the step's code.

An `Injector` multiplies tensors by a factor that is exactly 1 except at one place, in one
step, in some elements. Which place that is stands in variables, so that one compiled
graph serves every fault. `toy_patches` and `vgg_patches` let it into the pure functions
of the two programs, alike in training, in the replay and in the op-by-op trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import tensorflow as tf
import toy_run
import toy_step

from vggrepro import model, step_core
from vggrepro.optimizer import MomentumSGD
from vggrepro.train_step import TrainStep

NAN, OVERFLOW, POLE = "nan", "+inf", "-inf"
KINDS = (NAN, OVERFLOW, POLE)
_NOWHERE = -1
# An example carries this mark in its first number: ordinary as data, and rare.
MARK = 1.7109375  # exact in bfloat16 too


@dataclasses.dataclass(frozen=True)
class Injection:
    """One injected fault.

    Attributes:
      stage, layer: where; layer '' for the loss and the data.
      kind: 'nan' (0/0), '+inf' (the square of 1e30) or '-inf' (-1/0).
      step: the only step that it strikes; weights are overwritten just before it.
      rows: of the batch, where the place has rows.
      units: so many of the first elements of the last axis (of a weight array: of
        all elements; of bad data: of an example's numbers).
      group: 'params' or 'momentum', for weights.
      marked: it follows the examples that stood in `rows` at `step`, wherever
        they are, instead of striking rows of one step.
    """

    stage: str
    layer: str = ""
    kind: str = NAN
    step: int = 0
    rows: tuple[int, ...] = (0,)
    units: int = 1
    group: str = "params"
    marked: bool = False


class Injector:
    """Holds the armed fault; `apply` stands at every place where one may strike."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], int] = {}
        self._place = tf.Variable(_NOWHERE, trainable=False)
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._kind = tf.Variable(0, trainable=False)
        self._rows = tf.Variable(tf.zeros([8], tf.bool), shape=[None], trainable=False)
        self._units = tf.Variable(1, trainable=False)
        self._marked = tf.Variable(False, trainable=False)
        self._now: tuple[tf.Tensor, tf.Tensor] | None = None

    def arm(self, fault: Injection, batch_size: int) -> None:
        """From now on this fault strikes, and no other."""
        self._place.assign(self._code(fault.stage, fault.layer))
        self._step.assign(fault.step)
        self._kind.assign(KINDS.index(fault.kind))
        self._rows.assign(np.isin(np.arange(batch_size), fault.rows))
        self._units.assign(fault.units)
        self._marked.assign(fault.marked)

    def disarm(self) -> None:
        self._place.assign(_NOWHERE)

    @contextmanager
    def during(self, step: tf.Tensor, inputs: tf.Tensor) -> Iterator[None]:
        """Faults strike only inside, in the step being computed."""
        self._now = step, inputs
        try:
            yield
        finally:
            self._now = None

    def apply(self, stage: str, layer: str, values: tf.Tensor) -> tf.Tensor:
        """`values`, times factors that are not finite where the armed fault strikes."""
        if self._now is None:
            return values
        struck = self._struck(stage, layer, tf.shape(values), values.shape.rank, self._now)
        return _spoilt(values, struck, self._kind.read_value())

    def apply_backwards(self, layer: str, values: tf.Tensor) -> tf.Tensor:
        """`values` as they are; their gradient as `apply` makes it."""
        if self._now is None:
            return values
        now = self._now

        @tf.custom_gradient
        def identity(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            def gradient(dy: tf.Tensor) -> tf.Tensor:
                struck = self._struck("backward", layer, tf.shape(dy), dy.shape.rank, now)
                return _spoilt(dy, struck, self._kind.read_value())

            return tf.identity(x), gradient

        return identity(values)

    def strikes(self, stage: str, layers: Sequence[str]) -> tf.Tensor:
        """bool scalar: whether the armed fault strikes that stage of one of the layers now."""
        assert self._now is not None
        codes = [self._code(stage, layer) for layer in layers]
        here = tf.reduce_any(tf.equal(self._place.read_value(), codes))
        return tf.logical_and(here, tf.equal(self._step.read_value(), self._now[0]))

    def _code(self, stage: str, layer: str) -> int:
        return self._codes.setdefault((stage, layer), len(self._codes))

    def _struck(
        self,
        stage: str,
        layer: str,
        shape: tf.Tensor,
        rank: int,
        now: tuple[tf.Tensor, tf.Tensor],
    ) -> tf.Tensor:
        """bool of `shape`: the elements that the armed fault strikes."""
        step, inputs = now
        here = tf.equal(self._place.read_value(), self._code(stage, layer))
        due = tf.equal(step, self._step.read_value())
        if rank == 0:
            return tf.logical_and(here, due)
        struck = tf.range(shape[-1]) < self._units.read_value()
        if stage in ("forward", "backward"):
            marks = tf.equal(tf.reshape(inputs, [tf.shape(inputs)[0], -1])[:, 0], MARK)
            in_its_step = tf.logical_and(due, self._rows.read_value())
            rows = tf.where(self._marked.read_value(), marks, in_its_step)
            struck = tf.logical_and(tf.reshape(rows, [-1] + [1] * (rank - 1)), struck)
        else:
            here = tf.logical_and(here, due)
        return tf.broadcast_to(tf.logical_and(here, struck), shape)


def _spoilt(values: tf.Tensor, struck: tf.Tensor, kind: tf.Tensor) -> tf.Tensor:
    """Plain TensorFlow arithmetic that leaves its domain at the struck elements."""

    def number(kinds: Sequence[str], there: float) -> tf.Tensor:
        chosen = tf.reduce_any(tf.equal(kind, [KINDS.index(name) for name in kinds]))
        there_, elsewhere = tf.constant(there, values.dtype), tf.constant(1.0, values.dtype)
        return tf.where(tf.logical_and(struck, chosen), there_, elsewhere)

    numerator = number([NAN], 0.0) * number([POLE], -1.0)
    quotient = numerator / number([NAN, POLE], 0.0)
    # A square, because grappler reorders chains of products: one that overflows in the
    # step's graph may be finite in another part of the same graph.
    return values * quotient * tf.square(number([OVERFLOW], 1e30))


@contextmanager
def toy_patches(injector: Injector) -> Iterator[None]:
    """Lets the injector into the toy's step."""
    real_proposal = toy_run.ToyProgram._proposal

    def proposal(self, inputs, labels, step, enter):
        with injector.during(step, inputs):
            return real_proposal(self, inputs, labels, step, enter)

    def faulty(config, stage, layer, values, step):
        return injector.apply(stage, layer, values)

    def faulty_backwards(config, layer, values, step):
        return injector.apply_backwards(layer, values)

    with patched(
        (toy_run.ToyProgram, "_proposal", proposal),
        (toy_run, "faulty", faulty),
        (toy_step, "faulty", faulty),
        (toy_step, "_faulty_backwards", faulty_backwards),
    ):
        yield


@contextmanager
def vgg_patches(injector: Injector) -> Iterator[None]:
    """Lets the injector into VGG's step."""
    real_layer, real_loss = model._preactivation, step_core.cross_entropy
    real_gradient, real_bound = MomentumSGD.decayed_gradient, MomentumSGD.norm_bound
    real_step, real_trace = TrainStep._step, TrainStep.run_op_by_op
    layers: list[str] = []

    def step(self, images, labels, *key):
        layers[:] = self.layout.layers
        with injector.during(self.variables["counters/step"].read_value(), images):
            return real_step(self, images, labels, *key)

    def trace(self, images, labels, phase):
        with injector.during(self.variables["counters/step"].read_value(), images):
            real_trace(self, images, labels, phase)

    def preactivation(layer, parameters, values, multiply_dtype):
        real = real_layer(layer, parameters, values, multiply_dtype)
        made = injector.apply("forward", layer.name, real)
        return injector.apply_backwards(layer.name, made)

    def cross_entropy(logits, labels, classes, global_rows):
        loss, valid = real_loss(logits, labels, classes, global_rows)
        return injector.apply("loss", "", loss), valid

    def decayed_gradient(self, name, weight, gradient, scale):
        made = real_gradient(self, name, weight, gradient, scale)
        layer, _, part = name.partition("/")
        return injector.apply("update", layer, made) if part == "kernel" else made

    def norm_bound(self, *norms):
        bound = real_bound(self, *norms)
        return tf.where(injector.strikes("update", layers), np.inf, bound)

    with patched(
        (TrainStep, "_step", step),
        (TrainStep, "run_op_by_op", trace),
        (model, "_preactivation", preactivation),
        (step_core, "cross_entropy", cross_entropy),
        (MomentumSGD, "decayed_gradient", decayed_gradient),
        (MomentumSGD, "norm_bound", norm_bound),
    ):
        yield


@contextmanager
def patched(*changes: tuple[object, str, object]) -> Iterator[None]:
    """(owner, attribute, value) in place inside."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
