"""The exported weights load into keras.applications and give the same answers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from vggrepro.initializers import initial_parameters
from vggrepro.keras_export import keras_model, save_weights
from vggrepro.model import build_network, forward


@pytest.mark.parametrize("arch", ["A", "A-LRN", "C"])
def test_the_keras_model_agrees_with_the_net(arch, tmp_path):
    network = build_network(arch, width=0.05, image_size=40, classes=4)
    parameters = initial_parameters(network, "he-normal", seed=0)
    images = np.random.default_rng(0).normal(0, 50, (2, 40, 40, 3)).astype(np.float32)
    save_weights(network, parameters, tmp_path / "w.weights.h5")
    model = keras_model(network)
    model.load_weights(tmp_path / "w.weights.h5")
    expected = tf.nn.softmax(forward(network, parameters, tf.constant(images))).numpy()
    assert model(images).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["w.weights.h5"]


@pytest.mark.slow  # 540 MB of weights each
@pytest.mark.parametrize(
    ("arch", "application"),
    [("D", keras.applications.VGG16), ("E", keras.applications.VGG19)],
)
def test_full_width_weights_load_into_keras_applications(arch, application, tmp_path):
    network = build_network(arch, width=1.0, image_size=224, classes=10)
    parameters = initial_parameters(network, "he-normal", seed=0)
    save_weights(network, parameters, tmp_path / "w.weights.h5")
    model = application(weights=None, classes=10)
    model.load_weights(tmp_path / "w.weights.h5")
    images = np.random.default_rng(0).normal(0, 50, (1, 224, 224, 3)).astype(np.float32)
    expected = tf.nn.softmax(forward(network, parameters, tf.constant(images))).numpy()
    assert model(images).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert {layer.name for layer in model.layers if layer.weights} == {
        layer.name for layer in network.weight_layers
    }
