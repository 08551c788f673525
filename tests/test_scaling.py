"""The page of what ImageNet would need: computed as it says, and the page as computed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import scaling
import scaling_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plans():
    return {
        (plan.machine.name, plan.arch, plan.batch): plan
        for plan in scaling.plans(scaling.compiled())
    }


def test_the_page_holds_the_numbers_of_the_script(plans):
    remedy = "run python benchmarks/scaling.py --publish docs"
    page = scaling_report.page(list(plans.values()), scaling.rate_of_a_core())
    assert (ROOT / "docs" / "scaling.md").read_text() == page, remedy


def test_the_table_of_compilations_is_the_one_kept():
    page = (ROOT / "docs" / "accelerators.md").read_text()
    table = "\n".join(scaling_report.compilation_table(scaling.compiled()))
    assert table in page, "copy the table that python benchmarks/scaling.py prints"


def test_every_net_on_every_machine_of_the_issue(plans):
    for arch in "ABCDE":
        for machine in ("v3-8", "v3-32", "v5e-8", "8 x A100"):
            assert (machine, arch, 256) in plans


def test_a_gpu_step_by_hand(plans):
    plan = plans["8 x A100", "D", 256]
    arithmetic = 3 * 2 * 15.470e9 * 32 / (0.4 * 156e12)
    all_reduce = 2 * 7 / 8 * 4 * 138_357_544 / 150e9
    assert plan.step == pytest.approx(arithmetic + all_reduce)
    assert plan.steps == 370_337
    assert plan.hours == pytest.approx(370_337 * plan.step / 3600)


def test_a_tpu_step_takes_the_larger_of_arithmetic_and_memory(plans):
    plan = plans["v3-8", "D", 256]
    found = scaling.compiled()["v3:2x2 D float32 256"]
    assert plan.arithmetic == found["flops"] / 61.5e12
    assert plan.memory == found["bytes_accessed"] / 450e9
    assert plan.step == pytest.approx(max(plan.arithmetic, plan.memory) + plan.all_reduce)
    # Weak scaling: the same rows a core are the same step, but for the all-reduce.
    wide = plans["v3-32", "D", 1024]
    assert wide.arithmetic == plan.arithmetic and wide.all_reduce > plan.all_reduce


def test_a_step_that_was_not_compiled_has_the_operations_of_its_rows():
    steps = {"v3:2x2 D float32 256": scaling.compiled()["v3:2x2 D float32 256"]}
    v3_32 = scaling.MACHINES[1]
    flops, moved = scaling._cost(v3_32, "D", 256, steps)
    assert flops == steps["v3:2x2 D float32 256"]["flops"] * 8 / 32 and moved is None
    plan = scaling._plan(v3_32, "D", 256, flops, moved)
    assert plan.step == plan.arithmetic + plan.all_reduce


def test_checkpoints_hold_weights_and_momentum(plans):
    plan = plans["v3-8", "E", 256]
    assert plan.checkpoint_bytes == 2 * 4 * 143_667_240
    assert plan.checkpoint_traffic == 370 * plan.checkpoint_bytes
