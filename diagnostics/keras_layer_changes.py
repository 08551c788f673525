"""What can be done differently inside the layers of a foreign Keras run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from diagnostics.diagnosis import FirstNonfinite
from diagnostics.keras_facts import impossible_layer_settings
from diagnostics.keras_names import LayerNames
from diagnostics.op_domains import domain_fault
from diagnostics.protocol import Change, RunFacts, State, Telemetry
from diagnostics.signals import layer_multiples

LAYER_CHANGES = (
    "layer_epsilon",
    "layer_setting",
    "layer_scale",
    "finite_statistics",
    "zero_weights",
)
LAYER_EPSILON = 1e-3
_LARGE_MULTIPLE = 100.0  # times what goes into a layer without kernel

Setting = tuple[Any, str, Any]


def layer_changes(
    model: Any, facts: RunFacts, telemetry: Telemetry, start: State, half: bool
) -> list[Change]:
    """Changes of settings, scales and statistics that the model and its first step suggest.

    Args:
      start: the state of step 0; empty if it is not known.
      half: whether layers compute in float16, whose range explains a large signal.
    """
    found = []
    for label, name, _, usual in impossible_layer_settings(model):
        shown = f"{name} {usual:g} of {label}"
        found.append(Change("layer_setting", (label, name, usual), shown, rank=1))
    multiple = next(_multipliers(facts, telemetry), None)
    if multiple is not None and not half:
        label, times = multiple
        shown = f"output of {label} divided by {times:g}"
        found.append(Change("layer_scale", (label, times), shown, rank=2))
    if broken_statistics(start):
        shown = "variance 1 where it was adapted to 0"
        if not _flat_only(start):
            shown = "statistics that are not finite made finite"
        found.append(Change("finite_statistics", None, shown, from_start=True, rank=1))
    return found


def _multipliers(facts: RunFacts, telemetry: Telemetry) -> Iterator[tuple[str, float]]:
    """(layer, how many times) of layers without kernel that multiply what they are given."""
    kernels = {layer.name for layer in facts.layers if layer.weight is not None}
    for label, times in layer_multiples(telemetry, facts):
        if label not in kernels and times > _LARGE_MULTIPLE:
            yield label, float(f"{times:.1g}")


def changes_at(model: Any, place: FirstNonfinite, start: State, half: bool) -> list[Change]:
    """Changes of the layer at fault, where its formula left its domain."""
    fault = domain_fault(place, half)
    if fault is None or place.layer is None:
        return []
    found = []
    if fault.at_zero and zero_weights(start, place.layer):
        shown = f"other initial weights of {place.layer} than 0"
        found.append(Change("zero_weights", place.layer, shown, from_start=True, rank=1))
    layer = _by_label(model).get(place.layer)
    epsilon = getattr(layer, "epsilon", None)
    built_in = type(layer).__module__.startswith("keras.")
    if built_in and isinstance(epsilon, (int, float)) and epsilon < LAYER_EPSILON:
        shown = f"epsilon {LAYER_EPSILON:g} of {place.layer}"
        found.append(Change("layer_epsilon", (place.layer, LAYER_EPSILON), shown, rank=1))
    return found


def zero_weights(start: State, label: str) -> list[str]:
    """Trainable weights of a layer that are nothing but 0, biases apart, if it has no others."""
    own = [n for n in start if n.startswith(f"params/{label}/") and not n.endswith("/bias")]
    zero = [name for name in own if start[name].size and not start[name].any()]
    return zero


def drawn_weights(start: State, label: str) -> State:
    """Those weights as ones, and kernels as Keras draws them."""
    found = {}
    for name in zero_weights(start, label):
        old = start[name]
        initialiser = keras.initializers.GlorotUniform(seed=0) if old.ndim > 1 else np.ones
        found[name] = keras.ops.convert_to_numpy(initialiser(old.shape)).astype(old.dtype)
    return found


def broken_statistics(start: State) -> dict[str, np.ndarray]:
    """Copies of what is not trained and is not finite, or an adapted variance of 0, by name."""
    own = {n: a for n, a in start.items() if n.startswith("statistics/") and a.dtype.kind == "f"}
    return {
        name: np.array(array)
        for name, array in own.items()
        if not np.isfinite(array).all() or (name.endswith("/variance") and not array.all())
    }


def _flat_only(start: State) -> bool:
    """Whether all that is wrong with them is a variance of 0."""
    return all(np.isfinite(array).all() for array in broken_statistics(start).values())


def finite_statistics(start: State) -> State:
    """Those statistics with a variance of 1, and everything else 0, where they are not usable."""
    return {
        name: _finite(array, name.rpartition("/")[2])
        for name, array in broken_statistics(start).items()
    }


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    usual = 1.0 if "variance" in name else 0.0
    usable = np.isfinite(array) & ((array != 0) | (name != "variance"))
    return np.where(usable, array, np.asarray(usual, array.dtype))


def layer_settings(model: Any, change: Change) -> list[Setting]:
    """(owner, attribute, new value) of what a change sets inside layers."""
    layers = _by_label(model)
    if change.kind == "layer_epsilon":
        return [(layers[change.value[0]], "epsilon", change.value[1])]
    if change.kind == "layer_setting":
        label, name, usual = change.value
        return [(layers[label], name, usual)]
    if change.kind == "layer_scale":
        label, times = change.value
        return [(layers[label], "call", _divided(layers[label].call, times))]
    if change.kind == "precision":
        policy = keras.DTypePolicy(change.value)
        return [(one, "_dtype_policy", policy) for one in _all_layers(model)]
    # A normalisation that was adapted keeps its mean as a constant of the graph, too.
    adapted = [one for one in layers.values() if isinstance(one, keras.layers.Normalization)]
    return [
        (layer, name, keras.ops.convert_to_tensor(_finite(np.asarray(constant), name)))
        for layer in adapted
        for name in ("mean", "variance")
        if (constant := getattr(layer, name, None)) is not None
    ]


def _divided(call: Callable[..., Any], times: float) -> Callable[..., Any]:
    def divided(*args: Any, **kwargs: Any) -> Any:
        return keras.tree.map_structure(lambda one: one / times, call(*args, **kwargs))

    return divided


def layer_command(change: Change, start: State) -> str:
    """The change as a line of the user's program."""
    if change.kind == "layer_epsilon":
        return f"epsilon={change.value[1]:g}  # of the layer {change.value[0]}"
    if change.kind == "layer_setting":
        label, name, usual = change.value
        return f"{name}={usual:g}  # of the layer {label}"
    if change.kind == "layer_scale":
        label, times = change.value
        return f"x = x / {times:g}  # behind the layer {label}, or a scale smaller by as much in it"
    if change.kind == "zero_weights":
        lines = {
            name.rpartition("/")[2]: "glorot_uniform" if start[name].ndim > 1 else "ones"
            for name in zero_weights(start, change.value)
        }
        shown = ", ".join(f'initializer="{how}" of {name}' for name, how in lines.items())
        return f"{shown}  # in the layer {change.value}"
    if _flat_only(start):
        names = sorted({name.split("/")[1] for name in broken_statistics(start)})
        return (
            f"for n in map(model.get_layer, {names}): "
            "n.variance = keras.ops.where(n.variance == 0, 1.0, n.variance)  # before fit"
        )
    return _finite_command(broken_statistics(start))


