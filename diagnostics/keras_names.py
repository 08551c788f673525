"""Lasting names for the layers and the variables of a Keras model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from diagnostics.protocol import State


class LayerNames:
    """One label per layer: its name, or its path where two layers share a name."""

    def __init__(self, model: Any) -> None:
        self._layers = model._flatten_layers(include_self=True, recursive=True)
        # A recurrent layer's cell is part of it; Keras names it, not the user.
        self._whole: dict[int, Any] = {}
        for layer in self._layers:
            if isinstance(layer, keras.layers.RNN):
                for part in layer.cell._flatten_layers():
                    self._whole[id(part)] = layer
        self._layers = [layer for layer in self._layers if id(layer) not in self._whole]
        shared = Counter(layer.name for layer in self._layers)
        self._shared = {name for name, count in shared.items() if count > 1}
        self._owner: dict[int, Any] = {}
        for layer in model._flatten_layers(include_self=True, recursive=True):
            for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
                self._owner.setdefault(id(variable), layer)

    def label(self, layer: Any) -> str:
        """Of a layer, or of an operation in a functional model."""
        layer = self._whole.get(id(layer), layer)
        if layer.name in self._shared:
            return getattr(layer, "path", None) or layer.name
        return str(layer.name)

    def owner(self, variable: Any) -> str:
        """Label of the layer that made a weight; the weight's own path if none did."""
        layer = self._owner.get(id(variable))
        if layer is not None:
            return self.label(layer)
        return str(getattr(variable, "path", variable.name)).split(":")[0]

    def layers(self) -> list[Any]:
        """Every layer but cells, the model itself first, outer before inner ones."""
        return list(self._layers)


def find_optimizers(model: Any) -> list[Any]:
    """The compiled optimizer first, then others that the model holds as attributes."""
    found = [model.optimizer] if getattr(model, "optimizer", None) is not None else []
    for value in vars(model).values():
        candidates: Iterable[Any] = (value,)
        if isinstance(value, dict):
            candidates = value.values()
        elif isinstance(value, (list, tuple)):
            candidates = value
        for candidate in candidates:
            if isinstance(candidate, keras.optimizers.Optimizer) and all(
                candidate is not known for known in found
            ):
                found.append(candidate)
    return found


class StateNames:
    """The state of a training run: weights, statistics, slots, counters, metrics, seeds.

    Names are `params/<layer>/<weight>`, `statistics/<layer>/<weight>` (what is
    not trained: moving means), `seeds/<...>`, `optimizer/<layer>/<weight>_<slot>` and
    `counters/metrics/<metric>/<...>`; `other/<...>` for variables beyond Keras' knowledge.

    Attributes:
      variables: Keras or TensorFlow variables by name, in this order.
    """

    def __init__(self, model: Any, extra: Iterable[tf.Variable] = ()) -> None:
        self.variables: dict[str, Any] = {}
        self._known: set[int] = set()
        names = LayerNames(model)
        for name, variable in _named_variables(model, names):
            self._add(name, variable)
        for variable in extra:
            self._add(f"other/{variable.name.split(':')[0]}", variable)

    def _add(self, name: str, variable: Any) -> None:
        key = id(native(variable))
        if key in self._known:
            return
        self._known.add(key)
        unique, count = name, 1
        while unique in self.variables:
            count += 1
            unique = f"{name}~{count}"
        self.variables[unique] = variable

    def arrays(self) -> State:
        """A host copy of every variable."""
        return {name: np.array(v.numpy()) for name, v in self.variables.items()}

    def bytes(self) -> int:
        """Size of `arrays`."""
        return sum(
            int(np.prod(v.shape)) * tf.as_dtype(native(v).dtype).size
            for v in self.variables.values()
        )

    def load(self, state: State) -> None:
        """Writes arrays into the variables, in the variables' own types.

        Metrics, seeds and plain variables that are on one side only stay as they are.

        Raises:
          InputError: weights, statistics or slots differ in name or shape.
        """
        odd = [n for n in sorted(state.keys() ^ self.variables.keys()) if n.startswith(_NEEDED)]
        if odd:
            raise InputError(
                f"the saved state does not fit this model: {', '.join(odd[:3])}",
                "Give the model the layers and the optimizer that it was trained with",
            )
        for name, variable in self.variables.items():
            if name not in state:
                continue
            if tuple(state[name].shape) != tuple(variable.shape):
                raise InputError(
                    f"the saved {name} has shape {state[name].shape}, "
                    f"the model's has {tuple(variable.shape)}"
                )
            variable.assign(state[name].astype(native(variable).dtype.as_numpy_dtype))


_NEEDED = ("params/", "statistics/", "optimizer/")


def slot_owners(optimizer: Any, weights: Iterable[Any]) -> dict[int, tuple[Any, str]]:
    """id of a slot -> (its weight, the slot's kind), by Keras' name '<path of weight>_<kind>'."""
    prefixes = [(f"{getattr(w, 'path', w.name)}".replace("/", "_") + "_", w) for w in weights]
    prefixes.sort(key=lambda pair: -len(pair[0]))
    found = {}
    for slot in optimizer.variables:
        for prefix, weight in prefixes:
            if slot.name.startswith(prefix) and slot.shape == weight.shape:
                found[id(slot)] = (weight, slot.name[len(prefix) :])
                break
    return found


def native(variable: Any) -> Any:
    """The tf.Variable behind a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def local(variable: Any) -> Any:
    """This replica's part of a variable; itself without replicas."""
    variable = native(variable)
    context = tf.distribute.get_replica_context()
    parts = getattr(variable, "values", None)
    if parts is None or context is None:
        return variable
    return parts[int(tf.get_static_value(context.replica_id_in_sync_group))]


def _named_variables(model: Any, names: LayerNames) -> Iterator[tuple[str, Any]]:
    trained = {id(v) for v in model.trainable_variables}
    for variable in model.weights:
        kind = "params" if id(variable) in trained else "statistics"
        yield f"{kind}/{names.owner(variable)}/{variable.name}", variable
    for layer in model._flatten_layers(include_self=True, recursive=True):
        for generator in layer._seed_generators:
            yield f"seeds/{names.label(layer)}/{generator.name}", generator.state
    # Layers without a seed of their own draw from one generator of the whole process.
    shared = keras.src.backend.common.global_state.get_global_attribute("global_seed_generator")
    if shared is not None:
        yield "seeds/global", shared.state
    for optimizer in find_optimizers(model):
        weights = slot_owners(optimizer, model.trainable_variables)
        for variable in optimizer.variables:
            weight, slot = weights.get(id(variable), (None, variable.name))
            place = "" if weight is None else f"{names.owner(weight)}/{weight.name}_"
            yield f"optimizer/{place}{slot}", variable
    for metric in model.metrics:
        for variable in metric.variables:
            yield f"counters/metrics/{metric.name}/{variable.name}", variable
    for layer in names.layers():
        for name, value in vars(layer).items():
            if isinstance(value, tf.Variable):
                yield f"other/{names.label(layer)}/{name}", value
