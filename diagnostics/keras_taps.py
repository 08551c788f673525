"""What a Keras train step shows while it is traced: layer outputs, loss, gradients.

The user's `train_step` runs as it is. Around it, calls of layers, of
`compute_loss`, of `GradientTape.gradient` and of the optimizers' `apply` are
overheard: a `Recorder` notes their tensors in order of execution and adds
nothing to them. Pre-activations are read in front of the activation function,
because the CPU's fused ReLU turns NaN into 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from diagnostics.keras_names import LayerNames
from diagnostics.protocol import Check

# A maximum over a window drops NaN on the CPU, so their input is looked at.
_HIDES_NAN = (
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.GlobalMaxPooling3D,
)
# Finite inputs give finite outputs: reading them again would only cost time.
_KEEPS_FINITE = (
    *_HIDES_NAN,
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
    keras.layers.Concatenate,
    keras.layers.Cropping2D,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalAveragePooling3D,
    keras.layers.Identity,
    keras.layers.LeakyReLU,
    keras.layers.Permute,
    keras.layers.ReLU,
    keras.layers.RepeatVector,
    keras.layers.Reshape,
    keras.layers.Softmax,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding2D,
)
_UNBOUNDED_ACTIVATIONS = frozenset(["exponential"])
PREACTIVATION, OUTPUT = "pre-activation", "output"


class Tap(NamedTuple):
    """A tensor that the tripwire looks at.

    Attributes:
      lenient: negative infinity alone is let pass, as in a mask of -inf that a
        user's own layer puts in front of a softmax.
    """

    check: Check
    tensor: tf.Tensor
    lenient: bool = False


class Recorder:
    """Notes what one trace of the train step shows; used by one thread.

    Attributes:
      taps: layer outputs and losses, in order of execution.
      loss: what `compute_loss` returned first, else the first target that a tape
        differentiated by weights; a vector where the user's own step takes one.
      on_apply: called instead of an optimizer's `apply` with (optimizer, the
        method, gradients, variables); None calls it through.
      in_range: (check, bool scalar), whether class numbers or the indices of an
        embedding are in range.
      tape_gradients: (gradients, variables) of every tape.
    """

    def __init__(self, names: LayerNames) -> None:
        self.names = names
        self.taps: list[Tap] = []
        self.loss: tf.Tensor | None = None
        self.on_apply: Callable[..., None] | None = None
        self.tape_gradients: list[tuple[list[Any], list[Any]]] = []
        self.in_range: list[tuple[Check, tf.Tensor]] = []
        self.layer_calls: list[str] = []
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self._vouched: dict[int, Any] = {}  # id -> tensor, held so that no id is used twice

    def enter(self, phase: str) -> None:
        """The step enters 'loss', 'backward' or 'update'; of use to who traces op by op."""

    def vouch(self, values: Any) -> None:
        """These tensors need no look of their own."""
        for tensor in keras.tree.flatten(values):
            self._vouched[id(tensor)] = tensor

    def observe(self, check: Check, values: Any, lenient: bool = False) -> None:
        """Notes every floating-point tensor in a structure, each once."""
        for tensor in keras.tree.flatten(values):
            dense = getattr(tensor, "values", tensor)  # of a sparse tensor or IndexedSlices
            dense = getattr(tensor, "flat_values", dense)  # of a ragged one
            if id(tensor) in self._vouched or not self._readable(dense):
                continue
            self._vouched[id(tensor)] = tensor
            self.taps.append(Tap(check, dense, lenient))

    def _readable(self, tensor: Any) -> bool:
        """A real floating-point tensor of this very graph, not of a loop inside it."""
        if not tf.is_tensor(tensor) or not tensor.dtype.is_floating:
            return False
        return self._graph is None or getattr(tensor, "graph", None) is self._graph

    def layer_call(self, layer: Any, call: Callable[[], Any], inputs: Any) -> Any:
        """Runs a layer's (or operation's) call and notes what it shows."""
        if isinstance(layer, keras.layers.InputLayer):
            return call()
        label = self.names.label(layer)
        self.layer_calls.append(label)
        if isinstance(layer, _HIDES_NAN):
            self.observe(Check("forward", label, "input"), inputs)
        before = len(self.taps)
        with _tapped_activation(layer):
            outputs = call()
        own = any(tap.check.layer == label for tap in self.taps[before:])
        if type(layer) in _KEEPS_FINITE or (own and _bounded(layer)):
            self.vouch(outputs)
            return outputs
        built_in = type(layer).__module__.startswith("keras.")
        weighted = built_in and bool(getattr(layer, "weights", ()))
        quantity = OUTPUT if own or not weighted else PREACTIVATION
        self.observe(Check("forward", label, quantity), outputs, lenient=not weighted)
        return outputs

    def checked_labels(self, labels: Any, predictions: Any) -> Any:
        """Class numbers as they are, but 0 for one out of range, which is noted.

        TensorFlow raises on such a label on the CPU, and makes NaN of it under XLA.
        """
        predictions, labels = tf.convert_to_tensor(predictions), tf.convert_to_tensor(labels)
        classes = predictions.shape[-1] if predictions.shape.rank else None
        if classes is None or (self._graph is not None and labels.graph is not self._graph):
            return labels
        valid = tf.logical_and(labels >= 0, labels < tf.cast(classes, labels.dtype))
        return self._kept(Check("data", "", "labels"), labels, valid)

    def checked_indices(self, layer: keras.layers.Embedding, indices: Any) -> Any:
        """What an embedding is given as it is, but 0 for an index out of range, which is noted.

        TensorFlow raises on such an index on the CPU, and takes another row under XLA.
        """
        plain = tf.is_tensor(indices) and not isinstance(
            indices, (tf.SparseTensor, tf.RaggedTensor)
        )
        if not plain or getattr(indices, "graph", None) is not self._graph:
            return indices
        rows = tf.cast(layer.input_dim, indices.dtype)
        # Keras counts negative ones from the end.
        valid = tf.logical_and(indices >= -rows, indices < rows)
        return self._kept(Check("data", self.names.label(layer), "indices"), indices, valid)

    def _kept(self, check: Check, values: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
        self.in_range.append((check, tf.reduce_all(valid)))
        return tf.where(valid, values, tf.zeros_like(values))

    def note_loss(self, loss: Any) -> None:
        """The loss, or one more of a step that has several."""
        if self.loss is None and self._readable(loss):
            self.loss = loss
        self.observe(Check("loss", "", "loss"), loss)


class _Local(threading.local):
    recorder: Recorder | None = None


_local = _Local()
_lock = threading.Lock()
_users = 0


@contextmanager
def recording(recorder: Recorder, model: Any, optimizers: Sequence[Any]) -> Iterator[None]:
    """Overhears this thread's calls; every method is put back at the end.

    Several threads may record at once: the replicas of one strategy do.
    """
    global _users
    with _lock:
        undo = _patch_shared() if _users == 0 else None
        _users += 1
        if undo is not None:
            _undo.extend(undo)
        _undo.extend(_patch_model(model, optimizers))
    previous, _local.recorder = _local.recorder, recorder
    try:
        yield
    finally:
        _local.recorder = previous
        with _lock:
            _users -= 1
            if _users == 0:
                while _undo:
                    _undo.pop()()


_undo: list[Callable[[], None]] = []


def _patch_shared() -> list[Callable[[], None]]:
    call, gradient = keras.Operation.__call__, tf.GradientTape.gradient
    cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits

    def overheard_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _local.recorder
        if recorder is None:
            return call(self, *args, **kwargs)
        if isinstance(self, keras.layers.Embedding) and args:
            args = (recorder.checked_indices(self, args[0]), *args[1:])
        return recorder.layer_call(self, lambda: call(self, *args, **kwargs), (args, kwargs))

    def overheard_gradient(self: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _local.recorder
        # The gradient of an input, as in a gradient penalty, is a part of the loss.
        weights = recorder is not None and _of_weights(sources)
        if recorder is not None and weights:
            recorder.enter("backward")
        result = gradient(self, target, sources, *args, **kwargs)
        if recorder is not None:
            if recorder.loss is None and weights:
                recorder.note_loss(_first_tensor(target))
            pair = keras.tree.flatten(result), keras.tree.flatten(sources)
            recorder.tape_gradients.append(pair)
        return result

    def overheard_labels(labels: Any, logits: Any, name: Any = None) -> Any:
        recorder = _local.recorder
        if recorder is not None:
            labels = recorder.checked_labels(labels, logits)
        return cross_entropy(labels=labels, logits=logits, name=name)

    keras.Operation.__call__ = overheard_call
    # Keras' losses and a user's own call it by this name.
    tf.nn.sparse_softmax_cross_entropy_with_logits = overheard_labels
    tf.GradientTape.gradient = overheard_gradient
    return [
        lambda: setattr(keras.Operation, "__call__", call),
        lambda: setattr(tf.nn, "sparse_softmax_cross_entropy_with_logits", cross_entropy),
        lambda: setattr(tf.GradientTape, "gradient", gradient),
    ]


def _patch_model(model: Any, optimizers: Sequence[Any]) -> list[Callable[[], None]]:
    """Hooks on these very objects; none where another replica's trace has set them."""
    undo = []
    if "compute_loss" not in vars(model):
        undo.append(_shadow(model, "compute_loss", _overheard_loss(model, model.compute_loss)))
    for optimizer in optimizers:
        if "apply" not in vars(optimizer):
            apply = _overheard_apply(optimizer, optimizer.apply)
            undo.append(_shadow(optimizer, "apply", apply))
    return undo


