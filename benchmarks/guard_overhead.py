"""What NumericGuard costs a Keras `fit`: seconds and bytes a step, with and without it.

    python benchmarks/guard_overhead.py [--only WORD] [--rounds N] [--jit on|off|both]

One model per row; its fits with and without the guard take turns (A B A B), so that a
slow moment of the machine hits both. Of each fit the first steps, which compile, are
left out; the table shows the median step and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from diagnostics import NumericGuard
from diagnostics.keras_run_files import describe_packages

L = keras.layers
GOALS = {"vgg-d": 1.03}
GOAL, GOAL_FROM_MS = 1.10, 10.0


@dataclass(frozen=True)
class Net:
    """One row: a model, its batch, and how many steps a fit takes after those that compile."""

    name: str
    build: Callable[[], keras.Model]
    inputs: tuple[int, ...]
    classes: int
    batch: int
    steps: int


def mlp() -> keras.Model:
    """Three hidden layers of 1024."""
    hidden = [L.Dense(1024, activation="relu") for _ in range(3)]
    return keras.Sequential([keras.Input((784,)), *hidden, L.Dense(10)])


def cnn() -> keras.Model:
    """Three convolutions with batch norm on 32 px."""
    blocks: list[Any] = []
    for width in (32, 64, 128):
        blocks += [L.Conv2D(width, 3, padding="same"), L.BatchNormalization(), L.ReLU()]
        blocks += [L.MaxPooling2D()]
    return keras.Sequential([keras.Input((32, 32, 3)), *blocks, L.Flatten(), L.Dense(10)])


def transformer() -> keras.Model:
    """One pre-norm block of width 256, 8 heads, 128 positions."""
    tokens = keras.Input((128, 256))
    x = L.LayerNormalization()(tokens)
    x = L.Add()([tokens, L.MultiHeadAttention(8, 32, dropout=0.1)(x, x)])
    y = L.Dense(256)(L.Dense(1024, activation="gelu")(L.LayerNormalization()(x)))
    return keras.Model(tokens, L.Dense(10)(L.GlobalAveragePooling1D()(L.Add()([x, y]))))


def vgg_d() -> keras.Model:
    """Net D (VGG-16) at full width on 224 px."""
    return keras.applications.VGG16(weights=None, classifier_activation=None)


NETS = (
    Net("mlp", mlp, (784,), 10, 128, 60),
    Net("cnn", cnn, (32, 32, 3), 10, 64, 20),
    Net("transformer", transformer, (128, 256), 10, 16, 20),
    Net("vgg-d", vgg_d, (224, 224, 3), 1000, 8, 3),
)
WARM_UP = 3  # steps that compile and fill caches


class _StepTimes(keras.callbacks.Callback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.ends.append(time.perf_counter())

    def after_warm_up(self) -> list[float]:
        return np.diff(self.ends)[WARM_UP - 1 :].tolist()


def fit_seconds(model: keras.Model, data: tf.data.Dataset, callbacks: list[Any]) -> list[float]:
    """Seconds of every step of one fit, but those that compile."""
    times = _StepTimes()
    model.fit(data, verbose=0, callbacks=[*callbacks, times])
    return times.after_warm_up()


def measure(net: Net, jit: bool, rounds: int) -> dict[str, float]:
    """Medians of the plain and the guarded fit in milliseconds, their ratio, bytes a step."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(net.batch, *net.inputs)).astype("float32")
    y = draw.integers(0, net.classes, net.batch)
    data = tf.data.Dataset.from_tensors((x, y)).cache().repeat(WARM_UP + net.steps)
    model = net.build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), loss, jit_compile=jit)
    plain: list[float] = []
    guarded: list[float] = []
    ratios = []
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            guard = NumericGuard(Path(place) / f"run{turn}")
            a = fit_seconds(model, data, [])
            b = fit_seconds(model, data, [guard])
            plain += a
            guarded += b
            ratios.append(statistics.median(b) / statistics.median(a))
        telemetry = guard.telemetry()
    return {
        "plain_ms": 1e3 * statistics.median(plain),
        "guarded_ms": 1e3 * statistics.median(guarded),
        "ratio": statistics.median(ratios),
        # A float32 per column and the step's number.
        "bytes": 4.0 * len(telemetry.columns) + 8.0,
    }


def main() -> int:
    """0 if every row keeps its goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="nets whose name holds this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jit", choices=("on", "off", "both"), default="both")
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores; {describe_packages()}; {options.rounds} rounds")
    row = "{:<12} {:>4} {:>10} {:>10} {:>9} {:>7} {:>11}  {}"
    print(row.format("net", "jit", "fit ms", "guard ms", "more ms", "ratio", "bytes/step", "goal"))
    kept = True
    for net in NETS:
        for jit in {"on": [True], "off": [False], "both": [False, True]}[options.jit]:
            if options.only not in net.name:
                continue
            found = measure(net, jit, options.rounds)
            more = found["guarded_ms"] - found["plain_ms"]
            goal = GOALS.get(net.name, GOAL) if found["plain_ms"] >= GOAL_FROM_MS else None
            good = goal is None or found["ratio"] <= goal
            kept = kept and good
            text = "-" if goal is None else f"<= {goal:g} {'kept' if good else 'MISSED'}"
            times = [f"{found[k]:.2f}" for k in ("plain_ms", "guarded_ms")]
            cells = [*times, f"{more:.2f}", f"{found['ratio']:.3f}", f"{found['bytes']:.0f}", text]
            print(row.format(net.name, "on" if jit else "off", *cells), flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
