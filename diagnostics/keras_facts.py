"""The facts of a Keras model that the diagnosis asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from diagnostics.keras_names import LayerNames
from diagnostics.protocol import LayerFacts, RunFacts

_KINDS = {"Dense": "dense", "Conv1D": "conv", "Conv2D": "conv", "Conv3D": "conv"}
_SPARSE = ("SparseCategoricalCrossentropy", "sparse_categorical_crossentropy")
_CATEGORICAL = ("CategoricalCrossentropy", "categorical_crossentropy", *_SPARSE)
_LARGE_LOSS_WEIGHT = 100.0
_BINARY = ("BinaryCrossentropy", "binary_crossentropy")


def facts_of(model: Any, layer_order: list[str], batch_size: int | None) -> RunFacts:
    """Facts of a built and compiled model.

    Args:
      layer_order: labels in order of execution, as the first trace saw them.
    """
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    loss = loss_name(model)
    classes = _classes(model, loss)
    return RunFacts(
        layers=_layers(model, layer_order),
        learning_rate=learning_rate(optimizer),
        clip_norm=float(getattr(optimizer, "global_clipnorm", None) or 0.0),
        momentum=_number(getattr(optimizer, "momentum", 0.0)) or 0.0,
        weight_decay=float(getattr(optimizer, "weight_decay", None) or 0.0),
        optimizer=type(optimizer).__name__,
        optimizer_epsilon=_number(getattr(optimizer, "epsilon", None)),
        precision=precision(model),
        init=initialisers(model),
        loss=loss,
        classes=classes,
        chance_loss=math.log(classes) if classes else None,
        batch_size=batch_size,
        extra={
            "net": f"{type(model).__name__} '{model.name}'",
            **_output(model),
            **_loss_weights(model),
            **_penalty(model),
            **_activity_penalty(model),
            **_layer_settings(model),
            **_impossible_settings(optimizer),
        },
    )


def _layers(model: Any, order: list[str]) -> tuple[LayerFacts, ...]:
    names = LayerNames(model)
    known = {names.label(layer): layer for layer in names.layers()}
    called = [label for label in dict.fromkeys(order) if label in known]
    labels = called or list(known)
    # A plain container computes nothing by itself.
    plain = (keras.Sequential, keras.src.models.functional.Functional)
    return tuple(_layer(n, known[n]) for n in labels if type(known[n]) not in plain)


def _output(model: Any) -> dict[str, str]:
    """Which layer makes the output, where a functional model has one output."""
    outputs = getattr(model, "outputs", None) or []
    made_by = [getattr(one, "_keras_history", None) for one in outputs]
    if len(made_by) != 1 or made_by[0] is None:
        return {}
    return {"output layer": LayerNames(model).label(made_by[0].operation)}


def _loss_weights(model: Any) -> dict[str, str]:
    """As compiled, where one of them is no ordinary number."""
    compiled = getattr(model, "_compile_loss", None)
    given = getattr(compiled, "_user_loss_weights", None)
    flat = [one for one in keras.tree.flatten(given) if isinstance(one, (int, float))]
    far = [one for one in flat if abs(one) > _LARGE_LOSS_WEIGHT]
    return {"loss weights": ", ".join(f"{one:g}" for one in flat)} if far else {}


def _penalty(model: Any) -> dict[str, str]:
    """The largest factor of an L2 regulariser."""
    found = [getattr(v.regularizer, "l2", None) for v in model.trainable_variables]
    factors = [float(one) for one in found if one is not None]
    return {"l2 penalty": f"{max(factors):g}"} if factors else {}


def _activity_penalty(model: Any) -> dict[str, str]:
    """The largest factor of a regulariser of a layer's output."""
    factors = [
        float(factor)
        for regulariser in activity_regularisers(model).values()
        for kind in ("l1", "l2")
        if (factor := getattr(regulariser, kind, None)) is not None
    ]
    return {"activity penalty": f"{max(factors):g}"} if factors else {}


def activity_regularisers(model: Any) -> dict[Any, Any]:
    """Regularisers of outputs, by their layer."""
    layers = model._flatten_layers(include_self=True, recursive=True)
    found = {layer: getattr(layer, "activity_regularizer", None) for layer in layers}
    return {layer: one for layer, one in found.items() if one is not None}


