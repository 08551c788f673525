"""Orders of an epoch: permutations, whatever the sizes; the window order reads long runs."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.errors import InputError
from vggrepro.config import SHUFFLE_RUN, TrainConfig, window_of
from vggrepro.example_index import ExampleIndex, RecordTable
from vggrepro.order import FullShuffle, WindowShuffle, example_order

counts = st.integers(1, 700)
windows = st.integers(1, 5).map(lambda runs: runs * SHUFFLE_RUN)
seeds = st.integers(0, 2**63 - 1)


def imaginary_shards(count: int, shards: int = 3) -> ExampleIndex:
    """Examples in a scrambled place of their shards; no file exists."""
    places = np.random.default_rng(count).permutation(count)
    size = -(-count // shards)
    records = RecordTable(
        tuple(f"/nowhere/{i}" for i in range(shards)),
        (places // size).astype(np.int32),
        (places % size).astype(np.int64) * 100,
        np.full(count, 84, np.int64),
    )
    paths = tuple(f"train/a/{i}.JPEG" for i in range(count))
    return ExampleIndex("/nowhere", "train", paths, np.zeros(count, np.int32), ("a",), "", records)


def epoch_of(order: FullShuffle | WindowShuffle, epoch: int) -> np.ndarray:
    places = tf.range(order.count, dtype=tf.int64)
    return order.example_ids(tf.fill([order.count], tf.constant(epoch, tf.int64)), places).numpy()


@given(counts, windows, seeds, st.integers(0, 2**40))
def test_window_order_is_a_permutation(count: int, window: int, seed: int, epoch: int) -> None:
    order = WindowShuffle(imaginary_shards(count), window, seed)
    first, second = epoch_of(order, epoch), epoch_of(order, epoch + 1)
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 12:  # two equal permutations of so many would be a fault, not chance
        assert not np.array_equal(first, second)
        other = WindowShuffle(imaginary_shards(count), window, seed ^ 1)
        assert not np.array_equal(first, epoch_of(other, epoch))


@given(counts, windows, seeds)
def test_a_window_lies_in_few_runs(count: int, window: int, seed: int) -> None:
    """Records of one window: as many runs as fit, one more where the last record is passed."""
    index = imaginary_shards(count)
    place = np.empty(count, np.int64)
    assert index.records is not None
    place[index.records.ids_in_storage_order] = np.arange(count)
    ids = epoch_of(WindowShuffle(index, window, seed), 0)
    for start in range(0, count, window):
        places = np.sort(place[ids[start : start + window]])
        runs = 1 + int((np.diff(places) > 1).sum())
        assert runs <= -(-len(places) // SHUFFLE_RUN) + 1


def test_examples_meet_others_in_every_epoch() -> None:
    """Neighbours in the shards share a batch no more often than their window makes likely."""
    count, window, batch = 4096, 1024, 64
    index = imaginary_shards(count)
    order = WindowShuffle(index, window, seed=5)
    together = 0
    for epoch in range(20):
        position = np.empty(count, np.int64)
        position[epoch_of(order, epoch)] = np.arange(count)
        assert index.records is not None
        by_place = position[index.records.ids_in_storage_order]
        together += int((by_place[:-1] // batch == by_place[1:] // batch).sum())
    assert 0.04 < together / (20 * count) < 0.08  # batch / window = 0.0625


def test_a_million_examples_need_no_table_but_the_places() -> None:
    order = WindowShuffle(imaginary_shards(1_281_167, 1400), 2048, 0)
    places = tf.constant([0, 1_281_166, 640_000], tf.int64)
    found = order.example_ids(tf.constant([0, 73, 10**9], tf.int64), places).numpy()
    assert ((found >= 0) & (found < 1_281_167)).all()
    held = sum(value.nbytes for value in [order._ids.numpy()])
    assert held == 8 * 1_281_167  # 10 MB


def test_window_order_needs_shards() -> None:
    index = imaginary_shards(10)
    files = ExampleIndex(index.root, "train", index.paths, index.labels, ("a",), "")
    with pytest.raises(InputError, match="window:64 needs shards"):
        example_order(files, "window:64", 0)


@pytest.mark.parametrize("order", ["", "window", "window:0", "window:65", "window:-64", "half"])
def test_bad_orders_are_refused(order: str) -> None:
    with pytest.raises(InputError, match="neither full nor window"):
        TrainConfig(order=order)


def test_orders_are_read() -> None:
    assert window_of("full") == 0 and window_of("window:128") == 128
