"""Verification: identical on the machine that recorded; every tampering is found and placed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import tiny_config, tiny_data

from diagnostics.errors import InputError, StoppedByGuard
from diagnostics.snapshot import read_snapshot, write_snapshot
from vggrepro import trainer
from vggrepro.bit_comparison import number_difference, state_difference
from vggrepro.cli import main
from vggrepro.run_directory import RunDirectory
from vggrepro.step_state import compiled_part
from vggrepro.train_step import TrainStep
from vggrepro.verification import verify

pytestmark = pytest.mark.usefixtures("shared_training")

COMPILED = {}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory):
    """Ten steps with validations that drop the rate, interrupted in between by an end."""
    path = tmp_path_factory.mktemp("runs") / "run"
    changes = {"eval_every": 2, "plateau_patience": 1, "checkpoint_every": 4, "steps": 5}
    config = tiny_config(data, **changes, keep_checkpoints=9)
    trainer.train(config, path)
    trainer.train(
        tiny_config(data, **{**changes, "steps": 10}, keep_checkpoints=9), path, resume=True
    )
    return path


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Equal steps are compiled once for all tests here; each gets its own state."""

    def made(config, network, state, engine):
        key = (compiled_part(config), network)
        if key not in COMPILED:
            COMPILED[key] = TrainStep(config, network, state)
        step = COMPILED[key]
        step.reconfigure(config)
        step.load(state)
        return step

    monkeypatch.setattr("vggrepro.verification.training_step", made)