def _finite_command(broken: Mapping[str, np.ndarray]) -> str:
    layers = {name.split("/")[1] for name in broken if name.endswith(("/mean", "/variance"))}
    if len(layers) == 1 and all(name.split("/")[1] in layers for name in broken):
        return (
            f'model.get_layer("{layers.pop()}").adapt('
            "x[np.isfinite(x).reshape(len(x), -1).all(1)])  # before fit"
        )
    return (
        "for v in model.non_trainable_variables: v.assign(np.where(np.isfinite(v), v, "
        'float("variance" in v.name)))  # before fit'
    )


def _by_label(model: Any) -> dict[str, Any]:
    names = LayerNames(model)
    return {names.label(layer): layer for layer in names.layers()}


def _all_layers(model: Any) -> list[Any]:
    return list(model._flatten_layers(include_self=True, recursive=True))


def computes_in_half_only(model: Any) -> bool:
    """Whether weights are float32 and only the layers' arithmetic is of half precision."""
    return all(math.isclose(4, np.dtype(v.dtype).itemsize) for v in _floating(model)) and any(
        layer.compute_dtype in ("float16", "bfloat16") for layer in _all_layers(model)
    )


def _floating(model: Any) -> list[Any]:
    return [v for v in model.weights if "float" in keras.backend.standardize_dtype(v.dtype)]
