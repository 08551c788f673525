"""The optimizer of a foreign Keras run: its rate, and how its user would write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from diagnostics.protocol import RunFacts


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
