"""Whole rescaled images in batches of one shape each.

Photographs differ in shape, a batch may not: images are sorted by their shape after the
rescaling (shorter side Q), and each batch takes as many of one shape as fit. So every
example comes exactly once, unpadded, and no graph is traced for a shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.dataset import example_files
from vggrepro.example_index import ExampleIndex
from vggrepro.example_reader import find_bad_example
from vggrepro.graph_functions import as_written, parallel, threads
from vggrepro.preprocessing import Preprocessing


def image_sizes(index: ExampleIndex) -> np.ndarray:
    """Height and width of every image as stored; int32 [n, 2].

    Raises:
      InputError: an image cannot be read; names the file.
    """
    files = example_files(index, np.arange(len(index)))
    sizes = parallel(files, _stored_size)
    try:
        return np.concatenate(list(sizes.batch(256).as_numpy_iterator()))
    except tf.errors.OpError as error:
        raise unreadable(index, error) from error


def unreadable(index: ExampleIndex, error: Exception) -> InputError:
    """Which image it was."""
    found = find_bad_example(index, range(len(index)))
    return found or InputError(f"cannot read {index.root}: {str(error).splitlines()[0][:200]}")


@as_written
def _stored_size(jpeg: tf.Tensor) -> tf.Tensor:
    return tf.cond(  # ImageNet holds a PNG file named .JPEG
        tf.io.is_jpeg(jpeg),
        lambda: tf.io.extract_jpeg_shape(jpeg)[:2],
        lambda: tf.shape(_decoded(jpeg))[:2],
    )


def _decoded(jpeg: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")


def rescaled_sizes(sizes: np.ndarray, shorter_side: int) -> np.ndarray:
    """`resampling.rescaled_size` of many images; int32 [n, 2]."""
    exact = sizes.astype(np.float32)
    shortest = exact.min(axis=1, keepdims=True)
    return np.rint(exact * np.float32(shorter_side) / shortest).astype(np.int32)


@dataclass(frozen=True)
class WholeImages:
    """The images of a split at one scale; iterating gives (images, example ids).

    Images are float32 [b, h, w, 3], RGB minus the mean; ids int64 [b].

    Attributes:
      sizes: as `image_sizes` gives them.
      shorter_side: Q, pixels.
      batch_pixels: a batch holds no more, unless one image does.
      batch_images: nor more images than this.
    """

    index: ExampleIndex
    preprocessing: Preprocessing
    sizes: np.ndarray
    shorter_side: int
    batch_pixels: int
    batch_images: int

    def __iter__(self) -> Iterator[tuple[tf.Tensor, np.ndarray]]:
        batches = self.plan()
        order = np.concatenate(batches)
        images = iter(self._dataset(order))
        try:
            for ids in batches:
                yield tf.stack([next(images) for _ in ids]), ids
        except tf.errors.OpError as error:
            raise unreadable(self.index, error) from error

    def plan(self) -> list[np.ndarray]:
        """Example ids by batch; all images of a batch have one shape."""
        targets = rescaled_sizes(self.sizes, self.shorter_side)
        order = np.lexsort((np.arange(len(targets)), targets[:, 1], targets[:, 0]))
        borders = 1 + np.flatnonzero((np.diff(targets[order], axis=0) != 0).any(axis=1))
        batches = []
        for same_shape in np.split(order, borders):
            height, width = map(int, targets[same_shape[0]])
            fits = min(self.batch_images, max(1, self.batch_pixels // (height * width)))
            batches += np.split(same_shape, range(fits, len(same_shape), fits))
        return batches

    def _dataset(self, order: np.ndarray) -> tf.data.Dataset:
        targets = rescaled_sizes(self.sizes, self.shorter_side)
        with tf.device("CPU:0"):
            rows = tf.data.Dataset.from_tensor_slices(targets[order])
        files = example_files(self.index, order)
        images = parallel(tf.data.Dataset.zip((files, rows)), self._image)
        return images.prefetch(2 * threads())

    @as_written
    def _image(self, jpeg: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """Rescaled to `target` (height, width) with the run's kernel, antialiased."""
        pixels = _decoded(jpeg)
        size = tf.cast(tf.shape(pixels)[:2], tf.float32)
        rescaled = tf.raw_ops.ScaleAndTranslate(
            images=tf.cast(pixels, tf.float32)[tf.newaxis],
            size=target,
            scale=tf.cast(target, tf.float32) / size,
            translation=[0.0, 0.0],
            kernel_type=self.preprocessing.resize,
            antialias=True,
        )[0]
        return rescaled - tf.constant(self.preprocessing.mean_rgb)
