"""The training step on the devices that JAX's runtime (PJRT) has: TPUs, or virtual CPUs.

Kaggle's and Colab's TPU images come with JAX and a TensorFlow without TPU kernels. The
program is `jax_step.ShardedStep`; this class gives it the interface of `TrainStep`, so
that trainer, checkpoints, self-test and incidents are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from diagnostics.guard import StepResult
from vggrepro.config import TrainConfig
from vggrepro.jax_step import DEVICE_COUNTERS, GROUPS, ShardedStep
from vggrepro.model import Network
from vggrepro.step_state import State, StepState, rate_settings
from vggrepro.step_update import NOT_REFUSED


class PjrtStep(StepState):
    """The guarded step over all local JAX devices, data parallel.

    Args:
      config: batch_size is the global batch and divides over the devices.
      state: named arrays as `state()` returns them.
    """

    def __init__(self, config: TrainConfig, network: Network, state: State) -> None:
        super().__init__(config, network)
        devices = np.array(jax.devices())
        if config.batch_size % devices.size:
            raise InputError(
                f"batch size {config.batch_size} does not divide over {devices.size} devices",
                f"Give a --batch-size that is a multiple of {devices.size}",
            )
        self._sharded = ShardedStep(config, network, devices)
        self._on_device: dict[str, Any] = {}
        self._refused: Any = None
        # Batches that `ahead` put on the devices, by the id of their images, which are kept
        # so that it stays theirs.
        self._placed: dict[int, tuple[tf.Tensor, list[Any]]] = {}
        self.variables = {name: Slot(self, name, a) for name, a in state.items()}
        self._rate = self._sharded.replicated(np.array(rate_settings(config), np.float32))
        self.rearm()

    def __call__(self, images: tf.Tensor, labels: tf.Tensor) -> StepResult:
        """Runs one step on images float32 [B, s, s, 3] and labels int32 [B]."""
        _, batch = self._placed.pop(id(images), (images, None))
        if batch is None:
            batch = self._sharded.sharded(np.asarray(images), np.asarray(labels))
        self._on_device, self._refused, applied, passed, telemetry, healthy = self._sharded.program(
            self._on_device, self._refused, self._rate, *batch
        )
        return StepResult(
            bool(applied),
            np.asarray(passed),
            np.asarray(telemetry),
            np.asarray(healthy).tolist(),
        )

    def ahead(self, batches: tf.data.Dataset) -> Iterator[Mapping[str, tf.Tensor]]:
        source = iter(batches)

        def fetch() -> Mapping[str, tf.Tensor] | None:
            batch = next(source, None)
            if batch is not None:
                rows = (batch["images"], batch["labels"])
                placed = self._sharded.sharded(*map(np.asarray, rows))
                self._placed[id(batch["images"])] = (batch["images"], placed)
            return batch

        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(fetch)
            while (batch := coming.result()) is not None:
                coming = thread.submit(fetch)
                yield batch

    def reconfigure(self, config: TrainConfig) -> None:
        super().reconfigure(config)
        self._rate = self._sharded.replicated(np.array(rate_settings(config), np.float32))

    def rearm(self) -> None:
        self._refused = self._sharded.replicated(np.array(NOT_REFUSED, np.int32))

    def batch_sums(self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> np.ndarray:
        """`evaluation.batch_sums` with these weights on the first device."""
        parameters = {name: self._on_device[f"params/{name}"] for name in self._names}
        return np.asarray(
            self._sharded.evaluation(
                parameters, np.asarray(images), np.asarray(labels), np.asarray(weights)
            )
        )

    def read(self, name: str) -> Any:
        """An array of the state as the device holds it."""
        return self._on_device[name]

    def write(self, name: str, value: np.ndarray) -> None:
        """Puts an array of the state on every device."""
        self._on_device[name] = self._sharded.replicated(value)


class Slot:
    """One named array of a `PjrtStep`: on the devices, or on the host if no step needs it.

    JAX has no 64-bit integers by default; counters are 32 bits wide on the device.
    """

    def __init__(self, step: PjrtStep, name: str, value: np.ndarray) -> None:
        self._step, self._name, self._kind = step, name, value.dtype
        self._on_device = name in DEVICE_COUNTERS or name.partition("/")[0] in GROUPS
        self._value = value
        self.shape = value.shape
        self.assign(value)

    def numpy(self) -> np.ndarray:
        """A copy on the host, of the type that snapshots have."""
        value = self._step.read(self._name) if self._on_device else self._value
        return np.asarray(value).astype(self._kind)

    def assign(self, value: Any) -> None:
        """Replaces the array."""
        self._value = np.asarray(value, self._kind)
        if self._on_device:
            narrow = np.int32 if self._kind == np.int64 else self._kind
            self._step.write(self._name, self._value.astype(narrow))
            self._value = np.empty(0, self._kind)
