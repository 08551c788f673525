"""Whole small runs: files, resume, the stop on NaN, Ctrl-C, damaged checkpoints."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from small_runs import replaced, run_outcome, tiny_config, tiny_data

from diagnostics.errors import GuardFailure, InputError, RunLocked, StoppedByGuard
from diagnostics.incident import read_incident
from diagnostics.snapshot import hash_arrays
from vggrepro import run_start, trainer
from vggrepro.hooks import Hook
from vggrepro.run_directory import RunDirectory
from vggrepro.train_step import TrainStep
from vggrepro.training_step import training_step

pytestmark = pytest.mark.usefixtures("shared_training")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train(tiny_config(data), path)
    return path


class StopAfter(Hook):
    """Raises in the hook after some step, as a crash would."""

    def __init__(self, step):
        self._step = step

    def on_step(self, step, state, metrics):
        if step == self._step:
            raise RuntimeError("crash")


def test_a_finished_run_has_its_files_and_its_manifest(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["steps"] == 6
    assert set(manifest["final_metrics"]) == {
        "val_loss",
        "val_top1_error",
        "val_top5_error",
        "val_images",
    }
    assert manifest["final_metrics"]["val_images"] == 9
    assert manifest["config_origins"]["width"] == "deviation"
    assert manifest["config_origins"]["momentum"] == "paper"
    assert manifest["initial_weights_sha256"] != manifest["final_weights_sha256"]
    assert len(manifest["data"]["colours"]["mean_rgb"]) == 3
    assert (whole / trainer.WEIGHTS_FILE).stat().st_size > 0
    with RunDirectory.open(whole) as run:
        assert run.checkpoints() == [4, 6]
        steps = [record["step"] for record in run.metrics() if "loss" in record]
        assert steps == list(range(6))
        assert run.telemetry.read()[0].tolist() == list(range(6))


@pytest.mark.parametrize("crash", [0, 1, 2, 3, 4, 5])
def test_a_resumed_run_has_the_same_bits_wherever_it_crashed(data, whole, tmp_path, crash):
    config = tiny_config(data)
    with pytest.raises(RuntimeError):
        trainer.train(config, tmp_path / "run", [StopAfter(crash)])
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    with RunDirectory.open(tmp_path / "run") as run:
        stored = config.from_dict(run.config())
    trainer.train(stored, tmp_path / "run", resume=True)
    assert run_outcome(tmp_path / "run") == run_outcome(whole)


def test_resuming_a_finished_run_changes_nothing_and_more_steps_go_on(data, whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    with RunDirectory.open(copy) as run:
        config = tiny_config(data).from_dict(run.config())
    trainer.train(config, copy, resume=True)
    assert run_outcome(copy) == run_outcome(whole)
    trainer.train(replaced(config, steps=8), copy, resume=True)
    trainer.train(replaced(config, steps=8), tmp_path / "long")
    assert run_outcome(copy)["state"] == run_outcome(tmp_path / "long")["state"]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(data, whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    file = copy / "checkpoints" / "step-00000006" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    heard = []

    class Listen(Hook):
        def on_message(self, level, text):
            heard.append((level, text))

    with RunDirectory.open(copy) as run:
        config = tiny_config(data).from_dict(run.config())
    trainer.train(config, copy, [Listen()], resume=True)
    assert any(level == "warning" and "step-00000006" in text for level, text in heard)
    assert run_outcome(copy) == run_outcome(whole)


class PoisonBatch:
    """A training stream whose batch of one step holds one NaN."""

    def __init__(self, stream, step):
        self._stream, self._step = stream, step

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def stream(self, first_step):
        for step, batch in enumerate(self._stream.stream(first_step), first_step):
            if step == self._step:
                images = batch["images"].numpy()
                images[5, 3, 3, 0] = np.nan
                batch = {**batch, "images": tf.constant(images)}
            yield batch


def poison(monkeypatch, step):
    real = run_start.open_data

    def open_poisoned(*arguments):
        source = real(*arguments)
        return type(source)(PoisonBatch(source.training, step), source.validation, source.record)

    monkeypatch.setattr(run_start, "open_data", open_poisoned)


def test_the_guard_stops_the_run_and_leaves_an_exact_incident(data, whole, tmp_path, monkeypatch):
    config = tiny_config(data)
    poison(monkeypatch, 4)
    with pytest.raises(StoppedByGuard) as stopped:
        trainer.train(config, tmp_path / "run")
    text = str(stopped.value)
    assert "step 4: input is not finite" in text
    assert f"vggrepro diagnose-nan {tmp_path / 'run'}" in text
    assert stopped.value.exit_code == 3
    incident = read_incident(tmp_path / "run" / "incidents" / "step-00000004")
    assert np.argwhere(np.isnan(incident.batch["images"])).tolist() == [[5, 3, 3, 0]]
    assert incident.record["failed_checks"][0]["stage"] == "data"
    assert len(incident.record["example_names"]) == config.batch_size
    assert all(name.startswith("train/") for name in incident.record["example_names"])
    with RunDirectory.open(whole) as run:
        _, state = run.latest_checkpoint(at_most=4)
    assert hash_arrays(incident.state) == hash_arrays(state)
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.manifest()["status"] == "stopped_by_guard"
        assert run.telemetry.read()[0].tolist() == [0, 1, 2, 3, 4]


def test_the_literal_reading_of_the_paper_explodes_and_the_usual_one_does_not(data, tmp_path):
    """sigma = 0.1 on a wider net at 64 pixels; the full size is in the README."""
    wide = tiny_config(data, width=0.5, image_size=64, scale_min=73, scale_max=73, warmup_steps=0)
    with pytest.raises(StoppedByGuard) as stopped:
        trainer.train(replaced(wide, init="normal:0.1"), tmp_path / "literal")
    assert "not finite" in str(stopped.value)
    for init in ("normal:0.01", "glorot-uniform"):
        result = trainer.train(replaced(wide, init=init, steps=3), tmp_path / init)
        assert result.status == "finished"


def test_a_blind_guard_refuses_to_train(data, tmp_path, monkeypatch):
    from diagnostics import guard

    monkeypatch.setattr(guard, "all_finite", lambda groups: tf.fill([len(groups)], True))
    monkeypatch.setattr(trainer, "training_step", training_step)  # compiled anew
    with pytest.raises(GuardFailure, match="did not see a NaN"):
        trainer.train(tiny_config(data), tmp_path / "run")


def test_ctrl_c_saves_and_a_resumed_run_has_the_same_bits(data, whole, tmp_path):
    class CtrlC(Hook):
        def on_step(self, step, state, metrics):
            if step == 2:
                import signal

                signal.raise_signal(signal.SIGINT)

    result = trainer.train(tiny_config(data), tmp_path / "run", [CtrlC()])
    assert result.status == "interrupted" and result.steps == 3
    with RunDirectory.open(tmp_path / "run") as run:
        assert run.checkpoints()[-1] == 3
        assert run.manifest()["status"] == "interrupted"
        config = tiny_config(data).from_dict(run.config())
    trainer.train(config, tmp_path / "run", resume=True)
    assert run_outcome(tmp_path / "run") == run_outcome(whole)


def test_bad_input_is_named(data, tmp_path):
    config = tiny_config(data)
    with pytest.raises(InputError, match="--classes 7"):
        trainer.train(replaced(config, classes=7), tmp_path / "a")
    with pytest.raises(InputError, match="strategy 'tpu'"):
        trainer.train(replaced(config, strategy="tpu"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_fewer_steps_than_done_and_a_used_directory_are_refused(data, whole):
    with RunDirectory.open(whole) as run:
        config = tiny_config(data).from_dict(run.config())
    with pytest.raises(InputError, match="has done 6 steps already"):
        trainer.train(replaced(config, steps=5), whole, resume=True)
    with pytest.raises(InputError, match="exists and is not empty"):
        trainer.train(config, whole)


def test_a_truncated_training_image_is_named_and_nothing_is_lost(data, whole, tmp_path):
    broken = tmp_path / "images"
    shutil.copytree(data, broken)
    copy = tmp_path / "run"
    config = tiny_config(broken, checkpoint_every=1)
    trainer.train(replaced(config, steps=2), copy)
    for file in (broken / "train").rglob("*.JPEG"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(InputError, match=r"\.JPEG: truncated or damaged"):
        trainer.train(replaced(config, steps=5), copy, resume=True)
    with RunDirectory.open(copy) as run:
        assert run.latest_checkpoint()[0] == 2


def test_a_second_process_in_the_same_run_is_refused(data, whole):
    with RunDirectory.open(whole, writable=True), pytest.raises(RunLocked, match="pid"):
        trainer.train(tiny_config(data), whole, resume=True)


def test_resuming_on_other_data_is_refused(data, whole, tmp_path):
    other = tmp_path / "images"
    shutil.copytree(data, other)
    next((other / "train").rglob("*.JPEG")).unlink()
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    with pytest.raises(InputError, match="not those the run was started on"):
        trainer.train(tiny_config(other), copy, resume=True)


def test_the_step_that_trains_is_the_step_that_is_replayed(data, whole):
    """The recorded telemetry comes out of a fresh TrainStep, bit for bit."""
    from vggrepro.data_source import open_data
    from vggrepro.model import build_network

    with RunDirectory.open(whole) as run:
        config = tiny_config(data).from_dict(run.config())
        source = open_data(config, lambda text: None, run.manifest()["data"])
        recorded = run.telemetry.read()[2]
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=config.classes
    )
    step = TrainStep(config, network)
    for k in range(3):
        batch = source.training.batch(k)
        assert step(batch["images"], batch["labels"]).telemetry.tobytes() == recorded[k].tobytes()


@pytest.mark.parametrize("steps_per_loop", [2, 4])
def test_steps_in_one_call_have_the_bits_of_single_ones(tmp_path, steps_per_loop):
    data = tiny_data(tmp_path)
    config = tiny_config(data, classes=0, steps=7, eval_every=5, checkpoint_every=4)
    trainer.train(config, tmp_path / "single")
    trainer.train(replaced(config, steps_per_loop=steps_per_loop), tmp_path / "loops")
    assert run_outcome(tmp_path / "single") == run_outcome(tmp_path / "loops")


def test_the_guard_stops_inside_a_loop_at_the_first_bad_step(tmp_path):
    data = tiny_data(tmp_path)
    config = tiny_config(data, classes=0, init="normal:1", eval_every=0, checkpoint_every=50)
    incidents = []
    for steps_per_loop, name in ((1, "single"), (6, "loops")):
        with pytest.raises(StoppedByGuard):
            trainer.train(replaced(config, steps_per_loop=steps_per_loop), tmp_path / name)
        (place,) = (tmp_path / name / "incidents").iterdir()
        incidents.append(read_incident(place))
    single, loops = incidents
    assert 0 < single.step < 5 and loops.step == single.step
    assert hash_arrays(single.state) == hash_arrays(loops.state)
    assert hash_arrays(single.batch) == hash_arrays(loops.batch)
