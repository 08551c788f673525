"""Recipes are the paper's runs; the paper's tables are typed in right."""

import pytest

from diagnostics.errors import InputError
from vggrepro import paper
from vggrepro.config import TrainConfig
from vggrepro.model import build_network
from vggrepro.recipes import RECIPES, recipe

PAPER_RECIPES = [name for name in RECIPES if name.startswith("paper-")]


def test_the_demo_is_the_default_configuration():
    assert recipe("demo").config() == TrainConfig()


def test_each_net_of_the_paper_has_a_recipe():
    assert [recipe(name).config().arch for name in PAPER_RECIPES] == list(paper.NETS)


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_paper_recipe_deviates_in_nothing_but_the_data(name):
    config = recipe(name).config()
    deviations = [field for field, tag in config.origins().items() if tag == "deviation"]
    assert deviations == ["data"]
    assert (config.scale_min, config.scale_max, config.image_size) == (256, 256, 224)
    assert (config.batch_size, config.steps, config.lr) == (256, 370_000, 0.01)
    assert config.init == "normal:0.01"


@pytest.mark.parametrize("entry", RECIPES.values(), ids=lambda entry: entry.name)
def test_a_recipe_says_what_to_type_what_it_costs_and_what_to_expect(entry):
    assert entry.command.startswith("vggrepro train")
    assert f"{entry.config().steps * entry.config().batch_size:,} images" in entry.cost
    assert entry.purpose and entry.expected


def test_the_cost_is_three_passes_of_the_paper_s_multiply_adds():
    # 2 * 3 * 15.470e9 * 256 * 370,000
    assert "74 epochs of ImageNet), 8.8e+18 floating-point" in recipe("paper-D-256").cost


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
