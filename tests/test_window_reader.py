"""What the kernel is asked for ahead of a window order."""

import numpy as np
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from test_order import counts, imaginary_shards, seeds, windows

from vggrepro.order import WindowShuffle
from vggrepro.window_reader import read_ahead


class Noting:
    """A reader that notes what would be asked for, in the background, and at which step."""

    def __init__(self) -> None:
        self._asked: list[tuple[int, np.ndarray]] = []

    def asked(self, step: int) -> np.ndarray:
        """What has certainly been asked for when a step begins, in turn."""
        return np.concatenate([ids for at, ids in [*self._asked] if at <= step])

    def look_up(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"example_ids": ids}

    def will_need(self, rows: dict[str, tf.Tensor], passed: tf.Tensor) -> tf.Tensor:
        def note(ids: np.ndarray, passed: np.ndarray) -> np.ndarray:
            self._asked.append((int(passed), ids))
            return passed

        return tf.numpy_function(note, [rows["example_ids"], passed], tf.int64)


@given(
    counts, windows, seeds, st.integers(1, 200), st.integers(0, 30) | st.integers(0, 2**40),
    st.integers(1, 9),
)  # fmt: skip
def test_whatever_a_step_takes_was_asked_for_before(
    count: int, window: int, seed: int, batch_size: int, first_step: int, steps: int
) -> None:
    index, reader = imaginary_shards(count), Noting()
    order = WindowShuffle(index, window, seed)
    ahead = iter(read_ahead(order, reader, first_step, batch_size))  # type: ignore[arg-type]
    for step in range(first_step, first_step + steps):
        assert next(ahead) == step
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        taken = order.example_ids(*map(tf.constant, np.divmod(positions, count)))
        assert set(taken.numpy()) <= set(reader.asked(step))


@given(windows, seeds)
def test_each_record_is_asked_for_once_an_epoch_in_long_runs(window: int, seed: int) -> None:
    count, batch_size = 640, 32
    index, reader = imaginary_shards(count), Noting()
    order = WindowShuffle(index, window, seed)
    steps = read_ahead(order, reader, 0, batch_size)  # type: ignore[arg-type]
    last = 3 * count // batch_size
    list(steps.take(last))
    asked = reader.asked(last)
    assert sorted(asked[:count]) == sorted(asked[count : 2 * count]) == list(range(count))
    assert index.records is not None
    places = np.argsort(index.records.ids_in_storage_order)[asked]
    assert (np.diff(places) == 1).mean() > 0.95  # a run is 64 records
