"""Run directories: the API, one writer, damage, a full disk, and kills at any moment."""

import errno
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diagnostics.errors import InputError, RunLocked
from diagnostics.snapshot import MANIFEST_FILE, STATE_FILE
from vggrepro import run_directory
from vggrepro.run_directory import RunDirectory

ROOT = Path(run_directory.__file__).parents[1]
CONFIG = {"arch": "A", "lr": 0.01}


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "run", CONFIG, {"status": "running"}) as run:
        yield run


def state_of(step: int) -> dict[str, np.ndarray]:
    return {"params/w": np.full(8, step, np.float32), "counters/step": np.array(step)}


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_create_then_open(run):
    run.close()
    with RunDirectory.open(str(run.path)) as again:
        assert again.config() == CONFIG
        assert again.manifest() == {"status": "running"}
        assert again.checkpoints() == []
        assert again.latest_checkpoint() is None
        assert again.incidents() == []
        assert again.metrics() == []
        assert again.telemetry.read()[0].size == 0


def test_create_makes_parents_and_takes_an_empty_directory(tmp_path):
    RunDirectory.create(tmp_path / "a" / "b", CONFIG, {}).close()
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "empty", CONFIG, {}).close()


@pytest.mark.parametrize("name", ["photo.jpg", "manifest.json", "config.json", "checkpoints"])
def test_create_refuses_a_directory_with_anything_in_it(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="exists and is not empty") as caught:
        RunDirectory.create(tmp_path, CONFIG, {})
    assert "--run-dir" in caught.value.remedy and "--resume" in caught.value.remedy
    assert names_in(tmp_path) == [name]


def test_create_refuses_a_run_and_a_file(run, tmp_path):
    run.close()
    with pytest.raises(InputError, match="exists and is not empty"):
        RunDirectory.create(run.path, CONFIG, {})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        RunDirectory.create(tmp_path / "file", CONFIG, {})


@pytest.mark.parametrize("writes", [0, 1])
def test_create_starts_again_where_it_was_killed(tmp_path, monkeypatch, writes):
    left = iter(range(writes))
    write = run_directory.write_json

    def killed_after_some_writes(path, value):
        if next(left, None) is None:
            (path.parent / ".tmp-manifest.json-01234567").touch()
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_directory, "write_json", killed_after_some_writes)
        RunDirectory.create(tmp_path / "run", CONFIG, {"attempt": 1})
    with pytest.raises(InputError, match="not a run directory: it has no config.json"):
        RunDirectory.open(tmp_path / "run")
    with RunDirectory.create(tmp_path / "run", CONFIG, {"attempt": 2}) as run:
        assert run.manifest() == {"attempt": 2}
        assert names_in(run.path) == [".lock", "config.json", "manifest.json"]


def test_create_refuses_a_run_that_another_process_made_meanwhile(tmp_path, monkeypatch):
    lock = run_directory.acquire_lock

    def other_process_comes_first(path):
        monkeypatch.undo()
        RunDirectory.create(path, CONFIG, {"owner": "other"}).close()
        return lock(path)

    monkeypatch.setattr(run_directory, "acquire_lock", other_process_comes_first)
    with pytest.raises(InputError, match="exists and is not empty"):
        RunDirectory.create(tmp_path / "run", CONFIG, {"owner": "this"})
    with RunDirectory.open(tmp_path / "run", writable=True) as run:
        assert run.manifest() == {"owner": "other"}


