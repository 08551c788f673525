"""The training step of several replicas through tf.distribute.

Each replica takes an equal run of the rows of the global batch, computes its share of loss
and gradients and exchanges both; then each comes to its own verdict, the verdicts are
joined, and each writes its own copy of the state, or none does. All inside the compiled
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from diagnostics import guard
from vggrepro.config import TrainConfig
from vggrepro.dataset import replica_rows
from vggrepro.model import Network
from vggrepro.replica_evidence import added_in_order, brought_together, evidence_row
from vggrepro.step_core import CoreResult
from vggrepro.step_state import State
from vggrepro.train_step import TrainStep

if TYPE_CHECKING:
    from vggrepro.accelerator import Engine

_SUM = tf.distribute.ReduceOp.SUM


class DistributedStep(TrainStep):
    """The guarded step on every replica of an engine; of several workers, on this one's.

    Args:
      config: batch_size is the global batch and divides over the replicas.
      state: named arrays as `state()` returns them; of several workers the chief's counts.
    """

    def __init__(self, config: TrainConfig, network: Network, state: State, engine: Engine) -> None:
        assert engine.distribution is not None
        replica_rows(config.batch_size, 0, engine.replicas)
        self._engine, self._replicas = engine, engine.replicas
        self._strategy: tf.distribute.Strategy = engine.distribution
        # XLA's maximum drops NaN.
        self._reading = {"extremes": guard.checked_extremes} if engine.compiled_by_xla else {}
        # In one order, whatever a checkpoint's is: making a variable asks the chief for its value.
        super().__init__(config, network, dict(sorted(state.items())))

    def ahead(self, batches: tf.data.Dataset) -> Iterator[Mapping[str, tf.Tensor]]:
        return iter(batches)  # each replica fetches its own rows

    def _variable(self, value: np.ndarray, name: str) -> ReplicaVariable:
        return ReplicaVariable(self._strategy, value, name)

    def _fed(self, *batch: tf.Tensor) -> tuple[Any, ...]:
        return tuple(self._shared_out(part) for part in batch)

    def _shared_out(self, rows: tf.Tensor) -> Any:
        """This worker's rows of a batch, an equal run of them for each replica."""
        shares = tf.split(rows, self._engine.replicas_here)
        return self._per_replica(lambda replica: shares[replica])

    def _stacked(self, parts: Sequence[Any]) -> Any:
        shares = [self._strategy.experimental_local_results(part) for part in parts]
        return self._per_replica(lambda replica: tf.stack([share[replica] for share in shares]))

    def _per_replica(self, value: Callable[[int], tf.Tensor]) -> Any:
        first = self._engine.workers.index * self._engine.replicas_here
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: value(context.replica_id_in_sync_group - first)
        )

    def _taken(self, images: Any, labels: Any, row: tf.Tensor) -> tuple[Any, Any]:
        return self._strategy.run(
            lambda *parts: tuple(part[row] for part in parts), (images, labels)
        )

    def _step(self, images: Any, labels: Any, *key: int) -> tuple[tf.Tensor, ...]:
        results = self._strategy.run(super()._step, (images, labels))
        # The same on every replica.
        return tuple(self._strategy.experimental_local_results(part)[0] for part in results)

    def _global_rows(self, images: tf.Tensor) -> int:
        return images.shape[0] * self._replicas

    def _core(
        self, images: tf.Tensor, labels: tf.Tensor, step: tf.Tensor, **options: Any
    ) -> CoreResult:
        replica = _context().replica_id_in_sync_group
        rows = self._global_rows(images)
        first_row = replica * images.shape[0]
        own = self._share(images, labels, step, first_row, rows, **self._reading, **options)
        return brought_together(self._by_replica(evidence_row(own)), self._summed(own.gradients))

    def _at_scale_one(
        self, images: tf.Tensor, labels: tf.Tensor, step: tf.Tensor
    ) -> list[tf.Tensor]:
        first_row = _context().replica_id_in_sync_group * images.shape[0]
        return self._share(images, labels, step, first_row, self._global_rows(images)).gradients

    def _common(self, passed: tf.Tensor) -> tf.Tensor:
        failures = _context().all_reduce(_SUM, tf.cast(tf.logical_not(passed), tf.int32))
        return tf.equal(failures, 0)

    def _by_replica(self, row: tf.Tensor) -> tf.Tensor:
        """float32 [replicas, n] of each one's [n], exact in any order of adding."""
        mine = tf.one_hot(_context().replica_id_in_sync_group, self._replicas, True, False)
        return _context().all_reduce(_SUM, tf.where(mine[:, tf.newaxis], row[tf.newaxis], 0.0))

    def _summed(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        if not self._engine.adds_in_order:
            return _context().all_reduce(_SUM, list(gradients))
        # A ring adds in another order at every place.
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], axis=0)
        every = _context().all_gather(flat[tf.newaxis], axis=0)
        every.set_shape([self._replicas, flat.shape[0]])
        sizes = [gradient.shape.num_elements() for gradient in gradients]
        parts = tf.split(added_in_order(tf.unstack(every)), sizes)
        pairs = zip(parts, gradients, strict=True)
        return [tf.reshape(part, gradient.shape) for part, gradient in pairs]

    def _evaluated(self, *batch: Any) -> tf.Tensor:
        *rows, _ = batch
        sums = self._strategy.run(self._rows_evaluated, tuple(rows))
        return tf.stack(self._strategy.experimental_local_results(sums))


class ReplicaVariable:
    """A variable with a copy on each replica, which reads and writes its own alone.

    A `tf.Variable` of a strategy would exchange at every assignment, which no branch of a
    conditional can do. Outside of replicas, an assignment writes every copy here.
    """

    def __init__(self, strategy: tf.distribute.Strategy, value: np.ndarray, name: str) -> None:
        self._strategy = strategy
        with strategy.scope():
            self._copies = tf.Variable(value, trainable=False, name=name)
        self.shape, self.dtype = self._copies.shape, self._copies.dtype

    @property
    def handle(self) -> tf.Tensor:
        return self._copies.handle

    def read_value(self) -> tf.Tensor:
        """This replica's copy; outside of replicas, the first one's."""
        return self._copies.read_value()

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> tf.Tensor:
        return self.read_value()

    def assign(self, value: Any) -> None:
        """Replaces this replica's copy; outside of replicas, every one."""
        context = tf.distribute.get_replica_context()
        if context is None or context.strategy is not self._strategy:
            self._copies.assign(value)
        else:
            tf.raw_ops.AssignVariableOp(
                resource=self.handle, value=tf.cast(value, self.dtype), validate_shape=True
            )

    def assign_add(self, value: Any) -> None:
        """Adds to this replica's copy."""
        tf.raw_ops.AssignAddVariableOp(resource=self.handle, value=tf.cast(value, self.dtype))

    def numpy(self) -> np.ndarray:
        """The first replica's copy."""
        return self._copies.read_value().numpy()


def _context() -> tf.distribute.ReplicaContext:
    return tf.distribute.get_replica_context()
