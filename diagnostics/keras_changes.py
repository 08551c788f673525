"""What can be done differently in a foreign Keras run, and how a user writes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from diagnostics.diagnosis import FirstNonfinite
from diagnostics.keras_data_changes import data_changes
from diagnostics.keras_names import LayerNames
from diagnostics.keras_sights import RUNAWAY_GRADIENT, RUNAWAY_LOSS
from diagnostics.protocol import Batch, Change, Check, RunFacts, State
from diagnostics.signals import RECURRENT

CLIP_PREDICTIONS, FROM_LOGITS = "clipped predictions", "from logits"
OTHER_SIGN = "the other sign"
EPSILON, LAYER_EPSILON = 1e-7, 1e-3
# Losses that take probabilities and can be told to take logits.
_FROM_PROBABILITIES = ("categorical_crossentropy", "binary_crossentropy")


def candidates(
    model: Any,
    facts: RunFacts,
    failed: Sequence[Check],
    step: int,
    suspects: Sequence[int],
    batch: Batch | None,
    has_start: bool,
    falls: bool = False,
) -> list[Change]:
    """Changes worth a replay, those nearest to the intended run first.

    Args:
      failed: the checks that tripped.
      batch: the failing one; tells whether inputs are unscaled.
      has_start: the state of step 0 is known.
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
    losses = compiled_losses(model)
    if falls and losses and not any(_is_cross_entropy(loss) for loss in losses):
        label = "the loss with the other sign"
        found.append(Change("loss_formula", OTHER_SIGN, label, from_start=has_start, rank=1))
    found += _precision_changes(facts, failed)
    found += _setting_changes(model)
    found += _rate_changes(model, facts, step)
    if has_start and any(layer.weight for layer in facts.layers):
        for rank, name in ((2, "glorot_uniform"), (2, "he_normal")):
            found.append(Change("init", name, f"init {name}", from_start=True, rank=rank))
        found.append(Change("init_scale", 0.1, "initial kernels times 0.1", True, rank=6))
    return found


def _setting_changes(model: Any) -> list[Change]:
    """Optimizer settings that no run survives, back in their range."""
    optimizer = inner_optimizer(model)
    found = []
    for name, usual in (("momentum", 0.9), ("beta_1", 0.9), ("beta_2", 0.999), ("rho", 0.9)):
        value = getattr(optimizer, name, None)
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            label = f"{name} {usual:g}"
            found.append(Change("optimizer_setting", (name, usual), label, rank=1))
    decay = getattr(optimizer, "weight_decay", None)
    if isinstance(decay, (int, float)) and decay:
        change = Change("optimizer_setting", ("weight_decay", None), "no weight decay", rank=1)
        found.append(change)
    if any(v.regularizer is not None for v in model.trainable_variables):
        found.append(Change("regulariser", None, "no penalty on weights", rank=3))
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


def epsilon_changes(model: Any, place: FirstNonfinite) -> list[Change]:
    """A larger epsilon of the layer at fault, where it is one of Keras' own that has one."""
    names = LayerNames(model)
    layer = next((one for one in names.layers() if names.label(one) == place.layer), None)
    epsilon = getattr(layer, "epsilon", None)
    built_in = type(layer).__module__.startswith("keras.")
    if not built_in or not isinstance(epsilon, (int, float)) or epsilon >= LAYER_EPSILON:
        return []
    label = f"epsilon {LAYER_EPSILON:g} of {place.layer}"
    return [Change("layer_epsilon", (place.layer, LAYER_EPSILON), label, rank=1)]


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


def inner_optimizer(model: Any) -> Any:
    """The optimizer that updates, inside a loss scale if there is one."""
    return without_loss_scale(model.optimizer)


def without_loss_scale(optimizer: Any) -> Any:
    """The optimizer inside a `LossScaleOptimizer`, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def rate_variable(model: Any) -> Any:
    """The variable that holds the learning rate; None under a schedule."""
    return rate_variable_of(inner_optimizer(model))


def rate_variable_of(optimizer: Any) -> Any:
    """The same, of one optimizer without a loss scale."""
    rate = getattr(optimizer, "_learning_rate", None)
    return rate if isinstance(rate, keras.Variable) else None


def changed_start(state: State, facts: RunFacts, change: Change | None) -> State:
    """Step 0's state with other kernels, where the change asks for that."""
    if change is None or change.kind not in ("init", "init_scale"):
        return state
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


def _other_recurrence(old: np.ndarray, change: Change) -> np.ndarray:
    if change.kind == "init_scale":
        return (old * np.asarray(change.value, old.dtype)).astype(old.dtype)
    new = keras.initializers.OrthogonalInitializer(seed=0)(old.shape)
    return keras.ops.convert_to_numpy(new).astype(old.dtype)


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
        return "kernel_regularizer=None  # and no other regulariser"
    if change.kind == "layer_epsilon":
        return f"epsilon={value[1]:g}  # of the layer {value[0]}"
    if change.kind == "precision":
        return f'keras.config.set_dtype_policy("{value}")  # and no dtype= on the layers'
    if change.kind == "init":
        layers = [layer.name for layer in facts.layers if layer.weight]
        shown = ", ".join(layers[:4]) + (", …" if len(layers) > 4 else "")
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


def optimizer_code(model: Any, facts: RunFacts, **changes: Any) -> str:
    """The optimizer as Python, with some arguments changed; defaults are left out.

    The rate is the run's: the model's own may be that of a replay.
    """
    optimizer = inner_optimizer(model)
    try:
        defaults = type(optimizer)().get_config()
    except TypeError:  # an optimizer of the user's own that needs arguments
        defaults = {}
    config = _settings(optimizer, defaults)
    given: Mapping[str, Any] = {
        key: value
        for key, value in config.items()
        if key not in ("name", "learning_rate")
        and value != defaults.get(key)
        and not isinstance(value, dict)
    }
    rate = {"learning_rate": config["learning_rate"]} if "learning_rate" in config else {}
    if rate_variable_of(optimizer) is not None and facts.learning_rate is not None:
        rate["learning_rate"] = float(f"{facts.learning_rate:.6g}")
    merged = {**rate, **given, **changes}
    inside = ", ".join(f"{key}={_shown(value)}" for key, value in merged.items())
    module = "keras.optimizers." if type(optimizer).__module__.startswith("keras.") else ""
    return f"{module}{type(optimizer).__name__}({inside})"


class _Name(str):
    """A name of the user's program, shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _settings(optimizer: Any, names: Iterable[str]) -> Mapping[str, Any]:
    """The optimizer's configuration; a schedule of the user's own may have none to give."""
    if rate_variable_of(optimizer) is None:
        plain = {name: getattr(optimizer, name, None) for name in names if name != "learning_rate"}
        known = {k: v for k, v in plain.items() if isinstance(v, (bool, int, float, str))}
        return {"learning_rate": _Name("schedule"), **known}
    return optimizer.get_config()


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


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