def impossible_layer_settings(model: Any) -> Iterator[tuple[str, str, float, float]]:
    """(layer, name, value, usual value) of every setting that no layer can have for long."""
    names = LayerNames(model)
    for layer in names.layers():
        momentum, epsilon = (getattr(layer, name, None) for name in ("momentum", "epsilon"))
        normalises = isinstance(layer, keras.layers.BatchNormalization)
        if normalises and isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
            yield names.label(layer), "momentum", float(momentum), 0.99
        if isinstance(epsilon, (int, float)) and epsilon < 0:
            yield names.label(layer), "epsilon", float(epsilon), 1e-3


def _layer_settings(model: Any) -> dict[str, str]:
    found = [
        f"{name} {value:g} of {label}" for label, name, value, _ in impossible_layer_settings(model)
    ]
    return {"layer settings": ", ".join(found)} if found else {}


def impossible_settings(optimizer: Any) -> Iterator[tuple[str, float, float]]:
    """(name, value, usual value) of every decay of the optimizer that is outside [0, 1)."""
    for name, usual in (("momentum", 0.9), ("beta_1", 0.9), ("beta_2", 0.999), ("rho", 0.9)):
        value = _number(getattr(optimizer, name, None))
        if value is not None and not 0 <= value < 1:
            yield name, value, usual


def _impossible_settings(optimizer: Any) -> dict[str, str]:
    return {name: f"{value:g}" for name, value, _ in impossible_settings(optimizer)}


def _own_weights(layer: Any) -> list[Any]:
    """Its own trainable weights; a recurrent layer's are those of its cell."""
    cell = getattr(layer, "cell", None) if isinstance(layer, keras.layers.RNN) else None
    return list((layer if cell is None else cell)._trainable_variables)


def _layer(label: str, layer: Any) -> LayerFacts:
    kind = _KINDS.get(type(layer).__name__, type(layer).__name__)
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", None) if callable(activation) else None
    kernel = next((v for v in _own_weights(layer) if v.name in ("kernel", "embeddings")), None)
    if kernel is None or len(kernel.shape) < 2:
        return LayerFacts(label, kind, activation=name)
    shape = [int(size) for size in kernel.shape]
    receptive = int(np.prod(shape[:-2]))
    return LayerFacts(
        label,
        kind,
        f"params/{label}/{kernel.name}",
        receptive * shape[-2],
        receptive * shape[-1],
        name,
    )


def learning_rate(optimizer: Any) -> float | None:
    """The optimizer's rate now; None without optimizer."""
    return None if optimizer is None else float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def precision(model: Any) -> str:
    """The policy of the layers that compute: the one that is not float32, if there is one."""
    names = [
        layer.dtype_policy.name
        for layer in model._flatten_layers(include_self=False, recursive=True)
        if not isinstance(layer, keras.layers.InputLayer)
    ]
    special = [name for name in names if name != "float32"]
    return special[0] if special else "float32"


def initialisers(model: Any) -> str | None:
    """The most common kernel initialiser, in Keras' words: 'TruncatedNormal(stddev=0.1)'."""
    texts = []
    for layer in model._flatten_layers(include_self=False, recursive=True):
        initialiser = getattr(layer, "kernel_initializer", None)
        if isinstance(initialiser, keras.initializers.Initializer):
            config = {
                k: v for k, v in initialiser.get_config().items() if k not in ("seed", "mean")
            }
            inside = ", ".join(f"{k}={v!r}" for k, v in config.items())
            texts.append(f"{type(initialiser).__name__}({inside})")
    return max(set(texts), key=texts.count) if texts else None


def loss_name(model: Any) -> str:
    """The loss as compiled: a class's or function's name, several joined by '+'."""
    loss = getattr(model, "loss", None)
    flat = [loss] if callable(loss) or isinstance(loss, str) else keras.tree.flatten(loss)
    names = [
        one if isinstance(one, str) else getattr(one, "__name__", type(one).__name__)
        for one in flat
        if one is not None
    ]
    return "+".join(dict.fromkeys(names))


def _classes(model: Any, loss: str) -> int | None:
    """Classes of a classifier with one of Keras' cross-entropies; 2 for a binary one."""
    if loss in _BINARY:
        return 2
    shape = getattr(model, "output_shape", None)
    if loss in _CATEGORICAL and isinstance(shape, tuple) and isinstance(shape[-1], int):
        return shape[-1]
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
