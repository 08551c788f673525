"""Seconds a training step: ours with its guard, bare Keras fit, check_numerics, PyTorch.

All variants train the same net on the same batch with the same optimizer (momentum
0.9, L2 5e-4, dropout 0.5). They run in turn, round by round, in one process, so that
a slow moment of the machine hits all; the table shows medians and the median of the
ratios round by round to bare `fit`.

Usage: python benchmarks/step_time.py [--size demo|full|both] [--rounds N]
       python benchmarks/step_time.py --between-precisions [--size ...]   # bfloat16 against float32
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from vggrepro import accelerator
from vggrepro.config import TrainConfig
from vggrepro.environment import describe_environment
from vggrepro.model import WeightLayer, build_network
from vggrepro.step_metrics import StepMetrics
from vggrepro.train_step import TrainStep

Steps = Callable[[int], None]  # runs so many steps


@dataclass(frozen=True)
class Size:
    """One row group of the table: which net, and how many steps a timing takes."""

    name: str
    arch: str
    width: float
    image_size: int
    classes: int
    batch_size: int
    steps: int


SIZES = {
    "demo": Size("A, width 1/4, 32 px, batch 32", "A", 0.25, 32, 10, 32, 50),
    "full": Size("D, width 1, 224 px, batch 8", "D", 1.0, 224, 1000, 8, 4),
}


def batch(size: Size) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (size.batch_size, size.image_size, size.image_size, 3)
    images = random.normal(0.0, 60.0, shape).astype(np.float32)
    return images, random.integers(0, size.classes, size.batch_size).astype(np.int32)


def ours(size: Size, precision: str) -> Steps:
    """The guarded step with its numbers fetched and named, as the trainer does."""
    config = TrainConfig(
        arch=size.arch,
        width=size.width,
        image_size=size.image_size,
        scale_min=size.image_size,
        scale_max=size.image_size,
        classes=size.classes,
        batch_size=size.batch_size,
        lr=1e-4,
        precision=precision,
    )
    network = build_network(
        size.arch, width=size.width, image_size=size.image_size, classes=size.classes
    )
    step = TrainStep(config, network)
    metrics = StepMetrics(step.layout, size.batch_size, precision)
    metrics.start_clock()
    images, labels = (tf.constant(array) for array in batch(size))

    def run(steps: int) -> None:
        for _ in range(steps):
            result = step(images, labels)
            assert result.applied
            metrics.after_loop(1, 0.0)
            metrics.of_step(result.telemetry)

    return run


def keras_fit(size: Size, precision: str, check_numerics: bool = False) -> Steps:
    """The same net and optimizer through `Model.fit`, with the accuracy metric."""
    policy = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    keras.config.set_dtype_policy(policy)
    decay = keras.regularizers.L2(2.5e-4)
    network = build_network(
        size.arch, width=size.width, image_size=size.image_size, classes=size.classes
    )
    values = inputs = keras.Input((size.image_size, size.image_size, 3))
    for layer in network.layers:
        values = _keras_layer(layer, decay)(values)
        if isinstance(layer, WeightLayer) and layer.dropout:
            values = keras.layers.Dropout(0.5)(values)
    model = keras.Model(inputs, values)
    model.compile(
        keras.optimizers.SGD(1e-4, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    keras.config.set_dtype_policy("float32")
    data = tf.data.Dataset.from_tensors(batch(size)).repeat()

    def run(steps: int) -> None:
        model.fit(data, steps_per_epoch=steps, verbose=0, shuffle=False)

    if check_numerics:
        # The checks are put in while the step is traced, and stay in its graph.
        tf.debugging.enable_check_numerics()
        run(1)
        tf.debugging.disable_check_numerics()
    return run


def _keras_layer(layer: object, decay: keras.Regularizer) -> keras.layers.Layer:
    if isinstance(layer, WeightLayer):
        activation = "relu" if layer.relu else None
        units, options = layer.kernel_shape[-1], {"kernel_regularizer": decay}
        if layer.is_convolution:
            return keras.layers.Conv2D(
                units, layer.kernel_shape[0], padding="same", activation=activation, **options
            )
        # Logits and loss are float32 in ours as well.
        dtype = None if layer.relu else "float32"
        return keras.layers.Dense(units, activation, dtype=dtype, **options)
    if "pool" in layer.name:
        return keras.layers.MaxPooling2D()
    return keras.layers.Flatten()


def pytorch(size: Size, precision: str) -> Steps | None:
    """The same in PyTorch, channels last; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    network = build_network(
        size.arch, width=size.width, image_size=size.image_size, classes=size.classes
    )
    modules: list[torch.nn.Module] = []
    for layer in network.layers:
        if isinstance(layer, WeightLayer):
            inputs, outputs = layer.kernel_shape[-2:]
            if layer.is_convolution:
                kernel = layer.kernel_shape[0]
                modules.append(torch.nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
            else:
                modules.append(torch.nn.Linear(inputs, outputs))
            modules += [torch.nn.ReLU()] * layer.relu + [torch.nn.Dropout(0.5)] * layer.dropout
        else:
            modules.append(torch.nn.MaxPool2d(2) if "pool" in layer.name else torch.nn.Flatten())
    net = torch.nn.Sequential(*modules).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4)
    images, labels = batch(size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels).long()

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = torch.nn.functional.cross_entropy(net(pixels).float(), targets)
            loss.backward()
            optimizer.step()

    return run


