"""What differs between recorded and replayed numbers, bit for bit, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Difference:
    """The first thing of its kind that is not as recorded.

    Attributes:
      step: the state before this step, or the numbers of this step.
      kind: 'telemetry', 'metrics', 'guard', 'validation', 'state' or 'weights'.
      name: column, metric or array.
      recorded, replayed: the numbers; of an array, where they differ most.
      largest_absolute, largest_relative: over the array.
      differing, size: how many elements differ, of how many.
    """

    step: int
    kind: str
    name: str
    recorded: Any
    replayed: Any
    largest_absolute: float = 0.0
    largest_relative: float = 0.0
    differing: int = 1
    size: int = 1

    def sentence(self) -> str:
        """As in 'step 12, telemetry loss: 2.3 recorded, 2.4 replayed (...)'."""
        where = f"after {self.step} steps" if self.kind in _OF_STATES else f"step {self.step}"
        said = f"{where}, {self.kind} {self.name}: "
        if self.size > 1:
            said += f"{self.differing:,} of {self.size:,} elements differ, the most "
        said += f"{_text(self.recorded)} recorded, {_text(self.replayed)} replayed"
        if self.largest_absolute:
            said += f" (by {self.largest_absolute:.3g}, relative {self.largest_relative:.3g})"
        return said


_OF_STATES = ("state", "weights", "validation")


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def number_difference(
    step: int, kind: str, name: str, recorded: Any, replayed: Any
) -> Difference | None:
    """None if two numbers are the same bits, or both NaN; float32 and float64 as they are."""
    if type(recorded) is not type(replayed) or not isinstance(recorded, (float, np.floating)):
        same = recorded == replayed
        return None if same else Difference(step, kind, name, recorded, replayed)
    old, new = np.asarray(recorded), np.asarray(replayed)
    if old.tobytes() == new.tobytes() or (np.isnan(old) and np.isnan(new)):
        return None
    absolute, relative = _distance(old, new)
    return Difference(
        step, kind, name, float(recorded), float(replayed), float(absolute), float(relative)
    )


def row_difference(
    step: int, columns: Sequence[str], recorded: np.ndarray, replayed: np.ndarray
) -> Difference | None:
    """The first column of a telemetry row that differs; float32 [columns]."""
    for name, old, new in zip(columns, recorded, replayed, strict=True):
        found = number_difference(step, "telemetry", name, np.float32(old), np.float32(new))
        if found is not None:
            return found
    return None


def state_difference(
    step: int, kind: str, recorded: Mapping[str, np.ndarray], replayed: Mapping[str, np.ndarray]
) -> Difference | None:
    """The first array that differs, in the order of the replayed state (forward order)."""
    odd = sorted(recorded.keys() ^ replayed.keys())
    if odd:
        kept = "there" if odd[0] in recorded else "not there"
        now = "there" if odd[0] in replayed else "not there"
        return Difference(step, kind, odd[0], kept, now)
    for name, new in replayed.items():
        found = _array_difference(step, kind, name, recorded[name], new)
        if found is not None:
            return found
    return None


def _array_difference(
    step: int, kind: str, name: str, old: np.ndarray, new: np.ndarray
) -> Difference | None:
    if old.shape != new.shape or old.dtype != new.dtype:
        was, now = (f"{array.dtype}{list(array.shape)}" for array in (old, new))
        return Difference(step, kind, name, was, now)
    if old.tobytes() == new.tobytes():
        return None
    unlike = (_bits(old) != _bits(new)).reshape(old.shape)
    absolute, relative = _distance(old, new)
    place = np.unravel_index(int(np.argmax(np.where(unlike, absolute, -1.0))), old.shape)
    return Difference(
        step=step,
        kind=kind,
        name=name,
        recorded=old[place].item(),
        replayed=new[place].item(),
        largest_absolute=float(absolute[place]),
        largest_relative=float(np.max(np.where(unlike, relative, 0.0))),
        differing=int(unlike.sum()),
        size=old.size,
    )


def _bits(array: np.ndarray) -> np.ndarray:
    """Each element as whole bytes, so that NaN equals NaN and -0.0 is not 0.0."""
    return np.ascontiguousarray(array).reshape(-1).view(f"V{array.dtype.itemsize}")


def _distance(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|new - old| and the same relative to |old|; infinite where one is not finite."""
    before, after = old.astype(np.float64), new.astype(np.float64)
    with np.errstate(invalid="ignore"):
        absolute = np.nan_to_num(np.abs(after - before), nan=np.inf, posinf=np.inf)
    return absolute, absolute / np.maximum(np.abs(np.nan_to_num(before)), 1e-30)
