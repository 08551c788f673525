"""Trains, kills itself at random moments, resumes; run by test_kill_resume.py.

A process of its own, because it forks: TensorFlow is imported but has not started
its threads when a child begins, so a life costs no second import.

Usage: python kill_loop.py DATA_DIR WORK_DIR KILLS SEED
Prints one JSON line: {"kills": n, "runs": m, "resumed_from": [...]}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from small_runs import tiny_config

from diagnostics.errors import InputError
from vggrepro import trainer
from vggrepro.config import TrainConfig
from vggrepro.run_directory import RunDirectory

CHANGES = {"steps": 60, "eval_every": 7, "checkpoint_every": 3, "plateau_patience": 1}


def live(config: TrainConfig, run_dir: Path) -> int:
    """One child's life: starts or resumes the run; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        resume = (run_dir / "config.json").exists()
        if resume:
            with RunDirectory.open(run_dir) as run:
                config = TrainConfig.from_dict(run.config())
        trainer.train(config, run_dir, resume=resume)
        code = 0
    finally:
        os._exit(code)


def wait_for_a_moment(pid: int, run_dir: Path, moments: random.Random) -> bool:
    """Until the child has done some more steps, and a little longer; False if it ended.

    Steps and not seconds, so that a loaded machine sees kills at the same places:
    at the start, between steps, in validations and checkpoints.
    """
    target = recorded(run_dir) + moments.randrange(12)
    while recorded(run_dir) < target:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    time.sleep(moments.uniform(0.0, 0.1))
    return True


def recorded(run_dir: Path) -> int:
    """Lines of metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def finished(run_dir: Path) -> bool:
    try:
        with RunDirectory.open(run_dir) as run:
            return run.manifest()["status"] == "finished"
    except InputError:  # killed before its first file was there
        return False


def main() -> None:
    data, work, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    moments = random.Random(seed)
    config = tiny_config(data, **CHANGES)
    if os.waitpid(live(config, work / "whole"), 0)[1] != 0:
        sys.exit("the uninterrupted run failed")
    killed, runs, resumed_from = 0, 0, []
    while killed < kills or not finished(work / f"run-{runs}"):
        run_dir = work / f"run-{runs}"
        if finished(run_dir):
            runs += 1
            continue
        pid = live(config, run_dir)
        if killed >= kills:
            os.waitpid(pid, 0)
        elif wait_for_a_moment(pid, run_dir, moments):
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            checkpoints = (run_dir / "checkpoints").glob("step-*")
            resumed_from.append(max((place.name for place in checkpoints), default="none"))
    print(json.dumps({"kills": killed, "runs": runs + 1, "resumed_from": resumed_from}))


if __name__ == "__main__":
    main()
