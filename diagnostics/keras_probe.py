"""A dry trace of a train step: what it writes, and how often it updates weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from diagnostics.keras_names import LayerNames, StateNames, find_optimizers, native
from diagnostics.keras_taps import Recorder, recording

_READS = frozenset(
    ["ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarHandleOp"]
)


class Plan(NamedTuple):
    """How a step can be guarded.

    Attributes:
      gate: one optimizer update that comes last: it is let through or not. Else
        the step runs as it is and what it wrote is put back.
      written: names of variables written outside that update (all of them if not
        `gate`).
      alone: one optimizer update that comes last, and nothing else writes weights or slots.
    """

    gate: bool
    written: tuple[str, ...]
    alone: bool


def probe(
    model: Any, train_step: Callable[[Any], Any], data: Any, may_gate: bool
) -> tuple[Plan, StateNames]:
    """Traces the step into a graph that is thrown away.

    Layers, optimizer slots and metrics that are made at the first call exist
    afterwards, with their initial values: nothing is executed.

    Args:
      may_gate: whether the real step will run where an update can be skipped.
    """
    graph = tf.__internal__.FuncGraph("numeric_guard_probe")
    updates: list[tuple[int, int]] = []
    taps_at_update = 0

    def on_apply(optimizer: Any, apply: Callable[..., Any], grads: list, variables: list) -> None:
        nonlocal taps_at_update
        if not optimizer.built:
            with tf.init_scope():  # a slot may begin as a tensor, which would stay in here
                optimizer.build(variables)
        begin = len(graph.get_operations())
        apply(grads, variables)
        updates.append((begin, len(graph.get_operations())))
        taps_at_update = len(recorder.taps)

    with graph.as_default():
        recorder = Recorder(LayerNames(model))
        recorder.on_apply = on_apply
        with recording(recorder, model, find_optimizers(model)):
            train_step(data)
    state = StateNames(model, extra=graph.variables)
    operations = graph.get_operations()
    everything = tuple(sorted(_written(graph, operations, state)))
    if len(updates) != 1 or taps_at_update != len(recorder.taps):
        return Plan(False, everything, False), state
    begin, end = updates[0]
    before = _written(graph, operations[:begin], state)
    after = _written(graph, operations[end:], state)
    alone = not any(name.startswith(("params/", "opt")) for name in before | after)
    if may_gate and all(name.startswith("counters/metrics/") for name in after - before):
        return Plan(True, tuple(sorted(before | after)), alone), state
    return Plan(False, everything, alone), state


def _written(graph: Any, operations: Sequence[tf.Operation], state: StateNames) -> set[str]:
    """Names of the variables that these operations may write."""
    names = {id(native(v).handle): name for name, v in state.variables.items()}
    inner = {id(placeholder): names.get(id(outer)) for outer, placeholder in graph.captures}
    found = set()
    for handle in _handles(operations):
        name = inner.get(id(handle))
        if name is not None:
            found.add(name)
    return found


def _handles(operations: Iterable[tf.Operation]) -> Iterable[tf.Tensor]:
    """Resources that go into an op other than a plain read; a called graph may write."""
    for operation in operations:
        if operation.type not in _READS:
            yield from (t for t in operation.inputs if t.dtype == tf.resource)
