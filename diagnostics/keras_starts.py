"""Step 0's state of a Keras run, drawn or scaled otherwise."""

from __future__ import annotations

import keras
import numpy as np

from diagnostics.keras_layer_changes import drawn_weights, finite_statistics
from diagnostics.protocol import Change, RunFacts, State

ZERO_BIASES, FINITE_WEIGHTS = "biases of zero", "finite weights"


def changed_start(state: State, facts: RunFacts, change: Change | None) -> State:
    """Step 0's state with other kernels, where the change asks for that."""
    if change is not None and change.kind == "finite_statistics":
        return {**state, **finite_statistics(state)}
    if change is not None and change.kind == "zero_weights":
        return {**state, **drawn_weights(state, change.value)}
    if change is None or change.kind not in ("init", "init_scale"):
        return state
    if change.value == ZERO_BIASES:
        return {**state, **{name: np.zeros_like(old) for name, old in biases(state).items()}}
    if change.value == FINITE_WEIGHTS:
        return {**state, **{n: np.nan_to_num(a, False, 0.0, 0.0, 0.0) for n, a in broken(state)}}
    changed = dict(state)
    for seed, layer in enumerate(facts.layers):
        if layer.weight is None or layer.weight not in state:
            continue
        old = state[layer.weight]
        if layer.kind == "Embedding" and change.kind == "init":
            # As Keras draws them by itself; their size has nothing to do with fan-in.
            new = keras.initializers.RandomUniform(seed=seed)(old.shape)
            changed[layer.weight] = keras.ops.convert_to_numpy(new).astype(old.dtype)
        elif change.kind == "init_scale":
            changed[layer.weight] = (old * np.asarray(change.value, old.dtype)).astype(old.dtype)
        else:
            initialiser = type(keras.initializers.get(change.value))(seed=seed)
            new = keras.ops.convert_to_numpy(initialiser(old.shape))
            changed[layer.weight] = new.astype(old.dtype)
    for name in state:
        if name.startswith("params/") and name.endswith("/recurrent_kernel"):
            changed[name] = _other_recurrence(state[name], change)
    return changed


def broken(state: State) -> list[tuple[str, np.ndarray]]:
    """Copies of the trainable weights that hold something that is not finite, by name."""
    return [
        (name, np.array(array))
        for name, array in state.items()
        if name.startswith("params/") and array.dtype.kind == "f" and not np.isfinite(array).all()
    ]


def biases(state: State) -> dict[str, np.ndarray]:
    """Of layers, not the shifts of normalisations."""
    return {n: a for n, a in state.items() if n.startswith("params/") and n.endswith("/bias")}


def _other_recurrence(old: np.ndarray, change: Change) -> np.ndarray:
    if change.kind == "init_scale":
        return (old * np.asarray(change.value, old.dtype)).astype(old.dtype)
    new = keras.initializers.OrthogonalInitializer(seed=0)(old.shape)
    return keras.ops.convert_to_numpy(new).astype(old.dtype)
