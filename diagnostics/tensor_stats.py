"""Numbers that say how near an array is to overflow, or how far beyond."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

_CHUNK = 1 << 20  # elements: bounds the memory of the float64 working copy


@dataclass(frozen=True)
class TensorStats:
    """What `describe` found in one array.

    Attributes:
      nan, pos_inf, neg_inf: counts of non-finite elements.
      size: count of all elements.
      absmax: largest absolute value, infinities included, NaN left out; 0 if none.
      l2, rms: Euclidean norm and root mean square of the finite elements; 0 if none.
      minimum, maximum: over the finite elements; NaN if there is none.
      headroom: log2(largest finite number of the type / largest finite absolute
        value), in bits: how often the array can double before it overflows. inf for
        all zeros and for no elements; -inf as soon as one element is not finite.
    """

    nan: int
    pos_inf: int
    neg_inf: int
    size: int
    absmax: float
    l2: float
    rms: float
    minimum: float
    maximum: float
    headroom: float

    @property
    def finite(self) -> bool:
        """Whether every element is finite."""
        return self.nan + self.pos_inf + self.neg_inf == 0


def largest_finite(dtype: np.dtype) -> float:
    """The largest finite number of a real type; 1 for bool."""
    if dtype.kind == "b":
        return 1.0
    if dtype.kind in "iu":
        return float(np.iinfo(dtype).max)
    return float(ml_dtypes.finfo(dtype).max)


def describe(array: np.ndarray) -> TensorStats:
    """Statistics of a real array of any type and shape, bfloat16 and float16 included.

    Computed in float64, piece by piece; neither large nor tiny elements overflow or
    underflow in the norm, because it is scaled by the maximum.
    """
    array = np.asarray(array)
    nan = pos_inf = neg_inf = finite = 0
    minimum, maximum = math.inf, -math.inf
    for chunk in _chunks(array):
        nan += int(np.count_nonzero(np.isnan(chunk)))
        pos_inf += int(np.count_nonzero(chunk == np.inf))
        neg_inf += int(np.count_nonzero(chunk == -np.inf))
        kept = chunk[np.isfinite(chunk)]
        finite += kept.size
        minimum = min(minimum, float(kept.min(initial=math.inf)))
        maximum = max(maximum, float(kept.max(initial=-math.inf)))
    largest = max(abs(minimum), abs(maximum)) if finite else 0.0
    l2 = _scaled_norm(array, largest)
    return TensorStats(
        nan=nan,
        pos_inf=pos_inf,
        neg_inf=neg_inf,
        size=array.size,
        absmax=math.inf if pos_inf + neg_inf else largest,
        l2=l2,
        rms=l2 / math.sqrt(finite) if finite else 0.0,
        minimum=minimum if finite else math.nan,
        maximum=maximum if finite else math.nan,
        headroom=_headroom(largest_finite(array.dtype), largest, finite < array.size),
    )


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    values = array.reshape(-1)
    for start in range(0, array.size, _CHUNK):
        yield values[start : start + _CHUNK].astype(np.float64)


def _scaled_norm(array: np.ndarray, largest: float) -> float:
    if largest == 0.0:
        return 0.0
    total = 0.0
    for chunk in _chunks(array):
        total += float(np.sum(np.square(chunk[np.isfinite(chunk)] / largest)))
    return largest * math.sqrt(total)


def _headroom(limit: float, largest: float, overflowed: bool) -> float:
    if overflowed:
        return -math.inf
    return math.inf if largest == 0.0 else math.log2(limit) - math.log2(largest)
