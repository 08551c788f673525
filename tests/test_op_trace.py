"""`OpTrace`: layers, phases, source lines, and where non-finite values begin."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorflow.python.framework import op_callbacks

from diagnostics import guard
from diagnostics.op_records import Hit, largest_magnitude
from diagnostics.op_trace import OpTrace
from diagnostics.origins import mark_live
from diagnostics.scopes import LayerScopes

HERE = "test_op_trace.py"


def origins(tracer: OpTrace) -> list[Hit]:
    return [hit for hit in tracer.hits if hit.origin]


def only_origin(tracer: OpTrace) -> Hit:
    found = origins(tracer)
    assert len(found) == 1, [hit.record for hit in found]
    return found[0]


def test_records_carry_order_phase_layer_and_size():
    with OpTrace(layers=["one", "two"]) as tracer:
        with tf.name_scope("one"), tf.name_scope("inner"):
            values = tf.constant([1.0, -4.0]) * 2.0
        tracer.phase("loss")
        with tf.name_scope("net"), tf.name_scope("two"):
            tf.reduce_sum(values)
    product, total = tracer.records
    assert (product.op, product.phase, product.layer, product.absmax) == (
        "Mul",
        "forward",
        "one",
        8.0,
    )
    assert (total.op, total.phase, total.layer, total.absmax) == ("Sum", "loss", "two", 6.0)
    assert product.order < total.order
    assert tracer.hits == []


@pytest.mark.parametrize(
    ("layers", "scope", "layer"),
    [
        (["a", "b"], "a/b/", "b"),
        (["a", "b"], "gradient_tape/a/x/", "a"),
        (["dense"], "dense_1/", None),
        (["encoder/dense", "dense"], "model/encoder/dense/MatMul", "encoder/dense"),
        (["encoder/dense", "decoder/dense"], "decoder/dense/", "decoder/dense"),
        (["encoder/dense"], "dense/", None),
        ([], "outer/inner/", "outer"),
        (["a"], None, None),
    ],
)
def test_layers_from_scopes(layers, scope, layer):
    assert LayerScopes(layers).layer(scope) == layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_scalars_of_every_type_are_read(dtype):
    zero = tf.constant(0.0, dtype)
    with OpTrace() as tracer:
        tf.reduce_max(zero / zero)
    hit = only_origin(tracer)
    assert (hit.record.op, hit.kind) == ("RealDiv", "nan")
    assert (hit.details.count, hit.details.size) == (1, 1)
    assert [shown.maximum for shown in hit.details.inputs] == [0.0, 0.0]


def test_an_origin_is_told_from_what_follows_it():
    with OpTrace(layers=["a", "b"], batch_size=3) as tracer:
        with tf.name_scope("a"):
            values = tf.math.log(tf.constant([[1.0, 0.0], [-1.0, -1.0], [1.0, 1.0]]))
        with tf.name_scope("b"):
            tf.reduce_sum(values * 2.0)
    hit = only_origin(tracer)
    assert (hit.record.op, hit.record.layer, hit.kind) == ("Log", "a", "nan")
    assert (hit.details.count, hit.details.nan, hit.details.size) == (3, 2, 6)
    assert hit.details.row_counts.tolist() == [1, 2, 0]
    (shown,) = hit.details.inputs
    assert shown == type(shown)("x", (3, 2), -1.0, 1.0, 0)
    assert [later.record.op for later in tracer.hits] == ["Log", "Mul", "Sum"]
    assert [parent.record.op for parent in tracer.hits[2].parents] == ["Mul"]


def test_rows_need_the_batch_size():
    with OpTrace(batch_size=4) as tracer:
        tf.math.log(tf.zeros([3, 2]))
    assert only_origin(tracer).details.row_counts is None


def test_source_is_the_users_line():
    with OpTrace() as tracer:
        tf.reduce_mean(tf.math.log(tf.zeros([2])))  # the line
    line = str(only_origin(tracer).record.line)
    assert line.startswith(f"{HERE}:") and line.endswith("# the line")
    assert "in test_source_is_the_users_line: " in line


def _penalty(values: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.reduce_sum(tf.square(values), axis=1))  # the root


def test_a_backward_op_has_the_layer_and_line_of_its_forward_op():
    weights = tf.Variable(tf.zeros([2, 2]))
    with OpTrace(layers=["norm", "other"], batch_size=3) as tracer:
        with tf.GradientTape() as tape:
            with tf.name_scope("other"):
                values = tf.matmul(tf.ones([3, 2]), weights)
            with tf.name_scope("norm"):
                loss = tf.reduce_mean(_penalty(values))
        tracer.phase("backward")
        tape.gradient(loss, weights)
    first = min(origins(tracer), key=lambda hit: hit.record.order)
    assert (first.record.op, first.record.phase, first.record.layer) == (
        "SqrtGrad",
        "backward",
        "norm",
    )
    assert str(first.record.line).endswith("# the root")
    assert first.details.row_counts.tolist() == [1, 1, 1]
    by_layer = [record.layer for record in tracer.records if record.phase == "backward"]
    assert by_layer[-1] == "other"  # the gradient of matmul


@tf.custom_gradient
def _doubtful(values: tf.Tensor):
    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return upstream / tf.zeros_like(upstream)  # own gradient

    return values * 1.0, gradient


def test_a_custom_gradient_shows_its_own_line_and_its_forward_layer():
    values = tf.Variable([1.0, 2.0])
    with OpTrace(layers=["a", "b"]) as tracer:
        with tf.GradientTape() as tape:
            with tf.name_scope("a"):
                middle = _doubtful(values)
            with tf.name_scope("b"):
                loss = tf.reduce_sum(middle * 3.0)
        tape.gradient(loss, values)
    record = only_origin(tracer).record
    assert (record.op, record.phase, record.layer) == ("RealDiv", "backward", "a")
    assert str(record.line).endswith("# own gradient")


def test_a_sum_of_gradients_belongs_to_the_last_of_them():
    weights = tf.Variable([0.1])
    with OpTrace(layers=["a", "b"]) as tracer:
        with tf.GradientTape() as tape:
            with tf.name_scope("a"):
                first = weights * 3e38
            with tf.name_scope("b"):
                second = weights * -3e38
            loss = first - second * 1.0
        tape.gradient(loss, weights)
    record = only_origin(tracer).record
    assert (record.op, record.phase, record.layer) == ("AddN", "backward", "b")
    assert str(record.line).endswith("second = weights * -3e38")


def test_gradient_functions_inside_the_loss_stay_in_the_loss():
    values = tf.Variable([4.0])
    with OpTrace() as tracer:
        tracer.phase("loss")
        with tf.GradientTape() as tape:
            loss = tf.square(values)
        tape.gradient(loss, values)
    assert {record.phase for record in tracer.records} == {"loss"}


def test_functions_run_op_by_op_and_settings_are_restored():
    @tf.function
    def compiled(values):
        return tf.math.log(values)

    tf.config.run_functions_eagerly(False)
    compiled(tf.ones([1]))
    with pytest.raises(RuntimeError), OpTrace() as tracer:
        compiled(tf.zeros([1]))
        raise RuntimeError
    assert only_origin(tracer).record.op == "Log"
    assert not tf.config.functions_run_eagerly()
    assert not op_callbacks.should_invoke_op_callbacks()
    tf.math.log(tf.zeros([1]))
    assert len(tracer.hits) == 1


def test_a_branch_that_where_did_not_take_is_not_live():
    values = tf.constant([0.0, 1.0])
    with OpTrace() as tracer:
        tf.reduce_sum(tf.where(values > 0, tf.math.log(values), 0.0))
    mark_live(tracer.hits)
    assert [(hit.record.op, hit.live) for hit in tracer.hits] == [("Log", False)]


def test_a_value_that_the_guard_saw_is_live():
    with OpTrace() as tracer:
        values = tf.math.log(tf.constant([[0.0], [1.0]]))
        guard.extremes(values)
        tf.nn.relu(values)  # -inf becomes 0
    mark_live(tracer.hits)
    log = tracer.hits[0]
    assert (log.record.op, log.live, log.origin, log.removed) == ("Log", True, True, True)
    assert all(hit.bookkeeping and not hit.origin for hit in tracer.hits[1:])


def test_what_the_guard_reads_stays_live_whatever_becomes_of_the_reading():
    with OpTrace() as tracer:
        values = tf.math.log([-1.0])
        guard.exact_norm([values])  # puts 1 for a scale that is NaN
        seen = guard.extremes(values)
        tf.where(seen > 0, seen, 0.0)
    mark_live(tracer.hits)
    inside = [hit for hit in tracer.hits if hit.bookkeeping and hit.record.op in ("Max", "Min")]
    assert len(inside) == 4 and all(hit.live and not hit.removed for hit in inside)
    assert tracer.hits[0].live


def test_the_guards_own_arithmetic_is_never_an_origin():
    with OpTrace() as tracer:
        guard.squares([[tf.fill([4], 1e30)]])
    assert tracer.hits and origins(tracer) == []


def test_an_attention_mask_is_on_purpose():
    mask = tf.constant([[0.0, -np.inf], [0.0, 0.0]])
    with OpTrace() as tracer:
        tf.nn.softmax(tf.ones([2, 2]) + mask)
    mark_live(tracer.hits)
    (hit,) = tracer.hits
    assert (hit.record.op, hit.origin, hit.on_purpose, hit.live) == ("AddV2", False, True, False)


def test_a_row_that_is_masked_entirely_begins_at_the_softmax():
    mask = tf.constant([[-np.inf, -np.inf], [0.0, 0.0]])
    with OpTrace(batch_size=2) as tracer:
        tf.nn.softmax(tf.ones([2, 2]) + mask)
    hit = only_origin(tracer)
    assert (hit.record.op, hit.kind) == ("Softmax", "nan")
    assert hit.details.row_counts.tolist() == [2, 0]


def test_an_update_in_place_is_seen_through_its_variable():
    weights = tf.Variable([3e38, 1.0])
    with OpTrace() as tracer:
        tracer.phase("update")
        weights.assign_add([3e38, 1.0])
        tf.identity(weights.read_value())
        weights.assign([0.0, 0.0])
        weights.read_value()
    hit = only_origin(tracer)
    assert (hit.record.op, hit.kind, hit.details.count) == ("AssignAddVariableOp", "inf", 1)
    assert [later.parents for later in tracer.hits[1:2]] == [(hit,)]
    assert not hit.removed  # overwritten, not made finite
    assert tracer.records[-1].absmax == 0.0


def test_a_new_value_does_not_come_from_the_old_one():
    weights = tf.Variable([np.inf])
    with OpTrace() as tracer:
        weights.assign([3e38] * tf.constant(10.0))
        weights.assign(tf.math.log([-1.0]))
    second = tracer.hits[-1]
    assert second.record.op == "AssignVariableOp"
    assert [parent.record.op for parent in second.parents] == ["Log"]


def test_a_fused_optimizer_kernel_is_seen():
    weights, momentum = tf.Variable([1.0]), tf.Variable([-3e38])
    with OpTrace() as tracer:
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=weights.handle,
            accum=momentum.handle,
            lr=10.0,
            grad=tf.constant([3e38]),
            momentum=1.0,
        )
    assert only_origin(tracer).record.op == "ResourceApplyKerasMomentum"


def test_what_a_variable_held_before_is_no_origin():
    weights = tf.Variable([np.nan])
    with OpTrace() as tracer:
        tf.square(weights.read_value())
    assert tracer.hits[0].from_state and origins(tracer) == []


def test_the_update_of_a_layer_is_known_by_its_gradient():
    kernel, slot = tf.Variable([[1.0]]), tf.Variable([[3e38]])
    with OpTrace(layers=["dense", "other"]) as tracer:
        with tf.GradientTape() as tape, tf.name_scope("dense"):
            loss = tf.matmul([[1.0]], kernel)
        gradient = tape.gradient(loss, kernel)
        tracer.phase("update")
        slot.assign(slot * 1.0 + gradient * 3e38)
    record = only_origin(tracer).record
    assert (record.op, record.phase, record.layer) == ("AddV2", "update", "dense")


def test_scratch_outputs_of_batch_normalisation_do_not_count():
    outputs = [tf.ones([2]), tf.ones([2]), tf.ones([2]), tf.constant([np.nan])]
    tracer = OpTrace()
    tracer._observe("FusedBatchNormV3", [], [], outputs)
    assert len(tracer.records) == 1 and tracer.hits == []
    tracer._observe("FusedBatchNormV3", [], [], outputs[::-1])
    assert len(tracer.hits) == 1


FLOATS = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)),
    st.sampled_from(FLOATS),
)
def test_largest_magnitude_is_numpys(array, dtype):
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    wide = np.abs(array.astype(np.float64))
    np.testing.assert_equal(largest_magnitude(array), wide.max() if wide.size else 0.0)


@pytest.mark.parametrize("last", [np.nan, -np.nan, np.inf, -np.inf])
def test_largest_magnitude_sees_the_last_element(last):
    array = np.zeros(300_000, np.float32)
    array[-1] = last
    np.testing.assert_equal(largest_magnitude(array), np.abs(last))


def test_largest_magnitude_of_complex_numbers():
    assert largest_magnitude(np.array([1 - 5j, 2j], np.complex64)) == 5.0
