"""Dirty images, of every kind, made from bytes."""

import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from jpeg_samples import jpeg, jpegs, pixels

from vggrepro.image_inspection import GIANT_PIXELS, KINDS, read_header, unusual

PIL = pytest.importorskip("PIL.Image")


def pillow(mode: str, **options: object) -> bytes:
    file = io.BytesIO()
    PIL.fromarray(pixels(20, 30, 0)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def rotated(orientation: int) -> bytes:
    exif = PIL.Exif()
    exif[0x0112] = orientation
    return pillow("RGB", exif=exif)


def as_ycck(data: bytes) -> bytes:
    """The Adobe marker says which transform a file of four components has."""
    place = data.index(b"Adobe")
    return data[: place + 11] + b"\x02" + data[place + 12 :]


def with_size(data: bytes, height: int, width: int) -> bytes:
    """The same file with other numbers in its frame header."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


CLEAN = jpeg(pixels(20, 30, 0))
SAMPLES = {
    "empty": b"",
    "not-image": b"<html>404</html>",
    "truncated": CLEAN[: len(CLEAN) // 2],
    "tiny": jpeg(pixels(20, 7, 0)),
    "giant": with_size(CLEAN, 20_000, 20_000),
    "cmyk": pillow("CMYK"),
    "ycck": as_ycck(pillow("CMYK")),
    "grayscale": pillow("L"),
    "png": tf.io.encode_png(pixels(20, 30, 0)).numpy(),
    "exif-rotation": rotated(6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found(kind: str) -> None:
    assert unusual(SAMPLES[kind]).kinds == (kind,)


def test_there_is_a_sample_of_each_kind() -> None:
    assert set(SAMPLES) == set(KINDS)


@given(jpegs())
def test_sizes_are_those_of_the_decoder(data: bytes) -> None:
    found = unusual(data)
    image = tf.io.decode_jpeg(data)
    assert (found.height, found.width) == tuple(image.shape[:2])
    assert ("grayscale" in found.kinds) == (image.shape[2] == 1)
    assert not {"truncated", "not-image", "empty", "cmyk", "giant"} & set(found.kinds)


@pytest.mark.parametrize("progressive", [False, True])
def test_other_files_are_clean(progressive: bool) -> None:
    assert unusual(pillow("RGB", progressive=progressive)).kinds == ()
    assert unusual(rotated(1)).kinds == ()


@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]))
def test_any_bytes_are_judged(noise: bytes, start: bytes) -> None:
    kinds = unusual(start + noise).kinds
    assert {"empty", "not-image", "truncated", "giant"} & set(kinds)


@given(jpegs(), st.integers(0, 2**32))
def test_every_cut_is_found(data: bytes, where: int) -> None:
    cut = data[: where % (len(data) - 2)]  # the last two bytes only say that it ends
    assert {"truncated", "empty", "not-image"} & set(unusual(cut).kinds)


def test_a_bomb_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggrepro.image_inspection.image_fault", lambda data: 1 / 0)
    assert unusual(SAMPLES["giant"]).kinds == ("giant",)
    header = read_header(with_size(CLEAN, 10_000, 10_000))
    assert header.height * header.width == GIANT_PIXELS and header.kinds == ()


def test_a_conversion_gives_the_pixels_of_training() -> None:
    """What 'convert' relies on: the decoder makes RGB of every kind that is let through."""
    for kind in ("cmyk", "ycck", "grayscale", "png", "exif-rotation"):
        image = tf.io.decode_jpeg(SAMPLES[kind], channels=3, dct_method="INTEGER_ACCURATE")
        assert image.shape == (20, 30, 3), kind  # upright as stored: no rotation
        assert np.ptp(image.numpy()) > 50
