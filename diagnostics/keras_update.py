"""The optimizer update of a Keras step: applied whole, or not at all.

The fast level takes norms of gradients, weights and slots (`keras_norms`); where they prove
that every element of the new state is finite, the update runs and nothing is copied.
Where they do not, or for an optimizer without a known bound, the careful level
looks at every element, keeps the old state, lets the update run, looks at the
result and puts the old state back if it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from diagnostics.guard import SAFE_BOUND, all_finite, exact_norm
from diagnostics.keras_names import LayerNames, native, slot_owners
from diagnostics.keras_norms import CarriedNorms, Norms
from diagnostics.keras_products import gradient_square, square
from diagnostics.keras_readings import second_reading

# With an epsilon > 0 in the denominator these move a weight by at most
# learning rate * _AMPLIFICATION * (|slots| + |gradient|) / epsilon.
_ADAPTIVE = (
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Adadelta,
)
_AMPLIFICATION = 1e3  # covers 1 / (1 - beta_1) of Adam and the momentum of RMSprop


class Group(NamedTuple):
    """What belongs to one layer in an update; tensors are read where they are used."""

    layer: str
    gradients: list[tf.Tensor]
    weights: list[Any]
    slots: list[Any]


class Update(NamedTuple):
    """What the update showed, by group; bool or float32 [groups].

    Attributes:
      applied: whether the new state was written.
      gradients, weights, state: whether all elements are finite; `state` is of
        the new weights and slots.
    """

    applied: tf.Tensor
    gradients: tf.Tensor
    weights: tf.Tensor
    state: tf.Tensor
    gradient_norms: tf.Tensor
    weight_norms: tf.Tensor


def group_by_layer(
    names: LayerNames, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> list[Group]:
    """One group per layer, in the order of the variables; those without gradient are left out."""
    groups: dict[str, Group] = {}
    owners = slot_owners(optimizer, variables)
    slots: dict[int, list[Any]] = {id(variable): [] for variable in variables}
    for slot in optimizer.variables:
        if id(slot) in owners:
            slots[id(owners[id(slot)][0])].append(native(slot))
    for gradient, variable in zip(gradients, variables, strict=True):
        if gradient is None:
            continue
        label = names.owner(variable)
        group = groups.setdefault(label, Group(label, [], [], []))
        # Of an embedding's IndexedSlices, the rows that were looked up.
        group.gradients.append(second_reading(getattr(gradient, "values", gradient)))
        group.weights.append(native(variable))
        group.slots.extend(slots[id(variable)])
    return list(groups.values())


def guarded_update(
    optimizer: Any,
    apply: Callable[[], Any],
    groups: Sequence[Group],
    clear: tf.Tensor,
    touched: Sequence[Any],
    limit: tf.Tensor,
    carried: CarriedNorms | None = None,
) -> Update:
    """Runs `apply`; puts back what it wrote unless all is finite before and after.

    `apply` stays in the graph around it, because grappler rewrites products of
    gradient and learning rate across their border, and the bits with them.

    Args:
      clear: bool scalar, whether everything before the update was finite.
      touched: every variable that `apply` may write.
      limit: float32 scalar; a larger global gradient norm is refused too.
      carried: of `groups`, where nothing but `apply` writes weights and slots.
    """
    exempt = gradients_exempt(optimizer)
    sight, sure = _fast_sight(optimizer, groups, clear, touched, limit, carried)

    def careful() -> tuple[_Sight, list[tf.Tensor]]:
        return _careful_sight(groups, clear, exempt, limit), [tf.identity(v) for v in touched]

    def fast() -> tuple[_Sight, list[tf.Tensor]]:
        return sight, [tf.zeros([0], v.dtype) for v in touched]

    seen, saved = tf.cond(sure, fast, careful)
    seen = _Sight(*seen)
    apply()
    every = tf.ones([len(groups)], tf.bool)

    def judge() -> tuple[tf.Tensor, tf.Tensor]:
        state = tf.logical_or(all_finite(new_state(optimizer, groups, touched)), ~seen.good)
        good = tf.logical_and(seen.good, tf.reduce_all(state))
        return tf.cond(good, lambda: tf.constant(True), lambda: _put_back(touched, saved)), state

    applied, state = tf.cond(sure, lambda: (tf.constant(True), every), judge)
    gradients = tf.logical_or(seen.gradients, exempt)
    return Update(applied, gradients, seen.weights, state, seen.gradient_norms, seen.weight_norms)


class _Sight(NamedTuple):
    """What was seen before the update; `good`: nothing speaks against it."""

    good: tf.Tensor
    gradients: tf.Tensor
    weights: tf.Tensor
    gradient_norms: tf.Tensor
    weight_norms: tf.Tensor


def _fast_sight(
    optimizer: Any,
    groups: Sequence[Group],
    clear: tf.Tensor,
    touched: Sequence[Any],
    limit: tf.Tensor,
    carried: CarriedNorms | None,
) -> tuple[_Sight, tf.Tensor]:
    """Norms, and whether they prove that the new state will be finite."""
    if not has_bound(optimizer, touched):
        nothing, zeros = tf.zeros([len(groups)], tf.bool), tf.zeros([len(groups)])
        return _Sight(tf.constant(False), nothing, nothing, zeros, zeros), tf.constant(False)

    def norms(kind: str) -> tf.Tensor:
        return tf.stack([fast_norm(getattr(group, kind)) for group in groups])

    gradients = tf.stack(
        [tf.sqrt(tf.add_n([gradient_square(g) for g in group.gradients])) for group in groups]
    )
    if carried is None:
        weights = norms("weights")
        norm = Norms(gradients, weights, norms("slots"), weights, gradients)
    else:
        norm = carried.now(
            gradients,
            lambda: (norms("weights"), norms("slots")),
            lambda found: tf.reduce_all(proven_finite(optimizer, found)),
        )
    conclusive = proven_finite(optimizer, norm)
    within = tf.norm(gradients) <= limit
    sure = tf.logical_and(clear, tf.logical_and(tf.reduce_all(conclusive), within))
    if carried is not None:
        carried.leave(norm, *reached_norms(optimizer, norm), hold=sure)
    return _Sight(sure, conclusive, conclusive, gradients, norm.weights_read), sure


def _careful_sight(
    groups: Sequence[Group], clear: tf.Tensor, exempt: tf.Tensor, limit: tf.Tensor
) -> _Sight:
    gradients, weights, gradient_norms, weight_norms = exact_sight(groups)
    within = tf.logical_and(tf.reduce_all(gradients), global_norm(gradient_norms) <= limit)
    good = tf.logical_and(clear, tf.reduce_all(weights))
    good = tf.logical_and(good, tf.logical_or(exempt, within))
    return _Sight(good, gradients, weights, gradient_norms, weight_norms)


def _put_back(touched: Sequence[Any], saved: Sequence[tf.Tensor]) -> tf.Tensor:
    for variable, value in zip(touched, saved, strict=True):
        variable.assign(tf.reshape(value, variable.shape))
    return tf.constant(False)


def exact_sight(
    groups: Sequence[Group],
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finiteness and norms of gradients and weights, by every element."""
    gradients = [group.gradients for group in groups]
    weights = [[tf.identity(variable) for variable in group.weights] for group in groups]
    norms = (
        tf.stack([exact_norm([single(tensor) for tensor in group]) for group in kind])
        for kind in (gradients, weights)
    )
    return (all_finite(gradients), all_finite(weights), *norms)


