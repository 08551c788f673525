"""Runs TensorFlow code op by op and remembers where non-finite values begin.

`OpTrace` listens to every op that eager execution runs (the op callbacks that
`tf.debugging.enable_check_numerics` is built on). It keeps one small record an
op and no tensors, so a step needs no more memory than it does without it. The
finite check is one pass over each output; full statistics are taken only where
a non-finite value begins.

What counts as a beginning (`Hit.origin`): an op whose inputs were all finite, or
one that makes NaN out of an infinity that was put there on purpose. An infinity
is on purpose where it enters as a constant (the -inf of an attention mask): it
passes through additions and products, and a softmax normally removes it again.
What a later op removed (`Hit.live` is false) reached neither loss nor gradients;
`diagnostics.origins` then looks for another beginning.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks

from diagnostics.op_records import (
    Hit,
    OpRecord,
    describe_hit,
    host_array,
    largest_magnitude,
)
from diagnostics.scopes import LayerScopes
from diagnostics.source_lines import view_stack

# Reading a variable makes nothing; a non-finite value read was there before.
_READS = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableV2"})


class OpTrace:
    """A context manager; the code to trace runs inside it, in the same thread.

    It does not see into ops of an already traced `tf.function` (functions called
    inside run eagerly) nor into the threads of `tf.distribute` replicas.

    Args:
      layers: layer names to look for in name scopes; 'encoder/dense' asks for
        nested scopes. Without them a layer is the outermost scope.
      batch_size: ops whose outputs have that many rows get counts by row.

    Attributes:
      records: every op that made or wrote floating-point numbers, in order.
      hits: those with a non-finite result, in order.
      ended_by: the message of an op that refused its input and ended the
        replay early, or ''.
    """

    def __init__(self, layers: Sequence[str] = (), batch_size: int | None = None) -> None:
        self.records: list[OpRecord] = []
        self.hits: list[Hit] = []
        self.ended_by = ""
        self._scopes = LayerScopes(layers)
        self._batch_size = batch_size
        self._phase = "forward"
        self._executed = 0
        self._looking = False
        self._producer: dict[int, int] = {}  # tensor id -> place in records
        self._consumers: dict[tuple[str, int], list[int]] = {}
        self._bad: dict[int, Hit] = {}  # id of a non-finite tensor -> who made it
        self._outermost: FrameType | None = None
        self._functions_ran_eagerly = False

    @property
    def current_phase(self) -> str:
        return self._phase

    def phase(self, name: str) -> None:
        """Enters 'forward', 'loss', 'backward' or 'update'.

        Gradient functions that run while the phase is still 'forward' count as
        'backward'; inside 'loss' they stay 'loss' (a gradient penalty).
        """
        self._phase = name

    def __enter__(self) -> OpTrace:
        self._outermost = sys._getframe(1)
        self._functions_ran_eagerly = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        op_callbacks.add_op_callback(self._observe)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        op_callbacks.remove_op_callback(self._observe)
        tf.config.run_functions_eagerly(self._functions_ran_eagerly)
        self._outermost = None

    def _observe(
        self,
        op_type: str | bytes,
        inputs: Sequence[tf.Tensor],
        attrs: Sequence[Any],
        outputs: Sequence[tf.Tensor],
        op_name: str | None = None,
        graph: tf.Graph | None = None,
    ) -> None:
        """The op callback: called by TensorFlow after every op."""
        if self._looking or graph is not None:  # our own read; a graph under construction
            return
        self._executed += 1
        name = op_type.decode() if isinstance(op_type, bytes) else op_type
        self._looking = True
        try:
            results = list(_results(name, inputs, attrs, outputs))
        finally:
            self._looking = False
        if not results:
            return
        magnitude = max((largest_magnitude(array) for _, array in results), key=_badness)
        record, bookkeeping = self._record(name, inputs, magnitude)
        place = len(self.records)
        self.records.append(record)
        for tensor, _ in results:
            self._producer[tensor._id] = place
        if name in _READS and record.layer is not None:
            self._producer.setdefault(inputs[0]._id, place)  # whose variable it is
        if record.phase in ("forward", "loss"):
            for tensor in inputs:
                self._consumers.setdefault((name, tensor._id), []).append(place)
        self._follow(record, inputs, results, bookkeeping)

    def _record(
        self, name: str, inputs: Sequence[tf.Tensor], magnitude: float
    ) -> tuple[OpRecord, bool]:
        seen = view_stack(sys._getframe(2), self._outermost)
        phase, line = self._phase, seen.line
        layer = self._scopes.layer(context.context().scope_name)
        if seen.gradient is not None:
            phase = "backward" if phase == "forward" else phase
            forward = self._differentiated(seen.gradient)
            source = forward or self._latest(inputs)
            scope = seen.gradient.get("forward_pass_name_scope")
            layer = (source.layer if source else None) or self._scopes.layer(scope)
            line = line or (source.line if source else None)
        elif phase in ("backward", "update") and layer is None:
            layer = self._only_layer(inputs)
        record = OpRecord(self._executed - 1, name, phase, layer, magnitude, line)
        return record, seen.bookkeeping

    def _differentiated(self, gradient: dict[str, Any]) -> OpRecord | None:
        """The forward op of a gradient function, found by the tensors it kept."""
        for made in (gradient.get("outputs"), gradient.get("result")):
            for tensor in _tensors(made):
                if tensor._id in self._producer:
                    return self.records[self._producer[tensor._id]]
        places: set[int] | None = None
        for tensor in _tensors(gradient.get("inputs")):
            users = set(self._consumers.get((_text(gradient["op_name"]), tensor._id), ()))
            places = users if places is None else places & users
        return self.records[max(places)] if places else None

    def _latest(self, inputs: Sequence[tf.Tensor]) -> OpRecord | None:
        """The op that ran last of those that made the inputs."""
        places = [self._producer[t._id] for t in inputs if t._id in self._producer]
        return self.records[max(places)] if places else None

    def _only_layer(self, inputs: Sequence[tf.Tensor]) -> str | None:
        """The layer whose gradients or updates the inputs are, if it is one layer."""
        made = [self.records[self._producer[t._id]] for t in inputs if t._id in self._producer]
        layers = {record.layer for record in made} - {None}
        return layers.pop() if len(layers) == 1 else None

    def _follow(
        self,
        record: OpRecord,
        inputs: Sequence[tf.Tensor],
        results: list[tuple[tf.Tensor, np.ndarray]],
        bookkeeping: bool,
    ) -> None:
        """Adds the op to the flow of non-finite values."""
        # Assigning takes the new value, not the one that the variable held.
        taken = inputs[1:] if record.op == "AssignVariableOp" else inputs
        parents = {id(hit): hit for t in taken if (hit := self._bad.get(t._id)) is not None}
        if np.isfinite(record.absmax):
            for tensor, _ in results:
                self._bad.pop(tensor._id, None)  # a variable overwritten with finite values
            for hit in () if bookkeeping else parents.values():
                hit.removed = True
            return
        hit = Hit(record, tuple(parents.values()), bookkeeping=bookkeeping)
        if record.op in _READS:
            hit.from_state = not parents
        elif not bookkeeping and all(parent.on_purpose for parent in parents.values()):
            arrays = [array for _, array in results]
            hit.begin(*describe_hit(record.op, inputs, arrays, self._batch_size))
        for parent in parents.values():
            parent.consumers.append(hit)
        for tensor, array in results:
            if not np.isfinite(largest_magnitude(array)):
                self._bad[tensor._id] = hit
        self.hits.append(hit)


def _results(
    name: str,
    inputs: Sequence[tf.Tensor],
    attrs: Sequence[Any],
    outputs: Sequence[tf.Tensor],
) -> Iterable[tuple[tf.Tensor, np.ndarray]]:
    """(tensor, value) of everything floating-point that an op made or wrote.

    A variable written in place stands under its handle.
    """
    # Later outputs of batch normalisation are scratch space.
    for tensor in outputs[:3] if name.startswith("FusedBatchNorm") else outputs:
        if tensor.dtype.is_floating or tensor.dtype.is_complex:
            yield tensor, host_array(tensor)
    if outputs or not name.startswith(("Assign", "Resource")):
        return
    types = dict(zip(attrs[::2], attrs[1::2], strict=True))
    dtype = tf.as_dtype(types.get("dtype", types.get("T", tf.int32)))
    for tensor in inputs:
        if tensor.dtype == tf.resource and dtype.is_floating:
            value = tf.raw_ops.ReadVariableOp(resource=tensor, dtype=dtype)
            yield tensor, host_array(value)


def _tensors(values: Any) -> list[tf.Tensor]:
    values = values if isinstance(values, (list, tuple)) else [values]
    return [value for value in values if isinstance(value, tf.Tensor)]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _badness(magnitude: float) -> float:
    return np.inf if np.isnan(magnitude) else magnitude
