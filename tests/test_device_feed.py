"""Batches reach the device while a step runs, and the wait for them is measured."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from small_runs import random_batch, tiny_config, tiny_data, tiny_network

from vggrepro import step_metrics, trainer
from vggrepro.run_directory import RunDirectory
from vggrepro.step_metrics import StepMetrics
from vggrepro.train_step import TrainStep

CONFIG = tiny_config(classes=3, batch_size=8)


def batches(count: int) -> tf.data.Dataset:
    parts = zip(*(random_batch(CONFIG, seed) for seed in range(count)), strict=True)
    images, labels = (np.stack(part) for part in parts)
    return tf.data.Dataset.from_tensor_slices({"images": images, "labels": labels})


def test_the_feed_ends_on_the_device_of_the_step() -> None:
    """In a process of its own, which has two devices."""
    folder = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", "import test_device_feed as t; t.feed_the_second_device()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def feed_the_second_device() -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.device("/CPU:1"):
        step = TrainStep(CONFIG, tiny_network(CONFIG))
        fed = list(step.ahead(batches(3)))
        assert [batch["images"].device[-5:] for batch in fed] == ["CPU:1"] * 3
        for batch, expected in zip(fed, batches(3), strict=True):
            assert np.array_equal(batch["images"], expected["images"])
            assert step(batch["images"], batch["labels"]).applied


def test_the_share_of_waiting_is_that_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes at every look
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: float(next(clock)))
    step = TrainStep(CONFIG, tiny_network(CONFIG))
    metrics = StepMetrics(step.layout, batch_size=8)
    metrics.start_clock()
    telemetry = np.zeros(len(step.layout.columns()), np.float32)
    for waited, share in ((0.5, 0.5), (1.0, 0.75), (0.0, 0.5)):
        metrics.after_loop(1, waited)
        assert metrics.of_step(telemetry)["data_wait_share"] == share


def test_the_share_of_waiting_is_recorded(tmp_path: Path) -> None:
    config = tiny_config(tiny_data(tmp_path), steps=2, eval_every=0)
    trainer.train(config, tmp_path / "run")
    with RunDirectory.open(tmp_path / "run") as run:
        shares = [record["data_wait_share"] for record in run.metrics() if "loss" in record]
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)
