"""A VGG run directory as the diagnosis sees it: states, batches, changes, commands, conditions."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
from small_runs import replaced, tiny_config, tiny_data

from diagnostics.bundle import open_bundle, write_bundle
from diagnostics.errors import InputError, SnapshotDamaged, StoppedByGuard
from diagnostics.incident import read_incident
from diagnostics.protocol import Change
from diagnostics.replay import needed_batch, reproduce, state_at, telemetry_differences
from diagnostics.snapshot import hash_arrays
from vggrepro import cli, trainer
from vggrepro.config import TrainConfig
from vggrepro.config_options import given_values
from vggrepro.counterfactual_changes import (
    candidates,
    changed_batch,
    changed_config,
    has_option,
    scaled_kernels,
)
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory
from vggrepro.run_facts import run_facts
from vggrepro.step_state import initial_state


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_dir(data, tmp_path_factory):
    """A run with validations every second step that fails some steps after a checkpoint."""
    path = tmp_path_factory.mktemp("runs") / "failed"
    config = tiny_config(data, lr=0.3, warmup_steps=0, steps=20, eval_every=2, plateau_patience=1)
    with pytest.raises(StoppedByGuard, match=r"incidents/step-\d{8} \(\d+\.\d MB\)"):
        trainer.train(config, path)
    return path


@pytest.fixture(scope="module")
def run(run_dir):
    return VggRun(run_dir)


@pytest.fixture(scope="module")
def program(run):
    program = run.program()
    program.load(run.start_state())
    return program


@pytest.fixture
def copy(run_dir, tmp_path):
    """The run once more, to be damaged."""
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def failing(run):
    step = run.incident_step()
    assert step is not None and step >= 3
    return step


def test_an_incident_holds_all_that_a_diagnosis_needs(run, run_dir):
    step = failing(run)
    directory = run_dir / "incidents" / f"step-{step:08d}"
    incident = read_incident(directory)
    record = incident.record
    assert {"params/predictions/kernel", "momentum/predictions/kernel", "counters/step"} <= set(
        incident.state
    )
    assert int(incident.state["counters/step"]) == step
    assert incident.batch.keys() == {"images", "labels", "example_ids"}
    assert record["seeds"] == {"run": 0, "step": step}
    assert record["example_ids"] == incident.batch["example_ids"].tolist()
    assert len(set(record["example_names"])) == 8
    assert record["environment"]["packages"]["numpy"]
    assert record["failed_checks"][0].keys() == {"stage", "layer", "quantity"}
    assert run.telemetry().steps.tolist() == list(range(step + 1))
    # Twelve bytes a parameter of state and file, four an input number, and the names.
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    numbers = sum(array.nbytes for array in (*incident.state.values(), *incident.batch.values()))
    assert numbers <= size < numbers + 60_000


def test_the_batch_rebuilt_from_seed_and_step_is_the_captured_one(run):
    batch = run.batch(failing(run))
    rebuilt = run._rebuilt(failing(run))
    assert batch is not rebuilt and hash_arrays(batch) == hash_arrays(rebuilt)
    assert not any("not the captured one" in text for text in run.conditions())


def test_an_unchanged_run_has_no_conditions_to_tell(run):
    assert [text for text in run.conditions() if "environment variable" not in text] == []


def test_states_are_those_of_training(run, program):
    step = failing(run)
    assert run.state_steps()[0] == 0 and run.state_steps()[-1] == step
    stored = run.state_steps()[-2]
    program.load(run.state_before(stored))
    for now in range(stored, step):
        program.run(needed_batch(run, now), now)
    # Validations of the recording drive the rate, as they did then.
    state = program.state()
    now = dict(state)
    errors = run._validation_errors()
    assert set(errors) == set(range(2, step + 1, 2))
    if step in errors:
        program.run(needed_batch(run, step), step)
        now = program.state()
    assert hash_arrays(now) == hash_arrays(run.state_before(step))


def test_every_recorded_step_recurs_bit_for_bit_from_step_0(run, program):
    program.load(run.start_state())
    for step in range(failing(run) + 1):
        outcome = program.run(needed_batch(run, step), step)
        assert telemetry_differences(run.telemetry(), step, outcome) == ()
    assert not outcome.applied and outcome.failed == run.recorded_failures()


def test_the_incident_is_reproduced(run, program):
    step = failing(run)
    found = reproduce(run, program, run.state_before(step), run.batch(step), step)
    assert (found.verdict, found.differences) == ("reproduced", ())


def test_names_of_the_captured_and_of_any_other_batch(run):
    for step in (failing(run), 0):
        named = run.example_names(run.batch(step))
        assert len(named) == 8
        assert all(name.startswith("train/") and name.endswith(".JPEG") for _, name in named)


def test_a_released_step_is_taken_over_by_a_program_of_the_same_compiled_part(run):
    first = run.program()
    first.load(run.start_state())
    compiled = first._step
    first.release()
    with pytest.raises(ValueError, match="load a state first"):
        first.state()
    other = run.program(Change("learning_rate", 0.01, "learning rate 0.01"))
    other.load(run.start_state())
    assert other._step is compiled and compiled.config.lr == 0.01
    outcome = other.run(run.batch(0), 0)
    assert outcome.telemetry["lr"] == pytest.approx(0.01)
    other.release()
    back = run.program()
    back.load(run.start_state())
    assert back._step is compiled
    assert telemetry_differences(run.telemetry(), 0, back.run(run.batch(0), 0)) == ()
    back.release()


def all_changes(run, suspects=()):
    return run.changes(failing(run), suspects)


@pytest.mark.parametrize("init", ["normal:0.1", "glorot-uniform", "normal:0.01"])
def test_every_command_gives_the_configuration_that_was_replayed(run, init):
    config = replaced(run.config, init=init)
    for change in candidates(config, run.facts, 3, (5,)):
        if not has_option(change):
            assert run.command(change) == ""
            continue
        words = shlex.split(run.command(change))
        assert words[:2] == ["vggrepro", "train"]
        options = cli.build_parser().parse_args(words[1:])
        # The number of classes is the data's, not the command's.
        typed = dataclasses.replace(TrainConfig(**given_values(options)), classes=3)
        assert typed == changed_config(run.config, change)


def test_a_command_says_what_it_changes_even_to_the_default(run):
    assert TrainConfig().lr == 0.01 != run.config.lr
    assert "--lr 0.01" in run.command(Change("learning_rate", 0.01, "learning rate 0.01"))


def test_each_change_changes_one_thing(run):
    kinds = {change.kind for change in all_changes(run, (1, 2))}
    assert kinds == {
        "without_examples",
        "init",
        "init_scale",
        "learning_rate",
        "warmup",
        "clip_norm",
        "precision",
        "input_scale",
    }
    assert len({change.label for change in all_changes(run)}) == len(all_changes(run))
    before = run.config.to_dict()
    for change in all_changes(run, (1,)):
        after = changed_config(run.config, change).to_dict()
        differing = [name for name in before if before[name] != after[name]]
        assert len(differing) == int(has_option(change))
    assert changed_config(run.config, None) is run.config


def test_no_change_is_what_the_run_already_does(data):
    config = tiny_config(data, init="normal:0.01", clip_norm=1.0, precision="bfloat16", lr=0.3)
    facts = None  # no candidate asks for them
    offered = candidates(config, facts, 0, ())
    values = {(change.kind, change.value) for change in offered}
    assert ("init", "normal:0.01") not in values
    assert not any(kind == "clip_norm" for kind, _ in values)
    assert ("precision", "bfloat16") not in values and ("precision", "float32") in values
    assert sorted(value for kind, value in values if kind == "learning_rate") == [
        0.0003,
        0.003,
        0.03,
    ]


def test_a_warm_up_outlasts_the_failing_step(run):
    for step in (0, 3, 50):
        warmups = [c.value for c in run.changes(step, ()) if c.kind == "warmup"]
        assert warmups and warmups[0] > step + 1


def test_the_initial_scale_touches_kernels_only(run):
    state = run.start_state()
    scaled = run.start_state(Change("init_scale", 0.5, ""))
    for name, array in state.items():
        factor = 0.5 if name.startswith("params/") and name.endswith("/kernel") else 1.0
        assert scaled[name].tobytes() == (array * np.array(factor, array.dtype)).tobytes()
        assert scaled[name].dtype == array.dtype
    assert scaled_kernels(state, None) is state


def test_another_initialiser_draws_other_weights(run):
    changed = run.start_state(Change("init", "normal:0.01", ""))
    expected = initial_state(replaced(run.config, init="normal:0.01"), run.network)
    assert hash_arrays(changed) == hash_arrays(expected) != hash_arrays(run.start_state())


def test_suspects_become_copies_of_an_innocent_row_with_its_label(run):
    batch = run.batch(0)
    ids = batch["example_ids"].tolist()
    out = changed_batch(batch, Change("without_examples", (ids[0], ids[3]), ""))
    assert out["example_ids"].tolist() == [ids[1], ids[1], ids[2], ids[1], *ids[4:]]
    assert out["images"][0].tobytes() == batch["images"][1].tobytes()
    assert out["labels"][3] == batch["labels"][1]
    with pytest.raises(InputError, match="every example of the batch is suspect"):
        changed_batch(batch, Change("without_examples", tuple(ids), ""))
    scaled = changed_batch(batch, Change("input_scale", 0.5, ""))
    assert (scaled["images"] == batch["images"] * np.float32(0.5)).all()
    assert scaled["labels"] is batch["labels"]


# ---------------------------------------------------------------- what is not as it was


def test_data_that_is_gone_leaves_the_captured_batch(copy, tmp_path):
    rewrite(copy / "config.json", data=str(tmp_path / "nowhere"))
    run = VggRun(copy)
    assert run.batch(failing(run)) is not None and run.batch(0) is None
    text = " ".join(run.conditions())
    assert "the data cannot be used" in text and "only the captured batch" in text
    names = run.example_names(run.batch(failing(run)))
    assert all(name.startswith("train/") for _, name in names)
    with pytest.raises(InputError, match="batch of step 0 cannot be rebuilt"):
        state_at(run, 1)


def rewrite(file, **changes):
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, **changes}))


def test_other_data_at_the_same_place_is_told(copy, data, tmp_path):
    other = tmp_path / "images"
    shutil.copytree(data, other)
    rewrite(copy / "config.json", data=str(other))
    assert not any("data" in text for text in VggRun(copy).conditions())
    next((other / "train").rglob("*.JPEG")).unlink()
    assert any("not those the run was started on" in text for text in VggRun(copy).conditions())


def test_changed_pixels_under_the_same_names_are_told(copy, data, tmp_path):
    other = tmp_path / "images"
    shutil.copytree(data, other)
    rewrite(copy / "config.json", data=str(other))
    run = VggRun(copy)
    _, name = run.example_names(run.batch(failing(run)))[0]
    # Same size, another picture: another file of the same class, padded behind its end.
    file = other / name
    donors = [one for one in file.parent.glob("*.JPEG") if one.stat().st_size < file.stat().st_size]
    content = min(donors, key=lambda one: one.stat().st_size).read_bytes()
    file.write_bytes(content + bytes(file.stat().st_size - len(content)))
    assert any("is not the captured one, bit for bit" in text for text in VggRun(copy).conditions())


def test_an_image_damaged_since_is_named_and_ends_nothing(copy, data, tmp_path):
    other = tmp_path / "images"
    shutil.copytree(data, other)
    rewrite(copy / "config.json", data=str(other))
    run = VggRun(copy)
    _, name = run.example_names(run.batch(failing(run)))[0]
    (other / name).write_bytes(bytes((other / name).stat().st_size))
    run = VggRun(copy)
    told = " ".join(run.conditions())
    assert f"the batch of step {failing(run)} cannot be rebuilt" in told and name in told
    assert run.batch(failing(run)) is not None


def test_another_version_recorded_is_told(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    environment = manifest["environment"]
    wheel = next(name for name in environment["packages"] if name.startswith("tensorflow"))
    environment["packages"][wheel] = "2.20.0"
    environment["hardware"].update(cpu="abacus", devices=["GPU NVIDIA L4"])
    rewrite(copy / "manifest.json", environment=environment)
    told = VggRun(copy).conditions()
    assert any(text.startswith(f"{wheel}: 2.20.0 when recorded") for text in told)
    assert any(text.startswith("cpu: abacus when recorded") for text in told)
    assert any(text.startswith("device: GPU NVIDIA L4 when recorded, CPU") for text in told)


def test_other_initial_weights_out_of_the_seed_are_told(copy):
    rewrite(copy / "manifest.json", initial_weights_sha256="0" * 64)
    assert any("initial weights" in text for text in VggRun(copy).conditions())


def test_a_damaged_checkpoint_is_passed_over_and_told(copy, run, program):
    stored = [step for step in run.state_steps() if 0 < step < failing(run)][-1]

    def after_one_step(state):
        # A validation is counted by the step behind it, in a checkpoint already before.
        program.load(state)
        program.run(run.batch(stored), stored)
        return hash_arrays(program.state())

    file = copy / "checkpoints" / f"step-{stored:08d}" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fresh = VggRun(copy)
    with pytest.raises(SnapshotDamaged):
        fresh.state_before(stored)
    rewound = state_at(fresh, stored)
    assert after_one_step(rewound) == after_one_step(run.state_before(stored))
    assert any(f"step-{stored:08d}" in text for text in fresh.conditions())


# ---------------------------------------------------------------- damaged incidents


@pytest.mark.parametrize("part", ["incident.json", "state", "batch"])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "empty"])
def test_a_damaged_incident_is_named(copy, part, how):
    directory = next((copy / "incidents").iterdir())
    files = [directory / part] if part.endswith("json") else sorted((directory / part).iterdir())
    for file in files:
        content = file.read_bytes()
        damage(file, how)
        with pytest.raises(SnapshotDamaged) as damaged:
            VggRun(copy)
        text = str(damaged.value)
        assert "damaged" in text and file.name in text and "\n" not in damaged.value.remedy
        assert damaged.value.remedy and damaged.value.exit_code == 2
        file.write_bytes(content)
    VggRun(copy)


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[content.rindex(b"}") if file.suffix == ".json" else len(content) // 2] ^= 4
        file.write_bytes(content)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1},
        {"failed_checks": [{"stage": "loss"}]},
        {"failed_checks": "loss"},
        {"failed_checks": []},
        {"example_names": ["one"]},
        {"example_names": None},
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_named(copy, changes):
    directory = next((copy / "incidents").iterdir())
    rewrite(directory / "incident.json", **changes)
    with pytest.raises(SnapshotDamaged, match="incident.json") as damaged:
        VggRun(copy)
    assert "move" in damaged.value.remedy


def test_not_a_run_directory(tmp_path):
    with pytest.raises(InputError, match="is not a run directory: no such directory"):
        VggRun(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a run directory: it has no config.json"):
        VggRun(tmp_path)


def test_a_bundle_holds_the_same_incident(run, run_dir, tmp_path):
    write_bundle(tmp_path / "b.zip", run_dir, failing(run), [run.config.data])
    open_bundle(tmp_path / "b.zip", tmp_path / "opened")
    with RunDirectory.open(tmp_path / "opened") as opened:
        assert run.config.data not in json.dumps(opened.config())
    there = VggRun(tmp_path / "opened")
    step = failing(there)
    assert hash_arrays(there.state_before(step)) == hash_arrays(run.state_before(step))
    assert hash_arrays(there.batch(step)) == hash_arrays(run.batch(step))
    assert there.telemetry().rows.tobytes() == run.telemetry().rows.tobytes()
    assert there.recorded_failures() == run.recorded_failures()
    assert there.facts == run_facts(there.config, there.network)
