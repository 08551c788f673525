"""A crop of a rescaled image, from the source pixels that it reaches.

Rescaling and cropping are one resampling: only the pixels of the crop are computed, on the
grid of the rescaled image. Two ways to the same bits: one compiled op (`compiled_crop`), and
where that is not to be had, a chain of TensorFlow's own, which takes three times as long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vggrepro import compiled_crop, quiet_import

KERNEL_RADIUS = {"triangle": 1.0, "keyscubic": 2.0}
_COMPLAINT = re.compile(rb"E\d{4} .*oneDNN supports DT_INT32")


class Window(NamedTuple):
    """The source pixels of a crop, and where they come to lie; any leading dimensions.

    Attributes:
      box: first row and column, their numbers; int32 [..., 4].
      scale: pixels of the crop to one of the source, rows and columns; float32 [..., 2].
      shift: row y of the window is row y * scale + shift of the crop, columns likewise;
        float32 [..., 2].
    """

    box: tf.Tensor
    scale: tf.Tensor
    shift: tf.Tensor


class Crop(NamedTuple):
    """What becomes of a window, but for the pixels.

    Attributes:
      side: of the square crop, pixels.
      kernel: 'triangle' or 'keyscubic', widened when shrinking.
    """

    side: int
    kernel: str

    def of(self, pixels: tf.Tensor, window: Window, flip: tf.Tensor, rgb: tf.Tensor) -> tf.Tensor:
        """The crop, mirrored if so told, plus a colour.

        Args:
          pixels: uint8 [height, width, 3], in which the window's box lies.
          window: without leading dimensions.
          flip: whether left and right change places, bool scalar.
          rgb: grey levels (0..255) to add, float32 [3].
        Returns:
          float32 [side, side, 3].
        Raises:
          tf.errors.InvalidArgumentError: the box is not inside the image.
        """
        op = compiled_op()
        if op is None:
            return self.with_tensorflow(pixels, window, flip, rgb)
        crop = op(pixels, *window, flip, rgb, side=self.side, cubic=self.kernel == "keyscubic")
        return tf.ensure_shape(crop, [self.side, self.side, 3])

    def with_tensorflow(
        self, pixels: tf.Tensor, window: Window, flip: tf.Tensor, rgb: tf.Tensor
    ) -> tf.Tensor:
        """`of` by TensorFlow's own ops, whatever the compiled one can do."""
        top, left, height, width = tf.unstack(window.box)
        pixels = tf.slice(pixels, [top, left, 0], [height, width, 3])
        (scale_y, scale_x), (shift_y, shift_x) = map(tf.unstack, (window.scale, window.shift))
        rows = self._lines(tf.reshape(pixels, [1, 1, height, -1]), scale_y, shift_y)
        columns = _transposed(tf.reshape(rows, [self.side, -1]))
        lines = self._lines(tf.reshape(columns, [1, 1, width, -1]), scale_x, shift_x)
        # [side (columns), 3 * side (channels, rows)]: reversed whole, then turned upright.
        lines = tf.reshape(lines, [self.side, 3 * self.side])
        lines = tf.raw_ops.Reverse(tensor=lines, dims=tf.stack([flip, False]))
        upright = _transposed(tf.reshape(lines, [3 * self.side, self.side]))
        # By whole rows: broadcasting over an innermost dimension of 3 is 5 times slower.
        return tf.reshape(upright + tf.tile(rgb, [self.side]), [self.side, self.side, 3])

    def _lines(self, lines: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        """out(y) = lines((y - shift) / scale), antialiased.

        Resamples [1, 1, n, line] along n, to float32 [1, 1, side, line]. One long line instead
        of a picture: with more than one row the op splits its work over TensorFlow's shared
        threads, waits for them, and takes 2 to 10 times longer (TensorFlow 2.21); with three
        values in the innermost loop it is slow as well.
        """
        return tf.raw_ops.ScaleAndTranslate(
            images=lines,
            size=[1, self.side],
            scale=tf.stack([1.0, scale]),
            translation=tf.stack([0.0, shift]),
            kernel_type=self.kernel,
            antialias=True,
        )


def compiled_op() -> Callable[..., tf.Tensor] | None:
    """The compiled op; None: it cannot be had here, or has other bits than TensorFlow."""
    with tf.init_scope(), tf.device("/CPU:0"):
        return _tried_op()


@functools.cache
def _tried_op() -> Callable[..., tf.Tensor] | None:
    _transpose_once()
    op = compiled_crop.load()
    return op if op is not None and _agrees(op) else None


def _agrees(op: Callable[..., tf.Tensor]) -> bool:
    """Whether it has TensorFlow's bits, shrinking and enlarging: a compiler may be wrong."""
    random = np.random.default_rng(0)
    pixels = tf.constant(random.integers(0, 256, [61, 75, 3]), tf.uint8)
    shift, rgb = tf.constant([-2.3, 0.0]), tf.constant(random.normal(0.0, 50.0, 3), tf.float32)
    for kernel in KERNEL_RADIUS:
        for scale in (0.31, 1.7):
            window = Window(tf.constant([3, 1, 57, 74]), tf.constant([scale, 0.97 * scale]), shift)
            own = pixels, window, tf.constant(True), rgb
            found = op(pixels, *window, *own[2:], side=17, cubic=kernel == "keyscubic")
            if found.numpy().tobytes() != Crop(17, kernel).with_tensorflow(*own).numpy().tobytes():
                return False
    return True


def _transposed(matrix: tf.Tensor) -> tf.Tensor:
    """A float32 matrix, transposed by this thread alone.

    As integers: for floats TensorFlow 2.21 on the CPU calls oneDNN, which hands the work to
    TensorFlow's shared threads and waits for them; half of the time went there.
    """
    return tf.bitcast(tf.transpose(tf.bitcast(matrix, tf.int32)), tf.float32)


def _transpose_once() -> None:
    """oneDNN complains of integers once a process, though others then do the work."""
    with quiet_import.without_lines(_COMPLAINT):
        tf.transpose(tf.zeros([2, 2], tf.int32))
