"""What can be done differently in a foreign Keras run, and how a user writes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from diagnostics.keras_data_changes import data_changes
from diagnostics.keras_facts import activity_regularisers, impossible_settings
from diagnostics.keras_names import LayerNames
from diagnostics.keras_optimizer import inner_optimizer, optimizer_code, rate_variable
from diagnostics.keras_sights import RUNAWAY_GRADIENT, RUNAWAY_LOSS
from diagnostics.keras_starts import FINITE_WEIGHTS, ZERO_BIASES, biases, broken
from diagnostics.protocol import Batch, Change, Check, RunFacts, State
from diagnostics.signals import RECURRENT, UNBOUNDED

CLIP_PREDICTIONS, FROM_LOGITS = "clipped predictions", "from logits"
OTHER_SIGN = "the other sign"
EPSILON = 1e-7
_LONG_MEMORY = 0.99  # momentum: a hundred updates are added up
_LARGER_BATCH = 8
LARGE_BIAS = 5.0  # layers make signals of about 1
# From so many on the gradient fades: a sigmoid passes on a quarter of it at most.
SATURATING_LAYERS = 3
_SATURATING = ("sigmoid", "tanh", "hard_sigmoid", "softsign")
# Losses that take probabilities and can be told to take logits.
_FROM_PROBABILITIES = ("categorical_crossentropy", "binary_crossentropy")


def candidates(
    model: Any,
    facts: RunFacts,
    failed: Sequence[Check],
    step: int,
    suspects: Sequence[int],
    batch: Batch | None,
    start: State,
    falls: bool = False,
) -> list[Change]:
    """Changes worth a replay, those nearest to the intended run first.

    Args:
      failed: the checks that tripped.
      batch: the failing one; tells whether inputs are unscaled.
      start: the state of step 0; empty if it is not known.
      falls: the loss ran away downwards.
    """
    found: list[Change] = []
    if suspects:
        names = ", ".join(map(str, suspects[:4])) + ("…" if len(suspects) > 4 else "")
        found.append(
            Change("without_examples", tuple(suspects), f"without example {names}", rank=0)
        )
    found += data_changes(batch, facts)
    found += _formula_changes(model, failed)
    found += _sign_changes(model, falls, bool(start))
    found += _precision_changes(facts, failed)
    found += _setting_changes(model)
    found += _scale_changes(facts)
    found += _rate_changes(model, facts, step)
    return [*found, *_start_changes(model, facts, start)]


def _sign_changes(model: Any, falls: bool, has_start: bool) -> list[Change]:
    losses = compiled_losses(model)
    if not falls or not losses or any(_is_cross_entropy(loss) for loss in losses):
        return []
    label = "the loss with the other sign"
    return [Change("loss_formula", OTHER_SIGN, label, from_start=has_start, rank=1)]


def _start_changes(model: Any, facts: RunFacts, start: State) -> list[Change]:
    """Other weights to begin with, and activations that let their signal through."""
    found = []
    if any(np.abs(bias).max(initial=0.0) > LARGE_BIAS for bias in biases(start).values()):
        found.append(Change("init", ZERO_BIASES, "initial biases 0", from_start=True, rank=1))
    if broken(start):
        label = "initial weights that are not finite set to 0"
        found.append(Change("init", FINITE_WEIGHTS, label, from_start=True, rank=3))
    found += _activation_changes(model, bool(start))
    if start and any(layer.weight for layer in facts.layers):
        for rank, name in ((2, "glorot_uniform"), (2, "he_normal")):
            found.append(Change("init", name, f"init {name}", from_start=True, rank=rank))
        found.append(Change("init_scale", 0.1, "initial kernels times 0.1", True, rank=6))
    return found


def _activation_changes(model: Any, has_start: bool) -> list[Change]:
    found = []
    for value, least, rank in (("relu", SATURATING_LAYERS, 4), ("sigmoid", 1, 1), ("tanh", 1, 2)):
        layers = activated(model, value)
        if len(layers) >= least:
            old = _activation_name(layers[0])
            label = f"{value} instead of {old} in {', '.join(one.name for one in layers)}"
            if value == "relu":
                label = f"relu instead of {old} in {len(layers)} hidden layers"
            found.append(Change("activation", value, label, from_start=has_start, rank=rank))
    return found


def activated(model: Any, value: str) -> list[Any]:
    """The layers to which another activation would be given.

    Args:
      value: 'relu' for hidden layers that saturate, 'sigmoid' for a softmax over one unit,
        'tanh' for recurrent layers whose activation has no bound.
    """
    if value == "relu":
        return hidden_saturating(model)
    layers = LayerNames(model).layers()
    if value == "sigmoid":
        single = [one for one in layers if isinstance(one, keras.layers.Dense) and one.units == 1]
        return [one for one in single if _activation_name(one) == "softmax"]
    return [
        one
        for one in layers
        if isinstance(one, keras.layers.RNN) and _activation_name(one) in UNBOUNDED
    ]


def _activation_name(layer: Any) -> str:
    return getattr(getattr(layer, "activation", None), "__name__", "")


def _setting_changes(model: Any) -> list[Change]:
    """Optimizer settings that no run survives, back in their range."""
    optimizer = inner_optimizer(model)
    found = []
    for name, _, usual in impossible_settings(optimizer):
        label = f"{name} {usual:g}"
        found.append(Change("optimizer_setting", (name, usual), label, rank=1))
    decay = getattr(optimizer, "weight_decay", None)
    if isinstance(decay, (int, float)) and decay:
        change = Change("optimizer_setting", ("weight_decay", None), "no weight decay", rank=1)
        found.append(change)
    on_weights = any(v.regularizer is not None for v in model.trainable_variables)
    if on_weights or activity_regularisers(model):
        label = "no penalty on weights" if on_weights else "no penalty on the outputs of layers"
        found.append(Change("regulariser", None, label, rank=3))
    if getattr(optimizer, "momentum", None) and _LONG_MEMORY <= optimizer.momentum < 1:
        found.append(Change("optimizer_setting", ("momentum", 0.9), "momentum 0.9", rank=1))
    return found


def _scale_changes(facts: RunFacts) -> list[Change]:
    """Of a loss that is weighted too much, and of batches too small to be normalised over."""
    found = []
    if "loss weights" in facts.extra:
        found.append(Change("loss_weights", None, "every loss weighted 1", rank=1))
    normalised = any(layer.kind == "BatchNormalization" for layer in facts.layers)
    if facts.batch_size == 1 and normalised:
        label = f"batches of {_LARGER_BATCH}"
        found.append(Change("batch_size", _LARGER_BATCH, label, from_start=True, rank=1))
    return found


def _rate_changes(model: Any, facts: RunFacts, step: int) -> list[Change]:
    found = []
    usable = facts.learning_rate is not None and math.isfinite(facts.learning_rate)
    rate = abs(facts.learning_rate or 0.0) if usable else 0.0
    if rate and rate_variable(model) is not None:
        for divisor in (10, 100):
            value = float(f"{rate / divisor:.6g}")
            found.append(Change("learning_rate", value, f"learning rate {value:g}", rank=3))
        steps = max(100, 4 * (step + 1))
        found.append(Change("warmup", steps, f"{steps} steps of warm-up", rank=3))
    elif facts.learning_rate is not None:
        # Of a schedule: what it began with, else what Keras takes where nothing is said.
        usual = type(inner_optimizer(model))().learning_rate
        rate = rate or float(keras.ops.convert_to_numpy(usual))
        for value in (float(f"{rate:.6g}"), float(f"{rate / 10:.6g}")):
            label = f"constant learning rate {value:g}"
            found.append(Change("constant_rate", value, label, rank=3))
    if model.optimizer is not None and not facts.clip_norm:
        found.append(Change("clip_norm", 1.0, "gradient norm clipped to 1", rank=3))
    return found


def _precision_changes(facts: RunFacts, failed: Sequence[Check]) -> list[Change]:
    found = []
    half = facts.precision != "float32"
    in_update = bool(failed) and failed[0].stage == "update"
    if facts.optimizer_epsilon is not None and (half or in_update):
        epsilon = 1e-4 if half else 1e-3
        if epsilon > facts.optimizer_epsilon:
            label = f"optimizer epsilon {epsilon:g}"
            found.append(Change("optimizer_epsilon", epsilon, label, rank=1))
    if half:
        found.append(Change("precision", "float32", "precision float32", rank=2))
    return found


def _formula_changes(model: Any, failed: Sequence[Check]) -> list[Change]:
    if not failed or failed[0].stage not in ("loss", "backward"):
        return []
    if failed[0].quantity in (RUNAWAY_LOSS, RUNAWAY_GRADIENT):
        return []
    losses = compiled_losses(model)
    if any(_can_take_logits(loss) for loss in losses):
        return [Change("loss_formula", FROM_LOGITS, "loss from logits", rank=1)]
    layer = output_activation(model)
    name = getattr(layer, "activation", None)
    if not losses or getattr(name, "__name__", "") not in ("softmax", "sigmoid"):
        return []
    label = f"predictions kept between {EPSILON:g} and 1 - {EPSILON:g}"
    return [Change("loss_formula", CLIP_PREDICTIONS, label, rank=1)]


def _can_take_logits(loss: Any) -> bool:
    given = getattr(loss, "_fn_kwargs", {})
    return _is_cross_entropy(loss) and not given.get("from_logits", False)


def _is_cross_entropy(loss: Any) -> bool:
    name = getattr(getattr(loss, "fn", None), "__name__", "")
    return bool(name.endswith(_FROM_PROBABILITIES))


def compiled_losses(model: Any) -> list[Any]:
    """Loss objects as Keras compiled them; empty before the first step."""
    compiled = getattr(model, "_compile_loss", None)
    flat = getattr(compiled, "_flat_losses", None) or []
    return [entry.loss for entry in flat]


def hidden_saturating(model: Any) -> list[Any]:
    """Layers whose activation flattens out at its ends; the output and recurrent ones excepted."""
    last = output_activation(model)
    return [
        layer
        for layer in LayerNames(model).layers()
        if getattr(vars(layer).get("activation"), "__name__", "") in _SATURATING
        and layer is not last
        and not hasattr(layer, "recurrent_activation")
    ]


def command(model: Any, facts: RunFacts, change: Change) -> str:
    """The change as a line of the user's program; changes of data have their own."""
    value = change.value
    if change.kind == "optimizer_setting":
        return f"optimizer = {optimizer_code(model, facts, **dict([value]))}"
    if change.kind == "constant_rate":
        return f"optimizer = {optimizer_code(model, facts, learning_rate=value)}"
    if change.kind == "learning_rate":
        return f"optimizer = {optimizer_code(model, facts, learning_rate=value)}"
    if change.kind == "clip_norm":
        return f"optimizer = {optimizer_code(model, facts, global_clipnorm=value)}"
    if change.kind == "optimizer_epsilon":
        return f"optimizer = {optimizer_code(model, facts, epsilon=value)}"
    if change.kind == "warmup":
        rate = facts.learning_rate or 0.0
        return (
            f"learning_rate = keras.optimizers.schedules.CosineDecay({rate / value:.6g}, 1, "
            f"alpha=1.0, warmup_target={rate:g}, warmup_steps={value})"
        )
    if change.kind == "regulariser":
        return "kernel_regularizer=None, activity_regularizer=None  # and no other regulariser"
    if change.kind == "loss_weights":
        return "loss_weights=None  # in compile"
    if change.kind == "batch_size":
        return f"batch_size={value}  # in fit"
    if change.kind == "precision":
        return f'keras.config.set_dtype_policy("{value}")  # and no dtype= on the layers'
    if change.kind == "activation":
        shown = _first_few([layer.name for layer in activated(model, value)])
        return f'activation="{value}"  # of the layers {shown}'
    if change.kind == "init" and value == FINITE_WEIGHTS:
        return (
            "for v in model.trainable_variables: "
            "v.assign(np.nan_to_num(v, nan=0.0, posinf=0.0, neginf=0.0))  # before fit"
        )
    if change.kind == "init" and value == ZERO_BIASES:
        return 'bias_initializer="zeros"  # of every layer'
    if change.kind == "init":
        shown = _first_few([layer.name for layer in facts.layers if layer.weight])
        recurrent = any(word in layer.kind for layer in facts.layers for word in RECURRENT)
        also = ', recurrent_initializer="orthogonal"' if recurrent else ""
        return f'kernel_initializer="{value}"{also}  # of the layers {shown}'
    if change.kind == "init_scale":
        return (
            f"for v in model.trainable_variables: v.assign({value:g} * v if v.name == 'kernel' "
            "else v)  # before fit"
        )
    if change.kind == "loss_formula" and value == FROM_LOGITS:
        return "loss = the same loss with from_logits=True, and no activation on the last layer"
    if change.kind == "loss_formula" and value == OTHER_SIGN:
        return "loss = lambda y_true, y_pred: -your_loss(y_true, y_pred)"
    if change.kind == "loss_formula":
        return f"y_pred = keras.ops.clip(y_pred, {EPSILON:g}, 1 - {EPSILON:g})  # in the loss"
    return ""


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def output_activation(model: Any) -> Any:
    """The layer whose activation function makes the model's output; None if none does."""
    outputs = getattr(model, "outputs", None)
    made_by = [getattr(one, "_keras_history", None) for one in outputs or []]
    layers = [history.operation for history in made_by if history is not None]
    for layer in layers or reversed(LayerNames(model).layers()):
        activation = vars(layer).get("activation")
        if callable(activation) and getattr(activation, "__name__", "linear") != "linear":
            return layer
        if layers or getattr(layer, "weights", None):
            return None
    return None
