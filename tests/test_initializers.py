"""Initial weights: a function of the seed, with the right spread."""

from __future__ import annotations

import numpy as np
import pytest

from diagnostics.errors import InputError
from diagnostics.snapshot import hash_arrays
from vggrepro.config import INITIALIZERS, parse_init
from vggrepro.initializers import initial_parameters, standard_deviation
from vggrepro.model import build_network

NETWORK = build_network("A", width=0.25, image_size=32, classes=10)
FIRST_WEIGHTS = [-0.010103138163685799, -0.0037754911463707685, 0.005304871127009392]


@pytest.mark.parametrize("init", ["normal:0.01", "normal:0.1", *INITIALIZERS])
def test_kernels_have_the_stated_spread_and_biases_are_zero(init):
    parameters = initial_parameters(NETWORK, init, seed=3)
    for layer in NETWORK.weight_layers:
        kernel = parameters[f"{layer.name}/kernel"]
        expected = standard_deviation(layer, init)
        error = 4.0 / np.sqrt(kernel.size)  # four standard errors of a deviation
        assert kernel.std() == pytest.approx(expected, rel=error), layer.name
        assert abs(kernel.mean()) < expected * error
        assert not parameters[f"{layer.name}/bias"].any()


def test_glorot_and_he_have_their_papers_variance():
    layer = NETWORK.weight_layers[1]
    assert standard_deviation(layer, "glorot-uniform") ** 2 == pytest.approx(
        2 / (layer.fan_in + layer.fan_out)
    )
    assert standard_deviation(layer, "he-normal") ** 2 == pytest.approx(2 / layer.fan_in)


def test_the_seed_alone_decides_the_bits():
    first = initial_parameters(NETWORK, "normal:0.01", seed=7)
    again = initial_parameters(NETWORK, "normal:0.01", seed=7)
    other = initial_parameters(NETWORK, "normal:0.01", seed=8)
    assert hash_arrays(first) == hash_arrays(again) != hash_arrays(other)


def test_the_bits_are_those_of_the_first_release():
    """A change of the generator would silently make recorded runs unrepeatable."""
    parameters = initial_parameters(NETWORK, "normal:0.01", seed=0)
    found = parameters["block1_conv1/kernel"].ravel()[:3]
    assert found.tolist() == pytest.approx(FIRST_WEIGHTS, rel=1e-6)


def test_layers_do_not_depend_on_the_layers_before_them():
    deeper = build_network("D", width=0.25, image_size=32, classes=10)
    ours = initial_parameters(NETWORK, "he-normal", seed=0)["block1_conv1/kernel"]
    theirs = initial_parameters(deeper, "he-normal", seed=0)["block1_conv1/kernel"]
    assert (ours == theirs).all()


@pytest.mark.parametrize(
    "text", ["normal", "normal:", "normal:0", "normal:-1", "xavier", "normal:inf"]
)
def test_an_unknown_initializer_is_refused_by_name(text):
    with pytest.raises(InputError, match="init '"):
        parse_init(text)
