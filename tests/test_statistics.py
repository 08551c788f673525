"""Mean RGB and covariance against numpy, whatever the order."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from jpeg_samples import jpeg, pixels

from diagnostics.errors import InputError
from vggrepro.example_index import ExampleIndex
from vggrepro.image_folder import index_folder
from vggrepro.statistics import ColourStatistics, training_statistics


@pytest.fixture
def index(tmp_path: Path) -> ExampleIndex:
    """Two classes, seven images of different sizes, one of them greyscale."""
    for number in range(7):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = pixels(20 + 9 * number, 50 - 3 * number, number)
        image[..., 0] //= 1 + number % 3
        data = jpeg(image[..., :1] if number == 3 else image)
        (folder / f"{number}.JPEG").write_bytes(data)
        (tmp_path / "val" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / "ab"[number % 2] / "v.JPEG").write_bytes(data)
    return index_folder(tmp_path, "train")


def decoded(index: ExampleIndex) -> list[np.ndarray]:
    return [
        tf.io.decode_jpeg(
            (Path(index.root) / path).read_bytes(), channels=3, dct_method="INTEGER_ACCURATE"
        )
        .numpy()
        .reshape(-1, 3)
        .astype(np.float64)
        for path in index.paths
    ]


def test_against_numpy(index: ExampleIndex) -> None:
    statistics = training_statistics(index)
    images = decoded(index)
    mean = np.mean([image.mean(0) for image in images], axis=0)
    covariance = np.mean(
        [((image - mean).T @ (image - mean)) / len(image) for image in images], axis=0
    )
    np.testing.assert_allclose(statistics.mean_rgb, mean, rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, covariance / 255**2, rtol=1e-9)
    assert statistics.images == 7 and statistics.fingerprint == index.fingerprint


def test_eigenvectors_diagonalise(index: ExampleIndex) -> None:
    statistics = training_statistics(index)
    vectors, values = np.array(statistics.eigenvectors), np.array(statistics.eigenvalues)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vectors * values @ vectors.T, statistics.covariance, atol=1e-12)
    np.testing.assert_allclose(statistics.colour_components, vectors * values)
    assert list(values) == sorted(values, reverse=True) and values[2] >= 0
    assert (vectors[np.abs(vectors).argmax(0), range(3)] > 0).all()


def test_order_changes_no_bit(index: ExampleIndex) -> None:
    paths = tuple(reversed(index.paths))
    backwards = dataclasses.replace(index, paths=paths, labels=index.labels[::-1].copy())
    assert training_statistics(backwards) == training_statistics(index)


def test_json_round_trip(index: ExampleIndex) -> None:
    statistics = training_statistics(index)
    assert ColourStatistics.from_dict(json.loads(json.dumps(statistics.to_dict()))) == statistics


def test_cache_is_used_for_the_same_data_only(index: ExampleIndex, tmp_path: Path) -> None:
    cache = tmp_path / "statistics.json"
    first = training_statistics(index, cache)
    marked = {**first.to_dict(), "images": 99}
    cache.write_text(json.dumps(marked))
    assert training_statistics(index, cache).images == 99
    other = dataclasses.replace(index, fingerprint="other")
    assert training_statistics(other, cache) == dataclasses.replace(first, fingerprint="other")
    assert json.loads(cache.read_text())["fingerprint"] == "other"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "x": 2}', "\udcff"])
def test_damaged_cache_is_made_again(index: ExampleIndex, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "statistics.json"
    cache.write_bytes(content.encode(errors="surrogateescape"))
    assert training_statistics(index, cache) == training_statistics(index)
    assert json.loads(cache.read_text())["images"] == 7


def test_unwritable_cache_is_named(index: ExampleIndex, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write .*statistics.json"):
        training_statistics(index, tmp_path / "missing" / "statistics.json")


def test_progress_reaches_the_end(index: ExampleIndex) -> None:
    calls: list[tuple[int, int]] = []
    training_statistics(index, on_progress=lambda done, count: calls.append((done, count)))
    assert calls[-1] == (7, 7)


def test_damaged_image_is_named(index: ExampleIndex) -> None:
    bad = Path(index.location(4))
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{bad}: truncated"):
        training_statistics(index)
