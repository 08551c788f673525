"""Numbers that say how near an array is to overflow, or how far beyond."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class TensorStats:
    """What `describe` found in one array.

    Attributes:
      nan, pos_inf, neg_inf: counts of non-finite elements.
      size: count of all elements.
      absmax: largest absolute value, infinities included, NaN left out; 0 if none.
      l2, rms: Euclidean norm and root mean square of the finite elements.
      minimum, maximum: over the finite elements; NaN if there is none.
      headroom: log2(largest finite number of the type / absmax), in bits: how often
        the array can double before it overflows. inf for all zeros; -inf as soon as
        one element is not finite.
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
    """The largest finite number of a type; for bool, 1."""
    if dtype == np.bool_:
        return 1.0
    if np.issubdtype(dtype, np.integer):
        return float(np.iinfo(dtype).max)
    return float(ml_dtypes.finfo(dtype).max)


def describe(array: np.ndarray) -> TensorStats:
    """Statistics of a real array of any type and shape, bfloat16 and float16 included."""
    array = np.asarray(array)
    values = array.reshape(-1)
    is_float = array.dtype.kind in "fV"  # ml_dtypes' types are of kind 'V'
    values = values.astype(np.float64)
    nan = np.isnan(values)
    infinite = np.isinf(values)
    finite = values[~(nan | infinite)]
    largest = float(np.max(np.abs(finite), initial=0.0))
    l2 = _scaled_norm(finite, largest)
    any_infinite = bool(infinite.any())
    return TensorStats(
        nan=int(nan.sum()),
        pos_inf=int((values == np.inf).sum()),
        neg_inf=int((values == -np.inf).sum()),
        size=array.size,
        absmax=math.inf if any_infinite else largest,
        l2=l2,
        rms=l2 / math.sqrt(finite.size) if finite.size else 0.0,
        minimum=float(finite.min()) if finite.size else math.nan,
        maximum=float(finite.max()) if finite.size else math.nan,
        headroom=_headroom(
            largest_finite(array.dtype), largest, is_float and finite.size < array.size
        ),
    )


def _scaled_norm(values: np.ndarray, largest: float) -> float:
    """L2 norm whose squares can neither overflow nor underflow."""
    if largest == 0.0:
        return 0.0
    return largest * float(np.sqrt(np.sum(np.square(values / largest))))


def _headroom(limit: float, largest: float, overflowed: bool) -> float:
    if overflowed:
        return -math.inf
    return math.inf if largest == 0.0 else math.log2(limit) - math.log2(largest)
