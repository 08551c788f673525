"""`vggrepro diagnose-nan` as a user meets it: files, screens, exit codes, errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal

import numpy as np
import pytest
from recorded_toy import as_trained, exploding_toy
from small_runs import tiny_config, tiny_data

from diagnostics.diagnosis import CAUSE_KINDS, VERDICTS
from diagnostics.errors import StoppedByGuard
from diagnostics.incident import write_incident
from diagnostics.protocol import Telemetry
from vggrepro import trainer
from vggrepro.cli import main
from vggrepro.commands import diagnose_nan
from vggrepro.replay_adapter import VggRun
from vggrepro.replay_progress import ReplayProgress
from vggrepro.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("shared_training")

# Seconds: a busy machine must not cut a replay.
AMPLE = ("--budget-seconds", "100000")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def failed_run(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "failed"
    with pytest.raises(StoppedByGuard):
        trainer.train(tiny_config(data, lr=0.3, warmup_steps=0, steps=20, eval_every=0), path)
    return path


@pytest.fixture(scope="module")
def healthy_run(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "healthy"
    trainer.train(tiny_config(data, steps=4, eval_every=0), path)
    return path


@pytest.fixture
def copy(tmp_path):
    """Copies a run, so that a test may do it harm."""

    def make(run):
        shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("diagnosis"))
        return tmp_path / "copy"

    return make


@pytest.fixture(scope="module")
def trained_toy():
    return exploding_toy()


@pytest.fixture
def toy(trained_toy, tmp_path, monkeypatch):
    """The toy run behind the command: (run, directory)."""
    directory = tmp_path / "toy"
    directory.mkdir()
    (directory / "config.json").write_text('{"kind": "toy"}')
    (directory / "manifest.json").write_text('{"status": "stopped_by_guard"}')
    run = as_trained(trained_toy)
    run.kinds = ("clip_norm",)
    monkeypatch.setattr(diagnose_nan, "open_run", lambda place, imports: run)
    return run, directory


@pytest.fixture
def without_dump(monkeypatch):
    """Spares a test the time of a Debugger V2 dump."""
    monkeypatch.setattr("diagnostics.examine.dump", lambda *_: "not made")


def diagnosed(*arguments):
    return main(["diagnose-nan", *map(str, arguments)])


def one_json_object(text):
    """Standard output as strict JSON: one object, nothing else."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    value, end = json.JSONDecoder(parse_constant=refuse).raw_decode(text)
    assert isinstance(value, dict) and text[end:] == "\n"
    return value


def hashes(directory):
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.rglob("*")
        if file.is_file() and file.relative_to(directory).parts[0] != "diagnosis"
    }


def one_line(captured):
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@contextlib.contextmanager
def standard_output(file):
    """Everything that this process writes on standard output, C++ included, goes to a file."""
    kept = os.dup(1)
    with file.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        try:
            with contextlib.redirect_stdout(stream):
                yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@pytest.fixture(scope="module")
def whole(failed_run, tmp_path_factory):
    """The full diagnosis: (exit code, standard output, files before, after)."""
    before = hashes(failed_run)
    out = tmp_path_factory.mktemp("out") / "stdout"
    with standard_output(out):
        code = diagnosed(failed_run, "--json", *AMPLE)
    return code, one_json_object(out.read_text()), before, hashes(failed_run)


@pytest.fixture(scope="module")
def packed(failed_run, tmp_path_factory):
    """A bundle, and what the command printed that packed it."""
    directory = tmp_path_factory.mktemp("packed")
    arguments = ("--json", "--budget-seconds", "0", "--bundle", directory / "step.zip")
    with standard_output(directory / "stdout"):
        assert diagnosed(failed_run, *arguments) == 0
    return directory / "step.zip", one_json_object((directory / "stdout").read_text())


