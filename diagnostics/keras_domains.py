"""A Keras step traced with logarithms, divisions, roots and the like kept inside their domain.

The counterfactual of a formula that left its domain: every such op of the model and of
the loss, whoever wrote it, is given the nearest number that it can take. The optimizer's
own arithmetic stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import tensorflow as tf

from diagnostics.diagnosis import FirstNonfinite
from diagnostics.op_domains import UNCAST, domain_fault, op_name

EPSILON, EPSILON_HALF = 1e-7, 1e-3
_LARGEST_EXPONENT, _LARGEST_EXPONENT_HALF = 80.0, 10.0
_EVERY = "every"


class _Repair(NamedTuple):
    """How the inputs of one type of op are kept, in a graph and in a user's words.

    Attributes:
      place: which input; None for all of them.
      keep: given that input, the kept one.
      label: of the counterfactual. line: of the user's program.
    """

    place: int | None
    keep: Callable[[tf.Tensor], tf.Tensor]
    label: str
    line: str


def _epsilon(x: tf.Tensor) -> float:
    return EPSILON_HALF if x.dtype in (tf.float16, tf.bfloat16) else EPSILON


def _from_zero(x: tf.Tensor) -> tf.Tensor:
    return tf.maximum(x, tf.constant(_epsilon(x), x.dtype))


def _off_zero(x: tf.Tensor) -> tf.Tensor:
    small = tf.constant(_epsilon(x), x.dtype)
    away = tf.where(x < 0, -small, small)
    return tf.where(tf.abs(x) < small, away, x)


def _from_minus_one(x: tf.Tensor) -> tf.Tensor:
    return tf.maximum(x, tf.constant(_epsilon(x) - 1.0, x.dtype))


def _from_one(x: tf.Tensor) -> tf.Tensor:
    return tf.maximum(x, tf.constant(1.0 + 10 * _epsilon(x), x.dtype))


def _within_one(x: tf.Tensor) -> tf.Tensor:
    border = 1.0 - 10 * _epsilon(x)
    return tf.clip_by_value(x, -border, border)


def _inside_unit(x: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(x, _epsilon(x), 1.0 - _epsilon(x))


def _no_overflow(x: tf.Tensor) -> tf.Tensor:
    largest = _LARGEST_EXPONENT_HALF if x.dtype == tf.float16 else _LARGEST_EXPONENT
    return tf.minimum(x, tf.constant(largest, x.dtype))


def _finite_below(x: tf.Tensor) -> tf.Tensor:
    return tf.maximum(x, tf.constant(x.dtype.min, x.dtype))


def _finite(x: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(x, x.dtype.min, x.dtype.max)


def _positive_definite(x: tf.Tensor) -> tf.Tensor:
    """A diagonal that outweighs the rest of its row."""
    diagonal = tf.linalg.diag_part(x)
    rest = tf.reduce_sum(tf.abs(x), -1) - tf.abs(diagonal)
    return tf.linalg.set_diag(x, tf.maximum(diagonal, rest + EPSILON_HALF))


def _neither_overflow(x: tf.Tensor) -> tf.Tensor:
    return -_no_overflow(-_no_overflow(x))


_ABOVE = f"tf.maximum(x, {EPSILON:g})"
_INSIDE = f"tf.clip_by_value(x, -1 + {10 * EPSILON:g}, 1 - {10 * EPSILON:g})"
_KEPT_FINITE = "tf.clip_by_value({0}, {0}.dtype.min, {0}.dtype.max)".format
_AWAY = f"tf.where(tf.abs(b) < {EPSILON:g}, {EPSILON:g}, b)"
_REPAIRS = {
    "Log": _Repair(0, _from_zero, f"logarithms of at least {EPSILON:g}", f"tf.math.log({_ABOVE})"),
    "Log1p": _Repair(
        0, _from_minus_one, "logarithms of 1 + x above 0", "tf.math.log1p(tf.maximum(x, -0.999999))"
    ),
    "Xlogy": _Repair(
        1,
        _from_zero,
        f"logarithms of at least {EPSILON:g}",
        f"tf.math.xlogy(a, tf.maximum(b, {EPSILON:g}))",
    ),
    "Sqrt": _Repair(0, _from_zero, f"roots of at least {EPSILON:g}", f"tf.sqrt({_ABOVE})"),
    "Rsqrt": _Repair(0, _from_zero, f"roots of at least {EPSILON:g}", f"tf.math.rsqrt({_ABOVE})"),
    "RealDiv": _Repair(1, _off_zero, f"denominators of at least {EPSILON:g}", f"a / {_AWAY}"),
    "Xdivy": _Repair(1, _off_zero, f"denominators of at least {EPSILON:g}", f"a / {_AWAY}"),
    "Reciprocal": _Repair(0, _off_zero, f"denominators of at least {EPSILON:g}", f"1 / {_AWAY}"),
    "Pow": _Repair(0, _from_zero, f"powers of at least {EPSILON:g}", f"tf.pow({_ABOVE}, y)"),
    "Exp": _Repair(0, _no_overflow, "exponentials of at most 80", "tf.exp(tf.minimum(x, 80.0))"),
    "Expm1": _Repair(
        0, _no_overflow, "exponentials of at most 80", "tf.math.expm1(tf.minimum(x, 80.0))"
    ),
    "Sinh": _Repair(
        0, _neither_overflow, "sinh within 80", "tf.sinh(tf.clip_by_value(x, -80.0, 80.0))"
    ),
    "Cosh": _Repair(
        0, _neither_overflow, "cosh within 80", "tf.cosh(tf.clip_by_value(x, -80.0, 80.0))"
    ),
    "Softmax": _Repair(
        0, _finite_below, "a softmax of finite numbers", "tf.nn.softmax(tf.maximum(x, x.dtype.min))"
    ),
    "Acos": _Repair(0, _within_one, "angles of numbers inside (-1, 1)", f"tf.acos({_INSIDE})"),
    "Asin": _Repair(0, _within_one, "angles of numbers inside (-1, 1)", f"tf.asin({_INSIDE})"),
    "Atanh": _Repair(0, _within_one, "atanh of numbers inside (-1, 1)", f"tf.atanh({_INSIDE})"),
    "Erfinv": _Repair(
        0, _within_one, "erfinv of numbers inside (-1, 1)", f"tf.math.erfinv({_INSIDE})"
    ),
    "Ndtri": _Repair(
        0,
        _inside_unit,
        "ndtri of numbers inside (0, 1)",
        f"tf.math.ndtri(tf.clip_by_value(x, {EPSILON:g}, 1 - {EPSILON:g}))",
    ),
    "Lgamma": _Repair(
        0, _from_zero, f"lgamma of at least {EPSILON:g}", f"tf.math.lgamma({_ABOVE})"
    ),
    "Digamma": _Repair(
        0, _from_zero, f"digamma of at least {EPSILON:g}", f"tf.math.digamma({_ABOVE})"
    ),
    "Acosh": _Repair(0, _from_one, "acosh of numbers above 1", "tf.acosh(tf.maximum(x, 1.000001))"),
    "Cholesky": _Repair(
        0,
        _positive_definite,
        "matrices whose diagonal outweighs the rest",
        "d = tf.linalg.diag_part(x); x = tf.linalg.set_diag(x, tf.maximum(d, "
        "tf.reduce_sum(tf.abs(x), -1) - tf.abs(d) + 1e-3))",
    ),
    "Sub": _Repair(
        None,
        _finite,
        "differences of finite numbers",
        f"{_KEPT_FINITE('a')} - {_KEPT_FINITE('b')}",
    ),
    "Mul": _Repair(
        None, _finite, "products of finite numbers", f"{_KEPT_FINITE('a')} * {_KEPT_FINITE('b')}"
    ),
}
# Kept only where they are at fault: not logarithms, roots and the like.
_APART = frozenset(["Cholesky", "Sub", "Mul"])
_BY_NAME = {kind.lower(): kind for kind in _REPAIRS}
_BY_NAME |= {"div": "RealDiv", "inv": "Reciprocal"}
# A gradient op at fault, and the op whose gradient it is.
_GRADIENT_OF = {"sqrtgrad": "Sqrt", "rsqrtgrad": "Rsqrt"}


class DomainChange(NamedTuple):
    """A formula to keep inside its domain.

    Attributes:
      value: type of op, or 'every' where the gradient does not tell which it was.
      label: what is done. line: how a user writes it, with the place.
    """

    value: str
    label: str
    line: str


def domain_changes(place: FirstNonfinite, half: bool) -> list[DomainChange]:
    """What would keep the op at fault inside its domain, and then every op; empty if none left it.

    Args:
      half: whether it may have computed in float16.
    """
    if place.op is None or domain_fault(place, half) is None:
        return []
    name = op_name(place.op)
    kind = _BY_NAME.get(name) if place.stage in ("forward", "loss") else _GRADIENT_OF.get(name)
    if kind is None and place.stage == "backward":
        # The forward op stands in the user's line, if there is one.
        code = (place.source or "").lower()
        kind = next((_BY_NAME[known] for known in _BY_NAME if f"{known}(" in code), None)
    at = f"  # at {place.source.split(' in ')[0]}" if place.source else ""
    found = []
    if kind is not None:
        found.append(DomainChange(kind, _REPAIRS[kind].label, f"{_REPAIRS[kind].line}{at}"))
    label = f"logarithms, roots, powers and denominators of at least {EPSILON:g}"
    line = f"{_ABOVE} in front of every logarithm, root and division{at}"
    return [*found, DomainChange(_EVERY, label, line)]


def uncast(place: FirstNonfinite) -> DomainChange:
    """A float32 program that casts to float16 by itself: left in float32."""
    at = f"  # before {place.source.split(' in ')[0]}" if place.source else ""
    return DomainChange(UNCAST, "no cast to float16", f"tf.cast(x, tf.float32){at}")


def _whole(kind: int) -> int:
    """The type of a cast: float32 instead of float16."""
    half, whole = tf.float16.as_datatype_enum, tf.float32.as_datatype_enum
    return whole if kind == half else kind


@contextmanager
def kept_in_domain(value: str, optimizers: Sequence[Any]) -> Iterator[None]:
    """While it runs, ops of this kind are traced with kept inputs, or casts left out.

    Args:
      value: of a `DomainChange`. optimizers: whose updates are left alone.
    """
    graph_type = tf.__internal__.FuncGraph
    create = graph_type._create_op_internal
    kinds = frozenset(_REPAIRS) - _APART if value == _EVERY else frozenset([value])
    suspended = [False]

    def created(graph: Any, op_type: str, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if value == UNCAST and op_type == "Cast":
            kwargs["attrs"]["DstT"].type = _whole(kwargs["attrs"]["DstT"].type)
        elif op_type in kinds and not suspended[0]:
            repair = _REPAIRS[op_type]
            inputs = list(inputs)
            for place in range(len(inputs)) if repair.place is None else [repair.place]:
                if inputs[place].dtype.is_floating:
                    with _set(suspended):
                        inputs[place] = repair.keep(inputs[place])
        return create(graph, op_type, inputs, *args, **kwargs)

    def left_alone(update: Callable[..., Any]) -> Callable[..., Any]:
        def updated(*args: Any, **kwargs: Any) -> Any:
            with _set(suspended):
                return update(*args, **kwargs)

        return updated

    graph_type._create_op_internal = created
    for optimizer in optimizers:
        update = left_alone(optimizer._backend_apply_gradients)
        object.__setattr__(optimizer, "_backend_apply_gradients", update)
    try:
        yield
    finally:
        graph_type._create_op_internal = create
        for optimizer in optimizers:
            object.__delattr__(optimizer, "_backend_apply_gradients")


@contextmanager
def _set(flag: list[bool]) -> Iterator[None]:
    before, flag[0] = flag[0], True
    try:
        yield
    finally:
        flag[0] = before
