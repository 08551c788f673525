"""Ops kept inside their domain; the cheap sight under XLA; fixes of whole Keras runs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import FEATURES, Fitted, L, compiled, data

from diagnostics.guard import all_finite
from diagnostics.keras_data_changes import data_command
from diagnostics.keras_domains import _APART, _BY_NAME, _REPAIRS, kept_in_domain
from diagnostics.keras_replay import KerasRun
from diagnostics.keras_update import Group, exact_sight, new_state
from diagnostics.keras_xla_sight import xla_all_finite, xla_sight
from diagnostics.protocol import Change

BEYOND = {
    "Log": (lambda x: tf.math.log(x), -1.0),
    "Log1p": (lambda x: tf.math.log1p(x), -2.0),
    "Xlogy": (lambda x: tf.math.xlogy(tf.ones_like(x), x), -1.0),
    "Sqrt": (lambda x: tf.sqrt(x), -1.0),
    "Rsqrt": (lambda x: tf.math.rsqrt(x), 0.0),
    "RealDiv": (lambda x: 1.0 / x, 0.0),
    "Xdivy": (lambda x: tf.math.xdivy(tf.ones_like(x), x), 0.0),
    "Reciprocal": (lambda x: tf.math.reciprocal(x), 0.0),
    "Pow": (lambda x: tf.pow(x, 0.5), -1.0),
    "Exp": (lambda x: tf.exp(x), 200.0),
    "Expm1": (lambda x: tf.math.expm1(x), 200.0),
    "Sinh": (lambda x: tf.sinh(x), -200.0),
    "Cosh": (lambda x: tf.cosh(x), 200.0),
    "Softmax": (lambda x: tf.nn.softmax(tf.reshape(x, [1, 1]))[0, 0], -np.inf),
    "Acos": (lambda x: tf.acos(x), 1.0),
    "Asin": (lambda x: tf.asin(x), -1.5),
    "Atanh": (lambda x: tf.atanh(x), 1.0),
    "Acosh": (lambda x: tf.acosh(x), 0.5),
    "Erfinv": (lambda x: tf.math.erfinv(x), 1.0),
    "Ndtri": (lambda x: tf.math.ndtri(x), 0.0),
    "Lgamma": (lambda x: tf.math.lgamma(x), 0.0),
    "Digamma": (lambda x: tf.math.digamma(x), 0.0),
    "Cholesky": (lambda x: tf.linalg.cholesky(tf.reshape(x, [1, 1]))[0, 0], -1.0),
    "Sub": (lambda x: x - tf.reduce_max(x), -np.inf),
    "Mul": (lambda x: x * tf.zeros_like(x), np.inf),
}
INSIDE = {"Acosh": 3.0}


def value_and_gradient(op, at, value=None):
    """The op and its gradient at a point, in a graph of their own."""

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = op(x)
        return y, tape.gradient(y, x)

    optimizer = keras.optimizers.SGD()
    function = tf.function(both)
    if value is None:
        return [float(t) for t in function(tf.constant(at))]
    with kept_in_domain(value, [optimizer]):
        return [float(t) for t in function(tf.constant(at))]


def test_every_repair_is_tried_here():
    assert set(BEYOND) == set(_REPAIRS) and set(_BY_NAME.values()) <= set(_REPAIRS)


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, False) for name in BEYOND),
        *((name, True) for name in BEYOND if name not in _APART),
    ],
)
def test_an_op_beyond_its_domain_becomes_finite_and_inside_it_stays(name, every):
    op, at = BEYOND[name]
    assert not np.isfinite(value_and_gradient(op, at)).all()
    value = "every" if every else name
    assert np.isfinite(value_and_gradient(op, at, value)).all()
    inside = INSIDE.get(name, 0.5)
    assert value_and_gradient(op, inside, value) == value_and_gradient(op, inside)


def test_the_difference_of_two_infinities_in_a_loss_is_mended(tmp_path):
    """A sum of paths none of which is possible, as in a forward algorithm."""
    x, _ = data()
    allowed = tf.math.log(tf.constant([[0.5, 0.5], [0.0, 0.0]]))

    def loss(_, scores):
        paths = scores[:, None, :2] + allowed
        largest = tf.reduce_max(paths, -1, keepdims=True)
        total = largest[..., 0] + tf.math.log(tf.reduce_sum(tf.exp(paths - largest), -1))
        return -tf.reduce_max(total, -1)

    def build():
        model = keras.Sequential([keras.Input((FEATURES,)), L.Dense(3), L.LeakyReLU()])
        return compiled(model, loss=loss)

    found = Fitted(build, x, x, tmp_path / "run").guard.diagnose(budget_seconds=4)
    assert (found.first_nonfinite.op, found.cause.kind) == ("Sub", "loss_formula")
    assert "the difference of two infinities" in found.cause.evidence[0]
    assert found.recommendation.verified and "a.dtype.min" in found.recommendation.command


def test_a_cast_to_float16_in_a_float32_program_is_the_precision(tmp_path):
    x, y = data()

    class Energy(L.Layer):
        def call(self, v):
            half = tf.cast(100.0 * v, tf.float16)
            return tf.cast(half * half, tf.float32) / 1e4

    def build():
        return compiled(keras.Sequential([keras.Input((FEATURES,)), Energy(), L.Dense(3)]))

    found = Fitted(build, x, y, tmp_path / "run").guard.diagnose(budget_seconds=4)
    assert found.first_nonfinite.dtype == "float16" and found.cause.kind == "precision"
    assert found.recommendation.verified and "tf.float32" in found.recommendation.command


def test_the_optimizer_and_later_graphs_are_left_alone():
    optimizer = keras.optimizers.Adam(0.1)
    variable = keras.Variable(1.0)
    optimizer.build([variable])
    with kept_in_domain("Sqrt", [optimizer]):
        tf.function(lambda: optimizer.apply([tf.constant(1e-4)], [variable]))()
    # With the root of its second moment kept above 1e-7, it would hardly move.
    assert 1.0 - float(variable.numpy()) > 0.05
    assert np.isnan(value_and_gradient(tf.sqrt, -1.0)[0])


@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf, 3e38, 1e25])
def test_the_cheap_sight_sees_what_the_exact_one_sees(bad):
    draw = np.random.default_rng(0)
    gradient, bias = draw.normal(size=(3, 4, 5)).astype("f"), draw.normal(size=7).astype("f")
    if bad is not None:
        gradient[1, 2, 3] = bad
    weights = [tf.Variable(gradient), tf.Variable(bias)]
    tensors = [tf.constant(gradient), tf.constant(bias)]
    other = Group("b", [tf.constant(bias)], [tf.Variable(bias)], [])
    groups = [Group("a", tensors, weights, [tf.Variable(gradient)]), other]
    for seen, exact in zip(xla_sight(groups), exact_sight(groups), strict=True):
        if seen.dtype == tf.bool:
            assert seen.numpy().tolist() == exact.numpy().tolist()
        elif bad is None or abs(bad) < np.inf:
            assert seen.numpy() == pytest.approx(exact.numpy(), rel=1e-5)
    members = new_state(keras.optimizers.Adam(), groups, [])
    assert [len(group) for group in members] == [3, 1]
    assert xla_all_finite(members).numpy().tolist() == all_finite(members).numpy().tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_weights_of_sgd_tell_of_a_velocity_that_is_not_finite(bad, nesterov):
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=nesterov)
    weight = keras.Variable(np.ones(3, "f"))
    optimizer.build([weight])
    velocity = next(v for v in optimizer.variables if v.shape == (3,))
    velocity.assign([0.0, bad, 0.0])
    optimizer.apply([tf.zeros(3)], [weight])
    group = Group("a", [], [weight.value], [velocity.value])
    members = new_state(optimizer, [group], [weight.value, velocity.value])
    assert [len(tensors) for tensors in members] == [1]
    assert not all_finite(members).numpy().any()


class Ratio(L.Layer):
    """Divides by the sum of its input, which may be 0."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x / tf.reduce_sum(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_layer_that_divides_by_zero_is_mended_with_a_line_of_code(tmp_path, eagerly):
    x, y = data()
    x[11] = 0.0
    layers = [keras.Input((FEATURES,)), Ratio(name="ratio"), L.Dense(3, name="logits")]

    def build() -> keras.Model:
        return compiled(keras.Sequential(layers), run_eagerly=eagerly)

    fitted = Fitted(build, x, y, tmp_path / "run")
    found = fitted.guard.diagnose(budget_seconds=30)
    first = found.first_nonfinite
    assert (found.step, first.stage, first.layer, first.examples) == (1, "forward", "ratio", (11,))
    assert found.cause.kind == "architecture"
    assert (
        found.recommendation.verified and "test_keras_domains.py:" in found.recommendation.command
    )
    assert "tf.where(tf.abs(b)" in found.recommendation.command


