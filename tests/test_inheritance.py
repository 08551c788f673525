"""Weights taken over from a trained net: which layers, and that every replay finds them again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_runs import replaced, run_outcome, tiny_config, tiny_data

from diagnostics.bundle import open_bundle, write_bundle
from diagnostics.errors import InputError, SnapshotDamaged, StoppedByGuard
from diagnostics.replay import needed_batch, telemetry_differences
from diagnostics.snapshot import hash_arrays
from vggrepro import inheritance, trainer
from vggrepro.cli import main
from vggrepro.data_source import STATISTICS_FILE
from vggrepro.inheritance import BY_BLOCK
from vggrepro.initializers import initial_parameters
from vggrepro.model import build_network
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("shared_training")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def parent(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("parent") / "A"
    trainer.train(tiny_config(data, steps=2, eval_every=0), path)
    return path


@pytest.fixture(scope="module")
def child(data, parent, tmp_path_factory):
    path = tmp_path_factory.mktemp("child") / "D"
    trainer.train(child_config(data, parent), path)
    return path


def child_config(data, parent, **changes):
    values = {"arch": "D", "init": "normal:0.02", "init_from": str(parent), "eval_every": 0}
    return tiny_config(data, **{**values, "steps": 3, **changes})


def weights_of(path, step):
    with RunDirectory.open(path) as run:
        at, state = run.latest_checkpoint(at_most=step)
        assert at == step
        return {n.removeprefix("params/"): a for n, a in state.items() if n.startswith("params/")}


def test_deeper_nets_take_a_by_block_and_draw_the_rest(child, parent):
    run = VggRun(child)
    start, taken = run.start_state(), weights_of(parent, 2)
    drawn = initial_parameters(run.network, "normal:0.02", 0)
    copied = set()
    for name in run.network.parameter_shapes():
        layer = name.partition("/")[0]
        if layer in BY_BLOCK:
            assert start[f"params/{name}"].tobytes() == taken[name].tobytes()
            copied.add(layer)
        else:
            assert start[f"params/{name}"].tobytes() == drawn[name].tobytes()
    # The paper's four convolutions and three fully connected layers.
    assert copied == {
        *("block1_conv1", "block2_conv1", "block3_conv1", "block3_conv2"),
        *("fc1", "fc2", "predictions"),
    }


def test_the_manifest_keeps_the_table(child, parent):
    manifest = json.loads((child / "manifest.json").read_text())
    kept = manifest["inheritance"]
    assert (kept["source"], kept["source_arch"], kept["source_step"]) == (str(parent), "A", 2)
    assert kept["source_sha256"] == hash_arrays(weights_of(parent, 2))
    start = VggRun(child).start_state()
    assert [row["layer"] for row in kept["layers"] if row["origin"] == "copied"] == list(BY_BLOCK)
    assert len(kept["layers"]) == 16
    for row in kept["layers"]:
        arrays = {p: start[f"params/{row['layer']}/{p}"] for p in ("kernel", "bias")}
        assert row["shape"] == list(arrays["kernel"].shape)
        assert row["sha256"] == hash_arrays(arrays)
    assert manifest["config_origins"]["init_from"] == "interpretation"
    assert manifest["parent_run"] == str(parent)


def test_the_table_is_printed(data, parent, tmp_path, capsys):
    options = "train --width 0.05 --batch-size 8 --steps 1 --eval-every 0 --arch B"
    place = ["--data", str(data), "--init-from", str(parent), "--run-dir", str(tmp_path / "B")]
    assert main([*options.split(), *place]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "sha256" in line]
    assert len(rows) == 13
    assert [row[0] for row in rows if row[1] == "copied"] == list(BY_BLOCK)
    assert rows[1][:4] == ["block1_conv2", "random,", "glorot-uniform", "3x3x3x3"]


@pytest.mark.parametrize("source", ["run", "final.weights.h5", "state.safetensors"])
def test_a_run_its_exported_weights_and_its_checkpoint_give_the_same(parent, source):
    places = {"run": parent, "final.weights.h5": parent / "final.weights.h5"}
    place = places.get(source, parent / "checkpoints/step-00000002/state.safetensors")
    network = build_network("E", width=0.05, image_size=32, classes=3)
    found = inheritance.read_source(str(place), pytest.fail)
    assert found.arch == "A"
    taken = inheritance.inherited_parameters(found, network)
    expected = weights_of(parent, 2)
    assert len(taken) == 14
    assert all(array.tobytes() == expected[name].tobytes() for name, array in taken.items())


def test_between_sizes_every_layer_is_taken_and_no_initialiser_is_a_fix(data, child, tmp_path):
    config = child_config(data, child, scale_min=55, scale_max=73, steps=1)
    trainer.train(config, tmp_path / "jitter")
    run = VggRun(tmp_path / "jitter")
    before = weights_of(child, 3)
    start = run.start_state()
    assert all(start[f"params/{name}"].tobytes() == a.tobytes() for name, a in before.items())
    assert not any(start[name].any() for name in start if name.startswith("momentum/"))
    assert "init" not in {change.kind for change in run.changes(0, ())}
    assert "init" in {change.kind for change in VggRun(child).changes(0, ())}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0.1}, r"kernel is \[3, 3, 3, 3\] in .*A\) and \[3, 3, 3, 6\] in this run"),
        ({"image_size": 64, "scale_min": 64, "scale_max": 64}, r"fc1/kernel is \[26, 205\]"),
    ],
    ids=["width", "image size"],
)
def test_a_shape_mismatch_names_both(data, parent, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        trainer.train(child_config(data, parent, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arch", "source"), [("E", "D"), ("A", "D"), ("D", "B")])
def test_only_the_paper_s_inheritance_is_known(arch, source):
    with pytest.raises(InputError, match=f"net {arch} cannot inherit from net {source}"):
        inheritance.copied_layers(source, arch)


@pytest.mark.parametrize("place", ["nowhere", "empty.weights.h5", "notes.txt"])
def test_a_source_that_is_none_is_told(tmp_path, place):
    if place != "nowhere":
        (tmp_path / place).write_text("no weights")
    with pytest.raises(InputError, match=place):
        inheritance.read_source(str(tmp_path / place), pytest.fail)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "nowhere"}, "nowhere"),
        ({"arch": "A-LRN"}, "cannot inherit"),
        ({"classes": 9}, "9"),
    ],
)
def test_a_wrong_source_is_told_before_the_data_set_is_read(child, tmp_path, changes, message):
    data = tiny_data(tmp_path)
    with pytest.raises(InputError, match=message):
        trainer.train(child_config(data, child, **changes), tmp_path / "run")
    assert not (data / STATISTICS_FILE).exists()


def test_another_program_s_run_is_no_source(tmp_path):
    with RunDirectory.create(tmp_path / "keras", {"kind": "keras"}, {"status": "finished"}) as run:
        run.save_checkpoint(1, {"params/x": np.zeros(1)}, 1)
    with pytest.raises(InputError, match="not a run of `vggrepro train`"):
        inheritance.read_source(str(tmp_path / "keras"), pytest.fail)


def test_an_unfinished_source_is_told(data, parent, tmp_path):
    shutil.copytree(parent, tmp_path / "A")
    file = tmp_path / "A" / "manifest.json"
    file.write_text(file.read_text().replace('"finished"', '"interrupted"'))
    told = []
    inheritance.read_source(str(tmp_path / "A"), told.append)
    assert len(told) == 1 and "marked as interrupted: its weights after 2 steps" in told[0]


def test_every_step_replays_bit_for_bit_without_the_parent(child, parent, tmp_path):
    hidden = parent.with_name("gone")
    parent.rename(hidden)
    try:
        run = VggRun(child)
        program = run.program()
        program.load(run.start_state())
        for step in range(3):
            outcome = program.run(needed_batch(run, step), step)
            assert telemetry_differences(run.telemetry(), step, outcome) == ()
        assert hash_arrays(program.state()) == hash_arrays(run.state_before(3))
        assert [text for text in run.conditions() if "weights" in text] == []
    finally:
        hidden.rename(parent)


def test_a_run_killed_before_its_first_checkpoint_resumes_to_the_same_bits(
    data, parent, child, tmp_path
):
    config = child_config(data, parent)
    trainer.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    trainer.train(config, tmp_path / "run", resume=True)
    assert run_outcome(tmp_path / "run") == run_outcome(child)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_lost_copy_is_told_and_names_the_source(child, parent, tmp_path, damage):
    shutil.copytree(child, tmp_path / "run")
    file = tmp_path / "run" / "inherited" / "state.safetensors"
    if damage == "missing":
        shutil.rmtree(file.parent)
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    run = VggRun(tmp_path / "run")
    with pytest.raises(SnapshotDamaged, match=f"inherited from {parent}"):
        run.start_state()
    assert any(str(parent) in text for text in run.conditions())
    assert run.state_before(3)["counters/step"] == 3


def test_a_bundle_of_an_inheriting_run_starts_from_the_same_state(data, parent, tmp_path):
    config = child_config(data, parent, lr=1e9, warmup_steps=0, steps=10)
    with pytest.raises(StoppedByGuard):
        trainer.train(config, tmp_path / "run")
    run = VggRun(tmp_path / "run")
    write_bundle(tmp_path / "b.zip", tmp_path / "run", run.incident_step(), [str(data)])
    open_bundle(tmp_path / "b.zip", tmp_path / "elsewhere")
    unpacked = VggRun(tmp_path / "elsewhere")
    assert hash_arrays(unpacked.start_state()) == hash_arrays(run.start_state())
    drawn = initial_parameters(run.network, "normal:0.02", 0)["fc1/kernel"]
    assert not np.array_equal(unpacked.start_state()["params/fc1/kernel"], drawn)


def test_a_step_zero_without_its_inheritance_is_refused(data, parent):
    from vggrepro.step_state import initial_state

    network = build_network("D", width=0.05, image_size=32, classes=3)
    with pytest.raises(ValueError, match="are needed"):
        initial_state(child_config(data, parent), network)
    assert initial_state(replaced(child_config(data, parent), init_from=""), network)
