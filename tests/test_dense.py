"""Dense and multi-crop evaluation against references that are written down step by step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from vggrepro.config import ARCHITECTURES
from vggrepro.dense import dense_log_posteriors, score_map, with_pools_rounding_up
from vggrepro.initializers import initial_parameters
from vggrepro.model import FlattenLayer, build_network, forward
from vggrepro.multicrop import CROPS, GRID, grid_offsets, multicrop_log_posteriors

SIDE = 64  # a window of 2x2 on the last map


def net(arch="A", side=SIDE):
    network = build_network(arch, width=0.05, image_size=side, classes=5)
    parameters = initial_parameters(network, "he-normal", seed=1)
    random = np.random.default_rng(4)
    for name, array in parameters.items():
        if name.endswith("/bias"):
            parameters[name] = random.normal(0, 1.0, array.shape).astype(np.float32)
    parameters["predictions/kernel"] *= np.float32(0.005)  # keep the softmax from saturating
    return network, parameters


def pictures(height, width, count=2):
    return np.random.default_rng(9).normal(0, 60, (count, height, width, 3)).astype(np.float32)


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def head(parameters, flat):
    """The fully connected layers in numpy; flat: [n, inputs]."""
    values = flat.astype(np.float64)
    for layer in ("fc1", "fc2", "predictions"):
        values = values @ parameters[f"{layer}/kernel"] + parameters[f"{layer}/bias"]
        values = values if layer == "predictions" else np.maximum(values, 0)
    return values


def last_map(network, parameters, images):
    kept = [layer for layer in network.layers if not isinstance(layer, FlattenLayer)]
    convolutions = dataclasses.replace(network, layers=tuple(kept[:-3]))
    return forward(convolutions, parameters, tf.constant(images)).numpy()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_on_the_net_s_own_size_dense_is_the_ordinary_net(arch):
    network, parameters = net(arch)
    images = pictures(SIDE, SIDE)
    scores = score_map(network, parameters, tf.constant(images)).numpy()
    assert scores.shape == (2, 1, 1, 5)
    ordinary = forward(network, parameters, tf.constant(images)).numpy()
    assert scores[:, 0, 0] == pytest.approx(ordinary, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 97), (101, 160), (224, 64), (128, 127)])
@pytest.mark.parametrize("arch", ["A-LRN", "C"])
def test_on_larger_images_the_scores_are_the_head_slid_over_every_window(arch, height, width):
    network, parameters = net(arch)
    images = pictures(height, width)
    maps = last_map(network, parameters, images)
    rows, columns = maps.shape[1] - 1, maps.shape[2] - 1
    assert (rows, columns) == (height // 32 - 1, width // 32 - 1)
    expected = np.empty([2, rows, columns, 5])
    for row in range(rows):
        for column in range(columns):
            window = maps[:, row : row + 2, column : column + 2]
            expected[:, row, column] = head(parameters, window.reshape(2, -1))
    scores = score_map(network, parameters, tf.constant(images)).numpy()
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_pools_that_round_up_keep_odd_rows_and_columns():
    network, parameters = net()
    images = pictures(101, 160, count=1)
    caffe = with_pools_rounding_up(network)
    maps = images
    for layer in caffe.layers[:-4]:
        if "pool" in layer.name:
            spare = [(0, 0), (0, maps.shape[1] % 2), (0, maps.shape[2] % 2), (0, 0)]
            maps = np.pad(maps, spare, constant_values=-np.inf)
            maps = maps.reshape(1, maps.shape[1] // 2, 2, maps.shape[2] // 2, 2, -1).max((2, 4))
        else:
            kernel, bias = (parameters[f"{layer.name}/{part}"] for part in ("kernel", "bias"))
            maps = np.maximum(tf.nn.conv2d(maps, kernel, 1, "SAME").numpy() + bias, 0)
    assert maps.shape[1:3] == (4, 5)  # 101 pixels: 51, 26, 13, 7, 4
    scores = score_map(caffe, parameters, tf.constant(images)).numpy()
    expected = head(parameters, maps[:, 2:4, 3:5].reshape(1, -1))
    assert scores.shape[1:3] == (3, 4)
    assert scores[:, 2, 3] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    down = score_map(network, parameters, tf.constant(images)).numpy()
    assert down.shape[1:3] == (2, 4)


def test_the_net_slid_over_crops_is_something_else():
    # Crops are padded with zeros at their borders; the whole image shows what lies there.
    network, parameters = net()
    image = pictures(64, 96, count=1)
    scores = score_map(network, parameters, tf.constant(image)).numpy()[0, 0]
    crops = np.concatenate([image[:, :, :64], image[:, :, 32:]])
    slid = forward(network, parameters, tf.constant(crops)).numpy()
    assert scores.shape == slid.shape == (2, 5)
    assert np.abs(scores - slid).max() > 0.05


def test_scores_are_averaged_before_the_softmax_and_mirror_images_after():
    network, parameters = net()
    images = pictures(100, 140)
    posteriors = []
    for view in (images, images[:, :, ::-1]):
        scores = score_map(network, parameters, tf.constant(view)).numpy()
        posteriors.append(softmax(scores.astype(np.float64).mean(axis=(1, 2))))
    found = dense_log_posteriors(network, parameters, tf.constant(images)).numpy()
    assert np.exp(found) == pytest.approx(np.mean(posteriors, axis=0), rel=1e-4)
    assert np.exp(found).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    # Averaging after the softmax, or not mirroring, would show.
    positions = softmax(score_map(network, parameters, tf.constant(images)).numpy())
    assert np.abs(np.exp(found) - positions.mean(axis=(1, 2))).max() > 1e-3
    assert np.abs(posteriors[0] - posteriors[1]).max() > 1e-3


def test_multi_crop_is_the_mean_over_fifty_crops():
    network, parameters = net()
    images = pictures(75, 104)
    rows = [round((75 - 64) * i / 4) for i in range(5)]  # 0, 3, 6 (5.5 to even), 8, 11
    columns = [round((104 - 64) * i / 4) for i in range(5)]
    posteriors = []
    for row in rows:
        for column in columns:
            crop = images[:, row : row + 64, column : column + 64]
            for view in (crop, crop[:, :, ::-1]):
                scores = forward(network, parameters, tf.constant(view.copy())).numpy()
                posteriors.append(softmax(scores.astype(np.float64)))
    assert len(posteriors) == CROPS == 50
    found = multicrop_log_posteriors(network, parameters, tf.constant(images)).numpy()
    assert np.exp(found) == pytest.approx(np.mean(posteriors, axis=0), rel=1e-4)


@given(size=st.integers(1, 300), spare=st.integers(0, 700))
def test_the_grid_reaches_from_edge_to_edge(size, spare):
    offsets = grid_offsets(tf.constant(size + spare), size).numpy().tolist()
    assert len(offsets) == GRID
    assert offsets[0] == 0 and offsets[-1] == spare
    gaps = np.diff(offsets)
    assert gaps.min() >= 0 and gaps.max() - gaps.min() <= 1


def test_bfloat16_runs_and_agrees_roughly():
    network, parameters = net()
    images = tf.constant(pictures(70, 100))
    exact = dense_log_posteriors(network, parameters, images).numpy()
    rough = dense_log_posteriors(network, parameters, tf.cast(images, tf.bfloat16)).numpy()
    assert rough.dtype == np.float32
    assert np.exp(rough) == pytest.approx(np.exp(exact), abs=0.1)
