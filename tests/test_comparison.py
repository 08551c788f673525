"""Beside the paper's cell stands only what answers the same question."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggrepro import paper
from vggrepro.cli import main
from vggrepro.comparison import compare
from vggrepro.comparison_text import markdown, terminal_lines
from vggrepro.evaluation_record import save_record
from vggrepro.interval import wilson
from vggrepro.recipes import recipe, recipe_entries


def net(arch="D", stage="jitter", **changes):
    """A net as the paper trained it, out of its recipe."""
    config = recipe(f"paper-{arch}-{stage}").config()
    source = arch if stage != "256" else None if arch in ("A", "A-LRN") else "A"
    start = f"/runs/{source}" if source else ""
    values = {**config.to_dict(), "init_from": start}
    described = {
        "run_dir": f"/runs/{arch}-{stage}",
        "weights_file": None,
        "step": 370_000,
        "status": "finished",
        "config": values,
        "config_origins": recipe_entries(config, f"paper-{arch}-{stage}", paper.TRAINING_IMAGES)[
            "config_origins"
        ],
        "inheritance": source,
        "training_images": paper.TRAINING_IMAGES,
        "arch": arch,
        "image_size": 224,
        "classes": 1000,
        "parameters": paper.NETS[arch].parameters,
        "scale_min": config.scale_min,
        "scale_max": config.scale_max,
        "weights_sha256": f"{arch}{stage}",
        "scales": [],
    }
    return {**described, **changes}


def record(nets=None, scales=(256, 384, 512), protocol="dense", **changes):
    nets = [dict(one, scales=one["scales"] or list(scales)) for one in nets or [net()]]
    made = {
        "schema": 1,
        "protocol": protocol,
        "scales": list(scales),
        "images": 50_000,
        "split": "val",
        "pool_rounding": "down",
        "classes": 1000,
        "top1_error": 25.0,
        "top5_error": 7.6,
        "loss": 1.0,
        "nets": nets,
    }
    return {**made, **changes}


@pytest.mark.parametrize("cell", paper.RESULTS, ids=lambda c: f"table{c.table}-{c.top1_error}")
def test_every_cell_of_the_paper_is_found_by_its_question(cell):
    stages = {paper.FIXED_256: "256", paper.FIXED_384: "384", paper.JITTERED: "jitter"}
    nets = [net(one.arch, stages[one.scale_min, one.scale_max]) for one in cell.nets]
    if not cell.test_scales:
        for one, trained in zip(nets, cell.nets, strict=True):
            one["scales"] = list(paper.own_test_scales(trained.scale_min, trained.scale_max))
    asked = record(nets[::-1], cell.test_scales[::-1], cell.protocol)
    found = compare(asked)
    assert found.refusals == ()
    assert cell in found.cells
    assert {(one.top1_error, one.top5_error) for one in found.cells} == {
        (cell.top1_error, cell.top5_error)
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "train"}, "these are training images"),
        ({"images": 49_999}, "49,999 images, the paper's errors are on all 50,000"),
        ({"classes": 999}, "999 classes, the paper's have 1,000"),
        ({"nets": [net(parameters=1_000)]}, "of 1,000 parameters and 224 pixels, the paper's has"),
        ({"nets": [net(image_size=192)]}, "and 192 pixels, the paper's has 138,357,544 and 224"),
        ({"protocol": "center"}, "no figure for one centre crop"),
        ({"scales": (256,)}, r"the paper has no cell for D, S=\[256;512\], dense, Q=256"),
        ({"nets": [net("B", "256")]}, "the paper has no cell for B, S=256"),
        ({"nets": [net(), net()]}, "the paper has no cell for D"),
        ({"nets": [net(scale_min=None, scale_max=None)]}, "does not say at which scale S"),
    ],
    ids=str,
)
def test_anything_else_is_refused_and_says_why(changes, reason):
    found = compare(record(**changes))
    assert found.cells == ()
    assert any(re.search(reason, text) for text in found.refusals)
    shown = "\n".join(terminal_lines([found])) + markdown([found])
    assert "not beside the paper: " in shown
    for figure in ("24.8", "7.5", "24.6", "28.7"):
        assert f"paper {figure}" not in shown and f"| {figure} |" not in shown
    assert found.to_dict()["paper"] is None and found.to_dict()["refused"]


def test_the_error_the_cell_and_the_interval_stand_together():
    shown = "\n".join(terminal_lines([compare(record())]))
    assert "D, S=[256;512], dense, Q=256,384,512: 50,000 images of val, 1,000 classes" in shown
    assert "top-1 error  ours 25.00 (24.62 to 25.38)  paper 24.8  difference +0.20" in shown
    assert "top-5 error  ours 7.60 (7.37 to 7.84)  paper 7.5  difference +0.10" in shown
    assert "paper: Tables 4 and 5" in shown
    assert "outside the interval" not in shown
    assert "steered the learning-rate schedule" in shown
    worse = "\n".join(terminal_lines([compare(record(top1_error=26.0))]))
    assert "difference +1.20, outside the interval" in worse


def test_the_paper_s_figure_on_the_test_set_is_shown_where_it_has_one():
    shown = "\n".join(terminal_lines([compare(record([net("D"), net("E")], protocol="both"))]))
    assert "paper: Table 6; top-5 error on the challenge's test set 6.8" in shown
    assert "test set" not in "\n".join(terminal_lines([compare(record())]))


def test_calibration_goes_with_the_net_on_the_paper_s_images_only():
    found = compare(record(protocol="center", scales=(256,)))
    assert {one.arch for one in found.calibration} == {"D"} and len(found.calibration) == 2
    shown = "\n".join(terminal_lines([found]))
    assert "torchvision's weights, one centre crop: net D top-1 28.41" in shown
    assert "the authors' released weights, one centre crop: net D top-1 28.5 to 28.7" in shown
    assert "about 3.7 points" in shown
    assert compare(record(images=9)).calibration == ()


def test_the_calibration_is_the_complement_of_the_accuracies():
    accuracies = {"A": 69.02, "B": 69.93, "D": 71.59, "E": 72.38}
    for one in paper.CALIBRATION:
        if "torchvision" in one.what:
            assert one.top1_error == pytest.approx((100 - accuracies[one.arch],) * 2)


def test_what_differs_from_the_paper_is_told():
    other = net("D", "256", step=1000, status="interrupted", training_images=150_000)
    other["config"] = {**other["config"], "lr": 0.02, "precision": "bfloat16"}
    other["config_origins"] = {
        **other["config_origins"], "lr": "deviation", "precision": "deviation"
    }  # fmt: skip
    other["inheritance"] = None
    told = "\n".join(compare(record([other], (256,))).differences)
    for text in (
        "lr 0.02, the paper: 0.01, 0.001",
        "precision bfloat16, the paper: float32",
        "after 1,000 steps (interrupted), the paper: 370,000",
        "150,000 training images, the paper: 1,281,167",
        "from random weights, the paper: from a trained A",
        "init normal:0.01",
    ):
        assert text in told
    as_paper = compare(record([net("D", "256")], (256,))).differences
    assert len(as_paper) == 1 and as_paper[0].startswith("where the paper is silent")


@pytest.mark.parametrize(
    ("arch", "stage", "changes", "told"),
    [
        ("D", "jitter", {"inheritance": "A"}, "from a trained A, the paper: from a trained D"),
        ("C", "384", {"inheritance": None}, "from random weights, the paper: from a trained C"),
        ("A", "256", {"inheritance": "A-LRN"}, "a trained A-LRN, the paper: from random weights"),
        ("E", "384", {"lr": 0.01}, "lr 0.01, the paper at this S: 0.001"),
        ("B", "256", {"lr": 0.001}, "lr 0.001, the paper at this S: 0.01"),
        ("D", "256", {"training_resized": {"shorter_side": 128}}, "training images stored at"),
    ],
)
def test_what_the_paper_has_by_stage_is_compared_by_stage(arch, stage, changes, told):
    one = net(arch, stage)
    one |= {name: value for name, value in changes.items() if name != "lr"}
    one["config"] |= {name: value for name, value in changes.items() if name == "lr"}
    differences = compare(record([one], (256,))).differences
    assert [told in text for text in differences].count(True) == 1
    assert not any(told in text for text in compare(record([net(arch, stage)])).differences)


def test_evaluated_images_that_were_stored_smaller_are_named():
    found = compare(record(stored_resize={"shorter_side": 300}))
    assert "evaluated images stored at shorter side 300, the paper: as they came" in (
        found.differences
    )


def test_pools_that_round_up_are_named():
    found = compare(record(pool_rounding="up"))
    assert found.cells and found.title.endswith("Q=256,384,512, pools rounding up")


def test_equal_differences_are_told_once():
    shown = "\n".join(terminal_lines([compare(record()), compare(record(protocol="both"))]))
    assert shown.count("where the paper is silent") == 1
    assert "differs: as D, S=[256;512], dense, Q=256,384,512" in shown


def test_markdown_is_a_table_with_numbered_notes():
    text = markdown([compare(record()), compare(record(images=9))])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(row.count("|") == 7 for row in rows)
    assert "| 24.8 |" in rows[2] and "| – |" in rows[3]
    assert "[2] not beside the paper: 9 images" in text


def test_the_command_reads_runs_and_files(tmp_path, capsys):
    save_record(record(), tmp_path / "run")
    save_record(record(protocol="center", scales=(256,)), tmp_path / "run")
    (tmp_path / "file.json").write_text(json.dumps(record(images=9)))
    assert main(["compare", str(tmp_path / "run"), str(tmp_path / "file.json"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["comparisons"]
    assert [one["paper"] and one["paper"]["tables"] for one in made] == [None, [4, 5], None]
    assert made[1]["top1_interval"] == pytest.approx(wilson(25.0, 50_000))
    assert main(["compare", str(tmp_path / "run")]) == 0
    assert "paper: Tables 4 and 5" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "run"), "--markdown"]) == 0
    assert "| 24.8 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("no json", "is no evaluation"),
        ("{}", "is no evaluation"),
        ('{"schema": 2, "nets": [1], "top1_error": 1}', "has another schema than 1"),
        ('{"schema": 1, "nets": [1], "top1_error": 1}', "is not whole (KeyError: 'split')"),
        (json.dumps(record(images=0)), "is not whole (ZeroDivisionError"),
        (json.dumps(record(top1_error="25")), "is not whole (TypeError"),
    ],
)
def test_what_is_no_evaluation_is_told(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "file.json").write_text(content)
    assert main(["compare", str(tmp_path / "file.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_evaluations_is_told(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "has no evaluation. Make one: vggrepro evaluate" in capsys.readouterr().err


# ---------------------------------------------------------------- the interval


@given(st.integers(1, 50_000), st.floats(0, 1))
def test_the_interval_solves_wilson_s_equation(images, share):
    wrong = round(share * images)
    low, high = wilson(100 * wrong / images, images)
    p = wrong / images
    assert 0 <= low <= 100 * p + 1e-9 and 100 * p - 1e-9 <= high <= 100
    for end in (low / 100, high / 100):
        if 1e-9 < end < 1 - 1e-9:
            # The ends are the shares from which p is 1.96 standard errors away.
            distance = abs(p - end) / math.sqrt(end * (1 - end) / images)
            assert distance == pytest.approx(1.959964, rel=1e-4)


def test_a_known_interval():
    # Newcombe 1998, example: 81 of 263.
    low, high = wilson(100 * 81 / 263, 263)
    assert (low, high) == (pytest.approx(25.53, abs=0.01), pytest.approx(36.62, abs=0.01))