def test_open_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a run directory: no such directory"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="it has no config.json"):
        RunDirectory.open(tmp_path, writable=True)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config_is_named(run, text):
    run.path.joinpath("config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="config.json is not"):
        run.config()


def test_a_missing_manifest_is_named(run):
    run.path.joinpath("manifest.json").unlink()
    with pytest.raises(InputError, match="cannot read .*manifest.json"):
        run.manifest()


def test_update_manifest_keeps_the_other_entries(run):
    run.update_manifest(steps=3, final_metrics={"loss": float("nan")})
    run.update_manifest(status="finished")
    assert run.manifest() == {"status": "finished", "steps": 3, "final_metrics": {"loss": "NaN"}}


def test_a_run_open_for_reading_cannot_be_changed(run):
    run.close()
    before = names_in(run.path)
    with RunDirectory.open(run.path) as reader:
        for change in (
            lambda: reader.update_manifest(status="finished"),
            lambda: reader.save_checkpoint(1, state_of(1), keep=1),
            lambda: reader.append_metrics({"step": 1}),
            lambda: reader.truncate_metrics(0),
        ):
            with pytest.raises(ValueError, match="not open for writing"):
                change()
    assert names_in(run.path) == before


def test_checkpoints_come_back_and_the_oldest_go(run):
    for step in (0, 100, 200, 123456789):
        run.save_checkpoint(step, state_of(step), keep=3)
    assert run.checkpoints() == [100, 200, 123456789]
    assert names_in(run.path / "checkpoints") == [
        *("step-00000100", "step-00000200", "step-123456789")
    ]
    for at_most, expected in ((None, 123456789), (123456788, 200), (200, 200), (199, 100)):
        step, state = run.latest_checkpoint(at_most)
        assert step == expected
        assert state["params/w"].tobytes() == state_of(step)["params/w"].tobytes()
    assert run.latest_checkpoint(99) is None
    assert run.warnings == []


def test_the_checkpoint_just_saved_is_never_the_one_that_goes(run):
    for step in (10, 20, 5):
        run.save_checkpoint(step, state_of(step), keep=2)
    assert run.checkpoints() == [5, 20]
    run.save_checkpoint(3, state_of(3), keep=1)
    assert run.checkpoints() == [3]


def test_none_goes_while_there_are_fewer_than_keep(run):
    for step in (10, 20, 30, 40):
        run.save_checkpoint(step, state_of(step), keep=5)
    assert run.checkpoints() == [10, 20, 30, 40]


def test_a_checkpoint_saved_again_is_replaced(run):
    run.save_checkpoint(10, state_of(0), keep=2)
    run.save_checkpoint(10, state_of(10), keep=2)
    assert run.checkpoints() == [10]
    assert run.latest_checkpoint()[1]["params/w"][0] == 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_byte(path / STATE_FILE),
        lambda path: os.truncate(path / STATE_FILE, 20),
        lambda path: (path / STATE_FILE).unlink(),
        lambda path: (path / MANIFEST_FILE).unlink(),
        lambda path: os.truncate(path / MANIFEST_FILE, 20),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_but_kept(run, damage):
    told: list[str] = []
    for step in (10, 20):
        run.save_checkpoint(step, state_of(step), keep=3)
    run.close()
    damage(run.path / "checkpoints" / "step-00000020")

    with RunDirectory.open(run.path, on_warning=told.append) as reader:
        assert reader.latest_checkpoint()[0] == 10
        assert told == reader.warnings
        assert "step-00000020" in told[0] and "the checkpoint before it" in told[0]
        assert reader.checkpoints() == [10, 20]

    with RunDirectory.open(run.path, writable=True) as writer:
        assert writer.latest_checkpoint()[0] == 10
        assert len(writer.warnings) == 1
        assert writer.checkpoints() == [10]
        assert writer.latest_checkpoint()[0] == 10
        assert len(writer.warnings) == 1
        writer.save_checkpoint(20, state_of(20), keep=1)
    damage(run.path / "checkpoints" / "step-00000020")
    with RunDirectory.open(run.path, writable=True) as writer:
        assert writer.latest_checkpoint() is None
    assert names_in(run.path / "checkpoints") == [
        *("damaged-step-00000020", "damaged-step-00000020-2")
    ]


def test_a_checkpoint_under_another_steps_name_is_passed_over(run):
    run.save_checkpoint(10, state_of(10), keep=1)
    os.rename(run.path / "checkpoints/step-00000010", run.path / "checkpoints/step-00000030")
    assert run.latest_checkpoint() is None
    assert "step-00000030 holds step 10" in run.warnings[0]


def test_a_checkpoint_that_may_not_be_read_is_an_error_not_damage(run, monkeypatch):
    run.save_checkpoint(10, state_of(10), keep=1)

    def refuse(directory):
        raise InputError("cannot read it: Permission denied")

    monkeypatch.setattr(run_directory, "read_snapshot", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        run.latest_checkpoint()
    assert run.checkpoints() == [10]


def test_a_full_disk_keeps_the_earlier_checkpoints(run, monkeypatch):
    run.save_checkpoint(10, state_of(10), keep=1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError) as caught:
        patch.setattr(os, "fsync", full)
        run.save_checkpoint(20, state_of(20), keep=1)
    assert f"{run.path}/checkpoints/step-00000020: No space left" in caught.value.message
    assert names_in(run.path / "checkpoints") == ["step-00000010"]
    assert run.latest_checkpoint()[0] == 10


def test_leftovers_are_removed_only_by_a_writer(run):
    run.save_checkpoint(10, state_of(10), keep=1)
    run.close()
    leftovers = [
        run.path / ".tmp-manifest.json-01234567",
        run.path / "checkpoints" / ".tmp-step-00000020-01234567",
        run.path / "incidents" / ".tmp-step-00000020-01234567",
    ]
    for path in leftovers:
        (path / "inside").mkdir(parents=True)
    with RunDirectory.open(run.path) as reader:
        assert reader.checkpoints() == [10]
        assert reader.incidents() == []
    assert all(path.exists() for path in leftovers)
    RunDirectory.open(run.path, writable=True).close()
    assert not any(path.exists() for path in leftovers)


def test_metrics_are_strict_json_and_read_back_as_floats(run):
    records = [
        {"step": 0, "loss": np.float32(0.1), "headroom_layer": "fc1"},
        {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "low": -np.inf},
    ]
    for record in records:
        run.append_metrics(record)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [0, 1]
    first, second = run.metrics()
    assert first == {"step": 0, "loss": float(np.float32(0.1)), "headroom_layer": "fc1"}
    assert np.isnan(second["loss"])
    assert (second["grad_norm"], second["low"]) == (np.inf, -np.inf)


def test_metrics_reach_the_file_at_once(run):
    run.append_metrics({"step": 0})
    with RunDirectory.open(run.path) as reader:
        assert reader.metrics() == [{"step": 0}]


@pytest.mark.parametrize("tail", ["", '{"step": 3, "loss"', "{"])
def test_truncate_metrics_drops_later_steps_and_a_half_line(run, tail):
    for record in ({"note": "begin"}, {"step": 0}, {"step": 1}, {"step": 1, "val_loss": 2}):
        run.append_metrics(record)
    run.append_metrics({"step": 2})
    run.close()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(tail)
    with RunDirectory.open(run.path, writable=True) as again:
        again.truncate_metrics(5)
        again.append_metrics({"step": 5})
        assert [record.get("step") for record in again.metrics()] == [None, 0, 1, 1, 2, 5]
        again.truncate_metrics(2)
        again.append_metrics({"step": 2, "again": 1})
        assert again.metrics()[3:] == [{"step": 1, "val_loss": 2}, {"step": 2, "again": 1}]
        again.truncate_metrics(0)
        assert again.metrics() == [{"note": "begin"}]
        assert again.warnings == []


def test_truncating_metrics_before_there_are_any(run):
    run.truncate_metrics(0)
    assert run.metrics() == []
    assert not (run.path / "metrics.jsonl").exists()


def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(run):
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 0}\n\x00\x00\n[]\n{"step": 1}\n{"st')
    assert run.metrics() == [{"step": 0}, {"step": 1}]
    assert [warning.split(": ")[-1] for warning in run.warnings] == [
        "line 2 is damaged and left out",
        "line 3 is damaged and left out",
    ]


def test_where_incidents_and_diagnoses_lie(run):
    assert run.incident_directory(1) == run.path / "incidents" / "step-00000001"
    assert run.diagnosis_directory(1) == run.path / "diagnosis" / "step-00000001"
    for step in (12, 3):
        run.incident_directory(step).mkdir(parents=True)
    (run.path / "incidents" / "notes.txt").touch()
    assert run.incidents() == [run.incident_directory(3), run.incident_directory(12)]


def test_a_checkpoint_makes_the_telemetry_before_it_durable(run):
    run.telemetry.start(["loss"], 0)
    run.telemetry.append(0, np.ones(1, np.float32))
    run.save_checkpoint(1, state_of(1), keep=1)
    with RunDirectory.open(run.path) as reader:
        assert reader.telemetry.read()[0].tolist() == [0]


def test_a_second_writer_in_this_process_is_refused_until_the_first_closes(run):
    with pytest.raises(RunLocked, match=f"pid {os.getpid()} on "):
        RunDirectory.open(run.path, writable=True)
    RunDirectory.open(run.path).close()
    run.close()
    RunDirectory.open(run.path, writable=True).close()


def test_the_lock_file_names_only_its_present_holder(run):
    run.close()
    (run.path / ".lock").write_text("pid 1234567890 on a-machine-with-a-very-long-name\n" * 3)
    with RunDirectory.open(run.path, writable=True), pytest.raises(RunLocked) as caught:
        RunDirectory.open(run.path, writable=True)
    assert caught.value.message.endswith(f"(pid {os.getpid()} on {platform.node()})")


def start(code: str, *arguments: object) -> subprocess.Popen:
    """A Python process that imports the packages under test."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


HOLD = """
import sys, time
from vggrepro.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1], writable=True)
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(run):
    run.close()
    holder = start(HOLD, run.path)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(RunLocked) as caught:
            RunDirectory.open(run.path, writable=True)
        assert f"pid {holder.pid} on " in caught.value.message
        assert caught.value.remedy
        with pytest.raises(InputError, match="not empty"):
            RunDirectory.create(run.path, CONFIG, {})
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    RunDirectory.open(run.path, writable=True).close()