def global_norm(norms: tf.Tensor) -> tf.Tensor:
    """Norm of norms, scaled by the maximum: overflows only where it must."""
    largest = tf.reduce_max(norms)
    return largest * tf.norm(tf.math.divide_no_nan(norms, largest))


def new_state(
    optimizer: Any, groups: Sequence[Group], touched: Sequence[Any]
) -> list[list[tf.Tensor]]:
    """What must be finite after an update, by group; if it is, all of the new state is.

    What belongs to no layer (a loss scale) counts for the first group.
    """
    implied = _weights_tell_of_slots(optimizer, touched)
    members = [[*group.weights, *([] if implied else group.slots)] for group in groups]
    listed = {id(v) for group in groups for v in (*group.weights, *group.slots)}
    members[0] += [v for v in touched if id(v) not in listed and v.dtype.is_floating]
    return [[tf.identity(variable) for variable in group] for group in members]


def _weights_tell_of_slots(optimizer: Any, touched: Sequence[Any]) -> bool:
    """Whether a slot that is not finite makes its new weight so: SGD adds the velocity to it."""
    inner = _inner(optimizer)
    plain = type(inner) is keras.optimizers.SGD and not inner.use_ema
    constrained = any(v.constraint is not None for v in inner._trainable_variables)
    return plain and not constrained and len({v.dtype for v in touched if v.dtype.is_floating}) == 1


