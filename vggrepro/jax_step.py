"""The guarded training step as one sharded JAX program around TensorFlow's core.

For machines whose TPU runtime belongs to JAX, and for compiling a step for a TPU that
is not there. Loss, gradients, verdict and update are the TensorFlow functions of
`step_core` and `step_update`, lowered to StableHLO; JAX adds the shards and the
all-reduce. The state is a value and donated: a refused step returns it as it was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from jax.experimental import jax2tf
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diagnostics import guard
from diagnostics.guard import Forward
from vggrepro import loss_scale
from vggrepro.config import TrainConfig
from vggrepro.dropout import Dropout
from vggrepro.evaluation import batch_sums
from vggrepro.model import Network
from vggrepro.optimizer import MomentumSGD, RateSettings
from vggrepro.replica_evidence import all_its_own_finite, over_replicas
from vggrepro.step_core import loss_and_gradients
from vggrepro.step_state import guard_layout
from vggrepro.step_update import gated_update

AXIS = "replica"
_REPLICATED, _SHARDED = PartitionSpec(), PartitionSpec(AXIS)
GROUPS = ("params", "momentum", "loss_scale")
DEVICE_COUNTERS = ("counters/step", "schedule/drops")  # of the state, what the update reads


class ShardedStep:
    """The guarded step over all devices of a mesh; data parallel.

    Args:
      config: `classes` must be set; batch_size is the global batch.
      devices: JAX devices, of a live backend or of a topology that is only described.
    """

    def __init__(self, config: TrainConfig, network: Network, devices: np.ndarray) -> None:
        self.config, self.network = config, network
        self.layout = guard_layout(config, network)
        self.mesh = Mesh(np.asarray(devices).reshape(-1), (AXIS,))
        self.replicas = self.mesh.devices.size
        self.rows = config.batch_size // self.replicas
        self._names = tuple(network.parameter_shapes())
        self._optimizer = MomentumSGD.from_config(config)
        _choose_lowering_for_tpus()
        shards = jax.shard_map(
            self._replica,
            mesh=self.mesh,
            in_specs=(_REPLICATED, _REPLICATED, _REPLICATED, _SHARDED, _SHARDED),
            out_specs=_REPLICATED,
            check_vma=False,
        )
        self.program: Any = jax.jit(shards, donate_argnums=(0, 1))

        self.evaluation: Any = jax.jit(
            _tensorflow(functools.partial(_evaluation, network, config.precision))
        )

    def replicated(self, value: np.ndarray) -> Any:
        """An array on every device."""
        return jax.device_put(value, NamedSharding(self.mesh, _REPLICATED))

    def sharded(self, *batch: np.ndarray) -> list[Any]:
        """Arrays by rows over the devices."""
        return [jax.device_put(rows, NamedSharding(self.mesh, _SHARDED)) for rows in batch]

    def abstract_arguments(self) -> tuple[Any, ...]:
        """Shapes and shardings of the program's arguments, to compile it without data."""
        side = self.network.image_size
        shapes = self.network.parameter_shapes()
        state: dict[str, tuple[tuple[int, ...], Any]] = {
            f"{group}/{n}": (s, np.float32)
            for group in ("params", "momentum")
            for n, s in shapes.items()
        }
        scaling = loss_scale.initial_loss_scale(self.config.precision)
        state |= {name: ((), value.dtype) for name, value in scaling.items()}
        state |= dict.fromkeys(DEVICE_COUNTERS, ((), np.int32))

        def spec(shape: tuple[int, ...], kind: Any, where: PartitionSpec) -> Any:
            return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(self.mesh, where))

        batch = self.config.batch_size
        return (
            {name: spec(*pair, _REPLICATED) for name, pair in state.items()},
            spec((), np.int32, _REPLICATED),
            spec((2,), np.float32, _REPLICATED),
            spec((batch, side, side, 3), np.float32, _SHARDED),
            spec((batch,), np.int32, _SHARDED),
        )

    def operations(self) -> list[tf.Operation]:
        """TensorFlow's operations of loss and gradients, each with the stack that made it."""
        side = self.network.image_size
        parameters = [tf.TensorSpec(s) for s in self.network.parameter_shapes().values()]
        batch = (tf.TensorSpec([self.rows, side, side, 3]), tf.TensorSpec([self.rows], tf.int32))
        core = tf.function(self._core, autograph=False)
        counters = (tf.TensorSpec([], tf.int32),) * 2
        # Unscaled also in float16: a loss scale adds no kind of op that could fail.
        concrete = core.get_concrete_function(parameters, *batch, *counters, None)
        return list(concrete.graph.get_operations())

    def _replica(
        self, state: dict[str, Any], refused: Any, rate: Any, images: Any, labels: Any
    ) -> tuple[Any, ...]:
        """(state, refused, applied, passed, telemetry, healthy [replicas]) on one device."""
        first_row = jax.lax.axis_index(AXIS) * self.rows
        parameters = [state[f"params/{name}"] for name in self._names]
        core = _tensorflow(self._core)

        def computed(scale: Any) -> tuple[Any, Any]:
            """(what the guard saw on each replica, sums and gradients of the global batch)."""
            *seen, sums, gradients = core(
                parameters, images, labels, state["counters/step"], first_row, scale
            )
            return jax.lax.all_gather(seen, AXIS), self._all_reduce((sums, gradients))

        overflow = None
        if loss_scale.SCALE in state:
            seen, reduced = computed(state[loss_scale.SCALE])
            overflow = ~_all_finite(reduced[1])
            # The same on every replica, so that all of them take the branch.
            seen, reduced = jax.lax.cond(
                overflow, lambda: computed(np.float32(1)), lambda: (seen, reduced)
            )
        else:
            seen, reduced = computed(None)
        *seen, healthy = seen
        update = _tensorflow(self._update)
        return (*update(state, refused, rate, *seen, *reduced, overflow), healthy)

    def _all_reduce(self, values: Any) -> Any:
        """The sum over the replicas, with the same bits every time."""
        if self.mesh.devices.flat[0].platform != "cpu":
            return jax.lax.psum(values, AXIS)
        # Virtual CPU devices add in the order in which they arrive.
        return jax.tree.map(lambda value: jax.lax.all_gather(value, AXIS).sum(axis=0), values)

    def _core(
        self, parameters: Any, images: Any, labels: Any, step: Any, first_row: Any, scale: Any
    ) -> tuple[Any, ...]:
        """TensorFlow: this replica's share of loss and gradients, and what the guard saw."""
        batch = self.config.batch_size
        core = loss_and_gradients(
            self.network,
            dict(zip(self._names, parameters, strict=True)),
            images,
            labels,
            dropout=Dropout.of_step(self.config.dropout, self.config.seed, step, first_row),
            compute_dtype=tf.as_dtype(self.config.precision),
            global_rows=batch,
            loss_scale=scale,
            extremes=guard.checked_extremes,
        )
        seen, gradients = core.forward, core.gradients
        sums = tf.stack([seen.loss, core.top1 / batch, core.top5 / batch])
        return (
            seen.input_extremes,
            seen.labels_valid,
            seen.preactivation_extremes,
            all_its_own_finite(core),
            sums,
            gradients,
        )

    def _update(
        self,
        state: Any,
        refused: Any,
        rate: Any,
        extremes: Any,
        valid: Any,
        preactivations: Any,
        sums: Any,
        gradients: Any,
        overflow: Any,
    ) -> tuple[Any, ...]:
        """TensorFlow: verdict and update of the global batch; the same on every replica."""
        seen = Forward(
            over_replicas(extremes), tf.reduce_all(valid), over_replicas(preactivations), sums[0]
        )
        settings = RateSettings(rate[0], rate[1], self.config.lr_drop_factor)
        return tuple(
            gated_update(
                self._optimizer,
                self.layout,
                settings,
                state,
                refused,
                seen,
                gradients,
                (sums[1], sums[2]),
                overflow,
            )
        )