def test_a_normalisation_without_epsilon_is_given_one(tmp_path):
    x, y = data()
    x[11] = 1.0
    layers = [keras.Input((FEATURES,)), L.LayerNormalization(epsilon=0.0, name="norm"), L.Dense(3)]
    fitted = Fitted(lambda: compiled(keras.Sequential(layers)), x, y, tmp_path / "run")
    found = fitted.guard.diagnose(budget_seconds=30)
    assert found.cause.kind == "architecture"
    assert found.recommendation.verified
    assert found.recommendation.command == "epsilon=0.001  # of the layer norm"
    assert fitted.model.get_layer("norm").epsilon == 0.0


@pytest.mark.parametrize(
    ("structure", "line"),
    [
        (
            {"tuple": [{"array": "inputs"}, {"array": "labels"}]},
            "x, y = np.delete(x, [7], axis=0), np.delete(y, [7], axis=0)",
        ),
        (
            {"tuple": [{"list": []}, {"array": "labels"}, {"array": "sample_weight"}]},
            "x, y, sample_weight = [np.delete(a, [7], axis=0) for a in x], "
            "np.delete(y, [7], axis=0), np.delete(sample_weight, [7], axis=0)",
        ),
        (
            {"dict": {"left": {"array": "inputs/left"}}},
            "x = {k: np.delete(a, [7], axis=0) for k, a in x.items()}",
        ),
    ],
)
def test_rows_are_taken_out_of_every_argument(structure, line):
    change = Change("without_examples", (7,), "without example 7")
    assert data_command(change, structure) == line


