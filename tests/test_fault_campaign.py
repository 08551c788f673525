"""The fault campaign as tests: a part of it always, all of it with `-m slow`."""

from __future__ import annotations

import pytest
from campaign import Campaign
from clean_runs import CLEAN
from fault_injection import KINDS
from faults import injected_faults, quick_faults
from small_runs import tiny_data
from unusual_faults import NATURAL, QUICK

from diagnostics.protocol import STAGES


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    directory = tmp_path_factory.mktemp("campaign")
    return Campaign(directory, tiny_data(directory))


def complaints(outcomes):
    return {one.name: one.wrong for one in outcomes if one.wrong}


def test_the_campaign_covers_what_it_promises():
    faults = injected_faults()
    assert len({one.name for one in faults}) == len(faults) >= 60
    for program in ("toy", "vgg"):
        for precision in ("float32", "bfloat16"):
            here = [
                one.injection
                for one in faults
                if (one.program, one.precision) == (program, precision)
            ]
            assert {one.stage for one in here} == set(STAGES)
            assert {one.kind for one in here} == set(KINDS)
            assert len({one.step for one in here}) >= 3
    assert len(CLEAN) >= 15
    assert injected_faults() == faults != injected_faults(seed=1)


def test_injected_faults_are_found_where_they_are(campaign):
    assert complaints(campaign.injected(quick_faults())) == {}


def test_natural_faults_are_explained_and_verified_fixes_hold(campaign):
    assert complaints(campaign.natural([one for one in NATURAL if one.name in QUICK])) == {}


def test_clean_runs_are_left_alone(campaign):
    wanted = ("toy-seed-0", "vgg-A-glorot")
    assert complaints(campaign.clean([one for one in CLEAN if one.name in wanted])) == {}


@pytest.mark.slow
def test_every_injected_fault_is_found_where_it_is(campaign):
    assert complaints(campaign.injected(injected_faults())) == {}


@pytest.mark.slow
def test_every_natural_fault_is_explained_and_verified_fixes_hold(campaign):
    assert complaints(campaign.natural(NATURAL)) == {}


@pytest.mark.slow
def test_every_clean_run_is_left_alone(campaign):
    assert complaints(campaign.clean(CLEAN)) == {}
