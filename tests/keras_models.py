"""Small Keras models, data and a fit, for the tests of NumericGuard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from diagnostics import NumericGuard

L = keras.layers
ROWS, FEATURES, CLASSES, BATCH = 48, 6, 3, 8
STEPS = ROWS // BATCH
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs float32 [48, 6] and class numbers int64 [48]."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(ROWS, FEATURES)).astype("float32"), draw.integers(0, CLASSES, ROWS)


def poisoned(step: int, value: float = np.nan) -> tuple[np.ndarray, np.ndarray]:
    """The same, with one bad number in the third row of a step's batch."""
    x, y = data()
    x[step * BATCH + 2, 1] = value
    return x, y


def mlp(activation: str = "relu") -> keras.Model:
    """Two hidden layers; nothing is built yet."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            L.Dense(8, activation=activation, name="first"),
            L.Dense(8, activation=activation, name="second"),
            L.Dense(CLASSES, name="logits"),
        ]
    )


def compiled(model: keras.Model, **options: Any) -> keras.Model:
    """Compiled for class numbers, with Adam, without XLA, unless `options` say otherwise."""
    chosen = {
        "optimizer": keras.optimizers.Adam(1e-2),
        "loss": CROSS_ENTROPY,
        "jit_compile": False,
        **options,
    }
    model.compile(**chosen)
    return model


class Fitted:
    """A model after a fit with or without a guard, made from fixed seeds.

    Attributes:
      halfway: `bits()` after the first half of the steps of an epoch.

    Args:
      build: makes the compiled model. fit: arguments of `fit`, or a function that
        is given (model, callbacks) and fits.
    """

    def __init__(
        self,
        build: Callable[[], keras.Model],
        x: Any = None,
        y: Any = None,
        run_dir: Path | None = None,
        **fit: Any,
    ) -> None:
        keras.backend.clear_session()
        keras.utils.set_random_seed(7)
        self.model = build()
        self.guard = None if run_dir is None else NumericGuard(run_dir)
        self.halfway: list[bytes] = []
        half = keras.callbacks.LambdaCallback(on_train_batch_end=self._on_batch)
        callbacks = [half, *fit.pop("callbacks", []), *([self.guard] if self.guard else [])]
        options = {"shuffle": False, "verbose": 0, "epochs": 1, **fit}
        if isinstance(x, np.ndarray):
            options.setdefault("batch_size", BATCH)
        self.history = self.model.fit(x, y, callbacks=callbacks, **options)

    def _on_batch(self, batch: int, logs: dict | None) -> None:
        if batch == STEPS // 2 - 1:
            self.halfway = self.bits()

    def bits(self) -> list[bytes]:
        """Every weight, slot, statistic and seed of the model, as bytes."""
        variables = [*self.model.variables, *self.model.optimizer.variables]
        return [np.asarray(v.numpy()).tobytes() for v in variables]
