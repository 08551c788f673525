"""What `OpTrace` remembers of an op, and of one whose result is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from diagnostics.diagnosis import InputRange
from diagnostics.source_lines import SourceLine
from diagnostics.tensor_stats import describe

_CHUNK = 1 << 18  # elements: the working copy stays in the processor's cache


class OpRecord(NamedTuple):
    """One executed op that made or wrote floating-point numbers.

    Attributes:
      order: its place among all executed ops, from 0.
      phase: 'forward', 'loss', 'backward' or 'update'.
      absmax: largest absolute value of its outputs; inf or NaN if any is.
      line: the user's line; None where only library code ran it.
    """

    order: int
    op: str
    phase: str
    layer: str | None
    absmax: float
    line: SourceLine | None


_SPREADS = frozenset(["BroadcastTo", "Fill", "Tile"])


@dataclass(frozen=True)
class HitDetails:
    """Numbers of the first non-finite output, taken where a non-finite value begins.

    Attributes:
      count: of size elements, how many are not finite; nan: how many are NaN.
      dtype: the output's type.
      row_counts, row_absmax: per row of the batch the number of non-finite
        elements and the largest finite absolute value; None where the output
        has no such rows.
      inputs: ranges of the op's numeric inputs.
    """

    count: int
    nan: int
    size: int
    dtype: np.dtype
    row_counts: np.ndarray | None
    row_absmax: np.ndarray | None
    inputs: tuple[InputRange, ...]


@dataclass(eq=False)
class Hit:
    """An op with a non-finite result, as a node of the flow of non-finite values.

    Attributes:
      parents: the hits that made its non-finite inputs.
      consumers: later hits that took its result.
      bookkeeping: the guard's own reading; shows that a value got there, and is
        never a beginning.
      removed: some op took its result and made finite numbers of it.
      from_state: read from a variable that held it before the trace.
      origin: a non-finite value begins here.
      on_purpose: infinite because of an infinite constant, or a NaN constant spread out.
      live: its result, or what came of it, was not removed; set by
        `diagnostics.origins.mark_live`.
      details: only where no parent explains the result.
    """

    record: OpRecord
    parents: tuple[Hit, ...]
    bookkeeping: bool = False
    consumers: list[Hit] = field(default_factory=list)
    removed: bool = False
    from_state: bool = False
    origin: bool = False
    on_purpose: bool = False
    live: bool = True
    details: HitDetails | None = None

    @property
    def kind(self) -> str:
        """'nan' or 'inf'."""
        return "nan" if math.isnan(self.record.absmax) else "inf"

    def begin(self, details: HitDetails, nan_fed: bool, inf_fed: bool) -> None:
        """Judges a hit that no earlier op explains.

        Args:
          nan_fed, inf_fed: whether a constant among its inputs holds NaN, or
            some input an infinity put there on purpose.
        """
        self.details = details
        # A NaN spread out for a `tf.where`, as TensorFlow's deterministic cross-entropy does.
        spread = nan_fed and not self.parents and self.record.op in _SPREADS
        self.on_purpose = spread or (inf_fed and not nan_fed and details.nan == 0)
        self.origin = not (nan_fed or self.on_purpose)


def describe_hit(
    op: str,
    inputs: Sequence[tf.Tensor],
    results: Sequence[np.ndarray],
    batch_size: int | None,
) -> tuple[HitDetails, bool, bool]:
    """(details of an op's first non-finite result, any NaN fed, any infinity fed)."""
    bad = next(array for array in results if not np.isfinite(largest_magnitude(array)))
    shown = describe(_real(bad))
    row_counts = row_absmax = None
    if batch_size is not None and bad.ndim and bad.shape[0] == batch_size:
        rows = [describe(_real(row)) for row in bad]
        row_counts = np.array([row.nan + row.pos_inf + row.neg_inf for row in rows])
        row_absmax = np.array([np.nanmax([-row.minimum, row.maximum, 0.0]) for row in rows])
    fed = [
        (name, describe(_real(host_array(tensor))), tuple(tensor.shape))
        for name, tensor in zip(_input_names(op, len(inputs)), inputs, strict=True)
        if _is_numeric(tensor.dtype)
    ]
    details = HitDetails(
        count=shown.nan + shown.pos_inf + shown.neg_inf,
        nan=shown.nan,
        size=shown.size,
        dtype=bad.dtype,
        row_counts=row_counts,
        row_absmax=row_absmax,
        inputs=tuple(
            InputRange(
                name, shape, stats.minimum, stats.maximum, stats.nan + stats.pos_inf + stats.neg_inf
            )
            for name, stats, shape in fed
        ),
    )
    nan_fed = any(stats.nan for _, stats, _ in fed)
    inf_fed = any(stats.pos_inf + stats.neg_inf for _, stats, _ in fed)
    return details, nan_fed, inf_fed


def host_array(tensor: tf.Tensor) -> np.ndarray:
    """The tensor's value; a scalar bfloat16 tensor is no array to numpy by itself."""
    return np.asarray(tensor.numpy())


def largest_magnitude(array: np.ndarray) -> float:
    """Largest absolute value; NaN if any element is NaN; 0 for no elements.

    Without the sign bit, the bits of a floating-point number order as integers:
    finite below infinity below NaN, for every type alike. One pass, no copy.
    """
    values = _real(array).reshape(-1)
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    bits = values.view(unsigned)
    mask = unsigned.type(np.iinfo(unsigned).max >> 1)
    largest = unsigned.type(0)
    for start in range(0, bits.size, _CHUNK):
        largest = max(largest, (bits[start : start + _CHUNK] & mask).max())
    return float(np.array([largest], unsigned).view(values.dtype)[0])


def _real(array: np.ndarray) -> np.ndarray:
    """Complex numbers as pairs of real ones."""
    if array.dtype.kind != "c":
        return array
    return np.stack([array.real, array.imag], axis=-1)


def _is_numeric(dtype: tf.DType) -> bool:
    return dtype.is_floating or dtype.is_complex or dtype.is_integer or dtype.is_bool


def _input_names(op: str, count: int) -> list[str]:
    """The op's own argument names; a list argument's elements are numbered."""
    definition = op_def_registry.get(op)
    names = [] if definition is None else [arg.name for arg in definition.input_arg]
    if len(names) == count:
        return names
    return [f"{names[0] if names else 'input'}[{place}]" for place in range(count)]
