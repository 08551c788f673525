"""Batches written in place against batches that TensorFlow stacks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from jpeg_samples import AUGMENTED, pixels
from shard_samples import build, make_folder
from tensorflow.python.framework import op_def_registry
from test_dataset import op_types, same_bits

from vggrepro import compiled_ops, resampling
from vggrepro.data_source import open_index
from vggrepro.dataset import EvaluationStream, TrainingStream
from vggrepro.resampling import BatchRow, Crop, Window

# What has state, but the same in every run: with anything else in a function of it, TensorFlow
# makes a pipeline serial under op determinism, which training turns on.
HARMLESS = {"RangeDataset", "TensorSliceDataset", "TFRecordDatasetV2", "_Retval"}
ORDERS = [("folder", "full"), ("shards", "full"), ("shards", "window:64"), ("url", "window:64")]
needs_ops = pytest.mark.skipif(
    compiled_ops.load() is None, reason="no C compiler here that can make the ops"
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = make_folder(tmp_path_factory.mktemp("images"))
    shards = tmp_path_factory.mktemp("data") / "shards"
    build(folder, shards)
    return {"folder": str(folder), "shards": str(shards), "url": f"file://{shards}"}


def stream(roots: dict, where: str, order: str, size: int, replicas: int = 1) -> TrainingStream:
    return TrainingStream(open_index(roots[where], "train"), AUGMENTED, size, 5, order, 0, replicas)


@needs_ops
@pytest.mark.parametrize(("where", "order"), ORDERS)
@pytest.mark.parametrize(("size", "replicas"), [(1, 1), (7, 1), (8, 1), (30, 1), (20, 2)])
def test_both_ways_give_the_same_batches(
    roots: dict, monkeypatch: pytest.MonkeyPatch, where: str, order: str, size: int, replicas: int
) -> None:
    """Over the ends of epochs and windows, and pieces of a batch that are not full."""
    in_place = stream(roots, where, order, size, replicas)
    steps = max(9, 150 // size)
    found = list(in_place.stream(3).take(steps))
    assert "VggreproCropInto" in op_types(in_place.stream(3))
    monkeypatch.setattr(resampling, "compiled_ops", lambda: None)
    stacked = stream(roots, where, order, size, replicas).stream(3)
    assert "VggreproCropInto" not in op_types(stacked)
    for one, other in zip(found, stacked.take(steps), strict=True):
        assert same_bits(one, other)


@needs_ops
def test_a_batch_is_not_touched_after_it_was_given(roots: dict) -> None:
    batches = list(stream(roots, "folder", "full", 4).stream(0).take(3))
    before = [batch["images"].numpy().copy() for batch in batches]
    more = list(stream(roots, "folder", "full", 4).stream(0).take(12))
    assert all(
        np.array_equal(one, batch["images"]) for one, batch in zip(before, more, strict=False)
    )
    assert all(
        np.array_equal(one, batch["images"]) for one, batch in zip(before, batches, strict=True)
    )


@needs_ops
def test_a_batch_with_a_damaged_image_is_not_given_out(roots: dict, tmp_path: Path) -> None:
    """Not even to somebody who goes on after the error; the next ones are whole."""
    folder = Path(shutil.copytree(roots["folder"], tmp_path / "copy"))
    roots = {"folder": str(folder)}
    sound = stream(roots, "folder", "full", 20)
    victim = sound.name_of(sound.example_ids(1)[9])  # in the second piece of three
    broken = [step for step in range(5) if victim in map(sound.name_of, sound.example_ids(step))]
    whole = {step: sound.batch(step) for step in range(5) if step not in broken}
    (folder / victim).write_bytes((folder / victim).read_bytes()[:100])
    batches = iter(stream(roots, "folder", "full", 20).stream(0))
    found = []
    for _ in range(5):
        try:
            found.append(next(batches))
        except tf.errors.InvalidArgumentError:
            assert broken
    for one in found:
        step = next(
            s for s in range(9) if sound.example_ids(s) == one["example_ids"].numpy().tolist()
        )
        assert step not in broken and (step not in whole or same_bits(one, whole[step]))
    assert len(found) < 5


@pytest.mark.parametrize("ops", [pytest.param("compiled", marks=needs_ops), "tensorflow"])
@pytest.mark.parametrize(("where", "order"), ORDERS)
def test_op_determinism_leaves_the_pipeline_parallel(
    roots: dict, monkeypatch: pytest.MonkeyPatch, where: str, order: str, ops: str
) -> None:
    if ops == "tensorflow":
        monkeypatch.setattr(resampling, "compiled_ops", lambda: None)
    validation = EvaluationStream(open_index(roots[where], "val"), AUGMENTED, 4)
    for dataset in (stream(roots, where, order, 4).stream(0), validation.dataset()):
        types = op_types(dataset)
        assert "ParallelMapDatasetV2" in types
        known = {name: op_def_registry.get(name) for name in types}
        assert {name for name, op in known.items() if op and op.is_stateful} <= HARMLESS


def crop_inputs(seed: int) -> tuple:
    """An image of 9 x 9 pixels, all of which is the window, not rescaled, flipped or coloured."""
    window = Window(tf.constant([0, 0, 9, 9]), tf.constant([1.0, 1.0]), tf.constant([0.0, 0.0]))
    return tf.constant(pixels(9, 9, seed)), window, tf.constant(False), tf.zeros([3])


@needs_ops
@given(st.integers(1, 5), st.data())
def test_a_crop_is_written_to_its_row_alone(count: int, data: st.DataObject) -> None:
    ops = resampling.compiled_ops()
    assert ops is not None
    row = data.draw(st.integers(0, count - 1))
    images = tf.constant(np.full([count, 6, 6, 3], -1.0, np.float32))
    _, written = ops.new_images(tf.zeros([0], tf.int64), side=6)  # a constant's 0 is shared by all
    own = crop_inputs(seed=row)
    found = Crop(6, "triangle").of(*own, into=BatchRow(images, written, tf.constant(row, tf.int64)))
    expected = np.full([count, 6, 6, 3], -1.0, np.float32)
    expected[row] = Crop(6, "triangle").of(*own)
    assert np.array_equal(found, expected) and np.array_equal(images, expected)
    assert written == 1


@needs_ops
@given(st.integers(1, 4), st.data())
def test_what_a_crop_is_made_with_may_be_that_of_every_row(count: int, data: st.DataObject) -> None:
    """Any of it: the rest is of the one image."""
    ops = resampling.compiled_ops()
    assert ops is not None
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    boxes = np.concatenate([random.integers(0, 4, [count, 2]), np.full([count, 2], 5)], axis=1)
    every = {
        "box": boxes.astype(np.int32),
        "scale": random.uniform(0.5, 2.0, [count, 2]).astype(np.float32),
        "shift": random.uniform(-2.0, 2.0, [count, 2]).astype(np.float32),
        "flip": random.integers(0, 2, count).astype(bool),
        "rgb": random.normal(0.0, 50.0, [count, 3]).astype(np.float32),
    }
    row = data.draw(st.integers(0, count - 1))
    own = {name: tf.constant(values[row]) for name, values in every.items()}
    mixed = dict(own)
    for name in data.draw(st.sets(st.sampled_from(sorted(every)))):
        mixed[name] = tf.constant(every[name])

    def crop(form: dict, into: BatchRow | None) -> tf.Tensor:
        window = Window(form["box"], form["scale"], form["shift"])
        image = tf.constant(pixels(9, 9, seed=1))
        return Crop(6, "triangle").of(image, window, form["flip"], form["rgb"], into)

    images, written = ops.new_images(tf.zeros([count], tf.int64), side=6)
    found = crop(mixed, BatchRow(images, written, tf.constant(row, tf.int64)))
    assert np.array_equal(found[row], crop(own, None))


@needs_ops
@pytest.mark.parametrize(
    ("shape", "row", "complaint"),
    [
        ([2, 6, 6, 3], -1, "no such row"),
        ([2, 6, 6, 3], 2, "no such row"),
        ([2, 6, 6, 3], 2**62, "no such row"),
        ([2, 7, 6, 3], 0, "batch is not"),
        ([6, 6, 3], 0, "batch is not"),
    ],
)
def test_a_row_outside_the_batch_is_refused(shape: list[int], row: int, complaint: str) -> None:
    into = BatchRow(tf.zeros(shape), tf.constant([0], tf.int64), tf.constant(row, tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match=complaint):
        Crop(6, "triangle").of(*crop_inputs(seed=0), into=into)


@needs_ops
@pytest.mark.parametrize("name", ["box", "scale", "shift", "flip", "rgb"])
def test_neither_one_nor_one_for_every_row_is_refused(name: str) -> None:
    image, window, flip, rgb = crop_inputs(seed=0)
    form = {**window._asdict(), "flip": flip, "rgb": rgb}
    form[name] = tf.stack([form[name]] * 2)
    window = Window(form["box"], form["scale"], form["shift"])
    into = BatchRow(tf.zeros([3, 6, 6, 3]), tf.constant([0], tf.int64), tf.constant(1, tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="another size"):
        Crop(6, "triangle").of(image, window, form["flip"], form["rgb"], into)
