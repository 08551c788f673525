"""Mean RGB and colour covariance of a training set, in one pass over its images.

Each image weighs the same, whatever its size: training sees one crop of equal size
of each. Pixels are taken as decoded, before any rescaling. Sums within an image are
exact integers, sums over images are correctly rounded (`math.fsum`), so the result
depends on neither order nor parallelism.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.dataset import example_files
from vggrepro.example_index import ExampleIndex
from vggrepro.example_reader import find_bad_example
from vggrepro.graph_functions import as_written, parallel

Matrix = tuple[tuple[float, float, float], ...]

_VERSION = 1
_MOMENTS = 9  # three first moments, six second ones
_UPPER = np.triu_indices(3)


@dataclass(frozen=True)
class ColourStatistics:
    """First and second moments of the RGB pixels of a training set.

    Attributes:
      mean_rgb: grey levels, 0..255.
      covariance: of pixels in [0, 1].
      eigenvalues: of the covariance, largest first.
      eigenvectors: column i belongs to eigenvalue i; its largest element is positive.
      images: how many images were read.
      fingerprint: of the `ExampleIndex` they came from.
      weighting: 'image': each image weighs the same.
    """

    mean_rgb: tuple[float, float, float]
    covariance: Matrix
    eigenvalues: tuple[float, float, float]
    eigenvectors: Matrix
    images: int
    fingerprint: str
    weighting: str = "image"
    version: int = _VERSION

    @property
    def colour_components(self) -> Matrix:
        """Eigenvectors times eigenvalues (columns), what `Preprocessing` takes."""
        return _matrix(np.array(self.eigenvectors) * np.array(self.eigenvalues))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ColourStatistics:
        """Inverse of `to_dict`, also after a trip through JSON.

        Raises:
          KeyError, TypeError: fields are missing or unknown.
        """
        tuples = {name: _tuples(value) for name, value in values.items()}
        return cls(**tuples)


def training_statistics(
    index: ExampleIndex,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ColourStatistics:
    """Reads every image of `index` once.

    Args:
      index: the training split.
      cache: a JSON file; used if it belongs to the same data, else (re)written.
      on_progress: called now and then with (images read, images in all).
    Raises:
      InputError: an image is damaged or missing, or the cache cannot be written.
    """
    cached = _read_cache(cache, index.fingerprint)
    if cached is not None:
        return cached
    example_ids = index.ids_in_storage_order
    moments = np.empty([len(index), _MOMENTS])
    done = 0
    try:
        for rows in _moments_dataset(index, example_ids):
            moments[done : done + len(rows)] = rows
            done += len(rows)
            if on_progress:
                on_progress(done, len(index))
    except tf.errors.OpError as error:
        bad = find_bad_example(index, example_ids[done:])
        raise bad or InputError(f"cannot read {index.root}: {error.message}") from error
    statistics = _from_moments(moments, index)
    if cache is not None:
        _write_cache(cache, statistics)
    return statistics


def _moments_dataset(index: ExampleIndex, example_ids: np.ndarray) -> Any:
    """Batches of per-image moments, float64 [b, 9]: E[c], then E[c d] for c <= d."""
    images = parallel(example_files(index, example_ids), _image_moments)
    return images.batch(256).prefetch(1).as_numpy_iterator()


@as_written
def _image_moments(jpeg: tf.Tensor) -> tf.Tensor:
    pixels = tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")
    values = tf.cast(tf.reshape(pixels, [-1, 3]), tf.float64)  # integers stay exact below 2^53
    second = tf.gather_nd(tf.matmul(values, values, transpose_a=True), np.stack(_UPPER, 1))
    sums = tf.concat([tf.reduce_sum(values, 0), second], 0)
    return sums / tf.cast(tf.shape(values)[0], tf.float64)


def _from_moments(moments: np.ndarray, index: ExampleIndex) -> ColourStatistics:
    means = np.array([math.fsum(column) for column in moments.T]) / len(moments)
    mean = means[:3]
    second = np.zeros([3, 3])
    second[_UPPER] = means[3:]
    covariance = (second + np.triu(second, 1).T - np.outer(mean, mean)) / 255.0**2
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(3)]
    return ColourStatistics(
        mean_rgb=_tuples(mean.tolist()),
        covariance=_matrix(covariance),
        eigenvalues=_tuples(values.tolist()),
        eigenvectors=_matrix(vectors * np.sign(largest)),
        images=len(index),
        fingerprint=index.fingerprint,
    )


def _read_cache(cache: Path | None, fingerprint: str) -> ColourStatistics | None:
    """The cached statistics if they are readable and of this data, else None."""
    if cache is None or not cache.exists():
        return None
    try:
        values = json.loads(cache.read_text())
        if values["version"] != _VERSION or values["fingerprint"] != fingerprint:
            return None
        return ColourStatistics.from_dict(values)
    except (OSError, ValueError, KeyError, TypeError):  # a damaged cache is made again
        return None


def _write_cache(cache: Path, statistics: ColourStatistics) -> None:
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(statistics.to_dict(), indent=1))
        os.replace(temporary, cache)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {cache}: {error.strerror}", "Choose a writable directory"
        ) from error


def _matrix(values: np.ndarray) -> Matrix:
    return _tuples(values.tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
