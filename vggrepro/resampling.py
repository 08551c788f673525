"""A crop of a rescaled image, from the source pixels that it reaches.

Rescaling and cropping are one resampling: only the pixels of the crop are computed, on the
grid of the rescaled image. Two ways to the same bits: compiled ops (`compiled_ops`), and
where these are not to be had, a chain of TensorFlow's own, which takes three times as long.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from vggrepro import compiled_ops as library
from vggrepro import quiet_import
from vggrepro.compiled_ops import CompiledOps

KERNEL_RADIUS = {"triangle": 1.0, "keyscubic": 2.0}
# A window is wider than the kernel needs by this many source pixels: JPEG decoders
# interpolate subsampled chroma from neighbours that a window cuts off. Its outermost two
# pixels may differ from the whole image's, no others do.
_MARGIN = 2.0
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


class BatchRow(NamedTuple):
    """Where a crop is to be written.

    Attributes:
      images: float32 [b, side, side, 3], made by the compiled op, not yet read by anybody.
      written: how many rows are, int64 scalar, made with them.
      number: the row, int64 scalar.
    """

    images: tf.Tensor
    written: tf.Tensor
    number: tf.Tensor


class Crop(NamedTuple):
    """The form of all crops.

    Attributes:
      side: of the square crop, pixels.
      kernel: 'triangle' or 'keyscubic', widened when shrinking.
    """

    side: int
    kernel: str

    def window(self, shape: tf.Tensor, shorter_side: tf.Tensor, corner: tf.Tensor) -> Window:
        """`windows` of one image, of the shape that decoding gives: int32 [3]."""
        ops = compiled_ops()
        if ops is None:
            return self.windows(shape[:2], shorter_side, corner)
        return Window(*ops.window(shape, shorter_side, corner, margin=_MARGIN, **self._form()))

    def windows(self, sizes: tf.Tensor, shorter_side: tf.Tensor, corner: tf.Tensor) -> Window:
        """The source pixels of crops; any leading dimensions.

        Args:
          sizes: height and width of the images, pixels, [..., 2].
          shorter_side: S, whole numbers, float32 [..., 1], at least `side`.
          corner: where the crop lies, float32 [..., 2] in [0, 1), rows and columns: 0 is the
            first position, values near 1 the last.
        """
        sizes = tf.cast(sizes, tf.float32)
        rescaled = rescaled_size(sizes, shorter_side)
        scale = rescaled / sizes
        corner = tf.floor(corner * (rescaled - (self.side - 1.0)))
        reach = KERNEL_RADIUS[self.kernel] * tf.maximum(1.0 / scale, 1.0) + _MARGIN
        first = tf.maximum(tf.floor(corner / scale - reach), 0.0)
        end = tf.minimum(tf.math.ceil((corner + self.side) / scale + reach), sizes)
        box = tf.cast(tf.concat([first, end - first], -1), tf.int32)
        return Window(box, scale, first * scale - corner)

    def of(
        self,
        pixels: tf.Tensor,
        window: Window,
        flip: tf.Tensor,
        rgb: tf.Tensor,
        into: BatchRow | None = None,
    ) -> tf.Tensor:
        """The crop, mirrored if so told, plus a colour.

        Args:
          pixels: uint8 [height, width, 3], in which the window's box lies.
          window: without leading dimensions.
          flip: whether left and right change places, bool scalar.
          rgb: grey levels (0..255) to add, float32 [3].
          into: write it there; needs the compiled ops. Then window, flip and rgb may also be
            those of all rows of the batch, [b, ...] each.
        Returns:
          float32 [side, side, 3], or `into.images`, of which this row is now written.
        Raises:
          tf.errors.InvalidArgumentError: the box is not inside the image.
        """
        ops = compiled_ops()
        if ops is None:
            assert into is None
            return self.with_tensorflow(pixels, window, flip, rgb)
        if into is not None:
            images = ops.crop_into(pixels, *window, flip, rgb, *into, **self._form())
            images.set_shape(into.images.shape)
            return images
        crop = ops.crop(pixels, *window, flip, rgb, **self._form())
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

    def _form(self) -> dict[str, Any]:
        """The attributes of the compiled ops."""
        return {"side": self.side, "cubic": self.kernel == "keyscubic"}


def rescaled_size(size: tf.Tensor, shorter_side: tf.Tensor) -> tf.Tensor:
    """Height and width after the isotropic rescale.

    The shorter side becomes exactly S, the longer one `long * S / short` rounded to the
    nearest integer, halves to even.

    Args:
      size: height and width, float32 [..., 2].
      shorter_side: S, float32 [..., 1] or scalar.
    Returns:
      whole numbers, float32 [..., 2].
    """
    return tf.round(size * shorter_side / tf.reduce_min(size, axis=-1, keepdims=True))


def compiled_ops() -> CompiledOps | None:
    """The compiled ops; None: not to be had here, or with other bits than TensorFlow's."""
    with tf.init_scope(), tf.device("/CPU:0"):
        return _tried_ops()


@functools.cache
def _tried_ops() -> CompiledOps | None:
    _transpose_once()
    ops = library.load()
    return ops if ops is not None and _agree(ops) else None


def _agree(ops: CompiledOps) -> bool:
    """Whether they have TensorFlow's bits, shrinking and enlarging: a compiler may be wrong."""
    random = np.random.default_rng(0)
    pixels = tf.constant(random.integers(0, 256, [61, 75, 3]), tf.uint8)
    flip, rgb = tf.constant(True), tf.constant(random.normal(0.0, 50.0, 3), tf.float32)
    for kernel in KERNEL_RADIUS:
        for side, shorter_side in ((17, 19.0), (90, 104.0)):
            form = Crop(side, kernel)
            place = tf.constant([shorter_side]), tf.constant([0.3, 0.8])
            window = form.windows(pixels.shape[:2], *place)
            found = ops.window(pixels.shape, *place, margin=_MARGIN, **form._form())
            crop = ops.crop(pixels, *window, flip, rgb, **form._form())
            expected = *window, form.with_tensorflow(pixels, window, flip, rgb)
            if [_bits(x) for x in (*found, crop)] != [_bits(x) for x in expected]:
                return False
    return True


def _bits(tensor: tf.Tensor) -> bytes:
    return tensor.numpy().tobytes()


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