def test_the_whole_diagnosis_of_a_vgg_run(whole, failed_run):
    code, value, before, after = whole
    assert code == 0
    assert value["run_dir"] == str(failed_run) and value["verdict"] == "reproduced"
    assert value["cause"]["kind"] == "learning_rate"
    kinds = [one["kind"] for one in value["counterfactuals"]]
    assert kinds[0] == "none" and not value["counterfactuals"][0]["survived"]
    tried = {"init", "init_scale", "learning_rate", "warmup", "clip_norm", "precision"}
    assert tried | {"input_scale"} <= set(kinds)
    # Nothing but diagnosis/ is written.
    assert before == after


def test_the_recommended_command_is_the_replay_that_survived(whole, tmp_path, capsys):
    """Typed by the user, it gives the losses that were replayed, and trains to its end."""
    _, value, _, _ = whole
    advice = value["recommendation"]
    assert advice["verified"] is True
    replay = next(
        one
        for one in value["counterfactuals"]
        if advice["sentence"].startswith(f"{one['change']}:")
    )
    assert replay["survived"] and replay["first_step"] == 0
    assert replay["steps"] > value["step"] + 1
    program, *words = shlex.split(advice["command"])
    assert program == "vggrepro"
    words += ["--steps", str(replay["steps"]), "--run-dir", str(tmp_path / "mended")]
    assert main(words) == 0
    capsys.readouterr()
    with RunDirectory.open(tmp_path / "mended") as mended:
        losses = [one["loss"] for one in mended.metrics() if "loss" in one]
    assert losses[-1] == replay["loss"]


def test_the_largest_surviving_rate_is_between_a_survivor_and_a_casualty(whole):
    rates = [one for one in whole[1]["counterfactuals"] if one["kind"] == "learning_rate"]
    alive = max(one["value"] for one in rates if one["survived"])
    dead = min([one["value"] for one in rates if not one["survived"]] + [0.3])
    assert alive < dead <= 1.5 * alive


def test_the_reports_hold_what_was_printed(packed, failed_run):
    _, value = packed
    assert value["schema"] == 1 and value["run_dir"] == str(failed_run)
    assert value["verdict"] in VERDICTS and value["cause"]["kind"] in CAUSE_KINDS
    assert value["counterfactuals"] == [] and value["recommendation"] is None
    reports = failed_run / "diagnosis" / f"step-{value['step']:08d}"
    assert json.loads((reports / "diagnosis.json").read_text()) == value
    assert (reports / "report.html").read_text().startswith("<!doctype html>")
    assert list((reports / "tensorboard").iterdir())


def test_the_screen_says_where_the_reports_are(toy, capsys, monkeypatch):
    run, directory = toy
    monkeypatch.setenv("COLUMNS", "200")
    assert diagnosed(directory, "--budget-seconds", "0") == 0
    screen = capsys.readouterr().out
    reports = directory / "diagnosis" / f"step-{run.stopped_at:08d}"
    assert str(directory) in screen and "the step failed again with the same bits" in screen
    assert f"report: {reports / 'report.html'}\n" in screen
    assert f"the step, op by op: tensorboard --logdir {reports / 'tensorboard'}\n" in screen
    assert (reports / "report.html").is_file() and (reports / "tensorboard").is_dir()


def test_a_fix_that_no_option_makes_is_told_without_a_command(toy, capsys, monkeypatch):
    run, directory = toy
    run.kinds = ("learning_rate",)
    monkeypatch.setattr(run, "command", lambda change: "")
    assert diagnosed(directory, *AMPLE) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "It survives learning rate" in screen and "no option of the program" in screen
    assert "verified" not in screen


def test_two_diagnoses_print_the_same_but_for_the_seconds(toy, capsys, without_dump):
    values = []
    for _ in range(2):
        assert diagnosed(toy[1], "--json", *AMPLE) == 0
        values.append(one_json_object(capsys.readouterr().out))
    assert values[0].pop("seconds").keys() == values[1].pop("seconds").keys()
    assert values[0] == values[1]
    assert values[0]["counterfactuals"]


# ---------------------------------------------------------------- one step


