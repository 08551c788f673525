"""Faults of Keras programs whose fix lies off the learning rate: found, replayed, written down."""

import keras
import numpy as np
import pytest
from keras_models import BATCH, FEATURES, Fitted, L, compiled, data, mlp

from diagnostics.keras_data_changes import changed_batch, data_changes
from diagnostics.keras_replay import KerasRun
from diagnostics.keras_starts import FINITE_WEIGHTS, ZERO_BIASES, broken, changed_start
from diagnostics.protocol import Change, RunFacts


def thirds():
    """Classes that inputs tell, each as often, so that no bias alone learns anything."""
    return np.argsort(np.argsort(data()[0][:, 0])) // 16


def diagnosed(place, build, y=None, epochs=1):
    x, known = data()
    fitted = Fitted(build, x, known if y is None else y, place / "run", epochs=epochs)
    return fitted.guard.diagnose(budget_seconds=4)


def test_wrong_labels_in_every_batch_all_go(tmp_path):
    _, y = data()
    y[1::3] = -1
    found = diagnosed(tmp_path, lambda: compiled(mlp()), y)
    assert found.cause.kind == "labels" and found.recommendation.verified
    # Without those of the failing batch alone the next one fails.
    dropped = {one.kind: one.survived for one in found.counterfactuals}
    assert dropped["valid_examples"] and not dropped["without_examples"]
    keep = {"x": data()[0], "y": y, "np": np}
    exec(found.recommendation.command, keep)
    assert np.array_equal(keep["y"], y[y >= 0]) and len(keep["x"]) == len(keep["y"])


def test_valid_examples_stand_in_for_the_others():
    batch = {
        "inputs": np.array([[1.0], [np.nan], [3.0], [4.0]], np.float32),
        "labels": np.array([0, 1, 2, 9]),
    }
    facts = RunFacts(layers=(), classes=3)
    change = next(one for one in data_changes(batch, facts) if one.kind == "valid_examples")
    changed = changed_batch(batch, change)
    assert changed["labels"].tolist() == [0, 0, 2, 0]
    assert changed["inputs"].ravel().tolist() == [1, 1, 3, 1]
    sound = {"inputs": batch["inputs"][:1], "labels": batch["labels"][:1]}
    assert not any(one.kind == "valid_examples" for one in data_changes(sound, facts))


@pytest.mark.parametrize(
    ("optimizer", "cause", "repaired"),
    [
        (lambda: keras.optimizers.Adam(float("nan")), "learning_rate", "learning_rate=0.001"),
        (lambda: keras.optimizers.RMSprop(1e-3, rho=1.5), "optimizer", "rho=0.9"),
    ],
)
def test_a_setting_that_no_run_survives_is_named_and_mended(tmp_path, optimizer, cause, repaired):
    found = diagnosed(tmp_path, lambda: compiled(mlp(), optimizer=optimizer()))
    assert found.cause.kind == cause
    assert found.recommendation.verified and repaired in found.recommendation.command


def test_adam_that_never_moves_is_a_stall(tmp_path):
    def build():
        return compiled(mlp(), optimizer=keras.optimizers.Adam(1e-2, beta_2=1.0))

    found = diagnosed(tmp_path, build, epochs=6)
    assert (found.verdict, found.cause.kind) == ("stalled", "optimizer")
    assert "beta_2=0.999" in found.recommendation.command and found.recommendation.verified


def test_dead_units_come_alive_with_other_biases(tmp_path):
    def build():
        low = keras.initializers.Constant(-100.0)
        layers = [L.Dense(8, "relu", bias_initializer=low, name="first"), L.Dense(3, name="out")]
        return compiled(keras.Sequential([keras.Input((FEATURES,)), *layers]))

    found = diagnosed(tmp_path, build, thirds(), epochs=10)
    assert (found.verdict, found.cause.kind) == ("stalled", "init")
    assert "bias_initializer" in found.recommendation.command and found.recommendation.verified


def test_only_biases_are_changed():
    state = {"params/a/kernel": np.ones(2), "params/a/bias": np.ones(2), "slots/a/bias": np.ones(2)}
    changed = changed_start(state, RunFacts(layers=()), Change("init", ZERO_BIASES, "biases 0"))
    assert changed["params/a/bias"].tolist() == [0, 0]
    assert changed["params/a/kernel"] is state["params/a/kernel"]
    assert changed["slots/a/bias"] is state["slots/a/bias"]


def test_only_what_is_not_finite_becomes_0():
    state = {"params/a/gain": np.array([np.nan, 2.0, -np.inf]), "params/a/bias": np.ones(2)}
    change = Change("init", FINITE_WEIGHTS, "finite weights")
    changed = changed_start(state, RunFacts(layers=()), change)
    assert changed["params/a/gain"].tolist() == [0, 2, 0]
    assert changed["params/a/bias"] is state["params/a/bias"]
    assert np.isnan(state["params/a/gain"][0]) and not broken(changed)


def test_of_a_stack_of_sigmoids_only_the_hidden_ones_become_relu(tmp_path):
    def build():
        hidden = [L.Dense(8, "sigmoid", name=f"hidden{n}") for n in range(3)]
        layers = [keras.Input((FEATURES,)), *hidden, L.Dense(1, "sigmoid", name="out")]
        return compiled(keras.Sequential(layers), loss="binary_crossentropy")

    x, y = data()
    y = (y > 0).astype("float32")
    fitted = Fitted(build, x, y, tmp_path / "run")
    run = KerasRun(fitted.guard.run_dir, fitted.model)
    change = next(one for one in run.changes(0, ()) if one.kind == "activation")
    layers = "hidden0, hidden1, hidden2"
    assert run.command(change) == f'activation="relu"  # of the layers {layers}'
    losses = []
    for program in (run.program(change), run.program()):
        program.load(run.start_state())
        outcome = program.run({"inputs": x[:BATCH], "labels": y[:BATCH]}, 0)
        losses.append(outcome.telemetry["loss"])
    assert losses[0] != losses[1] == run.telemetry().column("loss")[0]
    kinds = [one.activation.__name__ for one in fitted.model.layers]
    assert kinds == ["sigmoid"] * 4


def test_a_row_of_another_size_goes(tmp_path):
    x, _ = data()
    x[20] *= 1e6

    def build():
        model = keras.Sequential([keras.Input((FEATURES,)), L.Dense(8, "relu"), L.Dense(1)])
        return compiled(model, loss="mse", optimizer=keras.optimizers.SGD(0.01))

    found = Fitted(build, x, x[:, :1], tmp_path / "run").guard.diagnose(budget_seconds=4)
    assert found.cause.kind == "data" and found.recommendation.verified
    keep = {"x": x, "y": np.arange(len(x)), "np": np}
    exec(found.recommendation.command, keep)
    assert np.array_equal(keep["y"], np.delete(np.arange(len(x)), 20))
