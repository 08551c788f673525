"""`OpTrace` on Keras models: layers, the user's lines, and the optimizer."""

from __future__ import annotations

import keras
import pytest
import tensorflow as tf

from diagnostics.op_records import OpRecord
from diagnostics.op_trace import OpTrace
from diagnostics.origins import ancestors, mark_live

ROWS = 4


class Ratio(keras.layers.Layer):
    def call(self, values):
        return values / (values - values)  # 1/0 in a layer


class Block(keras.Model):
    """A subclassed model, nested in a functional one."""

    def __init__(self, bad: bool) -> None:
        super().__init__(name="block")
        self.inner = keras.layers.Dense(3, activation="gelu", name="inner")
        self.normal = keras.layers.BatchNormalization(name="normal")
        self.ratio = Ratio(name="ratio") if bad else None

    def call(self, values, training=None):
        values = self.normal(self.inner(values), training=training)
        return values if self.ratio is None else self.ratio(values)


def log_loss(_, predicted):
    return tf.reduce_mean(tf.math.log(predicted - 1e6))  # log of a negative


def square_loss(true, predicted):
    return tf.reduce_mean(tf.square(true - predicted))


def model_with(*, bad_block=False, bad_lambda=False, loss=square_loss, optimizer="adam"):
    inputs = keras.Input((5,))
    values = keras.layers.Dense(4, activation="silu", name="first")(inputs)
    if bad_lambda:
        values = keras.layers.Lambda(lambda t: tf.math.log(t - 1e6), name="shifted")(values)
    values = Block(bad_block)(values)
    values = keras.layers.Dropout(0.5, name="drop", seed=3)(values)
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(values), name="net")
    model.compile(optimizer=optimizer, loss=loss)
    model.optimizer.build(model.trainable_variables)
    return model


def traced(model: keras.Model) -> OpTrace:
    names = ["first", "shifted", "block/inner", "block/normal", "block/ratio", "drop", "last"]
    data = tf.random.stateless_normal([ROWS, 5], [1, 2]), tf.ones([ROWS, 2])
    with OpTrace(layers=names, batch_size=ROWS) as tracer:
        with tf.GradientTape() as tape:
            predicted = model(data[0], training=True)
            tracer.phase("loss")
            loss = model.compute_loss(y=data[1], y_pred=predicted)
        tracer.phase("backward")
        gradients = tape.gradient(loss, model.trainable_variables)
        tracer.phase("update")
        model.optimizer.apply(gradients, model.trainable_variables)
    mark_live(tracer.hits)
    return tracer


def first_place(tracer: OpTrace) -> OpRecord:
    first = min((hit for hit in tracer.hits if hit.origin), key=lambda hit: hit.record.order)
    return first.record


def test_every_layer_is_found_forwards_and_backwards():
    tracer = traced(model_with())
    for phase in ("forward", "backward"):
        layers = [record.layer for record in tracer.records if record.phase == phase]
        inside = {"first", "block/inner", "block/normal", "drop", "last"}
        assert inside <= set(layers) <= inside | {None}
    assert tracer.hits == []


def test_updates_belong_to_the_layer_of_their_gradient():
    tracer = traced(model_with())
    written = {
        record.layer
        for record in tracer.records
        if record.phase == "update" and record.op == "AssignSubVariableOp"
    }
    assert written == {"first", "block/inner", "block/normal", "last"}


@pytest.mark.parametrize(
    ("options", "op", "phase", "layer", "comment"),
    [
        ({"loss": log_loss}, "Log", "loss", None, "# log of a negative"),
        ({"bad_block": True}, "RealDiv", "forward", "block/ratio", "# 1/0 in a layer"),
        ({"bad_lambda": True}, "Log", "forward", "shifted", 'name="shifted")(values)'),
    ],
)
def test_the_users_own_code_is_named(options, op, phase, layer, comment):
    record = first_place(traced(model_with(**options)))
    assert (record.op, record.phase, record.layer) == (op, phase, layer)
    line = str(record.line)
    assert line.startswith("test_op_trace_keras.py:") and line.endswith(comment)


def test_a_built_in_layer_shows_no_library_line():
    tracer = traced(model_with())
    lines = {record.line.function for record in tracer.records if record.line is not None}
    assert lines <= {"call", "square_loss", "traced"}


def test_adams_zero_over_zero_is_an_update():
    model = model_with(optimizer=keras.optimizers.Adam(epsilon=0.0))
    model.get_layer("last").kernel.assign(tf.zeros([3, 2]))  # first's gradient is 0
    tracer = traced(model)
    record = first_place(tracer)
    assert (record.op, record.phase) == ("RealDiv", "update")
    # A gradient of exactly 0 over a second moment of 0; of the layers below 'last'.
    assert record.layer in {"first", "block/inner", "block/normal"}
    written = [hit for hit in tracer.hits if hit.record.op == "AssignSubVariableOp"]
    assert written and all(hit.live for hit in written)
    assert {hit.record.layer for hit in ancestors(written[:1])} == {written[0].record.layer}
