"""What each engine costs a step beside plain `cpu`, and what steps in one call save.

One process, one replica each: TensorFlow's step alone (`cpu`), the same through
tf.distribute (`mirrored`, one CPU device) and through JAX (`pjrt`, one device); then 10 and
50 steps in one call. All train the same net from the same state on the same batch, in turn,
round by round, so that a slow moment of the machine hits all; each run's first steps, which
compile, are left out. Medians, and the medians of the ratios round by round to `cpu`.

With --multiworker the engine of several machines instead of JAX, here with one worker: its
collectives must be set up before TensorFlow starts, and JAX's before its kernels are set.

Usage: python benchmarks/engines.py [--arch A] [--width 0.25] [--image-size 32] [--rounds N]
                                    [--multiworker]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_PLATFORMS"] = "cpu"  # an installed libtpu would look for its TPU

import numpy as np
import tensorflow as tf
from interleaved import BATCH, Cost, Run, cost_since, measure, table_of
from rich.console import Console

from vggrepro import accelerator
from vggrepro.config import TrainConfig
from vggrepro.environment import describe_environment
from vggrepro.model import build_network
from vggrepro.step_state import StepState, initial_state
from vggrepro.training_step import training_step

LOOPS = (10, 50)
CLASSES = 10


def step_of(config: TrainConfig) -> StepState:
    """A step on the engine that the configuration asks for."""
    network = build_network(
        config.arch, width=config.width, image_size=config.image_size, classes=CLASSES
    )
    engine = accelerator.start(config)
    return training_step(config, network, initial_state(config, network), engine)


def one_worker() -> str:
    """TF_CONFIG of a cluster that is this process alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    task = {"type": "worker", "index": 0}
    return json.dumps({"cluster": {"worker": [place]}, "task": task})


def running(step: StepState, steps_per_loop: int) -> Run:
    """Times whole loops on one batch; the learning rate is too small to change the numbers."""
    side = step.config.image_size
    random = np.random.default_rng(0)
    images = tf.constant(random.normal(0, 60, (BATCH, side, side, 3)).astype(np.float32))
    batch = images, tf.constant(random.integers(0, CLASSES, BATCH).astype(np.int32))

    def run(images: int) -> Cost:
        step.loop([batch] * steps_per_loop)
        started = time.perf_counter(), time.process_time()
        for _ in range(images // BATCH // steps_per_loop):
            results = step.loop([batch] * steps_per_loop)
        if images >= BATCH * steps_per_loop:
            assert all(result.applied for result in results)
        return cost_since(started, images)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="A")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="of a timing; a multiple of 50")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--multiworker", action="store_true")
    options = parser.parse_args()
    environment = describe_environment()
    hardware = environment["hardware"]
    console = Console()
    console.print(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['cpu_flags']}")
    console.print(environment["packages"])

    def config(strategy: str) -> TrainConfig:
        return TrainConfig(
            arch=options.arch,
            width=options.width,
            image_size=options.image_size,
            scale_min=options.image_size,
            scale_max=options.image_size,
            classes=CLASSES,
            batch_size=BATCH,
            lr=1e-6,
            strategy=strategy,
        )

    # First, because TensorFlow lowers nothing once its kernels are to be deterministic.
    name = "pjrt"
    if options.multiworker:
        name = "multiworker, 1 worker"
        os.environ["TF_CONFIG"] = one_worker()
    first = running(step_of(config(name.partition(",")[0])), 1)
    first(BATCH)
    mirrored, cpu = step_of(config("mirrored")), step_of(config("cpu"))
    runs = {"cpu": running(cpu, 1), "mirrored, 1 replica": running(mirrored, 1), name: first}
    runs |= {f"cpu, {loop} steps a call": running(cpu, loop) for loop in LOOPS}
    runs |= {f"mirrored, {loop} steps a call": running(mirrored, loop) for loop in LOOPS}
    costs = measure(runs, options.steps * BATCH, options.rounds)
    size = f"width {options.width:g}, {options.image_size} px, batch {BATCH}"
    console.print(f"{options.arch}, {size}, float32; {options.rounds} rounds")
    console.print(table_of(costs))


if __name__ == "__main__":
    main()
