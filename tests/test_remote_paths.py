"""Runs and files at gfile paths: a local copy does the work and sends back what changed."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import tensorflow as tf
from small_runs import replaced, run_outcome, tiny_config, tiny_data

from diagnostics.errors import InputError
from vggrepro import remote_paths, trainer
from vggrepro.cli import build_parser, main
from vggrepro.inheritance import read_source
from vggrepro.remote_paths import RemotePath, local_copy, path_or_url, shown

URL = "gs://bucket/dir/run"


def url(path: Path) -> str:
    return f"file://{path}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Something like a run directory."""
    for name in ("manifest.json", "checkpoints/step-1/manifest.json", "checkpoints/step-1/state"):
        file = tmp_path / "there" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "there"


def files_in(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file.read_text()
        for file in directory.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--run-dir", URL],
        ["train", "--resume", URL],
        ["evaluate", URL],
        ["evaluate", "--weights", URL],
        ["compare", URL],
        ["verify", URL],
        ["diagnose-nan", URL],
        ["diagnose-nan", "run", "--bundle", URL],
        ["data", "make", URL],
    ],
)
def test_every_command_takes_a_url(command: list[str]) -> None:
    values = vars(build_parser().parse_args(command)).values()
    found = [part for value in values for part in (value if isinstance(value, list) else [value])]
    assert RemotePath(URL) in [part for part in found if isinstance(part, RemotePath)]


def test_local_paths_stay_as_they_are() -> None:
    assert path_or_url("runs/a") == Path("runs/a") and shown(Path("runs/a")) == "runs/a"


def test_changes_are_sent_and_nothing_else(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    copy = tf.io.gfile.copy
    with local_copy(url(run)) as local:
        assert files_in(local) == files_in(run)
        assert shown(f"see {local}/x") == f"see {url(run)}/x"
        (local / "manifest.json").write_text("new")
        (local / "checkpoints/step-1/state").unlink()
        for name in ("checkpoints/step-2/manifest.json", "checkpoints/step-2/state"):
            (local / name).parent.mkdir(exist_ok=True)
            (local / name).write_text(name)
        (local / ".lock").write_text("mine")
        (local / ".tmp-half").mkdir()
        (local / ".tmp-half/file").write_text("not yet")

        def watched(source: str, target: str, overwrite: bool = False) -> None:
            sent.append(target.removeprefix(f"{url(run)}/"))
            copy(source, target, overwrite)

        monkeypatch.setattr(tf.io.gfile, "copy", watched)
        expected = {**files_in(local)}
    for name in (".lock", ".tmp-half/file"):
        del expected[name]
    assert files_in(run) == expected and not local.exists()
    # A snapshot is one when its manifest is there, so that comes after the rest.
    assert sent == ["checkpoints/step-2/state", "checkpoints/step-2/manifest.json", "manifest.json"]


def test_what_changes_is_sent_while_the_work_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_paths, "_SECONDS", 0.01)
    with local_copy(url(run)) as local:
        (local / "metrics.jsonl").write_text("{}\n")
        deadline = time.monotonic() + 20
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (run / "metrics.jsonl").exists()


def test_work_that_cannot_be_sent_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(InputError, match="cannot write file://.*All of it is kept in ") as caught,
        local_copy(url(tmp_path / "file" / "run")) as local,
    ):
        local.mkdir()
        (local / "weights").write_text("dear")
    kept = re.search(r"kept in (\S+):", str(caught.value)).group(1)
    assert (Path(kept) / "weights").read_text() == "dear"


def test_a_scheme_without_its_file_system_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", "nosuch://bucket/run"]) == 2
    error = capsys.readouterr().err
    assert "cannot read nosuch://bucket/run" in error and "gcs-filesystem" in error
    assert error.count("\n") == 1


def test_a_run_at_a_url_is_that_of_a_local_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tiny_config(tiny_data(tmp_path), classes=0)
    trainer.train(config, tmp_path / "local")
    there = url(tmp_path / "remote")
    with local_copy(there) as local:
        trainer.train(replaced(config, steps=4), local)
    assert main(["train", "--resume", there, "--steps", str(config.steps)]) == 0
    remote, local = (run_outcome(tmp_path / name) for name in ("remote", "local"))
    for part in ("weights", "state", "telemetry"):
        assert remote[part] == local[part]
    text = capsys.readouterr().out
    assert f"vggrepro train --resume {there}" in text and "vggrepro-remote" not in text
    assert main(["train", "--run-dir", there]) == 2
    assert f"{there} exists and is not empty" in " ".join(capsys.readouterr().err.split())
    source = read_source(there, lambda text: None)
    assert source.place == there and source.step == config.steps
