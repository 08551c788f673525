"""Faults in what `fit` is fed: the row, and a line that mends it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import BATCH, Fitted, L, compiled, data, mlp, poisoned

CULPRIT = 2 * BATCH + 2  # where `poisoned(2)` puts its bad number


class Rows(keras.utils.PyDataset):
    """Batches by index, the bad number among them."""

    def __len__(self):
        return len(data()[0]) // BATCH

    def __getitem__(self, index):
        x, y = poisoned(2)
        part = slice(index * BATCH, (index + 1) * BATCH)
        return x[part], y[part]


def diagnosed(place, x, y=None, **fit):
    fitted = Fitted(lambda: compiled(mlp()), x, y, place / "run", **fit)
    return fitted.guard.diagnose(budget_seconds=4)


def generated():
    yield from (Rows()[index] for index in range(len(Rows())))


@pytest.mark.parametrize("feed", [Rows, generated])
def test_a_row_has_its_number_in_what_a_generator_gave(tmp_path, feed):
    found = diagnosed(tmp_path, feed())
    assert found.first_nonfinite.examples == (CULPRIT,)
    assert "what the generator gave" in found.first_nonfinite.example_names[0]
    assert found.cause.kind == "data" and found.recommendation.verified
    assert f"[{CULPRIT}]" in found.recommendation.command


def test_a_dataset_loses_the_row_by_the_recommended_line(tmp_path):
    dataset = tf.data.Dataset.from_tensor_slices(poisoned(2)).batch(BATCH)
    found = diagnosed(tmp_path, dataset)
    assert found.first_nonfinite.examples == (CULPRIT,) and found.recommendation.verified
    keep = {"dataset": dataset, "tf": tf}
    exec(found.recommendation.command, keep)
    left = np.concatenate([x for x, _ in keep["dataset"].as_numpy_iterator()])
    assert np.array_equal(left, np.delete(poisoned(2)[0], CULPRIT, axis=0))


def test_many_bad_rows_of_a_dataset_go_by_what_they_hold(tmp_path):
    x, y = data()
    x[1::3, 0] = np.inf
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    found = diagnosed(tmp_path, dataset)
    keep = {"dataset": dataset, "tf": tf}
    exec(found.recommendation.command, keep)
    left = np.concatenate([x for x, _ in keep["dataset"].as_numpy_iterator()])
    assert found.recommendation.verified and np.array_equal(left, x[np.isfinite(x).all(1)])


def test_a_shuffled_dataset_numbers_no_rows(tmp_path):
    shuffled = tf.data.Dataset.from_tensor_slices(poisoned(2)).shuffle(48, seed=1).batch(BATCH)
    found = diagnosed(tmp_path, shuffled.prefetch(1))
    (name,) = found.first_nonfinite.example_names
    assert name.endswith("of the batch") and found.first_nonfinite.examples[0] < BATCH


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_weights_of_examples_that_are_not_finite_are_the_data(tmp_path, bad):
    x, y = data()
    weights = np.ones(len(x), np.float32)
    weights[1::3] = bad
    found = diagnosed(tmp_path, x, y, sample_weight=weights)
    assert found.cause.kind == "data" and "sample_weight" in found.cause.evidence[0]
    keep = {"sample_weight": weights, "np": np}
    exec(found.recommendation.command, keep)
    assert found.recommendation.verified
    assert keep["sample_weight"].tolist() == np.where(np.isfinite(weights), 1, 0).tolist()


@pytest.mark.parametrize("bad", [20, -21])
def test_an_index_that_an_embedding_has_no_row_for_is_the_data(tmp_path, bad):
    x = np.random.default_rng(0).integers(0, 20, (len(data()[0]), 5))
    x[CULPRIT, 3] = bad
    x[CULPRIT + 1, 3] = -20  # Keras counts it from the end

    def build():
        words = L.Embedding(20, 4, name="words")
        layers = [keras.Input((5,), dtype="int32"), words, L.Flatten(), L.Dense(3)]
        return compiled(keras.Sequential(layers))

    found = Fitted(build, x, data()[1], tmp_path / "run").guard.diagnose(budget_seconds=4)
    place = found.first_nonfinite
    assert (place.stage, place.layer, place.examples) == ("data", "words", (CULPRIT,))
    assert found.cause.kind == "data" and "words has 20 rows" in found.cause.evidence[0]
    kept = next(one for one in found.counterfactuals if one.kind == "known_indices")
    assert kept.survived and found.recommendation.verified


def test_a_column_that_was_constant_when_a_normalisation_was_adapted(tmp_path):
    x, _ = data()
    x[:24, 1] = 2.0
    made = []

    def build():
        norm = L.Normalization(name="norm")
        norm.adapt(x[:16])
        made.append(keras.Sequential([keras.Input(x.shape[1:]), norm, L.Dense(1, name="out")]))
        return compiled(made[0], loss="mse", optimizer=keras.optimizers.SGD(0.01))

    found = Fitted(build, x, x[:, :1], tmp_path / "run").guard.diagnose(budget_seconds=4)
    assert found.cause.kind == "data" and "norm was adapted" in found.cause.evidence[0]
    assert found.recommendation.verified
    exec(found.recommendation.command, {"model": made[0], "keras": keras})
    assert np.abs(made[0].get_layer("norm")(x)).max() < 100


@pytest.mark.parametrize(
    ("low", "high", "kind", "line"),
    [
        (0, 255, "uint8", "y = y / 255"),
        pytest.param(-1, 1, "float32", "y = (y + 1) / 2", marks=pytest.mark.slow),
        (-1, 1, "int32", "y = (y + 1) / 2"),
    ],
)
def test_labels_that_are_no_probabilities_are_mapped_to_some(tmp_path, low, high, kind, line):
    x, _ = data()
    y = np.where(x[:, :1] > 0, high, low).astype(kind)

    def build():
        layers = [keras.Input(x.shape[1:]), L.Dense(8, "relu"), L.Dense(1, "sigmoid")]
        model, rate = keras.Sequential(layers), keras.optimizers.Adam(0.05)
        return compiled(model, loss="binary_crossentropy", optimizer=rate)

    fitted = Fitted(build, x, y, tmp_path / "run", epochs=20)
    found = fitted.guard.diagnose(budget_seconds=4)
    assert found.cause.kind == "labels" and found.recommendation.verified
    assert found.recommendation.command.startswith(line)