def _all_finite(arrays: Any) -> Any:
    return jnp.stack([jnp.isfinite(array).all() for array in arrays]).all()


def _evaluation(
    network: Network, precision: str, parameters: Any, images: Any, labels: Any, weights: Any
) -> tf.Tensor:
    """TensorFlow: the four sums of a batch of validation images."""
    sums = batch_sums(network, parameters, tf.as_dtype(precision), images, labels, weights)
    return tf.cast(sums, tf.float32)


def _tensorflow(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = tf.function(function, jit_compile=True, autograph=False)
    return jax2tf.call_tf(compiled, has_side_effects=False)


@functools.cache
def _choose_lowering_for_tpus() -> None:
    """A TensorFlow without TPU kernels lowers for the CPU; StableHLO is the same for both.

    `call_tf` would ask it for XLA_TPU_JIT kernels, which only tensorflow-tpu has.
    """
    if has_tpu_kernels():
        return
    module = sys.modules["jax.experimental.jax2tf.call_tf"]
    rule = functools.partial(module._call_tf_lowering, platform="cpu")
    mlir.register_lowering(module.call_tf_p, rule, platform="tpu")


@functools.cache
def has_tpu_kernels() -> bool:
    """Whether the installed TensorFlow lowers a convolution for TPU (tensorflow-tpu does)."""
    convolve = tf.function(lambda x: tf.nn.conv2d(x, x, 1, "SAME"), jit_compile=True)
    lower = convolve.experimental_get_compiler_ir(tf.TensorSpec([1, 1, 1, 1]))
    try:
        lower(stage="hlo_serialized", platform_name="TPU")
    except ValueError:
        return False
    return True