def test_a_healthy_step_layer_by_layer(failed_run, capsys):
    assert diagnosed(failed_run, "--step", 1, "--json") == 0
    value = one_json_object(capsys.readouterr().out)
    assert (value["step"], value["healthy"], value["identical"]) == (1, True, True)
    assert value["telemetry"]["loss"] > 0
    layers = {row["layer"] for row in value["layers"] if row["phase"] == "forward"}
    assert {"block1_conv1", "predictions"} <= layers
    assert {row["phase"] for row in value["layers"]} >= {"forward", "loss", "backward", "update"}
    assert all(row["absmax"] >= 0 for row in value["layers"])


def test_a_healthy_step_on_the_screen(toy, capsys):
    run, directory = toy
    assert diagnosed(directory, "--step", 1) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "step 1 is healthy; replayed bit for bit as recorded" in screen
    assert "forward dense1" in screen.replace("│", "").replace("  ", " ")
    rows = run.telemetry().rows.copy()
    rows[1, 0] *= 2
    run.recorded = Telemetry(run.telemetry().steps, run.telemetry().columns, rows)
    assert diagnosed(directory, "--step", 1) == 0
    assert "not replayed as recorded: loss: " in " ".join(capsys.readouterr().out.split())


def test_a_healthy_step_of_a_run_without_telemetry_claims_no_identity(toy, capsys):
    run, directory = toy
    telemetry = run.telemetry()
    run.recorded = Telemetry(telemetry.steps[4:], telemetry.columns, telemetry.rows[4:])
    assert diagnosed(directory, "--step", 1, "--json") == 0
    value = one_json_object(capsys.readouterr().out)
    assert value["recorded"] is False and value["identical"] is False
    assert diagnosed(directory, "--step", 1) == 0
    assert "were not recorded" in capsys.readouterr().out


def test_the_failing_step_by_its_number(toy, capsys, without_dump):
    run, directory = toy
    arguments = ("--step", run.stopped_at, "--budget-seconds", "0", "--json")
    assert diagnosed(directory, *arguments) == 0
    assert one_json_object(capsys.readouterr().out)["step"] == run.stopped_at
    # Without its incident the run is rewound to it.
    run.stopped, run.states_gone = None, [run.stopped_at]
    assert diagnosed(directory, *arguments) == 0
    assert one_json_object(capsys.readouterr().out)["verdict"] == "reproduced"


@pytest.mark.parametrize("step", ["-1", "99"])
def test_a_step_that_there_is_not(failed_run, capsys, step):
    assert diagnosed(failed_run, "--step", step) == 2
    line = one_line(capsys.readouterr())
    assert f"step {step} is none of {failed_run}. Its steps are 0 to " in line


# ---------------------------------------------------------------- verdicts and exit codes


def test_a_failure_that_does_not_recur_exits_5(copy, healthy_run, capsys, without_dump):
    """An incident that the step does not deserve, as a bit flipped in memory leaves it."""
    directory = copy(healthy_run)
    run = VggRun(healthy_run)
    record = {
        "step": 2,
        "failed_checks": [{"stage": "loss", "layer": "", "quantity": "loss"}],
        "example_names": ["one"] * 8,
    }
    write_incident(
        directory / "incidents" / "step-00000002",
        state=run.state_before(2),
        batch=run.batch(2),
        record=record,
    )
    assert diagnosed(directory, "--json") == 5
    value = one_json_object(capsys.readouterr().out)
    assert (value["verdict"], value["cause"]["kind"]) == ("not_reproduced", "hardware")
    assert value["first_nonfinite"] is None and value["recommendation"] is None
    reports = directory / "diagnosis" / "step-00000002"
    assert sorted(file.name for file in reports.iterdir()) == ["diagnosis.json", "report.html"]


def test_one_altered_bit_of_the_recording_is_told(toy, capsys, without_dump):
    run, directory = toy
    telemetry = run.telemetry()
    rows = telemetry.rows.copy()
    rows[-1, 1] = np.nextafter(rows[-1, 1], np.float32(np.inf))
    run.recorded = Telemetry(telemetry.steps, telemetry.columns, rows)
    assert diagnosed(directory, "--json", "--budget-seconds", "0") == 0
    value = one_json_object(capsys.readouterr().out)
    assert value["verdict"] == "replay_differs"
    assert any(note.startswith(f"{telemetry.columns[1]}: ") for note in value["notes"])


