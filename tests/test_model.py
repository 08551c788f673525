"""The nets of Table 1: shapes, parameter counts, names, dropout by row."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.errors import InputError
from vggrepro.config import ARCHITECTURES
from vggrepro.dropout import Dropout
from vggrepro.initializers import initial_parameters
from vggrepro.model import WeightLayer, build_network, forward

# Paper, Table 2, exact: at width 1, 224 pixels and 1000 classes.
PARAMETERS = {
    "A": 132_863_336,
    "A-LRN": 132_863_336,
    "B": 133_047_848,
    "C": 133_638_952,
    "D": 138_357_544,
    "E": 143_667_240,
}
MULTIPLY_ADDS = {"A": 7.609, "B": 11.308, "C": 11.771, "D": 15.470, "E": 19.632}
WEIGHT_LAYERS = {"A": 11, "A-LRN": 11, "B": 13, "C": 16, "D": 16, "E": 19}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_width_parameter_counts_are_the_papers(arch):
    network = build_network(arch, width=1.0, image_size=224, classes=1000)
    assert network.parameter_count() == PARAMETERS[arch]
    assert len(network.weight_layers) == WEIGHT_LAYERS[arch]
    shapes = network.parameter_shapes().values()
    assert sum(int(np.prod(shape)) for shape in shapes) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", MULTIPLY_ADDS)
def test_multiply_adds_are_the_papers(arch):
    network = build_network(arch, width=1.0, image_size=224, classes=1000)
    assert round(network.multiply_adds() / 1e9, 3) == MULTIPLY_ADDS[arch]


@given(
    arch=st.sampled_from(ARCHITECTURES),
    width=st.floats(0.01, 0.05),
    image_size=st.integers(32, 70),
    classes=st.integers(2, 7),
    rows=st.integers(1, 3),
)
def test_every_layer_has_the_shape_that_the_network_states(arch, width, image_size, classes, rows):
    network = build_network(arch, width=width, image_size=image_size, classes=classes)
    stated, seen = network.output_shapes(), {}
    parameters = initial_parameters(network, "he-normal", seed=0)
    logits = forward(
        network,
        parameters,
        tf.zeros([rows, image_size, image_size, 3]),
        observe=lambda layer, values: seen.update({layer: tuple(values.shape)}),
    )
    assert seen == {layer.name: (rows, *stated[layer.name]) for layer in network.weight_layers}
    assert logits.shape == (rows, classes) and logits.dtype == tf.float32
    side = image_size
    for block in range(1, 6):
        side //= 2
        assert stated[f"block{block}_pool"][:2] == (side, side)


def test_layer_names_are_those_of_keras_applications():
    keras_vgg16 = tf.keras.applications.VGG16(weights=None, classes=5)
    ours = build_network("D", width=1.0, image_size=224, classes=5)
    theirs = [layer.name for layer in keras_vgg16.layers if layer.weights]
    assert [layer.name for layer in ours.weight_layers] == theirs


def test_c_has_one_by_one_kernels_in_its_third_places():
    network = build_network("C", width=1.0, image_size=224, classes=10)
    small = [layer.name for layer in network.weight_layers if layer.kernel_shape[0] == 1]
    assert small == ["block3_conv3", "block4_conv3", "block5_conv3"]


def test_response_normalization_is_krizhevskys():
    network = build_network("A-LRN", width=0.05, image_size=32, classes=2)
    names = [layer.name for layer in network.layers]
    assert names[:3] == ["block1_conv1", "block1_lrn", "block1_pool"]
    values = np.random.default_rng(0).normal(0, 50, (1, 1, 1, 7)).astype(np.float32)
    found = tf.nn.local_response_normalization(values, 2, 2.0, 1e-4, 0.75).numpy().ravel()
    flat = values.ravel()
    for i, value in enumerate(flat):
        window = flat[max(0, i - 2) : i + 3]
        expected = value / (2.0 + 1e-4 * np.sum(window**2)) ** 0.75
        assert found[i] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"arch": "F"}, "arch 'F'"),
        ({"image_size": 31}, "image_size 31"),
        ({"classes": 1}, "1 classes"),
    ],
)
def test_an_impossible_net_is_refused_by_name(arguments, named):
    with pytest.raises(InputError, match=named):
        build_network(**{"arch": "A", "width": 1.0, "image_size": 32, "classes": 2, **arguments})


def test_fan_in_and_fan_out():
    assert WeightLayer("x", (3, 3, 64, 128)).fan_in == 576
    assert WeightLayer("x", (3, 3, 64, 128)).fan_out == 1152
    assert WeightLayer("x", (64, 128)).fan_out == 128


@given(first=st.integers(0, 5), rows=st.integers(1, 3), layer=st.integers(0, 30))
def test_a_replica_drops_what_the_global_batch_drops_in_its_rows(first, rows, layer):
    ones, seed = tf.ones([8, 16]), tf.constant(3, tf.int64)
    whole = Dropout(0.5, seed).apply(ones, layer).numpy()
    part = Dropout(0.5, seed, first_row=first).apply(ones[:rows], layer).numpy()
    assert (part == whole[first : first + rows]).all()


def test_dropout_keeps_the_mean_and_differs_between_layers_and_steps():
    ones = tf.ones([64, 512])
    draws = [
        Dropout.of_step(0.5, 7, tf.constant(step)).apply(ones, layer).numpy()
        for step, layer in ((0, 1), (0, 2), (1, 1))
    ]
    for draw in draws:
        assert set(np.unique(draw)) == {0.0, 2.0}
        assert draw.mean() == pytest.approx(1.0, abs=0.03)
        assert abs(np.corrcoef(draw[:-1].ravel(), draw[1:].ravel())[0, 1]) < 0.03
        assert abs(np.corrcoef(draw[:, :-1].ravel(), draw[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[0].ravel(), draws[1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[0].ravel(), draws[2].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.9])
def test_dropout_drops_at_its_rate(rate):
    drawn = Dropout.of_step(rate, 7, tf.constant(3)).apply(tf.ones([64, 512]), 1).numpy()
    assert (drawn == 0).mean() == pytest.approx(rate, abs=0.01)


def test_dropout_is_the_same_under_xla():
    def dropped(step):
        return Dropout.of_step(0.5, 7, step).apply(tf.ones([8, 32]), 1)

    plain, compiled = tf.function(dropped), tf.function(dropped, jit_compile=True)
    step = tf.constant(11, tf.int64)
    assert (plain(step).numpy() == compiled(step).numpy()).all()
