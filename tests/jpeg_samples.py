"""Small JPEG files for the tests of the input pipeline."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

from vggrepro.preprocessing import Preprocessing

NO_COLOUR = ((0.0, 0.0, 0.0),) * 3
# Eigenvectors times eigenvalues of ImageNet's RGB covariance, pixels in [0, 1].
IMAGENET_COLOUR = tuple(
    tuple(float(v) for v in row)
    for row in np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    * np.array([0.2175, 0.0188, 0.0045])
)


def settings(image_size: int = 16, side: int = 20, **changes: object) -> Preprocessing:
    """Preprocessing that only crops, unless told otherwise."""
    values: dict = {
        "image_size": image_size,
        "scale_min": side,
        "scale_max": side,
        "flip": False,
        "colour_shift": 0.0,
        "resize": "triangle",
        "decode": "exact",
        "mean_rgb": (0.0, 0.0, 0.0),
        "colour_components": NO_COLOUR,
    }
    return Preprocessing(**{**values, **changes})


AUGMENTED = settings(
    scale_min=18, scale_max=24, flip=True, colour_shift=0.1, colour_components=IMAGENET_COLOUR
)  # fmt: skip


def augmented(preprocessing: Preprocessing, data: bytes, seed: Sequence[int]) -> tf.Tensor:
    """The training crop of one file, its size taken from its header."""
    augmentation = preprocessing.augmentation(tf.constant([seed], tf.int64), None)
    own = tf.nest.map_structure(lambda many: many[0], augmentation)
    return preprocessing.training_image(tf.constant(data), own)


def pixels(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3]: coarse colour patches with fine noise on top."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 7), -(-width // 7), 3))
    patches = np.kron(coarse, np.ones((7, 7, 1)))[:height, :width]
    noise = random.integers(-40, 41, (height, width, 3))
    return np.clip(patches + noise, 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int = 90, subsampled: bool = True) -> bytes:
    """A JPEG file; a single channel makes it greyscale."""
    return tf.io.encode_jpeg(image, quality=quality, chroma_downsampling=subsampled).numpy()


@st.composite
def jpegs(draw: st.DrawFn, smallest: int = 9, largest: int = 160) -> bytes:
    """Files of any size, aspect ratio, quality, chroma subsampling; some greyscale."""
    sides = st.integers(smallest, largest)
    image = pixels(draw(sides), draw(sides), draw(st.integers(0, 2**16)))
    if draw(st.integers(0, 5)) == 0:
        image = image[..., :1]
    return jpeg(image, draw(st.integers(20, 100)), draw(st.booleans()))
