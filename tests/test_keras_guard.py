"""NumericGuard on plain compiled models: same bits when finite, nothing written when not."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import BATCH, CROSS_ENTROPY, STEPS, Fitted, L, compiled, data, mlp, poisoned

from diagnostics import NumericGuard
from diagnostics.errors import InputError
from diagnostics.incident import read_incident

CHECK_OF = {"forward": "pre-activation", "loss": "loss", "data": "input"}


def batch_norm_net() -> keras.Model:
    """Batch norm, dropout and a regulariser."""
    return keras.Sequential(
        [
            L.Dense(8, kernel_regularizer="l2", use_bias=False, name="first"),
            L.BatchNormalization(name="norm"),
            L.ReLU(),
            L.Dropout(0.3),
            L.Dense(3, name="logits"),
        ]
    )


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9)


@pytest.mark.parametrize(
    "build",
    [
        lambda: compiled(mlp()),
        lambda: compiled(mlp("gelu"), optimizer=sgd(), metrics=["accuracy"]),
        lambda: compiled(mlp("tanh")),
        lambda: compiled(mlp("sigmoid")),
        lambda: compiled(mlp("elu")),
        lambda: compiled(batch_norm_net()),
        lambda: compiled(batch_norm_net(), steps_per_execution=4),
        lambda: compiled(mlp(), run_eagerly=True),
        lambda: compiled(mlp(), optimizer=keras.optimizers.Lion(1e-3)),
    ],
    ids=[
        *("adam", "sgd", "tanh", "sigmoid", "elu"),
        *("batch_norm", "execution", "eager", "unbounded_optimizer"),
    ],
)
def test_a_finite_run_has_the_same_bits_with_and_without(tmp_path, build):
    x, y = data()
    plain = Fitted(build, x, y, epochs=2)
    guarded = Fitted(build, x, y, tmp_path / "run", epochs=2)
    assert guarded.guard.incident is None and guarded.guard.step == 2 * STEPS
    assert guarded.bits() == plain.bits()
    assert guarded.history.history == plain.history.history


@pytest.mark.parametrize(
    "build",
    [
        lambda: compiled(mlp()),
        lambda: compiled(batch_norm_net(), optimizer=sgd()),
        lambda: compiled(batch_norm_net(), steps_per_execution=5),
        lambda: compiled(mlp(), run_eagerly=True),
        lambda: compiled(mlp(), optimizer=keras.optimizers.Lion(1e-3)),
    ],
    ids=["adam", "batch_norm", "execution", "eager", "unbounded_optimizer"],
)
def test_a_bad_step_writes_nothing(tmp_path, build):
    x, y = data()
    before = Fitted(build, x[: 3 * BATCH], y[: 3 * BATCH])
    stopped = Fitted(build, *poisoned(3), tmp_path / "run")
    assert stopped.guard.step == 3
    assert stopped.guard.incident == tmp_path / "run" / "incidents" / "step-00000003"
    assert stopped.bits() == before.bits()
    assert stopped.model.stop_training


def test_a_first_step_that_fails_leaves_the_initial_weights(tmp_path):
    def build() -> keras.Model:
        return compiled(batch_norm_net())

    fresh = Fitted(build, *data(), epochs=0)
    fresh.model.build((None, 6))
    stopped = Fitted(build, *poisoned(0), tmp_path / "run")
    assert stopped.guard.step == 0
    for kept, initial in zip(stopped.model.get_weights(), fresh.model.get_weights(), strict=True):
        assert kept.tobytes() == initial.tobytes()
    assert int(stopped.model.optimizer.iterations) == 0


def test_a_running_mean_that_never_forgets_is_refused_before_it_writes(tmp_path):
    """With beta_1 = 1 Adam divides by 0: no bound of the new weights holds."""
    optimizer = keras.optimizers.Adam(1e-3, beta_1=1.0)
    stopped = Fitted(lambda: compiled(mlp(), optimizer=optimizer), *data(), tmp_path / "run")
    assert stopped.guard.step == 0
    assert all(np.isfinite(weights).all() for weights in stopped.model.get_weights())
    found = stopped.guard.diagnose(budget_seconds=10)
    assert found.cause.kind == "optimizer" and "beta_1=0.9" in found.recommendation.command
    assert found.recommendation.verified


def test_the_incident_holds_state_batch_and_telemetry(tmp_path):
    stopped = Fitted(lambda: compiled(mlp()), *poisoned(3), tmp_path / "run")
    incident = read_incident(stopped.guard.incident)
    x, y = poisoned(3)
    assert np.array_equal(incident.batch["inputs"], x[24:32], equal_nan=True)
    assert np.array_equal(incident.batch["labels"], y[24:32])
    kernel = stopped.model.get_layer("first").kernel.numpy()
    assert incident.state["params/first/kernel"].tobytes() == kernel.tobytes()
    places = [(check["stage"], check["layer"]) for check in incident.record["failed_checks"]]
    assert places[:3] == [("data", ""), ("forward", "first"), ("forward", "second")]
    telemetry = stopped.guard.telemetry()
    assert telemetry.steps.tolist() == [0, 1, 2, 3]
    assert np.isnan(telemetry.column("loss")).tolist() == [False] * 3 + [True]
    assert telemetry.column("logits/gradient_norm")[0] > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "stopped_by_guard" and manifest["steps"] == 3


@pytest.mark.parametrize(
    ("name", "stage", "layer"),
    [("second", "weights", "second"), ("logits", "weights", "logits")],
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, stage, layer):
    def build() -> keras.Model:
        model = compiled(mlp())
        kernel = model.get_layer(name).kernel.numpy()
        kernel[0, 0] = np.inf
        model.get_layer(name).kernel.assign(kernel)
        return model

    stopped = Fitted(build, *data(), tmp_path / "run")
    first = read_incident(stopped.guard.incident).record["failed_checks"][0]
    assert (first["stage"], first["layer"]) == (stage, layer)


def test_a_moving_statistic_of_nan_is_named(tmp_path):
    """It ruins inference only, so nothing else of a training step shows it."""

    def build() -> keras.Model:
        model = compiled(batch_norm_net())
        model.build((None, 6))
        norm = next(e for e in model.layers if isinstance(e, L.BatchNormalization))
        values = norm.moving_variance.numpy()
        values[1] = np.nan
        norm.moving_variance.assign(values)
        return model

    stopped = Fitted(build, *data(), tmp_path / "run")
    found = stopped.guard.diagnose(budget_seconds=0)
    assert found.step == 0 and found.cause.kind == "weights"
    assert "moving_variance" in found.cause.evidence[0]


def test_an_update_that_is_not_finite_is_refused(tmp_path):
    def build() -> keras.Model:
        def steep(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
            return 1e3 * tf.reduce_mean(y_pred, axis=-1)

        return compiled(mlp(), loss=steep, optimizer=keras.optimizers.SGD(3e38))

    before = Fitted(build, *data(), epochs=0)
    stopped = Fitted(build, *data(), tmp_path / "run")
    first = read_incident(stopped.guard.incident).record["failed_checks"][0]
    assert first["stage"] == "update" and stopped.guard.step == 0
    for kept, initial in zip(stopped.model.get_weights(), before.model.get_weights(), strict=True):
        assert kept.tobytes() == initial.tobytes()


def test_a_gradient_that_is_not_finite_behind_a_finite_loss(tmp_path):
    def root(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.sqrt(tf.nn.relu(y_pred - 1e6)), axis=-1) + 0.0 * y_pred[:, 0]

    stopped = Fitted(lambda: compiled(mlp(), loss=root), *data(), tmp_path / "run")
    failed = read_incident(stopped.guard.incident).record["failed_checks"]
    assert failed[0]["stage"] == "backward" and failed[0]["layer"] == "logits"


def test_a_label_out_of_range_stops_before_tensorflow_raises(tmp_path):
    x, y = data()
    y[2 * BATCH + 1] = 3
    stopped = Fitted(lambda: compiled(mlp()), x, y, tmp_path / "run")
    failed = read_incident(stopped.guard.incident).record["failed_checks"]
    assert stopped.guard.step == 2 and (failed[0]["stage"], failed[0]["quantity"]) == (
        "data",
        "labels",
    )


def test_a_label_out_of_range_of_one_of_two_outputs(tmp_path):
    def build() -> keras.Model:
        inputs = keras.Input((6,))
        outputs = [L.Dense(3, name="kind")(inputs), L.Dense(5, name="place")(inputs)]
        return compiled(keras.Model(inputs, outputs), loss=[CROSS_ENTROPY, CROSS_ENTROPY])

    x, y = data()
    places = np.zeros_like(y)
    places[BATCH + 1] = 5
    stopped = Fitted(build, x, [y, places], tmp_path / "run")
    found = stopped.guard.diagnose(budget_seconds=0)
    assert found.step == 1 and found.first_nonfinite.examples == (BATCH + 1,)
    assert found.cause.kind == "labels" and "runs from 0 to 5" in found.cause.evidence[0]


def test_a_wrong_label_is_found_among_deterministic_ops_too():
    """TensorFlow's deterministic cross-entropy keeps a NaN at hand for labels out of range."""
    code = """
import sys, tempfile
from pathlib import Path
import tensorflow as tf
tf.config.experimental.enable_op_determinism()
import test_keras_guard
test_keras_guard.test_a_label_out_of_range_of_one_of_two_outputs(Path(tempfile.mkdtemp()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_norm_that_overflows_is_no_incident(tmp_path):
    """Gradients of 1e25 are finite, though their sum of squares is not."""

    def build() -> keras.Model:
        def huge(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
            return 1e25 * tf.reduce_mean(y_pred, axis=-1)

        return compiled(mlp(), loss=huge, optimizer=keras.optimizers.SGD(1e-26))

    plain = Fitted(build, *data())
    guarded = Fitted(build, *data(), tmp_path / "run")
    assert guarded.guard.incident is None
    assert guarded.bits() == plain.bits()


def test_a_run_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(InputError, match="run is not empty"):
        Fitted(lambda: compiled(mlp()), *data(), tmp_path / "run")


def test_an_earlier_run_is_replaced_but_an_incident_is_kept(tmp_path):
    place = tmp_path / "run"
    Fitted(lambda: compiled(mlp()), *data(), place)
    Fitted(lambda: compiled(mlp()), *poisoned(1), place)
    assert not (tmp_path / "run.1").exists()
    Fitted(lambda: compiled(mlp()), *data(), place)
    assert (tmp_path / "run.1" / "incidents" / "step-00000001").is_dir()
    assert not (place / "incidents").exists()


def test_a_guard_is_off_after_its_fit(tmp_path):
    fitted = Fitted(lambda: compiled(mlp()), *data(), tmp_path / "run")
    fitted.model.fit(*poisoned(0), batch_size=BATCH, verbose=0)
    assert not np.isfinite(fitted.model.get_weights()[0]).all()
    assert fitted.guard.incident is None and "train_step" not in vars(fitted.model)


def test_the_package_is_light_until_the_guard_is_used():
    import subprocess
    import sys

    code = (
        "import sys, diagnostics; assert 'tensorflow' not in sys.modules;"
        "from diagnostics import NumericGuard; assert 'tensorflow' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert NumericGuard.__name__ == "NumericGuard"
