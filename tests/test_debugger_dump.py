"""The Debugger V2 dump: what TensorBoard reads of it, and a clean process afterwards."""

import time
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.plugins.debugger_v2.debug_data_multiplexer import (
    DEFAULT_DEBUGGER_RUN_NAME,
    DebuggerV2EventMultiplexer,
)
from tensorflow.python.debug.lib import debug_events_reader
from tensorflow.python.eager import context

from diagnostics.debugger_dump import dump_step

ONES = tf.ones([1, 2])


def failing_step(jit_compile: bool = False):
    """A compiled step whose second layer takes the logarithm of a negative number."""
    weights = tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    calls = tf.Variable(0)

    @tf.function(jit_compile=jit_compile)
    def gradients(inputs):
        with tf.GradientTape() as tape:
            with tf.name_scope("fc1"):
                hidden = tf.matmul(inputs, weights)
            with tf.name_scope("fc2"):
                loss = tf.reduce_sum(tf.math.log(hidden - 100.0))
        return loss, tape.gradient(loss, weights)

    @tf.function
    def step(inputs):
        loss, gradient = gradients(inputs)
        finite = tf.math.is_finite(loss)
        tf.cond(finite, lambda: weights.assign_sub(gradient), lambda: weights.read_value())
        calls.assign_add(1)
        return loss

    step.calls = calls
    return step


def alerts(dump: Path) -> list[dict]:
    """What TensorBoard's server answers when its page asks for the alerts."""
    server = DebuggerV2EventMultiplexer(str(dump))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if server.Runs():
            found = server.Alerts(DEFAULT_DEBUGGER_RUN_NAME, 0, -1)["alerts"]
            if found:
                return found
        time.sleep(0.05)
    raise AssertionError("TensorBoard shows no alert")


def op_names(dump: Path) -> list[str]:
    with debug_events_reader.DebugDataReader(str(dump)) as reader:
        reader.update()
        return [trace.op_name for trace in reader.graph_execution_traces()]


def recording_ops(function) -> list[str]:
    graph = function.get_concrete_function(ONES).graph
    return [op.type for op in graph.get_operations() if op.type.startswith("Debug")]


def assert_clean():
    assert context.context().op_callbacks == []
    assert tf.config.functions_run_eagerly() is False
    assert recording_ops(failing_step()) == []


@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensorboard_names_the_first_nonfinite_op(tmp_path, jit_compile):
    step = failing_step(jit_compile)
    step(ONES)  # compiled before the dump: must be looked into all the same
    assert dump_step(tmp_path / "dump", lambda: step(ONES)) is True
    first = alerts(tmp_path / "dump")[0]
    assert (first["op_type"], first["num_nan"], first["size"]) == ("Log", 2, 2)
    names = op_names(tmp_path / "dump")
    assert names[first["graph_execution_trace_index"]] == "fc2/Log"
    assert names.count("fc2/Log") == 1, "more than one step was recorded"
    assert any(name.startswith("gradient_tape/fc1") for name in names)


def test_the_process_is_clean_afterwards(tmp_path):
    step = failing_step()
    step(ONES)
    dump_step(tmp_path / "dump", lambda: step(ONES))
    assert_clean()
    assert recording_ops(step) == []
    size = sum(file.stat().st_size for file in (tmp_path / "dump").iterdir())
    step(ONES)
    assert int(step.calls) == 3
    assert sum(file.stat().st_size for file in (tmp_path / "dump").iterdir()) == size


def test_a_function_first_called_in_the_dump_is_not_instrumented(tmp_path):
    step = failing_step()
    dump_step(tmp_path / "dump", lambda: step(ONES))
    assert recording_ops(step) == []
    step(ONES)


def test_a_step_that_reads_values_is_recorded_op_by_op(tmp_path):
    step = failing_step()
    assert dump_step(tmp_path / "dump", lambda: float(step(ONES))) is False
    assert int(step.calls) == 1
    first = alerts(tmp_path / "dump")[0]
    assert (first["op_type"], first["graph_execution_trace_index"]) == ("Log", None)
    assert_clean()


def test_a_later_dump_replaces_the_earlier(tmp_path):
    dump_step(tmp_path / "dump", lambda: tf.math.log(ONES - 2.0))
    dump_step(tmp_path / "dump", lambda: tf.math.sqrt(ONES - 2.0))
    assert [alert["op_type"] for alert in alerts(tmp_path / "dump")] == ["Sqrt"]
    assert len(list((tmp_path / "dump").glob("*.metadata"))) == 1


def test_a_failing_step_leaves_neither_dump_nor_recorder(tmp_path):
    def step():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        dump_step(tmp_path / "dump", step)
    assert list(tmp_path.iterdir()) == []
    assert_clean()