@pytest.fixture
def copy(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_run_is_bit_identical_over_its_whole_length(run_dir):
    with RunDirectory.open(run_dir) as run:
        rates = {record["lr"] for record in run.metrics() if "lr" in record}
        assert len(rates) > 3  # warm-up, and the schedule drops
    found = verify(run_dir)
    assert found.identical and found.first_array_difference is None
    assert (found.first_step, found.end_step) == (0, 10)
    # Validations after 2, 4, 5 (the first end), 6, 8 and 10 steps; states 4, 5, 8, 10.
    assert found.compared == {"steps": 10, "validations": 6, "states": 4}
    # Files may be edited beside this test.
    assert [text for text in found.environment if not text.startswith("code: ")] == []


def test_some_steps_from_the_checkpoint_before_them(run_dir):
    found = verify(run_dir, 6, 9)
    assert found.identical and (found.first_step, found.end_step) == (5, 9)
    assert found.compared == {"steps": 4, "validations": 2, "states": 1}


@pytest.mark.parametrize("steps", [(0, 11), (5, 5), (7, 3), (-1, 4)])
def test_steps_that_the_run_does_not_have_are_told(run_dir, steps):
    with pytest.raises(InputError, match="Its steps are 0:10"):
        verify(run_dir, *steps)


def test_a_run_without_steps_is_told(copy):
    shutil.rmtree(copy / "telemetry")
    with pytest.raises(InputError, match="has recorded no step. Train it first"):
        verify(copy)


def test_a_run_that_the_guard_stopped_is_identical_to_its_refused_step(data, tmp_path):
    config = tiny_config(data, lr=0.3, warmup_steps=0, steps=20, eval_every=0)
    with pytest.raises(StoppedByGuard):
        trainer.train(config, tmp_path / "run")
    with RunDirectory.open(tmp_path / "run") as run:
        refused = int(run.incidents()[-1].name.removeprefix("step-"))
    found = verify(tmp_path / "run")
    assert found.identical and found.end_step == refused + 1
    # With the incident gone the refusal is a difference.
    shutil.rmtree(tmp_path / "run" / "incidents")
    found = verify(tmp_path / "run")
    assert found.first_difference.kind == "guard" and found.first_difference.step == refused


def other_bits(value: np.ndarray, place, steps=1):
    """The array with one element moved by so many units in the last place."""
    changed = value.copy()
    for _ in range(steps):
        changed[place] = np.nextafter(changed[place], np.float32(np.inf))
    return changed


def test_one_bit_of_one_stored_array_is_found(copy):
    place = copy / "checkpoints" / "step-00000008"
    state, manifest = read_snapshot(place)
    name = "params/block3_conv1/kernel"
    state[name] = other_bits(state[name], (1, 2, 3, 4))
    write_snapshot(place, state, manifest)
    found = verify(copy, 5).first_difference
    assert (found.step, found.kind, found.name) == (8, "state", name)
    assert (found.differing, found.size) == (1, state[name].size)
    assert 0 < found.largest_relative < 2e-7
    assert found.recorded == state[name][1, 2, 3, 4].item()
    assert "after 8 steps, state params/block3_conv1/kernel: 1 of" in found.sentence()


def test_one_bit_of_one_recorded_number_is_found(copy):
    with RunDirectory.open(copy) as run:
        steps, columns, rows = run.telemetry.read()
    rows = rows.copy()
    place = columns.index("fc2/gradient_norm")
    rows[6, place] = np.nextafter(rows[6, place], np.float32(np.inf))
    shutil.rmtree(copy / "telemetry")
    with RunDirectory.open(copy, writable=True) as run:
        run.telemetry.start(columns, 0)
        for step, row in zip(steps, rows, strict=True):
            run.telemetry.append(int(step), row)
    found = verify(copy, 5)
    assert (found.first_difference.step, found.first_difference.kind) == (6, "telemetry")
    assert found.first_difference.name == "fc2/gradient_norm"
    # The states behind it are as recorded.
    assert found.first_array_difference is None


@pytest.mark.parametrize(
    ("key", "step", "kind"), [("loss", 7, "metrics"), ("val_top1_error", 8, "validation")]
)
def test_a_number_changed_in_the_metrics_is_found(copy, key, step, kind):
    file = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    record = next(one for one in lines if one["step"] == 7 and key in one)
    record[key] = 0.25
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verify(copy, 5).first_difference
    assert (found.step, found.kind, found.name, found.recorded) == (step, kind, key, 0.25)


@pytest.mark.parametrize(
    ("entry", "step"), [("initial_weights_sha256", 0), ("final_weights_sha256", 10)]
)
def test_other_weights_at_the_start_or_the_end_are_found(copy, entry, step):
    rewrite(copy / "manifest.json", **{entry: "0" * 64})
    found = verify(copy).first_difference
    assert (found.step, found.kind, found.name) == (step, "weights", entry)


def test_another_setting_shows_in_the_first_number_and_the_next_state(copy):
    rewrite(copy / "config.json", lr=0.011)
    found = verify(copy)
    assert (found.first_difference.step, found.first_difference.name) == (0, "lr")
    assert found.first_difference.largest_relative == pytest.approx(0.1, rel=1e-3)
    assert (found.first_array_difference.step, found.first_array_difference.kind) == (4, "state")
    assert found.first_array_difference.name == "params/block1_conv1/kernel"
    assert found.first_array_difference.differing > 1
    # Nothing more can be learnt after the first stored state.
    assert found.compared["steps"] == 4


def test_changed_pixels_under_the_same_name_and_size_are_found(copy, data, tmp_path):
    shutil.copytree(data, tmp_path / "images")
    rewrite(copy / "config.json", data=str(tmp_path / "images"))
    assert verify(copy, 0, 1).identical
    for file in sorted((tmp_path / "images" / "train").rglob("*.JPEG")):
        smaller = [
            one for one in file.parent.glob("*.JPEG") if one.stat().st_size < file.stat().st_size
        ]
        if smaller:
            content = smaller[0].read_bytes()
            file.write_bytes(content + bytes(file.stat().st_size - len(content)))
    found = verify(copy, 0, 5).first_difference
    assert found is not None and found.kind == "telemetry" and found.step < 5


def test_the_environment_that_may_explain_it_is_told(copy, capsys):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["environment"]["hardware"]["cpu"] = "abacus"
    manifest["environment"]["code"]["commit"] = "0123abc"
    rewrite(copy / "manifest.json", environment=manifest["environment"])
    told = "\n".join(verify(copy, 0, 1).environment)
    assert "cpu: abacus when recorded" in told and "commit 0123abc" in told
    rewrite(copy / "config.json", lr=0.011)
    assert main(["verify", str(copy), "--steps", ":1"]) == 5
    shown = capsys.readouterr().out
    assert "not as recorded" in shown and "environment: cpu: abacus" in shown


def test_a_damaged_checkpoint_on_the_way_is_a_difference(copy):
    file = copy / "checkpoints" / "step-00000008" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = verify(copy, 5).first_difference
    assert (found.step, found.kind, found.recorded) == (8, "state", "damaged")


def test_data_that_is_gone_is_told(copy, tmp_path):
    rewrite(copy / "config.json", data=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        verify(copy)


def test_the_command_s_json_and_exit_codes(run_dir, copy, capsys):
    assert main(["verify", str(run_dir), "--json", "--steps", "8:"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is True and found["first_difference"] is None
    assert (found["first_step"], found["end_step"]) == (8, 10)
    assert main(["verify", str(run_dir), "--steps", "8:"]) == 0
    assert "steps 8 to 9: bit-identical" in capsys.readouterr().out
    rewrite(copy / "manifest.json", initial_weights_sha256="0" * 64)
    assert main(["verify", str(copy), "--json", "--steps", ":2"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["identical"] is False
    assert found["first_difference"]["name"] == "initial_weights_sha256"
    for steps in ("8", "a:b", "1:2:3"):
        assert main(["verify", str(run_dir), "--steps", steps]) == 2
        assert f"--steps '{steps}' is not A:B" in capsys.readouterr().err
    assert main(["verify", str(run_dir.parent)]) == 2


# ---------------------------------------------------------------- bits


@given(st.floats(width=32), st.floats(width=32))
def test_numbers_are_the_same_only_bit_for_bit(one, other):
    first, second = np.float32(one), np.float32(other)
    same = first.tobytes() == second.tobytes() or (np.isnan(first) and np.isnan(second))
    assert (number_difference(0, "telemetry", "x", first, second) is None) == same


def test_zeros_of_either_sign_differ_and_nan_does_not():
    old = {"a": np.array([0.0, np.nan, 1.0], np.float32)}
    assert state_difference(1, "state", old, {"a": old["a"].copy()}) is None
    found = state_difference(1, "state", old, {"a": np.array([-0.0, np.nan, 1.0], np.float32)})
    assert (found.differing, found.size, found.largest_absolute) == (1, 3, 0.0)


@pytest.mark.parametrize(
    ("new", "recorded"),
    [
        ({"a": np.zeros(3, np.float64)}, "float32[3]"),
        ({"a": np.zeros(4, np.float32)}, "float32[3]"),
        ({}, "there"),
        ({"a": np.zeros(3, np.float32), "b": np.zeros(1)}, "not there"),
    ],
)
def test_other_types_shapes_and_names_differ(new, recorded):
    old = {"a": np.zeros(3, np.float32)}
    assert state_difference(1, "state", old, new).recorded == recorded


def test_the_largest_difference_is_the_one_shown():
    old = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    new = old + np.array([[0, 0.5, 0], [0, 0, -2]], np.float32)
    found = state_difference(3, "state", {"w": old}, {"w": new})
    assert (found.recorded, found.replayed, found.differing) == (6.0, 4.0, 2)
    assert found.largest_absolute == 2.0 and found.largest_relative == pytest.approx(1 / 3)
    infinite = state_difference(3, "state", {"w": old}, {"w": old * np.float32(np.inf)})
    assert infinite.largest_absolute == np.inf
