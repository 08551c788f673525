"""The initialisation study: which cells, what it makes of them, and that it goes on."""

from __future__ import annotations

import json
import sys
import xml.dom.minidom
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import initialisation_study as study
import study_report

ENVIRONMENT = {"hardware": {"cpu": "abacus", "cores": 2}, "packages": {"keras": "3", "rich": "1"}}


def record(arch, method, kind):
    outcome = {
        "NaN": "NaN at step 1",
        "stalled": "stalled: loss 2.303 after 100 steps",
        "trains": "trains: loss 1.20 after 100 steps",
    }[kind]
    losses = [[0, 3e8], [1, "NaN"]] if kind == "NaN" else [[step, 2.3] for step in range(100)]
    diagnosis = {"cause": None, "said": ""}
    if kind != "trains":
        diagnosis = {
            "cause": "init",
            "confidence": 0.98,
            "place": None,
            "onset": None,
            "evidence": ["The signal vanishes"],
            "recommendation": "vggrepro train --init glorot-uniform --data /private/place",
        }
    return {
        "arch": arch,
        "method": method,
        "outcome": outcome,
        "kind": kind,
        "steps": len(losses),
        "last_loss": 1.2,
        "losses": losses,
        "diagnosis": diagnosis,
        "precision": "float32",
        "training_seconds": 60.0,
    }


def test_the_cells_are_depth_by_initialiser_by_inheritance():
    cells = study.cells()
    assert len({cell.name for cell in cells}) == len(cells) == 24
    assert {cell.method for cell in cells} == set(study_report.METHODS)
    for method in study_report.METHODS:
        archs = {cell.arch for cell in cells if cell.method == method}
        assert archs == set(study.ARCHS) - ({"A"} if "from A" in method else set())
    assert cells[0] == study.SOURCE  # what the inheriting cells need


def test_inheriting_cells_start_from_the_study_s_own_a(tmp_path):
    for cell in study.cells():
        config = cell.config(tmp_path, tmp_path, "float32")
        source = str(tmp_path / "runs" / "A-sigma-0.01") if "from A" in cell.method else ""
        assert config.init_from == source
    sigmas = {c.init for c in study.cells() if c.method.startswith("sigma 0.1")}
    assert sigmas == {"normal:0.225"}


def test_the_table_shows_every_outcome_and_how_much_is_missing():
    records = [
        record("A", "sigma 0.1", "NaN"),
        record("D", "sigma 0.01", "stalled"),
        record("D", "Glorot", "trains"),
    ]
    text = study_report.table(records, study.ARCHS, 21, ENVIRONMENT)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "**NaN at step 1**" in rows["sigma 0.1"]
    assert "stalled, 1.20 after 100" in rows["sigma 0.01"]
    assert "trains, 1.20 after 100" in rows["Glorot"]
    assert "21 cells have not been run yet" in text
    assert "cause init, 98 % sure; The signal vanishes" in text
    assert "--init glorot-uniform`" in text and "/private/place" not in text
    assert "have not been run" not in study_report.table(records, study.ARCHS, 0, ENVIRONMENT)


def test_the_picture_has_a_panel_for_every_cell():
    records = [record("A", "sigma 0.1", "NaN"), record("E", "sigma 0.1, pixels/58", "trains")]
    picture = study_report.figure(records, study.ARCHS)
    document = xml.dom.minidom.parseString(picture)
    assert len(document.getElementsByTagName("polyline")) == 2
    assert (
        "first loss 3e+08" in picture
        and "inf" not in picture
        and "nan" not in picture.lower().replace("nan at step", "")
    )


@pytest.mark.parametrize(("losses", "trained"), [([2.3, 1.0], 2000), ([2.3] * 3, 3000)])
def test_a_run_that_clearly_learns_is_ended_early(tmp_path, monkeypatch, losses, trained):
    asked, ahead = [], iter(losses)
    monkeypatch.setattr(study, "_go_on", lambda config, run_dir: asked.append(config.steps))
    monkeypatch.setattr(study, "_last_loss", lambda run_dir: next(ahead))
    monkeypatch.setattr(study, "_record", lambda *arguments: {})
    study.run_cell(study.SOURCE, tmp_path, tmp_path, "float32", 0.0)
    assert asked[-1] == trained


def test_an_interrupted_cell_is_not_kept(tmp_path, monkeypatch):
    interrupted = SimpleNamespace(status="interrupted")
    monkeypatch.setattr(study.trainer, "train", lambda *arguments, **options: interrupted)
    monkeypatch.setattr(study, "ensure_synthetic", lambda directory: directory)
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        study.main()
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
def test_a_cell_is_run_diagnosed_and_not_run_again(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--only", "A-sigma-0.1-", "--budget", "0"]
    monkeypatch.setattr(sys, "argv", ["study", *arguments])
    study.main()
    assert "NaN at step 1" in capsys.readouterr().out
    (file,) = (tmp_path / "cells").glob("*.json")
    kept = json.loads(file.read_text())
    assert (kept["kind"], kept["diagnosis"]["cause"]) == ("NaN", "init")
    study.main()
    assert capsys.readouterr().out == ""
    assert "23 cells have not been run yet" in (tmp_path / "initialisation.md").read_text()