@pytest.mark.parametrize(
    "status, words",
    [
        ("finished", "Use --step N to look at one step"),
        ("interrupted", "It was interrupted, and can be resumed: vggrepro train --resume "),
        ("failed", "It ended with an error, but not one of numbers"),
        ("running", "It is marked as running"),
        ("stopped_by_guard", "what it left in incidents/ is gone"),
    ],
)
def test_a_run_that_left_no_incident_exits_4_and_says_how_it_ended(
    copy, healthy_run, capsys, status, words
):
    directory = copy(healthy_run)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "status": status}))
    assert diagnosed(directory) == 4
    line = one_line(capsys.readouterr())
    assert f"{directory} left no incident, and its recorded steps are healthy" in line
    assert words in line
    assert not (directory / "diagnosis").exists()


def test_a_lost_incident_is_rewound_from_the_checkpoint(copy, failed_run, capsys, without_dump):
    directory = copy(failed_run)
    shutil.rmtree(directory / "incidents")
    assert diagnosed(directory, "--json", "--budget-seconds", "0") == 0
    value = one_json_object(capsys.readouterr().out)
    assert value["verdict"] == "reproduced"
    assert value["step"] == json.loads((failed_run / "manifest.json").read_text())["steps"]


# ---------------------------------------------------------------- bundles


def test_a_bundle_is_diagnosed_elsewhere_without_the_data(
    packed, data, tmp_path, capsys, monkeypatch, without_dump
):
    assert str(data).encode() not in packed[0].read_bytes()
    other = tmp_path / "other machine"
    other.mkdir()
    shutil.copy(packed[0], other)
    monkeypatch.chdir(other)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert diagnosed("step.zip", "--json", "--budget-seconds", "0") == 0
    value = one_json_object(capsys.readouterr().out)
    assert value["run_dir"] == "step.zip" and str(scratch) not in json.dumps(value)
    assert value["verdict"] == "reproduced"
    assert value["first_nonfinite"] == packed[1]["first_nonfinite"]
    assert any("the data cannot be used" in note for note in value["notes"])
    reports = other / "step-diagnosis" / f"step-{value['step']:08d}"
    assert (reports / "report.html").is_file()
    assert str(scratch) not in (reports / "report.html").read_text()
    assert list(scratch.iterdir()) == []
    # Another step than the packed one needs the data.
    assert diagnosed("step.zip", "--step", "1") == 2
    assert "the batch of step 0 cannot be rebuilt" in one_line(capsys.readouterr())


@pytest.mark.parametrize("how", ["cut", "flipped", "text", "empty"])
def test_a_damaged_bundle_is_named(failed_run, tmp_path, capsys, how):
    from diagnostics.bundle import write_bundle

    file = tmp_path / "step.zip"
    step = VggRun(failed_run).incident_step()
    write_bundle(file, failed_run, step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-200], "flipped": content, "text": b"hello", "empty": b""}
    file.write_bytes(damaged[how])
    assert diagnosed(file) == 2
    assert str(file) in one_line(capsys.readouterr())
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.zip"]


def test_a_bundle_needs_an_incident(healthy_run, failed_run, tmp_path, capsys):
    bundle = tmp_path / "b.zip"
    assert diagnosed(healthy_run, "--bundle", bundle) == 2
    assert f"--bundle packs an incident, and {healthy_run} left none" in one_line(
        capsys.readouterr()
    )
    assert diagnosed(failed_run, "--step", "1", "--bundle", bundle) == 2
    assert "--bundle packs the incident of step" in one_line(capsys.readouterr())
    assert not bundle.exists()


# ---------------------------------------------------------------- bad input


