"""Validation errors: every example once, ties and NaN handled, padding ignored."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from small_runs import tiny_config, tiny_data, tiny_network

from vggrepro.data_source import open_data
from vggrepro.evaluation import Evaluator
from vggrepro.initializers import initial_parameters
from vggrepro.model import forward


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = tiny_config(tiny_data(tmp_path_factory.mktemp("data")), batch_size=4)
    return config, open_data(config, lambda text: None)


def test_errors_match_numpy_over_every_image(source):
    config, data = source
    network = tiny_network(config)
    parameters = initial_parameters(network, "he-normal", seed=0)
    found = Evaluator(network, parameters).evaluate(data.validation)
    right, losses = [], []
    for batch in data.validation:
        logits = forward(network, parameters, batch["images"]).numpy().astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_posterior = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for row, label, weight in zip(
            log_posterior, batch["labels"].numpy(), batch["weights"].numpy(), strict=True
        ):
            if weight:
                right.append(row.argmax() == label)
                losses.append(-row[label])
    assert found["val_images"] == len(right) == 9  # 9 images in batches of 4
    assert found["val_top1_error"] == pytest.approx(100 * (1 - np.mean(right)))
    assert found["val_top5_error"] == 0.0  # three classes
    assert found["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_dead_net_scores_at_chance_and_nan_is_wrong(source):
    config, data = source
    network = tiny_network(config)
    dead = {name: np.zeros(shape, np.float32) for name, shape in network.parameter_shapes().items()}
    assert Evaluator(network, dead).evaluate(data.validation)["val_top1_error"] == (
        pytest.approx(100 * 2 / 3)
    )
    dead["predictions/bias"] = np.full(3, np.nan, np.float32)
    broken = Evaluator(network, dead).evaluate(data.validation)
    assert broken["val_top1_error"] == 100.0 and broken["val_top5_error"] == 100.0


def test_it_stops_when_told_to(source):
    config, data = source
    network = tiny_network(config)
    parameters = initial_parameters(network, "he-normal", seed=0)
    assert Evaluator(network, parameters).evaluate(data.validation, lambda: True) is None


def test_padding_never_counts_whatever_its_loss(source):
    config, _ = source
    network = tiny_network(config)
    parameters = initial_parameters(network, "he-normal", seed=0)
    images = tf.random.stateless_normal([4, 32, 32, 3], [1, 2])
    poisoned = tf.concat([images[:2], images[2:] * np.nan], axis=0)
    batch = {"labels": tf.constant([0, 1, 0, 0]), "weights": tf.constant([1.0, 1.0, 0.0, 0.0])}
    evaluator = Evaluator(network, parameters)
    clean = evaluator.evaluate([{**batch, "images": images}])
    assert evaluator.evaluate([{**batch, "images": poisoned}]) == clean
    assert clean["val_images"] == 2
