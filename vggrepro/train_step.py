"""The training step: (state, batch, seed) -> (state, metrics), guarded.

`TrainStep` holds the state on the device and wraps the pure core (`step_core`) in
the tripwire and the gated update; the trainer and the replay run this same
compiled function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from diagnostics import guard
from diagnostics.guard import Forward, StepResult
from vggrepro import loss_scale
from vggrepro.config import TrainConfig
from vggrepro.dropout import Dropout
from vggrepro.model import Network
from vggrepro.optimizer import MomentumSGD, RateSettings, learning_rate
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
    """

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
            name: tf.Variable(value, trainable=False, name=name.replace("/", "_"))
            for name, value in start.items()
        }
        self._rate = tf.Variable([0.0, 0.0], trainable=False)
        self.reconfigure(config)
        self._refused = tf.Variable(NOT_REFUSED, dtype=tf.int64, trainable=False)
        self._compiled = tf.function(self._step, jit_compile=False, autograph=False)
        self._compiled_loop = tf.function(self._loop, jit_compile=False, autograph=False)

    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> StepResult:
        """Runs one step on images float32 [B, s, s, 3] and labels int32 [B]."""
        applied, passed, telemetry = self._compiled(images, labels)
        return StepResult(bool(applied), passed.numpy(), telemetry.numpy())

    def loop(self, batches: Sequence[tuple[tf.Tensor, tf.Tensor]]) -> list[StepResult]:
        if len(batches) == 1:
            return super().loop(batches)
        images, labels = (tf.stack(parts) for parts in zip(*batches, strict=True))
        results = (tensor.numpy() for tensor in self._compiled_loop(images, labels))
        return [StepResult(bool(applied), *rest) for applied, *rest in zip(*results, strict=True)]

    def _loop(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """`_step` on images [N, B, ...] and labels [N, B], one after the other."""
        kinds = (tf.bool, tf.bool, tf.float32)
        kept = tuple(tf.TensorArray(kind, size=images.shape[0]) for kind in kinds)

        def body(row: tf.Tensor, *kept: tf.TensorArray) -> tuple[Any, ...]:
            results = self._step(images[row], labels[row])
            return row + 1, *(a.write(row, r) for a, r in zip(kept, results, strict=True))

        _, *kept = tf.while_loop(
            lambda row, *rest: row < images.shape[0],
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

    def reconfigure(self, config: TrainConfig) -> None:
        super().reconfigure(config)
        self._rate.assign(rate_settings(config))

    def rearm(self) -> None:
        self._refused.assign(NOT_REFUSED)

    def _parameter_tensors(self) -> dict[str, tf.Tensor]:
        return {name: self.variables[f"params/{name}"].read_value() for name in self._names}

    def _tensors(self, prefix: str) -> list[tf.Tensor]:
        return [self.variables[f"{prefix}/{name}"].read_value() for name in self._names]

    def _step(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        step = self.variables["counters/step"].read_value()
        if not self._scaled:
            core = self._core(images, labels, step)
            return self._gated_update(core, step, images.shape[0])
        scale = self.variables[loss_scale.SCALE].read_value()
        return self._gated_update(
            self._core(images, labels, step, loss_scale=scale),
            step,
            images.shape[0],
            lambda: self._core(images, labels, step).gradients,
        )

    def _core(
        self, images: tf.Tensor, labels: tf.Tensor, step: tf.Tensor, **options: Any
    ) -> CoreResult:
        return loss_and_gradients(
            self.network,
            self._parameter_tensors(),
            images,
            labels,
            dropout=Dropout.of_step(self.config.dropout, self.config.seed, step),
            compute_dtype=self._compute_dtype,
            multiply_dtype=self.multiply_dtype,
            global_rows=images.shape[0],
            **options,
        )

    def run_op_by_op(
        self, images: tf.Tensor, labels: tf.Tensor, phase: Callable[[str], None]
    ) -> None:
        """The same step eagerly, for a tracer; computes the update but writes nothing.

        At loss scale 1: what is not finite there is what makes an incident.
        """
        step = self.variables["counters/step"].read_value()
        core = self._core(images, labels, step, phase=phase)
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
        gradients = dict(zip(self._names, core.gradients, strict=True))
        gradient_norms = tf.sqrt(guard.squares(by_layer(core.gradients)))
        weight_norms = tf.sqrt(guard.squares(by_layer(self._tensors("params"))))
        velocity_norms = tf.sqrt(guard.squares(by_layer(self._tensors("momentum"))))
        bound = self._optimizer.norm_bound(weight_norms, velocity_norms, gradient_norms, rate)
        # NaN compares as false, so a NaN norm fails here too.
        conclusive = bound < guard.SAFE_BOUND
        passed = guard.passed_vector(core.forward, conclusive, conclusive, conclusive)
        armed = tf.equal(self._refused.read_value(), NOT_REFUSED)

        def fast() -> tuple[tf.Tensor, ...]:
            global_norm = tf.norm(gradient_norms)
            self._write(gradients, rate, global_norm)
            norms = Norms(gradient_norms, weight_norms, velocity_norms, global_norm)
            return tf.constant(True), passed, *norms, tf.constant(False)

        def careful() -> tuple[tf.Tensor, ...]:
            return self._careful_update(core.forward, gradients, rate, step, armed, at_scale_one)

        clear = tf.logical_and(armed, tf.reduce_all(passed))
        applied, passed, *norms, skipped = tf.cond(clear, fast, careful)
        accuracies = (core.top1 / rows, core.top5 / rows)
        extra = () if scale is None else loss_scale.telemetry_of(scale, skipped)
        telemetry = telemetry_row(
            self._optimizer, core.forward, accuracies, rate, Norms(*norms), extra
        )
        return applied, passed, telemetry

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

    def _careful_update(
        self,
        seen: Forward,
        gradients: Mapping[str, tf.Tensor],
        rate: tf.Tensor,
        step: tf.Tensor,
        armed: tf.Tensor,
        at_scale_one: Callable[[], list[tf.Tensor]] | None = None,
    ) -> tuple[tf.Tensor, ...]:
        """Looks at every element; applies the update if only a norm had overflowed.

        Gradients that overflowed at their loss scale are judged by those at scale 1, which
        decide between a skip and a refusal; they are never written.
        """
        judged_by, overflow = list(gradients.values()), tf.constant(False)
        if at_scale_one is not None:
            overflow = loss_scale.overflowed(judged_by)
            judged_by = tf.cond(overflow, at_scale_one, lambda: list(gradients.values()))
        judged = judge(
            self._optimizer,
            self._names,
            seen,
            judged_by,
            self._tensors("params"),
            self._tensors("momentum"),
            rate,
        )

        def write() -> tf.Tensor:
            self._write(gradients, rate, judged.norms.all_gradients)
            return tf.constant(True)

        def skip() -> tf.Tensor:
            self._advance(skipped=True)
            return tf.constant(True)

        def refuse() -> tf.Tensor:
            self._refused.assign(tf.where(armed, step, self._refused.read_value()))
            return tf.constant(False)

        def take() -> tf.Tensor:
            return write() if at_scale_one is None else tf.cond(overflow, skip, write)

        applied = tf.cond(tf.logical_and(armed, tf.reduce_all(judged.passed)), take, refuse)
        return applied, judged.passed, *judged.norms, tf.logical_and(applied, overflow)