def gradients_exempt(optimizer: Any) -> tf.Tensor:
    """bool scalar: non-finite gradients are the loss scale's business, not an incident.

    A `LossScaleOptimizer` skips such a step and halves its scale; once the scale is
    down to 1 the gradients themselves are at fault.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) and optimizer.built:
        return tf.convert_to_tensor(native(optimizer.dynamic_scale)) > 1.0
    return tf.constant(False)


def _inner(optimizer: Any) -> Any:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def has_bound(optimizer: Any, touched: Sequence[Any]) -> bool:
    """Whether `reached_norms` holds of it."""
    inner = _inner(optimizer)
    if any(v.dtype.is_floating and v.dtype != tf.float32 for v in touched):
        return False
    if any(v.constraint is not None for v in inner._trainable_variables):
        return False
    if type(inner) is keras.optimizers.SGD:
        return True
    # A centred RMSprop subtracts under its root, which rounding can make negative.
    known = type(inner) in _ADAPTIVE and not getattr(inner, "centered", False)
    return known and inner.epsilon >= 1e-30 and _tame(inner)


def _tame(optimizer: Any) -> bool:
    """Whether its running means are means, and of no more steps than `_AMPLIFICATION`."""
    longest = 1.0 - 1.0 / _AMPLIFICATION
    limits = {"beta_1": longest, "momentum": longest, "beta_2": 1.0 - 1e-7, "rho": 1.0 - 1e-7}
    values = {name: getattr(optimizer, name, None) for name in limits}
    return all(value is None or 0 <= value <= limits[name] for name, value in values.items())


def bounded_by_carried(optimizer: Any) -> bool:
    """Whether the bounds of one step are of use for many: Adadelta's slots hold its updates."""
    return not isinstance(_inner(optimizer), keras.optimizers.Adadelta)


def reached_norms(optimizer: Any, norm: Norms) -> tuple[tf.Tensor, tf.Tensor]:
    """Upper bounds of the norms of new weights and of new slots, float32 [groups] each."""
    inner = _inner(optimizer)
    rate = tf.maximum(tf.abs(tf.cast(inner.learning_rate, tf.float32)), 1.0)
    weights = (1.0 + rate * abs(inner.weight_decay or 0.0)) * norm.weights
    moved = norm.slots + norm.gradients
    if type(inner) is keras.optimizers.SGD:
        weights += 3.0 * (rate + 1.0) * moved
        slots = 2.0 * rate * moved
    else:
        amplified = rate / min(inner.epsilon, 1.0)
        weights += _AMPLIFICATION * amplified * moved
        # Gradients that are accumulated are slots until their turn comes.
        gradients = moved if inner.gradient_accumulation_steps else norm.gradients
        slots = 2.0 * (moved + tf.square(gradients))
        if getattr(inner, "momentum", None):  # RMSprop keeps a running sum of its updates
            slots += amplified * gradients
    return weights, slots + weights if inner.use_ema else slots


def proven_finite(optimizer: Any, norm: Norms) -> tf.Tensor:
    """bool [groups]: whether an update leaves all finite; false for a norm of NaN."""
    return tf.reduce_all(tf.stack(reached_norms(optimizer, norm)) < SAFE_BOUND, axis=0)


def fast_norm(tensors: Sequence[Any]) -> tf.Tensor:
    """L2 norm, float32; not finite if any element is not, or if a square overflowed."""
    return (
        tf.sqrt(tf.add_n([square(tensor) for tensor in tensors])) if tensors else tf.constant(0.0)
    )


def single(tensor: tf.Tensor) -> tf.Tensor:
    """As float32: squares of half precision overflow at once."""
    return tensor if tensor.dtype == tf.float32 else tf.cast(tensor, tf.float32)
