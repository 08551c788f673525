"""Runs on several replicas and workers, for test_distributed.py; a process of its own.

It forks: TensorFlow is imported but has not started when a child begins, so a worker costs
no second import, and each takes its own devices.

Usage: python distributed_runs.py DATA_DIR WORK_DIR SCENARIO...
Writes WORK_DIR/<scenario>.<worker>.{out,err}; prints one JSON line: {scenario: [exit codes]},
of 'torn' and 'float16' what those functions return.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from small_runs import random_batch, random_tensors, tiny_config, tiny_network

from diagnostics.snapshot import hash_arrays
from vggrepro import accelerator, cli, run_start
from vggrepro.config import TrainConfig
from vggrepro.config_options import option_name
from vggrepro.loss_scale import SCALE
from vggrepro.step_state import initial_state
from vggrepro.train_step import TrainStep
from vggrepro.training_step import training_step

BAD_STEP, BAD_ROW = 4, 6  # of the global batch of 8: the third row of worker 1 of 2
LOST_SECONDS = "10"


def options(data: Path, run_dir: Path, **changes: Any) -> list[str]:
    config = tiny_config(
        data, **{"checkpoint_every": 3, "keep_checkpoints": 9, "classes": 0, **changes}
    )
    words = ["train", "--run-dir", str(run_dir)]
    for name, value in config.to_dict().items():
        if value != getattr(TrainConfig(), name):
            words += [option_name(name), str(value)]
    return words


class PoisonedStream:
    """A training stream with one NaN in one step's batch."""

    def __init__(self, stream: Any, row: int) -> None:
        self._stream, self._row = stream, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def stream(self, first_step: int) -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(self._stream.stream(first_step), first_step):
            if step == BAD_STEP:
                images = batch["images"].numpy()
                images[self._row, 3, 3, 0] = np.nan
                batch = {**batch, "images": tf.constant(images)}
            yield batch


def poisoned(worker: int) -> None:
    """Worker 1's rows hold a NaN."""
    if worker == 1:
        real = run_start.open_data

        def open_poisoned(*arguments: Any) -> Any:
            source = real(*arguments)
            stream = PoisonedStream(source.training, BAD_ROW - 4)
            return type(source)(stream, source.validation, source.record)

        run_start.open_data = open_poisoned  # type: ignore[assignment]


def signalled(number: int, step: int) -> Callable[[int], None]:
    """Worker 1 gets a signal in the middle of a step's bookkeeping."""

    def prepare(worker: int) -> None:
        if worker == 1:
            from vggrepro.progress import ProgressDisplay

            def on_step(self: Any, now: int, *rest: Any) -> None:
                if now == step:
                    os.kill(os.getpid(), number)

            ProgressDisplay.on_step = on_step  # type: ignore[method-assign]

    return prepare


def nothing(worker: int) -> None:
    """No fault."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(
    work: Path,
    name: str,
    words: list[str],
    *,
    workers: int = 1,
    devices: int = 1,
    prepare: Callable[[int], None] = nothing,
) -> list[int]:
    """The exit codes of all workers; -9 of one that SIGKILL ended."""
    ports = free_ports(workers)
    pids = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            live(work / f"{name}.{worker}", words, worker, ports, devices, prepare)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def live(
    place: Path,
    words: list[str],
    worker: int,
    ports: list[int],
    devices: int,
    prepare: Callable[[int], None],
) -> None:
    """A worker's whole life, in a forked process."""
    code = 99
    try:
        for descriptor, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{place}.{ending}", os.O_WRONLY | os.O_CREAT, 0o666), descriptor)
        os.environ["VGGREPRO_VIRTUAL_CPUS"] = str(devices)
        os.environ["VGGREPRO_LOST_SECONDS"] = LOST_SECONDS
        if len(ports) > 1:
            cluster = {"worker": [f"localhost:{port}" for port in ports]}
            task = {"type": "worker", "index": worker}
            os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
        prepare(worker)
        code = cli.main(words)
    finally:
        os._exit(code)


