"""Recipes are the paper's runs; the paper's tables are typed in right."""

import json

import pytest

from diagnostics.errors import InputError
from vggrepro import paper
from vggrepro.cli import main
from vggrepro.config import TrainConfig
from vggrepro.model import build_network
from vggrepro.recipes import RECIPES, override_line, recipe, recipe_entries


def test_the_demo_is_the_default_configuration():
    assert recipe("demo").config() == TrainConfig()
    assert recipe("demo").command == "vggrepro train"


RUNS_OF_THE_PAPER = {
    *((arch, "256") for arch in ("A", "A-LRN", "B", "C", "D", "E")),
    *((arch, stage) for arch in ("C", "D", "E") for stage in ("384", "jitter")),
}
STAGES = {"256": (256, 256, 0.01), "384": (384, 384, 0.001), "jitter": (256, 512, 0.001)}


def test_each_run_of_the_paper_and_its_small_twin_has_a_recipe():
    for family in ("paper", "small"):
        names = {name for name in RECIPES if name.startswith(f"{family}-")}
        assert names == {f"{family}-{arch}-{stage}" for arch, stage in RUNS_OF_THE_PAPER}


@pytest.mark.parametrize(("arch", "stage"), sorted(RUNS_OF_THE_PAPER))
def test_a_paper_recipe_deviates_in_nothing_but_the_data(arch, stage):
    config = recipe(f"paper-{arch}-{stage}").config()
    deviations = [field for field, tag in config.origins().items() if tag == "deviation"]
    assert deviations == ["data"]
    assert (config.scale_min, config.scale_max, config.lr) == STAGES[stage]
    assert (config.batch_size, config.steps, config.image_size) == (256, 370_000, 224)
    assert (config.arch, config.init) == (arch, "normal:0.01")


def test_each_stage_starts_from_the_one_that_the_paper_names():
    for family in ("paper", "small"):
        for arch, stage in RUNS_OF_THE_PAPER:
            source = recipe(f"{family}-{arch}-{stage}").source
            before = {"384": "256", "jitter": "384"}.get(stage)
            if before:
                assert source == f"{family}-{arch}-{before}"
            else:
                assert source == ("" if arch in ("A", "A-LRN") else f"{family}-A-256")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("small-")])
def test_a_small_twin_has_the_shape_of_its_paper_run(name):
    small, large = recipe(name).config(), recipe(name.replace("small", "paper")).config()
    assert (small.arch, small.lr, small.width) == (large.arch, large.lr, 0.25)
    for side in ("scale_min", "scale_max"):
        assert getattr(small, side) * 7 == pytest.approx(getattr(large, side), abs=4)
    # Two cores: minutes.
    assert recipe(name).hours < 0.2


def test_the_first_users_run():
    config = recipe("first-users").config()
    assert (config.arch, config.width, config.image_size, config.batch_size) == ("A", 1.0, 224, 32)
    assert config.steps * config.batch_size == 150_000 * 50
    assert recipe("first-users").images == 7_500_000


@pytest.mark.parametrize("entry", RECIPES.values(), ids=lambda entry: entry.name)
def test_a_recipe_says_what_to_type_what_it_costs_and_what_to_expect(entry):
    assert entry.command.startswith("vggrepro train")
    assert ("--init-from" in entry.command) == bool(entry.source)
    assert f"{entry.config().steps * entry.config().batch_size:,} images" in entry.cost
    assert "hours on" in entry.cost and "TFLOP/s" in entry.cost
    assert entry.purpose and entry.expected


@pytest.mark.parametrize("entry", RECIPES.values(), ids=lambda entry: entry.name)
def test_the_operations_are_those_of_the_net(entry):
    config = entry.config()
    classes = 10 if config.width < 1 else 1000
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=classes
    )
    exact = 6 * network.multiply_adds() * config.steps * config.batch_size
    # The paper's own count is rounded, and the first layer does not narrow quadratically.
    assert entry.flop == pytest.approx(exact, rel=0.05)
    assert entry.hours == pytest.approx(exact / entry.rate / 3600, rel=0.05)


def test_the_cost_is_three_passes_of_the_paper_s_multiply_adds():
    # 2 * 3 * 15.470e9 * 256 * 370,000, and that at 1e13 a second
    cost = recipe("paper-D-256").cost
    assert "94,720,000 images, 8.8e+18 floating-point operations: 244 hours" in cost
    assert "one accelerator at 10 TFLOP/s" in cost


def test_what_to_expect_is_every_cell_of_the_net():
    expected = recipe("paper-D-jitter").expected
    for cell in ("25.6/8.1", "24.8/7.5", "24.6/7.5", "24.4/7.2"):
        assert cell in expected
    assert "Table 3 (dense, Q=384) 27.3/8.8" in recipe("paper-C-jitter").expected
    assert "Table 5" not in recipe("paper-C-jitter").expected


