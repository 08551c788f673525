"""Seconds from a stopped run to its place, its cause and a tested fix.

A narrow VGG-A trains on the synthetic images; at step 2, 50 or 500 one pixel of the
batch becomes NaN and the guard stops it. Timed: the diagnosis of that run directory
in a process that has TensorFlow loaded, and what a user has today instead: the run
again from step 0 with `tf.debugging.enable_check_numerics` until it raises.

Usage: python benchmarks/diagnosis_time.py [--steps 2 50 500] [--rounds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from diagnostics.diagnose import diagnose
from diagnostics.errors import StoppedByGuard
from diagnostics.guard import GuardLayout
from vggrepro import run_start, trainer
from vggrepro.config import TrainConfig
from vggrepro.data_source import DataSource, open_data
from vggrepro.environment import describe_environment
from vggrepro.initializers import initial_parameters
from vggrepro.model import build_network, forward
from vggrepro.replay_adapter import VggRun
from vggrepro.synthetic import ensure_synthetic

CONFIG = TrainConfig(width=0.125, batch_size=16, eval_every=0, checkpoint_every=100)


class PoisonedStream:
    """The training stream with a NaN pixel in one step's batch."""

    def __init__(self, stream: Any, step: int) -> None:
        self._stream, self._step = stream, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def stream(self, first_step: int) -> Iterator[dict[str, tf.Tensor]]:
        for step, batch in enumerate(self._stream.stream(first_step), first_step):
            yield self.poisoned(batch) if step == self._step else batch

    def poisoned(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        images = batch["images"].numpy()
        images[3, 5, 5, 1] = np.nan
        return {**batch, "images": tf.constant(images)}


def poisoned_source(config: TrainConfig, step: int) -> DataSource:
    source = open_data(config, lambda text: None)
    return dataclasses.replace(source, training=PoisonedStream(source.training, step))


def stopped_run(config: TrainConfig, run_dir: Path, step: int) -> float:
    """Trains until the guard stops it at `step`; seconds."""
    source = poisoned_source(config, step)
    started = time.perf_counter()
    with mock.patch.object(run_start, "open_data", lambda *arguments: source):
        try:
            trainer.train(dataclasses.replace(config, steps=step + 10), run_dir)
        except StoppedByGuard:
            return time.perf_counter() - started
    raise AssertionError("the guard did not stop the run")


def rerun_with_check_numerics(data: Path, step: int) -> float:
    """The run again from step 0, every op checked, until TensorFlow raises; seconds.

    In a process of its own without op determinism, under which TensorFlow's
    cross-entropy holds a NaN constant that the checks would trip over. Its start
    (import, data) is not counted.
    """
    command = [sys.executable, __file__, "--rerun", str(data), "--steps", str(step)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def rerun(data: Path, step: int) -> float:
    """What `rerun_with_check_numerics` times, in the process that it starts."""
    config = dataclasses.replace(CONFIG, data=str(data), classes=10)
    source = poisoned_source(config, step)
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=config.classes
    )
    weights = {
        name: tf.Variable(value)
        for name, value in initial_parameters(network, config.init, config.seed).items()
    }
    velocities = {name: tf.Variable(tf.zeros_like(value)) for name, value in weights.items()}

    @tf.function(autograph=False)
    def plain_step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = forward(network, weights, images)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        for name, gradient in tape.gradient(loss, weights).items():
            velocities[name].assign(0.9 * velocities[name] - config.lr * gradient)
            weights[name].assign_add(velocities[name])
        return loss

    tf.debugging.enable_check_numerics()
    started = time.perf_counter()
    try:
        for batch in source.training.stream(0):
            plain_step(batch["images"], batch["labels"])
    except tf.errors.InvalidArgumentError:
        return time.perf_counter() - started
    raise AssertionError("check_numerics did not raise")


def diagnosis_seconds(run_dir: Path, budget: float) -> dict[str, float]:
    started = time.perf_counter()
    found = diagnose(VggRun(run_dir), budget_seconds=budget)
    assert found.first_nonfinite is not None and found.first_nonfinite.stage == "data"
    return {**found.seconds, "whole": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 50, 500])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--rerun", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rerun is not None:
        print(rerun(options.rerun, options.steps[0]))
        return
    console = Console()
    hardware = describe_environment()["hardware"]
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores; TensorFlow {tf.__version__}")
    table = Table(title="VGG-A width 1/8, 32 px, batch 16: seconds (medians)")
    for name in ("failing step", "run until it stopped", "place", "place and cause"):
        table.add_column(name, justify="right")
    table.add_column("with all replays", justify="right")
    table.add_column("again with check_numerics", justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        data = ensure_synthetic(Path(scratch) / "images")
        config = dataclasses.replace(CONFIG, data=str(data), classes=10)
        for step in options.steps:
            run_dir = Path(scratch) / f"run-{step}"
            training = stopped_run(config, run_dir, step)
            place, cause, again = [], [], []
            for _ in range(options.rounds):
                parts = diagnosis_seconds(run_dir, 0.0)
                place.append(sum(parts[k] for k in ("state and batch", "replay", "location")))
                cause.append(parts["whole"])
                again.append(rerun_with_check_numerics(data, step))
            whole = diagnosis_seconds(run_dir, options.budget)["whole"]
            medians = [statistics.median(values) for values in (place, cause)]
            row = [training, *medians, whole, statistics.median(again)]
            table.add_row(str(step), *(f"{seconds:.1f}" for seconds in row))
    console.print(table)
    layers = build_network("A", width=1.0, image_size=224, classes=1000).weight_layers
    columns = len(GuardLayout(tuple(layer.name for layer in layers)).columns())
    console.print(f"telemetry of VGG-A: {12 + 4 * columns} bytes a step")


if __name__ == "__main__":
    main()