def matmul_rate() -> float:
    """FLOP/s of a 2048^3 float32 matrix product, the best of five."""
    left = tf.random.stateless_normal([2048, 2048], [1, 2])
    product = tf.function(lambda a: tf.matmul(a, a))
    product(left)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product(left).numpy()
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def measure(variants: dict[str, Steps], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of every variant and round, in turn."""
    for run in variants.values():
        run(2)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run(steps)
            times[name].append((time.perf_counter() - started) / steps)
    return times


def report(console: Console, size: Size, precision: str, rounds: int) -> None:
    # Traced before determinism is on: with it, TensorFlow's own cross-entropy holds a
    # NaN constant (for labels out of range) on which check_numerics raises.
    checked = keras_fit(size, precision, check_numerics=True)
    accelerator.prepare(TrainConfig())
    variants: dict[str, Steps] = {
        "bare fit": keras_fit(size, precision),
        "ours, guarded": ours(size, precision),
        "fit + check_numerics": checked,
    }
    torch_steps = pytorch(size, precision)
    if torch_steps is not None:
        variants["PyTorch, channels last"] = torch_steps
    rate = matmul_rate()
    title = f"{size.name}, {precision}; {rounds} rounds of {size.steps} steps"
    show(console, size, title, measure(variants, size.steps, rounds), rate)


def report_precisions(console: Console, size: Size, rounds: int) -> None:
    accelerator.prepare(TrainConfig())
    rate = matmul_rate()
    # Not float16: CPUs compute it in kernels that nobody trains with.
    variants = {name: ours(size, name) for name in ("float32", "bfloat16")}
    times = measure(variants, size.steps, rounds)
    title = f"{size.name}, ours, guarded; {rounds} rounds of {size.steps} steps"
    show(console, size, title, times, rate)


def show(
    console: Console, size: Size, title: str, times: dict[str, list[float]], rate: float
) -> None:
    """Medians, and the medians of the ratios round by round to the first variant."""
    base = next(iter(times))
    network = build_network(
        size.arch, width=size.width, image_size=size.image_size, classes=size.classes
    )
    flops = 6 * network.multiply_adds() * size.batch_size
    table = Table(title=title)
    for column in ("variant", "ms a step", f"ratio to {base}", "share of matmul rate"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[base], strict=True)]
        median = statistics.median(seconds)
        table.add_row(
            name,
            f"{1e3 * median:.1f}",
            f"{statistics.median(ratios):.3f}",
            f"{flops / median / rate:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, "both"], default="both")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument(
        "--between-precisions",
        action="store_true",
        help="instead: our step in float32 and bfloat16, in turn in one process",
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    sizes = SIZES if options.size == "both" else (options.size,)
    precisions = ("float32", "bfloat16") if options.precision == "both" else (options.precision,)
    kinds = [["--precision", precision] for precision in precisions]
    if options.between_precisions:
        kinds = [["--between-precisions"]]
    if len(sizes) * len(kinds) > 1:
        for size, kind in itertools.product(sizes, kinds):
            command = [sys.executable, __file__, "--size", size, *kind]
            subprocess.run([*command, "--rounds", str(options.rounds)], check=True)
        return
    console = Console()
    environment = describe_environment()
    hardware = environment["hardware"]
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['cpu_flags']}")
    console.print(environment["packages"])
    if options.between_precisions:
        report_precisions(console, SIZES[options.size], options.rounds)
    else:
        report(console, SIZES[options.size], options.precision, options.rounds)


if __name__ == "__main__":
    main()