def _shadow(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """An instance attribute in front of a method, past Keras' attribute tracking."""
    object.__setattr__(owner, name, method)
    return lambda: object.__delattr__(owner, name)


def _overheard_loss(model: Any, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    def overheard(*args: Any, **kwargs: Any) -> Any:
        recorder = _local.recorder
        if recorder is None:
            return compute_loss(*args, **kwargs)
        recorder.enter("loss")
        loss = compute_loss(*args, **kwargs)
        recorder.note_loss(loss)
        return loss

    return overheard


def _overheard_apply(optimizer: Any, apply: Callable[..., Any]) -> Callable[..., Any]:
    def overheard(grads: Any, trainable_variables: Any = None) -> Any:
        recorder = _local.recorder
        if recorder is not None:
            recorder.enter("update")
        if recorder is None or recorder.on_apply is None:
            return apply(grads, trainable_variables)
        variables = trainable_variables
        if variables is None:
            variables = optimizer._trainable_variables
        return recorder.on_apply(optimizer, apply, list(grads), list(variables))

    return overheard


@contextmanager
def _tapped_activation(layer: Any) -> Iterator[None]:
    """While it runs, the layer's activation function notes its input."""
    activation = vars(layer).get("activation")
    if not callable(activation) or hasattr(activation, "overheard"):
        yield
        return

    def tapped(values: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = _local.recorder
        if recorder is not None:
            label = recorder.names.label(layer)
            recorder.observe(Check("forward", label, PREACTIVATION), values)
        return activation(values, *args, **kwargs)

    tapped.overheard = activation  # type: ignore[attr-defined]
    object.__setattr__(layer, "activation", tapped)
    try:
        yield
    finally:
        object.__setattr__(layer, "activation", activation)


def _bounded(layer: Any) -> bool:
    """Whether its activation maps finite numbers to finite ones.

    That of a recurrent layer is applied inside its loop, which no tap sees.
    """
    if isinstance(layer, keras.layers.RNN):
        return False
    activation = getattr(layer, "activation", None)
    built_in = getattr(activation, "__module__", "").startswith("keras.")
    return built_in and getattr(activation, "__name__", "") not in _UNBOUNDED_ACTIVATIONS


def _of_weights(sources: Any) -> bool:
    """Whether a variable is among what a tape differentiates by."""
    return any(isinstance(s, (tf.Variable, keras.Variable)) for s in keras.tree.flatten(sources))


def _first_tensor(structure: Any) -> Any:
    return next(iter(keras.tree.flatten(structure)), None)
