"""Preprocessing against literal TensorFlow, and the invariants of the paper's section 3.1."""

import io

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st
from jpeg_samples import IMAGENET_COLOUR, augmented, jpeg, jpegs, pixels, settings

from vggrepro.preprocessing import Place, Preprocessing
from vggrepro.resampling import rescaled_size

# Grey levels of 255. Rounding of positions in float32 moves a sample by up to 1e-4 pixels.
TOLERANCE = 0.05
METHODS = {"triangle": "bilinear", "keyscubic": "bicubic"}

kernels = st.sampled_from(sorted(METHODS))
decoders = st.sampled_from(["exact", "fast"])
seeds = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
places = st.tuples(*[st.floats(0.0, 1.0 - 2.0**-23, width=32)] * 2)


def crop(preprocessing: Preprocessing, data: bytes, side: int, place: tuple) -> np.ndarray:
    at = Place(tf.constant([float(side)]), tf.constant(place))
    return preprocessing._crop(tf.constant(data), at, tf.constant(False), tf.zeros([3])).numpy()


def train(preprocessing: Preprocessing, data: bytes, seed: tuple[int, int]) -> np.ndarray:
    return augmented(preprocessing, data, seed).numpy()


def train_many(preprocessing: Preprocessing, data: bytes, count: int) -> np.ndarray:
    @tf.function
    def augment(seeds: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(
            lambda augmentation: preprocessing.training_image(tf.constant(data), augmentation),
            preprocessing.augmentation(seeds, None),
            fn_output_signature=tf.float32,
        )

    return augment(tf.stack([tf.fill([count], 7), tf.range(count)], axis=1)).numpy()


def literal_crop(
    data: bytes, size: int, side: int, place: tuple, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decode, rescale the whole image, slice; and the size of the rescaled image."""
    image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    shape = np.array(image.shape[:2], np.float32)
    rescaled = np.rint(shape * np.float32(side) / shape.min()).astype(int)
    whole = tf.image.resize(image, rescaled, method=METHODS[method], antialias=True).numpy()
    room = rescaled - size
    top, left = np.floor(np.float32(place) * (room + 1).astype(np.float32)).astype(int)
    assert 0 <= top <= room[0] and 0 <= left <= room[1]
    return whole[top : top + size, left : left + size], rescaled


@given(jpegs(), st.integers(1, 48), st.integers(0, 40), places, kernels)
def test_exact_path_is_rescale_then_crop(
    data: bytes, size: int, extra: int, place: tuple, kernel: str
) -> None:
    expected, rescaled = literal_crop(data, size, size + extra, place, kernel)
    assert rescaled.min() == size + extra
    found = crop(settings(size, size + extra, resize=kernel), data, size + extra, place)
    assert found.shape == (size, size, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@st.composite
def files_of_any_encoder(draw: st.DrawFn) -> bytes:
    """Every chroma subsampling, progressive or not, restart markers, grey, CMYK."""
    picture = pytest.importorskip("PIL.Image")
    sides = st.integers(9, 160)
    image = pixels(draw(sides), draw(sides), draw(st.integers(0, 2**16)))
    mode = draw(st.sampled_from(["RGB", "RGB", "RGB", "L", "CMYK"]))
    options = {"quality": draw(st.integers(20, 100)), "progressive": draw(st.booleans())}
    if mode != "L":
        options["subsampling"] = draw(st.sampled_from([0, 1, 2]))
    if draw(st.booleans()):
        options["restart_marker_blocks"] = draw(st.integers(1, 9))
    file = io.BytesIO()
    picture.fromarray(image).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@given(
    st.one_of(jpegs(), files_of_any_encoder()),
    st.integers(1, 48), st.integers(0, 100), places, kernels,
)  # fmt: skip
def test_fast_path_has_the_bits_of_the_exact_path(
    data: bytes, size: int, extra: int, place: tuple, kernel: str
) -> None:
    """A decoded window differs from the whole image only in its outermost two pixels."""
    exact = crop(settings(size, resize=kernel), data, size + extra, place)
    fast = crop(settings(size, resize=kernel, decode="fast"), data, size + extra, place)
    assert fast.tobytes() == exact.tobytes()


@given(st.lists(st.tuples(jpegs(), seeds), min_size=1, max_size=5), kernels, decoders)
def test_many_at_once_have_the_bits_of_one_by_one(
    images: list[tuple[bytes, tuple[int, int]]], kernel: str, decode: str
) -> None:
    """With sizes from an index or from the header, whatever the other images are."""
    preprocessing = settings(
        16, scale_max=90, flip=True, colour_shift=0.1, colour_components=IMAGENET_COLOUR,
        resize=kernel, decode=decode,
    )  # fmt: skip
    files = [data for data, _ in images]
    sizes = [tf.io.extract_jpeg_shape(data)[:2] for data in files]
    together = preprocessing.augmentation(
        tf.constant([seed for _, seed in images], tf.int64), tf.stack(sizes)
    )
    for i, (data, seed) in enumerate(images):
        own = tf.nest.map_structure(lambda many, i=i: many[i], together)
        found = preprocessing.training_image(tf.constant(data), own).numpy()
        assert found.tobytes() == train(preprocessing, data, seed).tobytes()


@given(st.lists(seeds, min_size=1, max_size=5))
def test_draws_are_those_of_tensorflow_s_stateless_op(keys: list[tuple[int, int]]) -> None:
    """Runs of earlier versions verify only while these numbers stay."""
    found = settings(scale_max=90).augmentation(tf.constant(keys, tf.int64), None)
    for i, key in enumerate(keys):
        draws = tf.random.stateless_uniform([8], tf.constant(key, tf.int64), alg="philox")
        assert found.crop.side[i] == 20 + tf.floor(draws[0] * 71.0)
        assert np.array_equal(found.crop.corner[i], draws[1:3])
        assert found.flip[i] == (draws[3] < 0.5)
        assert np.array_equal(found.colour[i], draws[5:])


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (96, 1000), (1200, 900)])
@pytest.mark.parametrize("kernel", sorted(METHODS))
def test_paths_agree_on_photograph_sizes(shape: tuple[int, int], kernel: str) -> None:
    data = jpeg(pixels(*shape, seed=1))
    for place in ((0.0, 0.0), (0.37, 0.81), (0.99, 0.99)):
        expected, _ = literal_crop(data, 224, 256, place, kernel)
        exact = crop(settings(224, resize=kernel), data, 256, place)
        fast = crop(settings(224, resize=kernel, decode="fast"), data, 256, place)
        np.testing.assert_allclose(exact, expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(fast, expected, rtol=0, atol=TOLERANCE)


@given(jpegs(), decoders, st.integers(0, 9))
def test_evaluation_takes_the_centre(data: bytes, decode: str, extra: int) -> None:
    side = 16 + extra
    found = settings(16, decode=decode).evaluation_image(tf.constant(data), side).numpy()
    image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    shape = np.array(image.shape[:2], np.float32)
    rescaled = np.rint(shape * np.float32(side) / shape.min()).astype(int)
    whole = tf.image.resize(image, rescaled, antialias=True).numpy()
    top, left = (rescaled - 16) // 2
    expected = whole[top : top + 16, left : left + 16]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_shorter_side_becomes_exactly_s(height: int, width: int, side: int) -> None:
    rescaled = rescaled_size(tf.constant([float(height), float(width)]), tf.constant([float(side)]))
    short, long = sorted((height, width))
    exact = long * side / short
    assert min(rescaled.numpy()) == side
    assert abs(max(rescaled.numpy()) - exact) <= 0.5 + 1e-6 * exact


@given(st.integers(1, 300), st.integers(0, 300))
def test_side_covers_its_range_to_both_ends(smallest: int, spread: int) -> None:
    jitter = settings(1, scale_min=smallest, scale_max=smallest + spread)
    draws = [0.0, 0.25, 0.5, 1.0 - 2.0**-23]
    sides = [float(jitter._shorter_side(tf.constant([draw]))[0]) for draw in draws]
    assert sides[0] == smallest and sides[-1] == smallest + spread
    assert sides == sorted(sides) and all(side == int(side) for side in sides)


def test_every_crop_position_is_reached_and_none_outside() -> None:
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None, None] * 10, (24, 20, 3))
    images = train_many(settings(16, 20), jpeg(ramp, quality=100), 300)
    tops, counts = np.unique(np.rint(images[:, 0].mean(axis=(1, 2)) / 10), return_counts=True)
    assert list(tops) == list(range(9))  # 24 rows, crops of 16: offsets 0 to 8
    assert counts.min() > 10  # 33 expected


@given(jpegs(largest=60), seeds, decoders)
def test_same_seed_same_bits(data: bytes, seed: tuple[int, int], decode: str) -> None:
    augmented = settings(
        8, scale_min=10, scale_max=14, flip=True, colour_shift=0.1,
        colour_components=IMAGENET_COLOUR, decode=decode,
    )  # fmt: skip
    image = train(augmented, data, seed)
    assert image.tobytes() == train(augmented, data, seed).tobytes()
    assert image.tobytes() != train(augmented, data, (seed[0], seed[1] + 1)).tobytes()
    assert image.tobytes() != train(augmented, data, (seed[0] ^ 1, seed[1])).tobytes()


@given(jpegs(), seeds, st.tuples(*[st.floats(0.0, 255.0, width=32)] * 3))
def test_range_and_mean_subtraction(data: bytes, seed: tuple[int, int], mean: tuple) -> None:
    plain = train(settings(), data, seed)
    assert plain.shape == (16, 16, 3) and plain.dtype == np.float32
    assert plain.min() >= -1e-3 and plain.max() <= 255.0 + 1e-3
    centred = train(settings(mean_rgb=mean), data, seed)
    np.testing.assert_allclose(centred + np.float32(mean), plain, rtol=0, atol=1e-3)
    side = tf.constant(data), 20
    evaluated = settings(mean_rgb=mean).evaluation_image(*side).numpy() + np.float32(mean)
    np.testing.assert_allclose(
        evaluated, settings().evaluation_image(*side).numpy(), rtol=0, atol=1e-3
    )


@given(jpegs(), seeds, decoders)
def test_flip_is_nothing_or_a_mirror(data: bytes, seed: tuple[int, int], decode: str) -> None:
    plain = train(settings(decode=decode), data, seed)
    flipped = train(settings(decode=decode, flip=True), data, seed)
    mirror = plain[:, ::-1]
    assert np.array_equal(flipped, plain) or np.array_equal(flipped, mirror)
    assert np.array_equal(flipped[:, ::-1], mirror) or np.array_equal(flipped[:, ::-1], plain)


def test_half_of_the_crops_are_flipped() -> None:
    data = jpeg(pixels(8, 8, seed=0))
    plain = train(settings(8, 8), data, (0, 0))
    flips = (train_many(settings(8, 8, flip=True), data, 1000) != plain).any(axis=(1, 2, 3))
    assert 437 <= flips.sum() <= 563  # 4 standard deviations


@given(jpegs(), seeds)
def test_no_colour_shift_is_the_identity(data: bytes, seed: tuple[int, int]) -> None:
    plain = train(settings(), data, seed)
    off = train(settings(colour_components=IMAGENET_COLOUR), data, seed)
    flat = train(settings(colour_shift=0.1), data, seed)  # a data set without colour variance
    assert np.array_equal(off, plain)
    assert np.array_equal(flat, plain)


@given(jpegs(), seeds)
def test_colour_shift_is_one_colour_for_the_whole_crop(data: bytes, seed: tuple) -> None:
    plain = train(settings(), data, seed)
    shifted = train(settings(colour_shift=0.1, colour_components=IMAGENET_COLOUR), data, seed)
    shift = shifted - plain
    assert np.ptp(shift, axis=(0, 1)).max() < 1e-3
    assert np.abs(shift).max() > 1e-3


def test_colour_shift_is_in_grey_levels() -> None:
    """255 * 0.1 * eigenvalue: 5.5, 0.48 and 0.11 grey levels along ImageNet's components."""
    colour = settings(colour_shift=0.1, colour_components=IMAGENET_COLOUR)
    draws = tf.random.stateless_uniform([4000, 3], [1, 2], alg="philox")
    shifts = np.stack([colour._colour_shift(draw).numpy() for draw in draws[:4000:2]])
    components = np.array(IMAGENET_COLOUR)
    directions = components / np.linalg.norm(components, axis=0)
    along = shifts @ directions
    np.testing.assert_allclose(along.std(axis=0), [5.546, 0.479, 0.115], rtol=0.06)
    assert np.abs(along.mean(axis=0)).max() < 0.4
    assert np.abs(np.corrcoef(along.T) - np.eye(3)).max() < 0.1


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-23])
def test_extreme_draws_stay_finite(draw: float) -> None:
    colour = settings(colour_shift=0.1, colour_components=IMAGENET_COLOUR)
    shift = colour._colour_shift(tf.fill([3], draw)).numpy()
    assert np.isfinite(shift).all() and np.abs(shift).max() < 60


