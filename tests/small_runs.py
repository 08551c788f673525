"""Small real runs for tests: a few tiny JPEG files and a very narrow VGG-A."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.snapshot import hash_arrays
from vggrepro.config import TrainConfig
from vggrepro.model import Network, build_network
from vggrepro.run_directory import RunDirectory
from vggrepro.step_metrics import ON_THE_CLOCK
from vggrepro.synthetic import ensure_synthetic
from vggrepro.train_step import TrainStep

TINY = {
    "width": 0.05,
    "batch_size": 8,
    "steps": 6,
    "eval_every": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
    "lr": 0.01,
    "warmup_steps": 2,
    "classes": 3,
}


def tiny_data(directory: Path) -> Path:
    """36 training and 9 validation images of 3 classes."""
    return ensure_synthetic(
        directory / "images", seed=1, classes=3, train_per_class=12, val_per_class=3
    )


def tiny_config(data: Path | str = "unused", **changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "data": str(data), **changes})


def tiny_network(config: TrainConfig) -> Network:
    return build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=config.classes
    )


def random_batch(config: TrainConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images in the range of mean-subtracted pixels, and labels."""
    random = np.random.default_rng(seed)
    side = config.image_size
    images = random.normal(0.0, 60.0, (config.batch_size, side, side, 3)).astype(np.float32)
    return images, random.integers(0, config.classes, config.batch_size).astype(np.int32)


def random_tensors(config: TrainConfig, seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    """`random_batch` as a step takes it."""
    images, labels = random_batch(config, seed)
    return tf.constant(images), tf.constant(labels)


def tiny_step(config: TrainConfig) -> TrainStep:
    """At its initial state, of one replica."""
    return TrainStep(config, tiny_network(config))


def without_timing(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what depends on the clock."""
    return {name: value for name, value in record.items() if name not in ON_THE_CLOCK}


def run_outcome(path: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on how it was interrupted."""
    with RunDirectory.open(path) as run:
        steps, columns, rows = run.telemetry.read()
        manifest = run.manifest()
        last = run.latest_checkpoint()
        return {
            "weights": manifest["final_weights_sha256"],
            "final_metrics": manifest["final_metrics"],
            "state": hash_arrays(last[1]),
            "metrics": [without_timing(record) for record in run.metrics()],
            "telemetry": (steps.tolist(), columns, rows.tobytes()),
        }


def replaced(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)
