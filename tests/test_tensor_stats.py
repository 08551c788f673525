"""Statistics of arrays against plain numpy, and where plain numpy overflows."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import tensor_stats
from diagnostics.tensor_stats import describe, largest_finite

NUMBERS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0])


@given(values=st.lists(NUMBERS, max_size=30), chunk=st.integers(1, 40))
def test_against_numpy_whatever_the_piece_size(values, chunk):
    array = np.array(values, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_stats, "_CHUNK", chunk)
        stats = describe(array)
    finite = array[np.isfinite(array)].astype(np.float64)
    assert (stats.nan, stats.size) == (np.isnan(array).sum(), array.size)
    assert stats.pos_inf == (array == np.inf).sum()
    assert stats.neg_inf == (array == -np.inf).sum()
    assert stats.finite == np.isfinite(array).all()
    not_nan = np.abs(array[~np.isnan(array)])
    assert stats.absmax == (not_nan.max() if not_nan.size else 0.0)
    if finite.size:
        assert (stats.minimum, stats.maximum) == (finite.min(), finite.max())
        assert stats.l2 == pytest.approx(np.linalg.norm(finite), rel=1e-12)
        assert stats.rms == pytest.approx(np.sqrt(np.mean(finite**2)), rel=1e-12)
    else:
        assert (stats.l2, stats.rms) == (0.0, 0.0)
        assert math.isnan(stats.minimum) and math.isnan(stats.maximum)


@pytest.mark.parametrize("value", [1e308, 3e-320, 1e200, 1e-200])
def test_the_norm_neither_overflows_nor_underflows(value):
    stats = describe(np.full((2, 2), value / 2))
    assert stats.l2 == pytest.approx(value)
    assert stats.rms == pytest.approx(value / 2)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (np.float16, 65504.0),
        (ml_dtypes.bfloat16, 3.3895313892515355e38),
        (np.float32, 3.4028234663852886e38),
        (np.float64, 1.7976931348623157e308),
        (np.int8, 127.0),
        (np.uint8, 255.0),
        (np.bool_, 1.0),
    ],
)
def test_headroom_counts_doublings_to_the_largest_number(dtype, limit):
    assert largest_finite(np.dtype(dtype)) == limit
    assert describe(np.array([0, 1], dtype)).headroom == pytest.approx(math.log2(limit))
    assert describe(np.array([0, 0], dtype)).headroom == math.inf
    assert describe(np.zeros((0, 3), dtype)).headroom == math.inf


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_headroom_says_how_many_doublings_survive(dtype):
    value = np.array([3.0, -1.0], dtype)
    doublings = math.floor(describe(value).headroom)
    with np.errstate(over="ignore"):
        assert np.isfinite((value.astype(np.float64) * 2.0**doublings).astype(dtype)).all()
        assert not np.isfinite(
            (value.astype(np.float64) * 2.0 ** (doublings + 1)).astype(dtype)
        ).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_element_leaves_no_headroom(dtype, bad):
    stats = describe(np.array([[0.5, bad], [1.0, -2.0]], dtype))
    assert stats.headroom == -math.inf
    assert stats.nan + stats.pos_inf + stats.neg_inf == 1
    assert (stats.minimum, stats.maximum) == (-2.0, 1.0)
    assert stats.l2 == pytest.approx(math.sqrt(5.25))
    assert stats.rms == pytest.approx(math.sqrt(5.25 / 3))


def test_a_scalar_and_a_transposed_array():
    assert describe(np.float32(-3.0)).absmax == 3.0
    assert describe(np.arange(6.0).reshape(2, 3).T).l2 == pytest.approx(math.sqrt(55))


def test_extreme_integers():
    stats = describe(np.array([np.iinfo(np.int64).min, 0]))
    assert stats.absmax == 2.0**63
    assert stats.headroom == pytest.approx(0.0)