def test_not_a_run_directory(tmp_path, capsys):
    assert diagnosed(tmp_path / "nowhere") == 2
    assert "nowhere is not a run directory: no such directory" in one_line(capsys.readouterr())
    assert diagnosed(tmp_path) == 2
    line = one_line(capsys.readouterr())
    assert "is not a run directory: it has no config.json" in line
    assert "Give the directory that `vggrepro train` named at its end" in line


@pytest.mark.parametrize("budget", ["-1", "nan"])
def test_a_budget_that_is_none(tmp_path, capsys, budget):
    assert diagnosed(tmp_path, f"--budget-seconds={budget}") == 2
    assert "--budget-seconds must be 0 or more" in one_line(capsys.readouterr())


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", '{"kind": "torch"}', "was written by 'torch'"),
        ("config.json", '{"arch": "A", "zoom": 2}', "unknown field 'zoom'"),
        ("manifest.json", "", "manifest.json is not JSON"),
        ("incidents/step-{}/incident.json", "{}", "incident damaged: "),
        ("incidents/step-{}/state/state.safetensors", "x", "snapshot damaged: "),
        ("incidents/step-{}/batch/manifest.json", "{}", "snapshot damaged: "),
        ("telemetry/steps.bin", "x", "telemetry"),
    ],
)
def test_damaged_files_are_one_line(copy, failed_run, capsys, file, content, words):
    directory = copy(failed_run)
    step = f"{VggRun(failed_run).incident_step():08d}"
    target = directory / file.format(step)
    if file.startswith("telemetry"):
        target = next((directory / "telemetry").iterdir())
    assert target.is_file()
    target.write_text(content)
    assert diagnosed(directory, "--json") == 2
    line = one_line(capsys.readouterr())
    assert words in line and target.name in line or "written by" in line or "field" in line


# ---------------------------------------------------------------- interruptions and disks


@pytest.fixture
def ctrl_c():
    """Interrupts this process, also where its parent had asked for SIGINT to be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_130_without_a_traceback(toy, capsys, monkeypatch, ctrl_c):
    monkeypatch.setattr("diagnostics.diagnose.locate", ctrl_c)
    assert diagnosed(toy[1], "--json") == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "interrupted\n")
    assert not (toy[1] / "diagnosis").exists()


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "screen"])
def test_reports_that_cannot_be_written_lose_no_diagnosis(toy, capsys, as_json, without_dump):
    _, directory = toy
    (directory / "diagnosis").write_text("in the way")
    arguments = ["--budget-seconds", "0"] + (["--json"] if as_json else [])
    assert diagnosed(directory, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot write ") and captured.err.count("\n") == 1
    if as_json:
        assert one_json_object(captured.out)["verdict"] == "reproduced"
    else:
        assert "learning rate" in captured.out and "report: " not in captured.out


def test_a_full_disk_is_named_and_leaves_no_halves(toy, capsys, monkeypatch, without_dump):
    def full(path):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("diagnostics.durable_files.sync", full)
    assert diagnosed(toy[1], "--json", "--budget-seconds", "0") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "diagnosis.json" in error
    assert [file for file in (toy[1] / "diagnosis").rglob("*") if file.is_file()] == []


def test_a_dump_that_cannot_be_made_is_said(toy, capsys, monkeypatch):
    monkeypatch.setattr("diagnostics.examine.dump", lambda *_: "the label is out of range")
    assert diagnosed(toy[1], "--json", "--budget-seconds", "0") == 0
    captured = capsys.readouterr()
    one_json_object(captured.out)
    assert "no Debugger V2 dump: the label is out of range" in captured.err


def test_progress_is_plain_lines_on_standard_error_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("vggrepro.replay_progress._QUIET_SECONDS", -1.0)
    with ReplayProgress(quiet=False) as progress:
        progress("replaying: [/b] without example 3", 2, 12)
        progress("location", 0, 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "replaying: [/b] without example 3 2/12\nlocation\n"
    with ReplayProgress(quiet=True) as progress:
        progress("location", 0, 0)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_takes_labels_literally(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ReplayProgress(quiet=False) as progress:
        progress("replaying: [/b]", 1, 2)
        progress._bar.refresh()
