"""Incidents of NumericGuard replayed: in the process that trained, and in another one."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras_custom import Doubled, squared_log
from keras_models import BATCH, FEATURES, Fitted, L, compiled, data, mlp, poisoned

from diagnostics.errors import InputError, NothingToDiagnose
from diagnostics.keras_replay import KerasRun, open_keras_run
from diagnostics.protocol import Change
from diagnostics.replay import reproduce


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Fitted:
    """A net with dropout and moving statistics, stopped by row 26 at step 3."""

    def build() -> keras.Model:
        layers = [
            keras.Input((FEATURES,)),
            L.Dense(8, activation="relu", name="first"),
            L.BatchNormalization(name="norm"),
            L.Dropout(0.3, name="drop"),
            L.Dense(3, name="logits"),
        ]
        return compiled(keras.Sequential(layers))

    return Fitted(build, *poisoned(3), tmp_path_factory.mktemp("keras") / "run")


def test_the_failing_step_recurs_with_the_same_bits(stopped):
    for run in (
        KerasRun(stopped.guard.run_dir, stopped.model),
        open_keras_run(stopped.guard.run_dir),
    ):
        found = reproduce(run, run.program(), run.state_before(3), run.batch(3), 3)
        assert found.verdict == "reproduced", found.differences


def test_earlier_steps_replay_to_the_state_of_the_incident(stopped):
    run = KerasRun(stopped.guard.run_dir, stopped.model)
    program = run.program()
    program.load(run.start_state())
    for step in range(3):
        assert program.run(run.batch(step), step).applied
    reached, recorded = program.state(), run.state_before(3)
    different = [
        name
        for name, array in recorded.items()
        if not name.startswith("counters/") and array.tobytes() != reached[name].tobytes()
    ]
    assert different == []


def test_what_came_next_is_kept(stopped):
    run = KerasRun(stopped.guard.run_dir, stopped.model)
    x, _ = poisoned(3)
    assert np.array_equal(run.batch(4)["inputs"], x[4 * BATCH : 5 * BATCH])
    assert np.array_equal(run.batch(6)["inputs"], x[:BATCH])
    assert run.batch(9)["inputs"].tobytes() == run.batch(3)["inputs"].tobytes()


def test_two_programs_do_not_disturb_each_other(stopped):
    run = KerasRun(stopped.guard.run_dir, stopped.model)
    first, second = run.program(), run.program(Change("learning_rate", 1e-5, "lr"))
    first.load(run.start_state())
    second.load(run.start_state())
    first.run(run.batch(0), 0)
    second.run(run.batch(0), 0)
    moved = first.state()["params/first/kernel"] - run.start_state()["params/first/kernel"]
    crept = second.state()["params/first/kernel"] - run.start_state()["params/first/kernel"]
    assert np.abs(moved).max() > 100 * np.abs(crept).max() > 0


def test_the_diagnosis_names_the_row_and_a_proven_fix(stopped):
    before = [np.array(v.numpy()) for v in stopped.model.variables]
    found = stopped.guard.diagnose(budget_seconds=20)
    assert found.verdict == "reproduced"
    assert found.first_nonfinite.stage == "data" and found.first_nonfinite.examples == (26,)
    assert found.cause.kind == "data"
    assert found.recommendation.verified and "np.delete(x, [26]" in found.recommendation.command
    for kept, variable in zip(before, stopped.model.variables, strict=True):
        assert kept.tobytes() == np.array(variable.numpy()).tobytes()
    report = found.save()
    assert report.is_file()
    assert json.loads((report.parent / "diagnosis.json").read_text())["step"] == 3
    assert "row 26" in str(found)


def against(targets, predictions):
    """A squared error with the wrong sign."""
    return -keras.ops.square(targets - predictions)


def test_a_loss_with_the_wrong_sign_is_turned_and_not_only_slowed_down(tmp_path):
    def build() -> keras.Model:
        layers = [keras.Input((FEATURES,)), L.Dense(8, "relu"), L.Dense(1, name="out")]
        return compiled(keras.Sequential(layers), loss=against, optimizer=keras.optimizers.SGD(0.3))

    x, _ = data()
    x = np.tile(x, (4, 1))
    found = Fitted(build, x, x[:, :1], tmp_path / "run").guard.diagnose(budget_seconds=20)
    assert found.cause.kind == "loss_formula" and found.recommendation.verified
    assert (
        found.recommendation.command == "loss = lambda y_true, y_pred: -your_loss(y_true, y_pred)"
    )
    rates = [one for one in found.counterfactuals if one.kind == "learning_rate"]
    assert rates and not any(one.survived for one in rates)


def test_a_label_of_the_step_before_that_was_far_too_large_is_the_cause(tmp_path):
    def build() -> keras.Model:
        layers = [keras.Input((FEATURES,)), L.Dense(8, "relu", name="h"), L.Dense(1, name="o")]
        return compiled(keras.Sequential(layers), optimizer=keras.optimizers.SGD(0.01), loss="mse")

    x, _ = data()
    y = x[:, :1].copy()
    y[3 * BATCH + 3] = 1e12
    found = Fitted(build, x, y, tmp_path / "run").guard.diagnose(budget_seconds=20)
    assert found.cause.kind == "labels" and found.onset.step == 3
    assert "labels of that step must have been far larger" in found.cause.evidence[0]


def test_a_healthy_run_has_nothing_to_diagnose(tmp_path):
    fitted = Fitted(lambda: compiled(mlp()), *data(), tmp_path / "run")
    with pytest.raises(NothingToDiagnose):
        fitted.guard.diagnose()


def custom_run(place: Path) -> Fitted:
    """A run with a custom layer and a custom loss, both of module keras_custom."""

    def build() -> keras.Model:
        layers = [keras.Input((FEATURES,)), Doubled(name="twice"), L.Dense(1, name="out")]
        return compiled(keras.Sequential(layers), loss=squared_log)

    x, _ = data()
    return Fitted(build, x, x[:, :1], place)


def test_the_command_line_diagnoses_in_another_process(tmp_path):
    fitted = custom_run(tmp_path / "run")
    assert fitted.guard.incident is not None
    main = "import sys; from vggrepro.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "diagnose-nan", str(fitted.guard.run_dir)]
    options = ["--json", "--budget-seconds", "0", "--import", "keras_custom"]
    here = Path(__file__).parent
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr[-2000:]
    first = json.loads(done.stdout)["first_nonfinite"]
    assert (first["stage"], first["op"]) == ("loss", "Log")
    assert "keras_custom.py" in first["source"] and "tf.math.log(y_pred)" in first["source"]


@pytest.mark.parametrize("name", ["Doubled", "squared_log"])
def test_a_missing_custom_object_is_named(tmp_path, monkeypatch, name):
    """The module is there for this process only, as with a script's own classes."""
    fitted = custom_run(tmp_path / "run")
    config = fitted.guard.run_dir / "config.json"
    stored = json.loads(config.read_text())
    if name == "squared_log":
        layers = stored["model"]["config"]["layers"]
        layers[:] = [layer for layer in layers if layer["class_name"] != "Doubled"]
    config.write_text(json.dumps(stored).replace("keras_custom", "gone_with_the_script"))
    with pytest.raises(InputError, match=name) as error:
        open_keras_run(fitted.guard.run_dir)
    assert "--import" in error.value.remedy


def test_a_directory_without_a_guarded_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no step"):
        open_keras_run(tmp_path)
