"""The compiled crop against TensorFlow's ops, and life without a compiler."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from jpeg_samples import pixels
from small_runs import tiny_config, tiny_data

from vggrepro import compiled_ops, resampling
from vggrepro.data_source import open_data
from vggrepro.resampling import KERNEL_RADIUS, Crop, Window

needs_ops = pytest.mark.skipif(
    compiled_ops.library() is None, reason="no C compiler here that can make the op"
)
RGB = tf.constant([-123.7, 0.0, 3.25])


@st.composite
def boxes(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """An image and a window of it."""
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    rows, columns = draw(st.integers(1, height - top)), draw(st.integers(1, width - left))
    return pixels(height, width, draw(st.integers(0, 2**16))), [top, left, rows, columns]


def window(box: list[int], scale: tuple[float, float], shift: tuple[float, float]) -> Window:
    return Window(tf.constant(box), tf.constant(scale), tf.constant(shift))


@pytest.mark.skipif(
    shutil.which("gcc") is None or "CC" in os.environ, reason="no GCC here, or CC tells otherwise"
)
def test_gcc_compiles_it() -> None:
    """Without this the tests below could all be skipped unnoticed."""
    assert compiled_ops.library() is not None
    ops = compiled_ops.load()
    assert ops is not None
    if platform.machine() == "x86_64" and "sse4_2" in Path("/proc/cpuinfo").read_text():
        assert ops.read_record is not None and ops.read_ahead is not None


@needs_ops
@given(
    boxes(), st.integers(1, 70), st.sampled_from(sorted(KERNEL_RADIUS)), st.booleans(),
    st.tuples(*[st.floats(0.0625, 4.0, width=32)] * 2),
    st.tuples(*[st.floats(-20.0, 20.0, width=32)] * 2),
)  # fmt: skip
def test_the_compiled_op_has_the_bits_of_tensorflow(
    source: tuple, side: int, kernel: str, flip: bool, scale: tuple, shift: tuple
) -> None:
    """Crops that reach beyond the window too, where there is nothing but the colour."""
    image, box = source
    own = tf.constant(image), window(box, scale, shift), tf.constant(flip), RGB
    assert resampling.compiled_ops() is not None
    found = Crop(side, kernel).of(*own).numpy()
    assert found.shape == (side, side, 3)
    assert found.tobytes() == Crop(side, kernel).with_tensorflow(*own).numpy().tobytes()


@needs_ops
@given(
    st.tuples(*[st.integers(1, 5000)] * 2), st.integers(1, 300), st.integers(0, 300),
    st.tuples(*[st.floats(0.0, 1.0 - 2.0**-23, width=32)] * 2),
    st.sampled_from(sorted(KERNEL_RADIUS)),
)  # fmt: skip
def test_the_compiled_window_has_the_bits_of_tensorflow(
    size: tuple[int, int], side: int, extra: int, corner: tuple, kernel: str
) -> None:
    place = tf.constant([float(side + extra)]), tf.constant(corner)
    assert resampling.compiled_ops() is not None
    found = Crop(side, kernel).window(tf.constant([*size, 3]), *place)
    expected = Crop(side, kernel).windows(tf.constant(size), *place)
    assert [part.numpy().tobytes() for part in found] == [
        part.numpy().tobytes() for part in expected
    ]


@needs_ops
@pytest.mark.parametrize("box", [[-1, 0, 4, 4], [0, -1, 4, 4], [0, 0, 11, 4], [0, 7, 4, 4]])
def test_a_window_outside_the_image_is_an_error(box: list[int]) -> None:
    own = window(box, (1.0, 1.0), (0.0, 0.0)), tf.constant(False), RGB
    with pytest.raises(tf.errors.InvalidArgumentError, match="not inside the image"):
        Crop(4, "triangle").of(tf.zeros([10, 10, 3], tf.uint8), *own)


@needs_ops
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ({"pixels": tf.zeros([4, 4, 4], tf.uint8)}, r"not \[height, width, 3\]"),
        ({"rgb": tf.zeros([4])}, "another size"),
        ({"side": 0}, "at least 1"),
    ],
)
def test_the_op_refuses_what_it_would_misread(fault: dict, complaint: str) -> None:
    box, scale, shift = window([0, 0, 4, 4], (1.0, 1.0), (0.0, 0.0))
    given = {
        "pixels": tf.zeros([4, 4, 3], tf.uint8), "box": box, "scale": scale, "shift": shift,
        "flip": tf.constant(False), "rgb": RGB, "side": 2, "cubic": False,
    }  # fmt: skip
    ops = resampling.compiled_ops()
    assert ops is not None
    with pytest.raises(tf.errors.InvalidArgumentError, match=complaint):
        ops.crop(**{**given, **fault})


@pytest.fixture
def no_op_yet(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """As in a new process of a user who never compiled it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    resampling._tried_ops.cache_clear()
    yield tmp_path
    resampling._tried_ops.cache_clear()


@pytest.mark.parametrize("compiler", ["", "false", "no-such-compiler"])
def test_without_a_compiler_tensorflow_does_it(
    no_op_yet, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert resampling.compiled_ops() is None
    image = tf.constant(pixels(20, 30, seed=0))
    own = window([1, 2, 18, 20], (0.5, 0.5), (0.0, 0.0)), tf.constant(True), RGB
    found = Crop(8, "triangle").of(image, *own)
    assert np.array_equal(found, Crop(8, "triangle").with_tensorflow(image, *own))


@pytest.mark.parametrize("by", ["tensorflow", pytest.param("compiled", marks=needs_ops)])
def test_a_run_says_what_resampled_its_images(monkeypatch, tmp_path, by: str) -> None:
    if by == "tensorflow":
        monkeypatch.setattr(resampling, "compiled_ops", lambda: None)
    config = tiny_config(tiny_data(tmp_path))
    assert open_data(config, lambda line: None).record["resampling"] == by


@needs_ops
def test_it_is_compiled_once_and_kept(no_op_yet, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled_ops.library()
    assert first is not None and [*(no_op_yet / "vggrepro").iterdir()] == [first]

    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refused)
    assert compiled_ops.library() == first


def test_a_home_that_cannot_be_written_is_no_error(
    no_op_yet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_op_yet / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_op_yet / "file"))
    assert compiled_ops.load() is None


@needs_ops
@pytest.mark.parametrize("name", ["window", "crop"])
def test_ops_with_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A compiler that fuses products and sums rounds otherwise."""
    ops = resampling.compiled_ops()
    assert ops is not None and resampling._agree(ops)

    def rounded_otherwise(*inputs: tf.Tensor, **form: object) -> object:
        return tf.nest.map_structure(
            lambda x: x * (1.0 + 2.0**-23) if x.dtype.is_floating else x,
            getattr(ops, name)(*inputs, **form),
        )

    monkeypatch.setattr(compiled_ops, "load", lambda: ops._replace(**{name: rounded_otherwise}))
    resampling._tried_ops.cache_clear()
    assert resampling.compiled_ops() is None
    resampling._tried_ops.cache_clear()