@given(jpegs(smallest=40), seeds, decoders, st.floats(0.0, 0.999))
def test_truncated_file_is_an_error_or_changes_nothing(
    data: bytes, seed: tuple[int, int], decode: str, keep: float
) -> None:
    """A window may lie before the cut; no pixel may ever be invented."""
    whole = train(settings(decode=decode), data, seed)
    try:
        cut = train(settings(decode=decode), data[: int(keep * len(data))], seed)
    except tf.errors.InvalidArgumentError:
        return
    assert np.array_equal(cut, whole)


@given(jpegs(smallest=40), seeds, st.floats(0.0, 0.9))
def test_exact_path_refuses_truncated_files(data: bytes, seed: tuple, keep: float) -> None:
    cut = data[: int(keep * len(data))]
    with pytest.raises(tf.errors.InvalidArgumentError):
        train(settings(), cut, seed)


@given(st.binary(max_size=200), seeds, decoders)
def test_other_bytes_are_an_error(data: bytes, seed: tuple[int, int], decode: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        train(settings(decode=decode), data, seed)


@given(seeds, decoders, st.integers(20, 60), st.integers(20, 60))
def test_png_named_jpeg_is_decoded(
    seed: tuple[int, int], decode: str, height: int, width: int
) -> None:
    """ImageNet holds one."""
    image = pixels(height, width, seed=5)
    found = train(settings(decode=decode), tf.io.encode_png(image).numpy(), seed)
    lossless = train(settings(), jpeg(image, quality=100, subsampled=False), seed)
    assert np.abs(found - lossless).mean() < 2.0  # quality 100 still rounds


@given(seeds, decoders, st.booleans())
def test_cmyk_is_decoded(seed: tuple[int, int], decode: str, progressive: bool) -> None:
    """ImageNet holds 22 of them."""
    picture = pytest.importorskip("PIL.Image")
    image = np.zeros([40, 50, 3], np.uint8) + np.uint8([200, 100, 30])
    file = io.BytesIO()
    cmyk = picture.fromarray(image).convert("CMYK")
    cmyk.save(file, "JPEG", quality=100, progressive=progressive)
    found = train(settings(decode=decode), file.getvalue(), seed)
    assert np.abs(found - [200, 100, 30]).max() <= 2


@given(jpegs(), seeds)
def test_greyscale_becomes_three_equal_channels(data: bytes, seed: tuple[int, int]) -> None:
    grey = tf.io.decode_jpeg(data, channels=1).numpy()
    assume(np.ptp(grey) > 0)
    for decode in ("exact", "fast"):
        image = train(settings(decode=decode), jpeg(grey), seed)
        assert np.array_equal(image[..., 0], image[..., 1])
        assert np.array_equal(image[..., 0], image[..., 2])