TRAIN = """
import sys
import numpy as np
from vggrepro.run_directory import RunDirectory
with RunDirectory.open(sys.argv[1], writable=True) as run:
    checkpoint = run.latest_checkpoint()
    step, state = checkpoint or (0, {"w": np.zeros(50_000), "step": np.array(0)})
    assert (state["w"] == step).all() and state["step"] == step, (step, state)
    assert not run.warnings, run.warnings
    run.truncate_metrics(step)
    run.telemetry.start(["value"], step)
    while True:
        run.telemetry.append(step, np.array([step], np.float32))
        run.append_metrics({"step": step, "value": step})
        step += 1
        if step % 5 == 0:
            state = {"w": np.full(50_000, float(step)), "step": np.array(step)}
            run.save_checkpoint(step, state, keep=2)
            print(step, flush=True)
"""


def test_killed_at_random_moments_the_run_always_goes_on(run):
    run.close()
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    reached = 0
    for _ in range(10):
        child = start(TRAIN, run.path)
        printed = [child.stdout.readline()]
        time.sleep(moments.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        printed += child.stdout.read().splitlines(keepends=True)
        child.wait()
        child.stdout.close()
        whole = [int(line) for line in printed if line.endswith("\n")]
        assert whole, "the child failed"
        reached = whole[-1]
        with RunDirectory.open(run.path) as reader:
            _assert_readable(reader, reached)


def _assert_readable(reader: RunDirectory, reached: int) -> None:
    step, state = reader.latest_checkpoint()
    assert step >= reached
    assert (state["w"] == step).all() and state["step"] == step
    steps, columns, rows = reader.telemetry.read()
    assert columns == ["value"]
    assert steps.tolist() == list(range(len(steps))) and len(steps) >= step
    assert rows[:, 0].tolist() == steps.tolist()
    metrics = reader.metrics()
    assert [record["step"] for record in metrics] == list(range(len(metrics)))
    assert len(metrics) >= step
    assert reader.warnings == []
    assert 1 <= len(reader.checkpoints()) <= 3  # a third one while the oldest goes
