"""What other tripwires say of the same three faults, and what each costs.

    python benchmarks/tripwires.py [--rounds N] [--torch-python PYTHON]

NumericGuard beside `keras.callbacks.TerminateOnNaN`, `tf.debugging.enable_check_numerics`
and, in a Python that has PyTorch, `torch.autograd.set_detect_anomaly`. Per fault: the step
each stops at, whether the weights survive, and its words. Then seconds a step on healthy
data, with and without, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from diagnostics import NumericGuard

L = keras.layers
FAULTS = ("a loss with log(0)", "one NaN in the data", "an initialiser that explodes")
ROWS, FEATURES, CLASSES, BATCH = 640, 64, 10, 32


def data(fault: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs float32 [640, 64] and one-hot labels; row 211 holds a NaN if that is the fault."""
    draw = np.random.default_rng(0)
    classes = draw.integers(0, CLASSES, ROWS)
    x = draw.normal(size=(ROWS, FEATURES)) + 2 * draw.normal(size=(CLASSES, FEATURES))[classes]
    if fault == FAULTS[1]:
        x[211, 5] = np.nan
    return x.astype("float32"), np.eye(CLASSES, dtype="float32")[classes]


def model(fault: str) -> keras.Model:
    """Eight ReLU layers and a softmax, with cross-entropy by hand or by Keras."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    kernel = keras.initializers.RandomNormal(0, 1.0) if fault == FAULTS[2] else "he_normal"
    hidden = [
        L.Dense(256, activation="relu", kernel_initializer=kernel, name=f"dense_{i}")
        for i in range(8)
    ]
    wide = keras.initializers.RandomNormal(0, 4.0) if fault == FAULTS[0] else kernel
    head = L.Dense(CLASSES, activation="softmax", kernel_initializer=wide, name="p")
    made = keras.Sequential([keras.Input((FEATURES,)), *hidden, head])

    def by_hand(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return -tf.reduce_sum(y_true * tf.math.log(y_pred), axis=-1)

    loss = by_hand if fault == FAULTS[0] else "categorical_crossentropy"
    made.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=False)
    return made


@contextlib.contextmanager
def check_numerics() -> Iterator[None]:
    """`enable_check_numerics` while it lasts, its own log not shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        tf.debugging.enable_check_numerics()
        try:
            yield
        finally:
            tf.debugging.disable_check_numerics()


class _Steps(keras.callbacks.Callback):
    """Counts the steps that were run and notes when each ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.ends.append(time.perf_counter())


def fit(fault: str, tool: str, epochs: int = 3) -> tuple[_Steps, keras.Model, str]:
    """One fit under a tool: its steps, the model afterwards, what the tool said."""
    made, steps, said = model(fault), _Steps(), ""
    with tempfile.TemporaryDirectory() as place:
        guard = NumericGuard(Path(place) / "run")
        own = {"NumericGuard": [guard], "TerminateOnNaN": [keras.callbacks.TerminateOnNaN()]}
        around = check_numerics() if tool == "check_numerics" else contextlib.nullcontext()
        out = io.StringIO()
        try:
            with around, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                x, y = data(fault)
                callbacks = [*own.get(tool, []), steps]
                options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
                made.fit(x, y, epochs=epochs, callbacks=callbacks, **options)
            said = out.getvalue().strip()
        except tf.errors.InvalidArgumentError as error:
            said = _check_words(error.message)
        if guard.incident is not None:
            said = _guard_words(guard)
    return steps, made, said


def _guard_words(guard: NumericGuard) -> str:
    """What the guard found, in a sentence."""
    found = guard.diagnose(budget_seconds=20)
    first, fix = found.first_nonfinite, found.recommendation
    place = "" if first is None else f"{first.stage}, layer {first.layer}, op {first.op}"
    proof = "" if fix is None else f"; {'verified' if fix.verified else 'untested'}: {fix.command}"
    return f"step {found.step}: {place}, {first and first.source}; cause {found.cause.kind}{proof}"


def _check_words(message: str) -> str:
    """Of TensorFlow's error: the node, the innermost line of this file, and the complaint."""
    node = re.search(r"Detected at node (\S+)", message)
    lines = re.findall(r"tripwires\.py\", line \d+, in \w+", message)
    complaint = re.search(r"[^\n]*(?:had|has) (?:NaN|Inf|-Inf)[^\n]*|!!![^\n]*", message)
    parts = [node and node.group(1), lines and lines[-1], complaint and complaint.group(0)]
    return "; ".join(part for part in parts if part)


def tell(fault: str, tool: str) -> None:
    """Prints the row of one tool on one fault."""
    steps, made, said = fit(fault, tool)
    whole = all(np.isfinite(weight).all() for weight in made.get_weights())
    words = " ".join(said.split())[:230] or "(nothing)"
    print(
        f"  {tool:<16} {len(steps.ends):>3} steps, weights {'kept' if whole else 'LOST'}: {words}"
    )


def costs(tools: list[str], rounds: int) -> None:
    """Seconds a step on healthy data, in turns, as ratios to a bare fit."""
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    for _ in range(rounds):
        for tool in tools:
            steps, _, _ = fit("none", tool)
            times[tool].append(statistics.median(np.diff(steps.ends)[5:].tolist()))
    print("\nhealthy data, median step:")
    for tool in tools:
        pairs = zip(times[tool], times[tools[0]], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"  {tool:<16} {1e3 * statistics.median(times[tool]):8.2f} ms, ratio {ratio:.2f}")


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch-python", help="a Python with PyTorch, for detect_anomaly")
    options = parser.parse_args()
    tools = ["NumericGuard", "TerminateOnNaN", "check_numerics"]
    for fault in FAULTS:
        print(fault)
        for tool in tools:
            tell(fault, tool)
    costs(["bare fit", *tools], options.rounds)
    if options.torch_python:
        script = str(Path(__file__).with_name("tripwires_torch.py"))
        subprocess.run([options.torch_python, script, str(options.rounds)], check=True)


if __name__ == "__main__":
    main()
