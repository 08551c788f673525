"""The training step: (state, batch, seed) -> (state, metrics), guarded.

`TrainStep` holds the state on the device and wraps the pure core (`step_core`) in
the tripwire and the gated update; the trainer and the replay run this same
compiled function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics import guard
from diagnostics.guard import Forward, StepResult
from vggrepro import loss_scale
from vggrepro.config import TrainConfig
from vggrepro.dropout import Dropout
from vggrepro.evaluation import batch_sums
from vggrepro.model import Network
from vggrepro.optimizer import MomentumSGD, RateSettings, learning_rate
from vggrepro.replica_evidence import added_in_order, brought_together, evidence_row
from vggrepro.step_core import CoreResult, loss_and_gradients
from vggrepro.step_state import State, StepState, initial_state, rate_settings
from vggrepro.step_update import NOT_REFUSED, Norms, by_layer, judge, telemetry_row


class TrainStep(StepState):
    """The guarded step and the state it owns on the device.

    Calling it with a batch runs one step. If anything is not finite, nothing is
    written and every later call is refused until `rearm`. A skip of float16's loss scale
    (`vggrepro.loss_scale`) is a step taken without a change of weights and momentum.

    Args:
      config: `classes` must be set.
      state: named arrays as `state()` returns them; None draws initial weights.
      multiply_dtype: of a replay that imitates a TPU, as `model.forward`.

    Attributes:
      replicas: as of how many replicas a step is computed, their rows one run after the
        other. On a CPU it has the bits of so many replicas on CPUs, for their replay.
    """

    replicas = 1

    def __init__(
        self,
        config: TrainConfig,
        network: Network,
        state: State | None = None,
        multiply_dtype: tf.DType | None = None,
    ) -> None:
        super().__init__(config, network)
        self.multiply_dtype = multiply_dtype
        self._optimizer = MomentumSGD.from_config(config)
        self._compute_dtype = tf.as_dtype(config.precision)
        self._scaled = loss_scale.has_loss_scale(config.precision)
        start = initial_state(config, network) if state is None else state
        self.variables = {
            name: self._variable(value, name.replace("/", "_")) for name, value in start.items()
        }
        self._rate = self._variable(np.zeros(2, np.float32), "rate")
        self.reconfigure(config)
        self._refused = self._variable(np.array(NOT_REFUSED, np.int64), "refused")
        self._compiled = tf.function(self._step, jit_compile=False, autograph=False)
        self._compiled_loop = tf.function(self._loop, jit_compile=False, autograph=False)
        self._sums = tf.function(self._evaluated, jit_compile=False, autograph=False)

    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> StepResult:
        """Runs one step on images float32 [B, s, s, 3] and labels int32 [B]."""
        results = self._compiled(*self._fed(images, labels), self.replicas)
        return _result(tensor.numpy() for tensor in results)

    def loop(self, batches: Sequence[tuple[tf.Tensor, tf.Tensor]]) -> list[StepResult]:
        if len(batches) == 1:
            return super().loop(batches)
        parts = zip(*(self._fed(*batch) for batch in batches), strict=True)
        images, labels = (self._stacked(part) for part in parts)
        results = (tensor.numpy() for tensor in self._compiled_loop(images, labels, len(batches)))
        return [_result(row) for row in zip(*results, strict=True)]

    def _loop(self, images: Any, labels: Any, steps: int) -> tuple[tf.Tensor, ...]:
        """`_step` on images [steps, B, ...] and labels [steps, B], one after the other."""
        kinds = (tf.bool, tf.bool, tf.float32, tf.bool)
        kept = tuple(tf.TensorArray(kind, size=steps) for kind in kinds)

        def body(row: tf.Tensor, *kept: tf.TensorArray) -> tuple[Any, ...]:
            results = self._step(*self._taken(images, labels, row))
            return row + 1, *(a.write(row, r) for a, r in zip(kept, results, strict=True))

        _, *kept = tf.while_loop(
            lambda row, *rest: row < steps,
            body,
            (tf.constant(0), *kept),
            parallel_iterations=1,
        )
        return tuple(array.stack() for array in kept)

    def ahead(self, batches: tf.data.Dataset) -> Iterator[Mapping[str, tf.Tensor]]:
        device = self._rate.device
        if not device.endswith("CPU:0"):  # where the pipeline leaves them
            batches = batches.apply(tf.data.experimental.prefetch_to_device(device, 2))
        return super().ahead(batches)

    def batch_sums(self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> np.ndarray:
        """float64 [replicas, 4]: `evaluation.batch_sums` of each one's rows."""
        return self._sums(*self._fed(images, labels, weights), self.replicas).numpy()

    def reconfigure(self, config: TrainConfig) -> None:
        super().reconfigure(config)
        self._rate.assign(rate_settings(config))

    def rearm(self) -> None:
        self._refused.assign(NOT_REFUSED)

    def _parameter_tensors(self) -> dict[str, tf.Tensor]:
        return {name: self.variables[f"params/{name}"].read_value() for name in self._names}

    def _tensors(self, prefix: str) -> list[tf.Tensor]:
        return [self.variables[f"{prefix}/{name}"].read_value() for name in self._names]

    # What differs where several replicas share the batch (`distributed_step`).

    def _variable(self, value: np.ndarray, name: str) -> Any:
        return tf.Variable(value, trainable=False, name=name)

    def _fed(self, *batch: tf.Tensor) -> tuple[Any, ...]:
        """A batch as `_step` takes it."""
        return batch

    def _stacked(self, parts: Sequence[Any]) -> Any:
        """What was fed for several steps, as one argument."""
        return tf.stack(parts)

    def _taken(self, images: Any, labels: Any, row: tf.Tensor) -> tuple[Any, Any]:
        """One step's part of `_stacked`."""
        return images[row], labels[row]

    def _common(self, passed: tf.Tensor) -> tf.Tensor:
        """bool [checks]: what passed on every replica."""
        return passed

    def _core(
        self, images: tf.Tensor, labels: tf.Tensor, step: tf.Tensor, **options: Any
    ) -> CoreResult:
        """Of the global batch."""
        rows = images.shape[0]
        if self.replicas == 1:
            return self._share(images, labels, step, 0, rows, **options)
        shares = [
            self._share(part, its_labels, step, number * part.shape[0], rows, **options)
            for number, (part, its_labels) in enumerate(self._shares(images, labels))
        ]
        gradients = zip(*(own.gradients for own in shares), strict=True)
        evidence = tf.stack([evidence_row(own) for own in shares])
        return brought_together(evidence, [added_in_order(parts) for parts in gradients])

    def _at_scale_one(
        self, images: tf.Tensor, labels: tf.Tensor, step: tf.Tensor
    ) -> list[tf.Tensor]:
        """The gradients that tell a skip from an incident; they are never written.

        Each of several replicas judges its own, because none can exchange anything inside of
        a conditional: here the first one's, NaN where another one's are not finite.
        """
        rows = images.shape[0]
        first, *others = (
            self._share(part, its_labels, step, number * part.shape[0], rows).gradients
            for number, (part, its_labels) in enumerate(self._shares(images, labels))
        )
        for other in others:
            finite = [tf.reduce_all(tf.math.is_finite(gradient)) for gradient in other]
            first = [tf.where(ok, own, np.nan) for ok, own in zip(finite, first, strict=True)]
        return first

    def _shares(self, *batch: tf.Tensor) -> Iterator[tuple[tf.Tensor, ...]]:
        return zip(*(tf.split(part, self.replicas) for part in batch), strict=True)

    def _evaluated(self, *batch: Any) -> tf.Tensor:
        *rows, _ = batch
        return tf.stack([self._rows_evaluated(*share) for share in self._shares(*rows)])

    def _rows_evaluated(self, *rows: tf.Tensor) -> tf.Tensor:
        return batch_sums(self.network, self._parameter_tensors(), self._compute_dtype, *rows)

    def _global_rows(self, images: tf.Tensor) -> int:
        """Rows of the batch that `_step` has part or all of."""
        return images.shape[0]

    def _share(
        self,
        images: tf.Tensor,
        labels: tf.Tensor,
        step: tf.Tensor,
        first_row: int | tf.Tensor,
        global_rows: int,
        **options: Any,
    ) -> CoreResult:
        """Of some rows of the global batch."""
        return loss_and_gradients(
            self.network,
            self._parameter_tensors(),
            images,
            labels,
            dropout=Dropout.of_step(self.config.dropout, self.config.seed, step, first_row),
            compute_dtype=self._compute_dtype,
            multiply_dtype=self.multiply_dtype,
            global_rows=global_rows,
            **options,
        )

    def _step(self, images: Any, labels: Any, *key: int) -> tuple[tf.Tensor, ...]:
        """(applied, passed, telemetry, healthy [replicas]).

        Args:
          key: of the compiled program besides shapes: `replicas`.
        """
        step = self.variables["counters/step"].read_value()
        scaling: dict[str, Any] = {}
        at_scale_one = None
        if self._scaled:
            scaling = {"loss_scale": self.variables[loss_scale.SCALE].read_value()}
            at_scale_one = functools.partial(self._at_scale_one, images, labels, step)
        core = self._core(images, labels, step, **scaling)
        rows, healthy = self._global_rows(images), tf.convert_to_tensor(core.healthy, tf.bool)
        return *self._gated_update(core, step, rows, at_scale_one), healthy

    def run_op_by_op(
        self, images: tf.Tensor, labels: tf.Tensor, phase: Callable[[str], None]
    ) -> None:
        """The same step eagerly, for a tracer; computes the update but writes nothing.

        At loss scale 1: what is not finite there is what makes an incident.
        """
        step = self.variables["counters/step"].read_value()
        core = self._share(images, labels, step, 0, images.shape[0], phase=phase)
        phase("update")
        rate = self._learning_rate(step)
        scale = self._optimizer.clip_scale(guard.exact_norm(core.gradients))
        for name, gradient in zip(self._names, core.gradients, strict=True):
            with tf.name_scope(name.partition("/")[0]):
                weight = self.variables[f"params/{name}"].read_value()
                velocity = self.variables[f"momentum/{name}"].read_value()
                self._optimizer.proposal(name, weight, velocity, gradient, rate, scale)

    def _gated_update(
        self,
        core: CoreResult,
        step: tf.Tensor,
        rows: int,
        at_scale_one: Callable[[], list[tf.Tensor]] | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """(applied, passed, telemetry); writes the new state only if all is finite.

        Args:
          at_scale_one: where gradients were scaled, computes them anew without.
        """
        rate = self._learning_rate(step)
        scale = self.variables[loss_scale.SCALE].read_value() if self._scaled else None
        gradient_norms = tf.sqrt(guard.squares(by_layer(core.gradients)))
        weight_norms = tf.sqrt(guard.squares(by_layer(self._tensors("params"))))
        velocity_norms = tf.sqrt(guard.squares(by_layer(self._tensors("momentum"))))
        bound = self._optimizer.norm_bound(weight_norms, velocity_norms, gradient_norms, rate)
        # NaN compares as false, so a NaN norm fails here too.
        conclusive = bound < guard.SAFE_BOUND
        at_a_glance = guard.passed_vector(core.forward, conclusive, conclusive, conclusive)

        def glance() -> tuple[tf.Tensor, ...]:
            norms = Norms(gradient_norms, weight_norms, velocity_norms, tf.norm(gradient_norms))
            return at_a_glance, *norms, tf.constant(False)

        def look() -> tuple[tf.Tensor, ...]:
            return self._every_element(core.forward, core.gradients, rate, at_scale_one)

        passed, *parts, overflow = tf.cond(tf.reduce_all(at_a_glance), glance, look)
        passed, norms = self._common(passed), Norms(*parts)
        applied = self._write_if_passed(
            passed, core.gradients, rate, norms.all_gradients, step, overflow
        )
        accuracies = (core.top1 / rows, core.top5 / rows)
        skipped = tf.logical_and(applied, overflow)
        extra = () if scale is None else loss_scale.telemetry_of(scale, skipped)
        telemetry = telemetry_row(self._optimizer, core.forward, accuracies, rate, norms, extra)
        return applied, passed, telemetry

    def _every_element(
        self,
        seen: Forward,
        gradients: Sequence[tf.Tensor],
        rate: tf.Tensor,
        at_scale_one: Callable[[], list[tf.Tensor]] | None,
    ) -> tuple[tf.Tensor, ...]:
        """(passed, *norms, overflow) where a glance at the norms was not enough.

        A norm may have overflowed and nothing else. Gradients that overflowed at their loss
        scale are judged by those at scale 1, which decide between a skip and a refusal.
        """
        judged_by, overflow = list(gradients), tf.constant(False)
        if at_scale_one is not None:
            overflow = loss_scale.overflowed(gradients)
            judged_by = tf.cond(overflow, at_scale_one, lambda: list(gradients))
        judged = judge(
            self._optimizer,
            self._names,
            seen,
            judged_by,
            self._tensors("params"),
            self._tensors("momentum"),
            rate,
        )
        return judged.passed, *judged.norms, overflow

    def _write_if_passed(
        self,
        passed: tf.Tensor,
        gradients: Sequence[tf.Tensor],
        rate: tf.Tensor,
        global_norm: tf.Tensor,
        step: tf.Tensor,
        overflow: tf.Tensor,
    ) -> tf.Tensor:
        """Whether the step was taken; else it is remembered as refused."""
        refused = self._refused.read_value()
        armed = tf.equal(refused, NOT_REFUSED)

        def write() -> tf.Tensor:
            self._write(dict(zip(self._names, gradients, strict=True)), rate, global_norm)
            return tf.constant(True)

        def skip() -> tf.Tensor:
            self._advance(skipped=True)
            return tf.constant(True)

        def take() -> tf.Tensor:
            return tf.cond(overflow, skip, write) if self._scaled else write()

        def refuse() -> tf.Tensor:
            self._refused.assign(tf.where(armed, step, refused))
            return tf.constant(False)

        return tf.cond(tf.logical_and(armed, tf.reduce_all(passed)), take, refuse)

    def _learning_rate(self, step: tf.Tensor) -> tf.Tensor:
        base, warmup = tf.unstack(self._rate.read_value())
        settings = RateSettings(base, warmup, self.config.lr_drop_factor)
        return learning_rate(settings, step, self.variables["schedule/drops"].read_value())

    def _write(
        self, gradients: Mapping[str, tf.Tensor], rate: tf.Tensor, global_norm: tf.Tensor
    ) -> None:
        scale = self._optimizer.clip_scale(global_norm)
        for name, gradient in gradients.items():
            self._optimizer.apply(
                name,
                self.variables[f"params/{name}"],
                self.variables[f"momentum/{name}"],
                gradient,
                rate,
                scale,
            )
        self._advance(skipped=False)

    def _advance(self, skipped: bool) -> None:
        self.variables["counters/step"].assign_add(1)
        if self._scaled:
            scaling = loss_scale.after_step(self.variables, tf.constant(skipped))
            for name, value in scaling.items():
                self.variables[name].assign(value)


def _result(parts: Iterable[np.ndarray]) -> StepResult:
    applied, passed, telemetry, healthy = parts
    return StepResult(bool(applied), passed, telemetry, healthy.tolist())