def torn_state() -> list[Any]:
    """A step of two replicas of which the second's copy of a momentum holds a NaN.

    Returns:
      Whether the step was applied, the checks that failed, and whether each replica's copy of
      the state was left alone; then whether the next step was refused as well.
    """
    os.environ["VGGREPRO_VIRTUAL_CPUS"] = "2"
    config = tiny_config(strategy="mirrored", warmup_steps=0)
    network = tiny_network(config)
    engine = accelerator.start(config)
    step = training_step(config, network, initial_state(config, network), engine)
    copies = step.variables["momentum/fc1/kernel"]._copies.values
    torn = copies[1].numpy()
    torn[0, 0] = np.nan
    copies[1].assign(torn)

    def bits() -> list[bytes]:
        names = ("params/fc2/kernel", "momentum/fc1/kernel", "counters/step")
        every = [copy for name in names for copy in step.variables[name]._copies.values]
        return [copy.numpy().tobytes() for copy in every]

    before = bits()
    batch = random_tensors(config)
    result, again = step(*batch), step(*batch)
    pairs = zip(step.layout.checks(), result.passed, strict=True)
    failed = [check.describe() for check, passed in pairs if not passed]
    return [result.applied, failed, bits() == before, again.applied]


def float16() -> list[Any]:
    """Two replicas in float16 whose loss scale overflows, beside one device that computes both.

    Returns:
      Whether the step was applied, and skipped; whether state and telemetry have the same bits
      in both; and whether a NaN is refused by both in the next step.
    """
    os.environ["VGGREPRO_VIRTUAL_CPUS"] = "2"
    config = tiny_config(strategy="mirrored", precision="float16", warmup_steps=0)
    network = tiny_network(config)
    engine = accelerator.start(config)
    start = {**initial_state(config, network), SCALE: np.array(2.0**24, np.float32)}
    steps = training_step(config, network, start, engine), TrainStep(config, network, start)
    steps[1].replicas = 2
    images, labels = random_batch(config)
    results = [step(tf.constant(images), tf.constant(labels)) for step in steps]
    named = dict(zip(steps[0].layout.columns(), results[0].telemetry.tolist(), strict=True))
    same = len({hash_arrays(step.state()) for step in steps}) == 1
    same = same and len({result.telemetry.tobytes() for result in results}) == 1
    images[BAD_ROW, 3, 3, 0] = np.nan
    later = [step(tf.constant(images), tf.constant(labels)).applied for step in steps]
    return [results[0].applied, named["skipped"], same, later]


def in_a_child(function: Callable[[], Any]) -> Callable[[], Any]:
    """Starts a function in a process of its own; what is returned waits for its answer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writing)

    def answer() -> Any:
        os.waitpid(pid, 0)
        with os.fdopen(reading) as pipe:
            return json.load(pipe)

    return answer


def main() -> None:
    data, work, *wanted = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]

    def fresh(name: str, strategy: str, **settings: Any) -> Callable[[], list[int]]:
        changes = settings.pop("changes", {})
        words = options(data, work / name, strategy=strategy, **changes)
        return lambda: run(work, name, words, **settings)

    def resumed(name: str, of: str, *more: str, **settings: Any) -> Callable[[], list[int]]:
        words = ["train", "--resume", str(work / of), *more]
        return lambda: run(work, name, words, **settings)

    loops = {"steps_per_loop": 3}
    killed, stopped = signalled(signal.SIGKILL, 3), signalled(signal.SIGTERM, 1)
    two = {"strategy": "multiworker", "workers": 2}
    scenarios = {
        "one": fresh("one", "cpu"),
        "two": fresh("two", "mirrored", devices=2),
        "four": fresh("four", "mirrored", devices=4),
        "workers": fresh("workers", **two, changes=loops),
        "four-workers": fresh("four-workers", "auto", workers=4),
        "poisoned": fresh("poisoned", **two, prepare=poisoned, changes=loops),
        "killed": fresh("killed", **two, prepare=killed),
        "killed-on": resumed("killed-on", "killed", "--strategy", "cpu"),
        "stopped": fresh("stopped", **two, prepare=stopped),
        "stopped-on": resumed("stopped-on", "stopped", workers=2),
        "torn": lambda: in_a_child(torn_state)(),
        "float16": lambda: in_a_child(float16)(),
    }

    def codes(names: list[str]) -> dict[str, Any]:
        return {name: scenarios[name]() for name in names}

    # Most of it is waiting for the killed one's heartbeat.
    waiting = [name for name in wanted if name.startswith("killed")]
    beside = in_a_child(lambda: codes(waiting))
    found = codes([name for name in wanted if name not in waiting])
    print(json.dumps({**found, **beside()}))


if __name__ == "__main__":
    main()