def test_a_penalty_out_of_proportion_is_taken_off(tmp_path):
    def build() -> keras.Model:
        penalty = keras.regularizers.L2(200.0)
        layers = [L.Dense(8, kernel_regularizer=penalty), L.Dense(3, kernel_regularizer=penalty)]
        return compiled(keras.Sequential(layers), optimizer=keras.optimizers.SGD(0.1))

    fitted = Fitted(build, *data(), tmp_path / "run", epochs=8)
    found = fitted.guard.diagnose(budget_seconds=20)
    assert found.cause.kind == "loss_formula"
    assert found.recommendation.verified
    assert found.recommendation.command.startswith("kernel_regularizer=None")
    rates = [c for c in found.counterfactuals if c.kind == "learning_rate"]
    clipped = [c for c in fitted_commands(fitted) if "clipnorm" in c]
    assert rates and all("learning_rate=0.1," in line for line in clipped)


def fitted_commands(fitted: Fitted) -> list[str]:
    """What a user is told for every change, after the replays moved the model's own rate."""
    run = KerasRun(fitted.guard.run_dir, fitted.model)
    fitted.model.optimizer.learning_rate.assign(1e-5)
    return [run.command(change) for change in run.changes(run.state_steps()[-1], ())]


def test_labels_from_one_are_lowered(tmp_path):
    x, y = data()
    fitted = Fitted(lambda: compiled(keras.Sequential([L.Dense(3)])), x, y + 1, tmp_path / "run")
    found = fitted.guard.diagnose(budget_seconds=5)
    assert found.cause.kind == "labels"
    assert found.recommendation.verified and "y = y - 1" in found.recommendation.command


def test_a_schedule_that_divides_by_zero(tmp_path):
    class Inverse(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1 / tf.cast(step, tf.float32)

    def build() -> keras.Model:
        return compiled(
            keras.Sequential([L.Dense(3, name="out")]), optimizer=keras.optimizers.SGD(Inverse())
        )

    fitted = Fitted(build, *data(), tmp_path / "run")
    found = fitted.guard.diagnose(budget_seconds=5)
    assert found.first_nonfinite.stage == "update" and found.cause.kind == "learning_rate"
    assert found.recommendation.verified
    assert "SGD(learning_rate=0.01)" in found.recommendation.command
