"""Operations that give NaN or infinity for ordinary finite numbers, and when.

Everything else (products, sums, convolutions) gives them only for huge or
non-finite inputs, so its own formula is not to blame.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from diagnostics.diagnosis import FirstNonfinite, InputRange
from diagnostics.report_words import number

UNCAST = "uncast"  # a repair: numbers stay in float32

_LOG = {"log", "xlogy"}
_LOG1P = {"log1p", "xlog1py"}
_DIVISION = {"realdiv", "div", "truediv", "xdivy", "divide", "floordiv", "mod", "floormod"}
_RECIPROCAL = {"reciprocal", "inv"}
_EXPONENTIAL = {"exp", "expm1", "sinh", "cosh"}
_BATCH_NORM = {"fusedbatchnorm", "fusedbatchnormv", "batchnormwithglobalnormalization"}
_POSITIVE_ONLY = {"lgamma", "digamma", "polygamma"}
_MATRIX = {"matrixinverse", "matrixsolve", "cholesky", "logmatrixdeterminant", "svd"}
_OF_INFINITIES = {
    "sub": "the difference of two infinities",
    "mul": "the product of 0 and infinity",
}
_FLOAT32_BITS = 128
_LARGEST_EXPONENT = 88.72  # of exp in float32
_LARGEST_EXPONENT_HALF = 11.09


class DomainFault(NamedTuple):
    """An operation outside its domain.

    Attributes:
      what: as in 'the logarithm of 0'.
      magnitude: largest absolute finite input.
      at_zero: whether an exact zero is at fault, as against a sign or a size.
    """

    what: str
    magnitude: float
    at_zero: bool


def domain_fault(first: FirstNonfinite, half: bool) -> DomainFault | None:
    """How the op at fault left its domain; None if it did not.

    Args:
      half: whether it may have computed in float16, where exp overflows at 11.
    """
    if first.op is None or not first.inputs:
        return None
    name = op_name(first.op)
    finite = [r for r in first.inputs if math.isfinite(r.minimum) and math.isfinite(r.maximum)]
    if any(given.nonfinite for given in first.inputs):
        # The first NaN nevertheless: the infinity had been put there, as in a mask.
        what = _OF_INFINITIES.get(name, f"{first.op} with infinite inputs")
        if "softmax" in name:
            what = "a softmax over nothing but infinite inputs"
        return DomainFault(f"{what} (a mask of -Inf, a logarithm of 0?)", 0.0, False)
    if not finite:
        return None
    magnitude = max(max(abs(r.minimum), abs(r.maximum)) for r in finite)
    fault = _fault(name, finite, half)
    return None if fault is None else DomainFault(fault[0], magnitude, fault[1])


def op_name(op: str) -> str:
    """The kind of op in lower case: 'loss/Log_1' and 'Log' -> 'log'."""
    last = op.split(":")[0].strip().split("/")[-1].split(".")[-1].split(" ")[0]
    return re.sub(r"[_\d]+$", "", last).lower()


def _fault(name: str, given: list[InputRange], half: bool) -> tuple[str, bool] | None:
    first, last = given[0], given[-1]
    if name in _LOG:
        return _below(last, 0.0, "the logarithm")
    if name in _LOG1P:
        return _below(last, -1.0, "the logarithm of 1 + x")
    if name in _DIVISION and last.minimum <= 0 <= last.maximum:
        return "a division by 0", True
    if name in _RECIPROCAL and first.minimum <= 0 <= first.maximum:
        return "a division by 0", True
    if name == "sqrt" and first.minimum < 0:
        return f"the square root of {number(first.minimum)}", False
    if name == "rsqrt" and first.minimum <= 0:
        zero = first.minimum == 0
        return f"1 over the square root of {number(first.minimum)}", zero
    if name in ("sqrtgrad", "rsqrtgrad") and any(r.minimum <= 0 <= r.maximum for r in given):
        return "the gradient of a square root at 0, which is infinite", True
    if name == "pow":
        return _power(first, last)
    if name in _POSITIVE_ONLY and first.minimum <= 0:
        return f"{name} at {number(first.minimum)}", first.minimum == 0
    if name in _MATRIX:
        return f"{name} of a matrix that is singular or nearly so", False
    if name in _EXPONENTIAL:
        return _exponential(name, first, half)
    if (
        name in ("asin", "acos", "atanh", "erfinv")
        and max(abs(first.minimum), abs(first.maximum)) >= 1
    ):
        return f"{name} of a number outside (-1, 1): {_span(first)}", False
    if name == "ndtri" and (first.minimum <= 0 or first.maximum >= 1):
        return f"ndtri of a number outside (0, 1): {_span(first)}", False
    if name == "acosh" and first.minimum < 1:
        return f"acosh of a number below 1: {number(first.minimum)}", False
    if name in _BATCH_NORM and len(given) > 3 and given[-1].minimum <= 0:
        return "a batch normalisation whose variance is 0", True
    return None


def _power(base: InputRange, exponent: InputRange) -> tuple[str, bool] | None:
    whole = exponent.minimum == exponent.maximum and float(exponent.minimum).is_integer()
    if base.minimum < 0 and not whole:
        return f"a power of {number(base.minimum)} with exponent {_span(exponent)}", False
    if base.minimum <= 0 <= base.maximum and exponent.minimum < 0:
        return f"0 to the power of {number(exponent.minimum)}", True
    largest = max(abs(base.minimum), abs(base.maximum))
    if largest > 1 and math.log2(largest) * exponent.maximum > _FLOAT32_BITS:
        return f"{number(largest)} to the power of {number(exponent.maximum)}", False
    return None


def _below(given: InputRange, border: float, what: str) -> tuple[str, bool] | None:
    if given.minimum > border:
        return None
    return f"{what} at {number(given.minimum)}", given.minimum == border


def _exponential(name: str, given: InputRange, half: bool) -> tuple[str, bool] | None:
    largest = max(abs(given.minimum), abs(given.maximum))
    if name in ("exp", "expm1"):
        largest = given.maximum
    limit = _LARGEST_EXPONENT_HALF if half else _LARGEST_EXPONENT
    if largest < limit:
        return None
    return f"{name} of {number(largest)} (it overflows from {limit:g} on)", False


def _span(given: InputRange) -> str:
    if given.minimum == given.maximum:
        return number(given.minimum)
    return f"{number(given.minimum)} to {number(given.maximum)}"
