"""The configuration: what each field must say, and what it refuses."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.errors import InputError
from vggrepro.config import INITIALIZERS, TrainConfig, parse_init

FIELDS = dataclasses.fields(TrainConfig)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_has_help_and_a_source(field):
    meta = field.metadata
    assert meta["help"]
    # Data has no paper value: it is a place on this machine.
    assert bool(meta["paper"]) != bool(meta["silent"]) or field.name == "data"


def test_every_field_has_an_origin():
    origins = TrainConfig().origins()
    assert origins.keys() == {field.name for field in FIELDS}
    assert set(origins.values()) <= {"paper", "interpretation", "deviation"}
    assert (origins["lr"], origins["init"], origins["width"]) == (
        "paper",
        "interpretation",
        "deviation",
    )


@given(
    lr=st.floats(min_value=0, exclude_min=True, max_value=1e30),
    seed=st.integers(0, 2**63 - 1),
    flip=st.booleans(),
    side=st.integers(1, 1000),
)
def test_a_configuration_survives_json(lr, seed, flip, side):
    config = TrainConfig(
        lr=lr, seed=seed, flip=flip, image_size=side, scale_min=side, scale_max=side
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values",
    [
        {"arch": "a"},
        {"width": 0.0},
        {"width": math.nan},
        {"image_size": 0},
        {"classes": -1},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"init": "he"},
        {"scale_min": 31},
        {"scale_max": 36},
        {"colour_shift": -0.1},
        {"resize": "nearest"},
        {"decode": "slow"},
        {"batch_size": 0},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr_drop_factor": 0.0},
        {"lr_drop_factor": 1.5},
        {"weight_decay": -1e-4},
        {"momentum": 1.0},
        {"momentum_form": "nesterov"},
        {"warmup_steps": -1},
        {"clip_norm": -1.0},
        {"clip_norm": math.nan},
        {"lr_drops": -1},
        {"plateau_patience": 0},
        {"eval_every": -1},
        {"checkpoint_every": 0},
        {"keep_checkpoints": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"precision": "float64"},
        {"strategy": "gpu"},
    ],
    ids=str,
)
def test_an_illegal_value_is_an_error_that_names_it(values):
    (name, value), *_ = values.items()
    with pytest.raises(InputError) as caught:
        TrainConfig(**values)
    assert name in caught.value.message and str(value) in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"learning_rate": 1.0}, "unknown field 'learning_rate'"),
        ({"steps": "10"}, "steps='10' is not of type int"),
        ({"steps": True}, "steps=True is not of type int"),
        ({"flip": 1}, "flip=1 is not of type bool"),
        ({"lr": None}, "lr=None is not of type float"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(values, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict(values)


def test_from_dict_takes_an_integer_for_a_float():
    assert TrainConfig.from_dict({"lr": 1}).lr == 1


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_normal_carries_its_standard_deviation(std):
    assert parse_init(f"normal:{std!r}") == ("normal", std)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_other_initialisers_carry_no_number(name):
    assert parse_init(name) == (name, 0.0)


@pytest.mark.parametrize(
    "text", ["", "normal", "normal:", "normal:0", "normal:-1", "normal:nan", "normal:inf", "he:2"]
)
def test_other_words_are_not_initialisers(text):
    with pytest.raises(InputError, match="not an initialiser"):
        parse_init(text)