def test_the_list_names_cost_and_result_of_every_recipe(capsys):
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for entry in RECIPES.values():
        assert f"{entry.images:,}" in text and f"{entry.flop:.1e}" in text
        assert entry.expected in text and entry.purpose in text
    assert text.splitlines()[0].split() == ["recipe", "images", "FLOP", "hours", "at", "TFLOP/s"]


def test_recipes_as_json(capsys):
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [one["name"] for one in listed] == list(RECIPES)
    assert main(["recipes", "paper-E-384", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["recipes"]
    assert one["source"] == "paper-E-256" and one["config"]["lr"] == 0.001
    assert one["hours"] == pytest.approx(one["flop"] / one["flop_per_second"] / 3600)


def manifest_of(name, images=paper.TRAINING_IMAGES, **changes):
    values = {**recipe(name).values, "data": "/somewhere", **changes}
    return recipe_entries(TrainConfig(**values), name, images)


def test_a_recipe_as_it_is_has_no_deviation():
    entries = manifest_of("paper-D-384", init_from="/runs/D-256")
    assert entries["recipe"] == {"name": "paper-D-384", "overridden": {}}
    assert [n for n, t in entries["config_origins"].items() if t == "deviation"] == []
    assert manifest_of("first-users", classes=100)["recipe"]["overridden"] == {}


def test_fewer_images_or_other_classes_are_no_data_of_the_paper():
    start = {"init_from": "/runs/D-256"}
    assert manifest_of("paper-D-384", **start)["config_origins"]["data"] == "paper"
    fewer = manifest_of("paper-D-384", 150_000, **start)
    assert fewer["config_origins"]["data"] == "deviation"
    assert manifest_of("first-users", classes=100)["config_origins"]["data"] == "deviation"


def test_an_overridden_field_is_a_deviation_even_if_the_paper_used_the_value_elsewhere():
    entries = manifest_of("paper-D-384", init_from="/runs/D-256", lr=0.01, seed=3)
    assert entries["recipe"]["overridden"] == {"lr": (0.001, 0.01), "seed": (0, 3)}
    assert entries["config_origins"]["lr"] == "deviation"
    assert entries["config_origins"]["seed"] == "deviation"
    assert entries["config_origins"]["momentum"] == "paper"


def test_what_is_overridden_is_said():
    plain = manifest_of("paper-D-384", init_from="/runs/D-256")["recipe"]
    assert override_line(**plain) == "recipe paper-D-384"
    changed = manifest_of("paper-D-384", init_from="/runs/D-256", lr=0.01, seed=3)["recipe"]
    assert override_line(**changed) == "recipe paper-D-384, but lr 0.01 for 0.001, seed 3 for 0"


def test_leaving_out_the_inheritance_is_a_deviation_and_so_is_adding_one():
    assert manifest_of("paper-D-256")["recipe"]["overridden"] == {
        "init_from": ("RUN_OF_paper-A-256", "")
    }
    assert "init_from" in manifest_of("paper-A-256", init_from="/x")["recipe"]["overridden"]


def test_no_recipe_leaves_the_origins_alone():
    entries = recipe_entries(TrainConfig(), "", 1000)
    assert entries == {"recipe": None, "config_origins": TrainConfig().origins()}


def test_a_recipe_that_inherits_asks_for_its_source(capsys, tmp_path):
    assert main(["train", "--recipe", "small-D-256", "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "recipe small-D-256 starts from a run of small-A-256. Give it: --init-from" in error


def test_an_unknown_recipe_is_an_error_that_lists_the_known():
    with pytest.raises(InputError, match="'paper-F' does not exist. Known: demo, paper-A-256"):
        recipe("paper-F")


@pytest.mark.parametrize("arch", paper.NETS)
def test_the_nets_have_the_paper_s_parameters(arch):
    network = build_network(arch, width=1.0, image_size=224, classes=paper.CLASSES)
    assert network.parameter_count() == paper.NETS[arch].parameters


@pytest.mark.parametrize("table, rows", [(3, 12), (4, 10), (5, 6), (6, 4)])
def test_each_table_is_complete(table, rows):
    cells = [result for result in paper.RESULTS if result.table == table]
    assert len({(cell.nets, cell.test_scales, cell.protocol) for cell in cells}) == rows


def test_more_scales_never_lose_and_the_tables_agree_where_they_overlap():
    for multi in paper.TABLE_4:
        single = paper.single_scale_result(*multi.nets)
        assert multi.top1_error < single.top1_error and multi.top5_error < single.top5_error
    jittered = {cell.nets: cell for cell in paper.TABLE_4 if cell.test_scales == (256, 384, 512)}
    for cell in paper.TABLE_5:
        if cell.protocol == "dense":
            assert cell.top1_error == jittered[cell.nets].top1_error
            assert cell.top5_error == jittered[cell.nets].top5_error


def test_a_run_that_the_paper_does_not_have_has_no_cell():
    with pytest.raises(KeyError):
        paper.single_scale_result(paper.Trained("A", 384, 384))
