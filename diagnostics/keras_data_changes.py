"""What can be done differently with the data of a foreign Keras run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from diagnostics.errors import InputError
from diagnostics.keras_batches import ARRAYS, GENERATOR
from diagnostics.protocol import Batch, Change, LayerFacts, RunFacts
from diagnostics.signals import takes_probabilities

LARGE_INPUT, LARGE_TARGET = 20.0, 100.0
OUTLIER = 1e3  # times the size of the median example
DATA_CHANGES = (
    "known_indices",
    "without_examples",
    "valid_examples",
    "usual_examples",
    "finite_inputs",
    "input_scale",
    "shift_labels",
    "label_span",
    "target_scale",
    "example_weights",
)
LARGE_WEIGHT = 100.0


_PARTS = {
    "shift_labels": "labels",
    "label_span": "labels",
    "target_scale": "labels",
    "example_weights": "sample_weight",
}


def data_changes(batch: Batch | None, facts: RunFacts) -> list[Change]:
    """Changes of inputs and labels that the failing batch suggests."""
    if batch is None:
        return []
    found = []
    invalid = _invalid_rows(batch, facts.classes)
    if invalid.any() and not invalid.all():
        label = "without any example that is not finite"
        if facts.classes:
            label += f" or whose label is outside 0 to {facts.classes - 1}"
        found.append(Change("valid_examples", facts.classes, label, rank=1))
    inputs = [a for n, a in batch.items() if n.startswith("inputs") and a.dtype.kind == "f"]
    labels = [a for n, a in batch.items() if n.startswith("labels") and a.size]
    if not all(np.isfinite(array).all() for array in inputs):
        found.append(Change("finite_inputs", 0.0, "non-finite inputs set to 0", rank=1))
    divisor = input_divisor(inputs)
    if divisor is not None:
        label = f"inputs divided by {divisor:g}"
        found.append(Change("input_scale", 1.0 / divisor, label, rank=2))
    found += _probability_changes(labels, facts)
    if facts.classes and any(a.min() >= 1 and a.max() == facts.classes for a in labels):
        found.append(Change("shift_labels", -1, "class numbers lowered by 1", rank=1))
    weights = [a for n, a in batch.items() if n.startswith("sample_weight") and a.size]
    heaviest = max(
        (float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in weights), default=0.0
    )
    if not all(np.isfinite(array).all() for array in weights):
        label = "weights of examples that are not finite set to 0"
        found.append(Change("example_weights", 0.0, label, rank=1))
    if heaviest > LARGE_WEIGHT:
        label = f"weights of examples divided by {heaviest:g}"
        found.append(Change("example_weights", 1.0 / heaviest, label, rank=1))
    if not facts.classes:
        spread = max((_rms(a) for a in labels if a.dtype.kind == "f"), default=0.0)
        if spread > LARGE_TARGET:
            divisor = float(f"{spread:.2g}")
            label = f"targets divided by {divisor:g}"
            found.append(Change("target_scale", 1.0 / divisor, label, rank=2))
    return found


def _probability_changes(labels: list[np.ndarray], facts: RunFacts) -> list[Change]:
    """Targets of a cross-entropy that are no probabilities: masks of 255, classes of -1 and 1."""
    whole = [a for a in labels if takes_probabilities(facts) and np.isfinite(a).all()]
    low = min((float(a.min()) for a in whole), default=0.0)
    high = max((float(a.max()) for a in whole), default=1.0)
    if low >= 0 and high <= 1:
        return []
    low = low if low < 0 or high - low == 1 else 0.0
    label = f"labels from {low:g} to {high:g} mapped to 0 to 1"
    return [Change("label_span", (low, high), label, rank=1)]


def index_changes(batch: Batch | None, layer: LayerFacts | None) -> list[Change]:
    """The indices of an embedding kept below its number of rows, where one input is all indices.

    Args:
      layer: the embedding that has no row for some of them, if that is why the step failed.
    """
    given = [n for n, a in (batch or {}).items() if n.startswith("inputs") and a.dtype.kind in "iu"]
    if layer is None or layer.fan_in is None or len(given) != 1:
        return []
    label = f"indices of at most {layer.fan_in - 1}"
    return [Change("known_indices", (layer.name, layer.fan_in), label, rank=1)]


def outlier_changes(batches: Iterable[Batch]) -> list[Change]:
    """Leaving out examples of quite another size, where one of these batches holds such."""
    if not any(_outliers(batch, OUTLIER).any() for batch in batches):
        return []
    label = f"without examples {OUTLIER:g} times as large as others"
    return [Change("usual_examples", OUTLIER, label, rank=1)]


def _outliers(batch: Batch, times: float) -> np.ndarray:
    """bool [rows]: a floating-point input is so many times as large as that of the median row."""
    found = np.zeros(_rows(batch), bool)
    for name, array in batch.items():
        if not (name.startswith("inputs") and array.dtype.kind == "f" and array.ndim):
            continue
        if len(array) == len(found):
            sizes = np.abs(array.reshape(len(array), -1)).max(axis=1, initial=0.0)
            usual = float(np.median(sizes))
            found |= sizes > times * usual if usual > 0 else False
    return found


def _rows(batch: Batch) -> int:
    return max((len(array) for array in batch.values() if array.ndim), default=0)


def input_divisor(inputs: list[np.ndarray]) -> float | None:
    """What large inputs should be divided by: 255 for grey levels, else their RMS."""
    for array in inputs:
        finite = array[np.isfinite(array)]
        largest = float(np.abs(finite).max(initial=0.0))
        if largest > LARGE_INPUT:
            grey = finite.min() >= 0 and 64 < largest <= 255
            return 255.0 if grey else float(f"{_rms(finite):.2g}")
    return None


def _rms(array: np.ndarray) -> float:
    finite = array[np.isfinite(array)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def changed_batch(batch: Batch, change: Change | None) -> Batch:
    """The batch with the change, where it is one of the data.

    Raises:
      InputError: every example of the batch is suspect.
    """
    if change is None or change.kind not in DATA_CHANGES:
        return batch
    if change.kind == "without_examples":
        if "example_ids" not in batch:
            return batch
        return _without(batch, np.isin(batch["example_ids"], np.array(change.value)))
    if change.kind == "valid_examples":
        return _without(batch, _invalid_rows(batch, change.value))
    if change.kind == "usual_examples":
        return _without(batch, _outliers(batch, change.value))
    part = _PARTS.get(change.kind, "inputs")
    return {
        name: _changed(array, change) if name.startswith(part) else array
        for name, array in batch.items()
    }


def _changed(array: np.ndarray, change: Change) -> np.ndarray:
    if change.kind == "shift_labels":
        return array + np.asarray(change.value, array.dtype)
    if change.kind == "label_span":
        low, high = change.value
        return ((array - low) / (high - low)).astype(
            array.dtype if array.dtype.kind == "f" else "f"
        )
    if change.kind == "known_indices":
        integer = array.dtype.kind in "iu"
        return np.clip(array, 0, change.value[1] - 1) if integer else array
    if array.dtype.kind != "f":
        return array
    if change.value == 0.0:
        return np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    return (array * np.float32(change.value)).astype(array.dtype)


def _invalid_rows(batch: Batch, classes: int | None) -> np.ndarray:
    """bool [rows]: an input, label or weight is not finite, or a class does not exist."""
    rows = _rows(batch)
    found = np.zeros(rows, bool)
    for name, array in batch.items():
        if array.ndim == 0 or len(array) != rows:
            continue
        if array.dtype.kind == "f":
            bad = ~np.isfinite(array)
        elif name == "labels" and classes is not None:
            bad = (array < 0) | (array >= classes)
        else:
            continue
        found |= bad.reshape(rows, -1).any(axis=1)
    return found


def _without(batch: Batch, bad: np.ndarray) -> Batch:
    """Examples that stay stand in for those that go, so that shapes are the same."""
    if bad.all():
        raise InputError("every example of the batch is suspect", "Look at the data itself")
    rows = np.where(bad, np.flatnonzero(~bad)[0], np.arange(len(bad)))
    return {
        name: array[rows] if array.ndim and len(array) == len(rows) else array
        for name, array in batch.items()
    }


def fed_command(change: Change, fed: str, rows: int) -> str:
    """The change as a line of a program that has no arrays; '' where arrays do as well.

    Args:
      fed: what `fit` was given, a kind of `keras_batches.DataSource`. rows: of a batch.
    """
    if fed == ARRAYS or change.kind not in ("without_examples", "valid_examples"):
        return ""
    if change.kind == "without_examples":
        gone = list(change.value)
        if fed == GENERATOR:
            return f"continue  # in the generator, for the examples {gone} of an epoch"
        keep = f"enumerate().filter(lambda i, _: tf.reduce_all(i != {gone})).map(lambda i, e: e)"
        return f"dataset = dataset.unbatch().{keep}.batch({rows})"
    classes = "" if change.value is None else f", and classes from 0 to {change.value - 1}"
    if fed == GENERATOR:
        return f"if all(np.isfinite(a).all() for a in (x, y)){classes}: yield x, y"
    finite = "tf.reduce_all(tf.math.is_finite(tf.cast(part, tf.float32)))"
    keep = f"filter(lambda *e: tf.reduce_all([{finite} for part in tf.nest.flatten(e)]))"
    return f"dataset = dataset.unbatch().{keep}.batch({rows}){classes and '  #' + classes[1:]}"


def data_command(change: Change, structure: Any) -> str:
    """The change as a line of the user's program.

    Args:
      structure: of a batch, as `keras_batches.flatten_batch` gives it.
    """
    value = change.value
    if change.kind == "without_examples":
        parts = structure.get("tuple", []) if isinstance(structure, dict) else []
        named = zip(("x", "y", "sample_weight"), parts or [structure], strict=False)
        lines = {name: _deleted(name, part, list(value)) for name, part in named if part}
        return f"{', '.join(lines)} = {', '.join(lines.values())}"
    if change.kind == "valid_examples":
        classes = "" if value is None else f" & (y.reshape(len(y), -1)[:, 0] < {value})"
        return (
            "keep = np.isfinite(x).reshape(len(x), -1).all(1) & np.isfinite(y).reshape(len(y), -1)"
            f".all(1){classes and ' & (y.reshape(len(y), -1)[:, 0] >= 0)'}{classes}; "
            "x, y = x[keep], y[keep]  # before fit"
        )
    if change.kind == "known_indices":
        layer, rows = value
        return f"x = np.clip(x, 0, {rows - 1})  # or more rows than {rows} in the layer {layer}"
    if change.kind == "usual_examples":
        return (
            "size = np.abs(x).reshape(len(x), -1).max(1); "
            f"keep = size <= {value:g} * np.median(size); x, y = x[keep], y[keep]  # before fit"
        )
    if value == 0.0:
        name = "x" if change.kind == "finite_inputs" else "sample_weight"
        return f"{name} = np.nan_to_num({name}, nan=0.0, posinf=0.0, neginf=0.0)  # before fit"
    if change.kind == "shift_labels":
        return "y = y - 1  # before fit"
    if change.kind == "label_span":
        low, high = value
        shifted = "y" if low == 0 else f"(y - {low:g})" if low > 0 else f"(y + {-low:g})"
        return f"y = {shifted} / {high - low:g}  # before fit"
    if change.kind == "example_weights":
        return (
            f"class_weight = {{k: w / {1.0 / value:g} for k, w in class_weight.items()}}"
            "  # or sample_weight, before fit"
        )
    name = "x" if change.kind == "input_scale" else "y"
    return f"{name} = {name} / {1.0 / value:.6g}  # before fit"


def _deleted(name: str, part: Any, rows: list[int]) -> str:
    """An argument of `fit` without some rows."""
    if "dict" in part:
        return f"{{k: np.delete(a, {rows}, axis=0) for k, a in {name}.items()}}"
    if "array" in part:
        return f"np.delete({name}, {rows}, axis=0)"
    return f"[np.delete(a, {rows}, axis=0) for a in {name}]"
