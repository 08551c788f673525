"""From JPEG bytes to the network's input, as graph functions (paper section 3.1).

Rescale so that the shorter side is S, crop, flip, shift the colours, subtract the
mean RGB. Rescaling and cropping are one resampling: only the pixels of the crop
are computed, on the grid of the rescaled image. Two ways to the source pixels:

exact  decodes the whole image; equals `tf.image.resize(antialias=True)` + slice.
fast   decodes only the window that the crop's resampling kernel can reach: the same
       bits, sooner. Damage beyond the window goes unnoticed.

Images are RGB, float32, 0..255 minus the mean, not scaled otherwise. The `keyscubic`
kernel may overshoot 0..255 at edges; `triangle` may not. With small images the time
goes into the number of ops, not into pixels: hence float geometry in pairs (height,
width), for many images at once where their sizes are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from vggrepro import resampling
from vggrepro.batching import Batching, InPlace, Stacked
from vggrepro.resampling import BatchRow, Crop, Window

# Just below 1/2: an odd number of spare pixels leaves the larger part below and right.
_CENTRE = np.nextafter(np.float32(0.5), np.float32(0.0))
# The second draw of flip is of no use: earlier runs drew it.
_DRAWS = {"side": 1, "corner": 2, "flip": 2, "colour": 3}
_PHILOX = 1


class Place(NamedTuple):
    """Where a crop lies, whatever the size of the image; any leading dimensions.

    Attributes:
      side: S, a whole number, float32 [..., 1], at least image_size.
      corner: float32 [..., 2] in [0, 1), row and column: 0 is the first position of the
        crop, values near 1 the last.
    """

    side: tf.Tensor
    corner: tf.Tensor


class Augmentation(NamedTuple):
    """What chance decides about an image; any leading dimensions.

    Attributes:
      crop: a window if the size of the image is known, else a place.
      flip: whether left and right change places, bool [...].
      colour: draws for the colour shift, float32 [..., 3] in [0, 1).
    """

    crop: Place | Window
    flip: tf.Tensor
    colour: tf.Tensor


@dataclass(frozen=True)
class Preprocessing:
    """The settings, with the graph functions that apply them.

    Attributes:
      image_size: side of the square crop, pixels.
      scale_min, scale_max: S is uniform over the integers of [scale_min, scale_max], pixels.
      flip: mirror half of the training crops.
      colour_shift: standard deviation of alpha; 0: no colour shift.
      resize: resampling kernel, 'triangle' or 'keyscubic', widened when shrinking.
      decode: 'exact' or 'fast', see the module.
      mean_rgb: subtracted, grey levels (0..255).
      colour_components: 3x3; column i is eigenvector i times eigenvalue i of the
        covariance of RGB pixels in [0, 1].
    """

    image_size: int
    scale_min: int
    scale_max: int
    flip: bool
    colour_shift: float
    resize: str
    decode: str
    mean_rgb: tuple[float, float, float]
    colour_components: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        resampling.compiled_ops()  # now: not in the middle of tracing a graph

    @property
    def _form(self) -> Crop:
        return Crop(self.image_size, self.resize)

    @property
    def evaluation_side(self) -> int:
        """Q = S, or the middle of [scale_min, scale_max] (paper section 4.1)."""
        return (self.scale_min + self.scale_max) // 2

    def batching(self, size: int) -> Batching:
        """How training images become batches of `size` here."""
        ops = resampling.compiled_ops()
        return Stacked(size) if ops is None else InPlace(ops, size, self.image_size)

    def augmentation(self, seeds: tf.Tensor, sizes: tf.Tensor | None) -> Augmentation:
        """What is done to many images, at once.

        Args:
          seeds: int64 [b, 2]; the same seed gives the same augmentation, whatever the others.
          sizes: height and width of the images, pixels, [b, 2]; None: unknown.
        """
        draws = tf.map_fn(
            _uniform, seeds, fn_output_signature=tf.TensorSpec([sum(_DRAWS.values())])
        )
        side, corner, flip, colour = tf.split(draws, list(_DRAWS.values()), axis=1)
        place = Place(self._shorter_side(side), corner)
        crop = place if sizes is None else self._form.windows(sizes, *place)
        return Augmentation(crop, flip[:, 0] < 0.5, colour)

    def training_image(
        self, jpeg: tf.Tensor, augmentation: Augmentation, into: BatchRow | None = None
    ) -> tf.Tensor:
        """One augmented crop.

        Args:
          jpeg: scalar string, the bytes of the file.
          augmentation: of this image, without leading dimensions.
          into: write it there, see `Crop.of`; then the augmentation is that of all rows of the
            batch, [b, ...].
        Returns:
          float32 [image_size, image_size, 3], or the batch that it was written to.
        Raises:
          tf.errors.InvalidArgumentError: the bytes are not a whole image.
        """
        flip = augmentation.flip if self.flip else tf.constant(False)
        rgb = self._colour_shift(_of_row(augmentation.colour, into)) - self.mean_rgb
        return self._crop(jpeg, augmentation.crop, flip, rgb, into)

    def evaluation_image(self, jpeg: tf.Tensor, shorter_side: int) -> tf.Tensor:
        """The centre crop of the image rescaled to `shorter_side`; float32 as above."""
        place = Place(tf.constant([float(shorter_side)]), tf.constant([_CENTRE, _CENTRE]))
        return self._crop(jpeg, place, tf.constant(False), -tf.constant(self.mean_rgb))

    def _crop(
        self,
        jpeg: tf.Tensor,
        crop: Place | Window,
        flip: tf.Tensor,
        rgb: tf.Tensor,
        into: BatchRow | None = None,
    ) -> tf.Tensor:
        """A crop of the rescaled image plus a colour; as `Crop.of`."""
        if isinstance(crop, Place):
            place = Place(_of_row(crop.side, into), _of_row(crop.corner, into))
            pixels, window = self._placed(jpeg, place)
        elif self.decode == "exact":
            pixels, window = _decoded(jpeg), crop
        else:
            box = _of_row(crop.box, into)
            pixels, box = _if_jpeg(
                jpeg, lambda: _decoded_box(jpeg, box), lambda: (_decoded(jpeg), box)
            )
            window = crop._replace(box=box)
        return self._form.of(pixels, window, flip, rgb, into)

    def _placed(self, jpeg: tf.Tensor, place: Place) -> tuple[tf.Tensor, Window]:
        """The pixels of an image of unknown size, and the crop's window in them."""

        def whole() -> tuple[tf.Tensor, Window]:
            pixels = _decoded(jpeg)
            return pixels, self._form.window(tf.shape(pixels), *place)

        def window_alone() -> tuple[tf.Tensor, Window]:
            window = self._form.window(tf.io.extract_jpeg_shape(jpeg), *place)
            pixels, box = _decoded_box(jpeg, window.box)
            return pixels, window._replace(box=box)

        return whole() if self.decode == "exact" else _if_jpeg(jpeg, window_alone, whole)

    def _shorter_side(self, draw: tf.Tensor) -> tf.Tensor:
        """S from draws in [0, 1); float32 of the same shape."""
        return self.scale_min + tf.floor(draw * (self.scale_max - self.scale_min + 1.0))

    def _colour_shift(self, draws: tf.Tensor) -> tf.Tensor:
        """255 P (alpha lambda) with alpha ~ N(0, colour_shift), in grey levels; float32 [3]."""
        if self.colour_shift == 0:
            return tf.zeros([3])
        components = 255.0 * self.colour_shift * np.array(self.colour_components, np.float32)
        # Draws are multiples of 2^-23 from 0 on; the half step keeps ndtri finite.
        return tf.reduce_sum(components * tf.math.ndtri(draws + 2.0**-24), axis=1)


def _uniform(seed: tf.Tensor) -> tf.Tensor:
    """`tf.random.stateless_uniform(…, alg="philox")` of one seed (int64 [2]), in two ops."""
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    return tf.raw_ops.StatelessRandomUniformV2(
        shape=[sum(_DRAWS.values())], key=key, counter=counter, alg=_PHILOX
    )


def _of_row(rows: tf.Tensor, into: BatchRow | None) -> tf.Tensor:
    """What belongs to an image, of what belongs to all of its batch."""
    return rows if into is None else tf.gather(rows, into.number)


def _if_jpeg(jpeg: tf.Tensor, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """ImageNet holds a PNG named .JPEG, of which no window can be decoded."""
    return tf.cond(tf.io.is_jpeg(jpeg), yes, no)


def _decoded(jpeg: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")


def _decoded_box(jpeg: tf.Tensor, box: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The pixels of a box, and the box in these."""
    pixels = tf.io.decode_and_crop_jpeg(jpeg, box, channels=3, dct_method="INTEGER_ACCURATE")
    return pixels, box * [0, 0, 1, 1]
