"""From JPEG bytes to the network's input, as graph functions (paper section 3.1).

Rescale so that the shorter side is S, crop, flip, shift the colours, subtract the
mean RGB. Rescaling and cropping are one resampling: only the pixels of the crop
are computed, on the grid of the rescaled image. Two ways to the source pixels:

exact  decodes the whole image; equals `tf.image.resize(antialias=True)` + slice.
fast   decodes only the window that the crop's resampling kernel can reach.

Images are RGB, float32, 0..255 minus the mean, not scaled otherwise. The `keyscubic`
kernel may overshoot 0..255 at edges; `triangle` may not.
"""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf

# A fast window is wider than the kernel needs by this many source pixels: JPEG
# decoders interpolate subsampled chroma from neighbours that a window cuts off.
_WINDOW_MARGIN = 2.0
_KERNEL_RADIUS = {"triangle": 1.0, "keyscubic": 2.0}
_DRAWS = 7  # scale, top, left, flip, three colour components


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

    @property
    def evaluation_side(self) -> int:
        """Q = S, or the middle of [scale_min, scale_max] (paper section 4.1)."""
        return (self.scale_min + self.scale_max) // 2

    def training_image(self, jpeg: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """One augmented crop.

        Args:
          jpeg: scalar string, the bytes of the file.
          seed: int64 [2]; the same seed gives the same crop.
        Returns:
          float32 [image_size, image_size, 3].
        Raises:
          tf.errors.InvalidArgumentError: the bytes are not a whole JPEG file.
        """
        draws = tf.random.stateless_uniform([_DRAWS], seed, alg="philox")
        side = self.scale_min + tf.cast(draws[0] * (self.scale_max - self.scale_min + 1), tf.int32)
        image = self._window(jpeg, side, draws[1:3])
        if self.flip:
            image = tf.raw_ops.Reverse(tensor=image, dims=[False, draws[3] < 0.5, False])
        return image + self._colour_offset(draws[4:7])

    def evaluation_image(self, jpeg: tf.Tensor, shorter_side: int) -> tf.Tensor:
        """The centre crop of the image rescaled to `shorter_side`; float32 as above."""
        return self._window(jpeg, tf.constant(shorter_side), None) - tf.constant(self.mean_rgb)

    def _colour_offset(self, draws: tf.Tensor) -> tf.Tensor:
        """-mean + 255 P (alpha lambda), alpha ~ N(0, colour_shift), grey levels [3]."""
        mean = tf.constant(self.mean_rgb)
        if self.colour_shift == 0:
            return -mean
        # Draws are multiples of 2^-23 from 0 on; the half step keeps ndtri finite.
        alpha = self.colour_shift * tf.math.ndtri(draws + 2.0**-24)
        return 255.0 * tf.linalg.matvec(tf.constant(self.colour_components), alpha) - mean

    def _window(self, jpeg: tf.Tensor, side: tf.Tensor, place: tf.Tensor | None) -> tf.Tensor:
        """The crop at `place` (two numbers in [0, 1); None: the centre), in grey levels."""
        if self.decode == "exact":
            pixels = tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")
            size = tf.shape(pixels)[:2]
            rescaled = rescaled_size(size, side)
            scale = tf.cast(rescaled, tf.float32) / tf.cast(size, tf.float32)
            offset = self._offset(rescaled, place)
            return self._resample(pixels, scale, -offset)
        size = tf.io.extract_jpeg_shape(jpeg)[:2]
        rescaled = rescaled_size(size, side)
        scale = tf.cast(rescaled, tf.float32) / tf.cast(size, tf.float32)
        offset = self._offset(rescaled, place)
        first, count = self._source_window(size, scale, offset)
        pixels = tf.io.decode_and_crop_jpeg(
            jpeg, tf.concat([first, count], 0), channels=3, dct_method="INTEGER_ACCURATE"
        )
        return self._resample(pixels, scale, tf.cast(first, tf.float32) * scale - offset)

    def _offset(self, rescaled: tf.Tensor, place: tf.Tensor | None) -> tf.Tensor:
        """Top left corner of the crop in the rescaled image, float32 [2], whole numbers."""
        room = rescaled - self.image_size
        if place is None:
            return tf.cast(room // 2, tf.float32)
        return tf.floor(place * tf.cast(room + 1, tf.float32))

    def _source_window(
        self, size: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """First source pixel and number of them that the crop depends on, int32 [2] each."""
        reach = _KERNEL_RADIUS[self.resize] * tf.maximum(1.0 / scale, 1.0) + _WINDOW_MARGIN
        first = tf.cast(tf.maximum(tf.floor(offset / scale - reach), 0.0), tf.int32)
        end = tf.cast(tf.math.ceil((offset + self.image_size) / scale + reach), tf.int32)
        return first, tf.minimum(end, size) - first

    def _resample(self, pixels: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        """out(y) = pixels((y - shift) / scale) on the crop's grid, antialiased."""
        side = self.image_size
        crop = tf.raw_ops.ScaleAndTranslate(
            images=pixels[tf.newaxis],
            size=[side, side],
            scale=scale,
            translation=shift,
            kernel_type=self.resize,
            antialias=True,
        )
        return tf.reshape(crop, [side, side, 3])


def rescaled_size(size: tf.Tensor, shorter_side: tf.Tensor) -> tf.Tensor:
    """Height and width after the isotropic rescale, int32 [2].

    The shorter side becomes exactly S, the longer one `long * S / short` rounded half up.
    """
    short = tf.reduce_min(size)
    return (2 * size * shorter_side + short) // (2 * short)
