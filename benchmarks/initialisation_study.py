"""Why did my loss turn NaN, and what would have trained? Depth x initialiser x inheritance.

Nets A to E at a quarter of their width train on synthetic images of 32 pixels. The same
sigma gives a narrower net a fainter signal, so sigma is scaled by 2.25: the narrow net A
then has the logits (RMS 7e-4 at sigma=0.01) that the paper's net A has. Every cell is a
real run of the trainer: its outcome is NaN at step k (the guard stopped it), stalled (the
loss is still that of guessing) or trains, and what the diagnosis says of it.

A cell that is done is kept in OUT/cells/ and not run again, so the study may be
interrupted at any time. Table and picture are made anew whenever a cell is done.

Usage: python benchmarks/initialisation_study.py [--out DIR] [--only WORD] [--publish docs]
       [--precision float32|bfloat16]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from study_report import figure, table

from diagnostics.diagnose import diagnose
from diagnostics.durable_files import write_json, write_whole
from diagnostics.errors import NothingToDiagnose, StoppedByGuard
from vggrepro import run_start, trainer
from vggrepro.config import TrainConfig
from vggrepro.data_source import DataSource, open_data
from vggrepro.environment import describe_environment
from vggrepro.replay_adapter import VggRun
from vggrepro.run_directory import RunDirectory
from vggrepro.synthetic import ensure_synthetic

ARCHS = ("A", "B", "C", "D", "E")
SIGMA_SCALE = 2.25
PIXEL_SPREAD = 58.0  # grey levels; dividing by it gives inputs of about unit variance
# A leaves its plateau at about 2,000; with and without inheritance get the same steps.
STEPS = {"sigma 0.01": 3000, "sigma 0.01, from A": 3000}
SHORT_STEPS = 1000
CHUNK = 1000  # steps after which a run that clearly learns is ended
CLEARLY_LEARNT = 0.7  # of the loss of guessing, over the last steps
LEARNT = 0.9
TAIL = 50  # steps that count as the last


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
      method: the row: initialiser, and what was done beside it.
      divided: pixels are divided by PIXEL_SPREAD.
      inherits: starts from the cell (A, sigma 0.01).
    """

    arch: str
    method: str
    init: str
    divided: bool = False
    inherits: bool = False

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.method.replace(' ', '-').replace(',', '').replace('/', '-')}"

    def config(self, data: Path, out: Path, precision: str) -> TrainConfig:
        """The run; the source of an inheriting one is the study's own net A."""
        return TrainConfig(
            arch=self.arch,
            init=self.init,
            init_from=str(out / "runs" / SOURCE.name) if self.inherits else "",
            data=str(data),
            batch_size=16,
            steps=STEPS.get(self.method, SHORT_STEPS),
            eval_every=0,
            checkpoint_every=500,
            keep_checkpoints=1,
            precision=precision,
        )


def _sigma(sigma: float) -> str:
    return f"normal:{SIGMA_SCALE * sigma:g}"


SOURCE = Cell("A", "sigma 0.01", _sigma(0.01))


def cells() -> list[Cell]:
    """All cells, what others need first."""
    found = [SOURCE]
    for arch in ARCHS:
        found.append(Cell(arch, "sigma 0.1", _sigma(0.1)))
        found.append(Cell(arch, "sigma 0.1, pixels/58", _sigma(0.1), divided=True))
        found.append(Cell(arch, "Glorot", "glorot-uniform"))
        if arch != "A":
            found.append(Cell(arch, "sigma 0.01, from A", _sigma(0.01), inherits=True))
    return found + [Cell(arch, "sigma 0.01", _sigma(0.01)) for arch in ARCHS[1:]]


class DividedStream:
    """A stream of batches with the pixels divided."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[dict[str, tf.Tensor]]:
        return map(self._divided, iter(self._stream))

    def stream(self, first_step: int) -> Iterator[dict[str, tf.Tensor]]:
        return map(self._divided, self._stream.stream(first_step))

    def batch(self, step: int) -> dict[str, tf.Tensor]:
        return self._divided(self._stream.batch(step))

    @staticmethod
    def _divided(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {**batch, "images": batch["images"] / PIXEL_SPREAD}


def _divided_data(*arguments: Any) -> DataSource:
    source = open_data(*arguments)
    return dataclasses.replace(
        source,
        training=DividedStream(source.training),
        validation=DividedStream(source.validation),
    )


def run_cell(cell: Cell, data: Path, out: Path, precision: str, budget: float) -> dict[str, Any]:
    """Trains (or goes on with) a cell, diagnoses it and returns its record.

    Raises:
      KeyboardInterrupt: the training was told to stop; the cell goes on next time.
    """
    run_dir = out / "runs" / cell.name
    config = cell.config(data, out, precision)
    opened = _divided_data if cell.divided else open_data
    started = time.perf_counter()
    with mock.patch.object(run_start, "open_data", opened):
        try:
            for steps in range(CHUNK, config.steps + 1, CHUNK):
                _go_on(dataclasses.replace(config, steps=steps), run_dir)
                if _last_loss(run_dir) < CLEARLY_LEARNT * math.log(10):
                    break
            stopped = None
        except StoppedByGuard as error:
            stopped = error.message
    trained = time.perf_counter() - started
    with mock.patch("vggrepro.replay_adapter.open_data", opened):
        record = _record(cell, run_dir, stopped is not None, budget)
    return {
        **record,
        "training_seconds": trained,
        "precision": precision,
        "stopped": stopped,
        "commit": describe_environment()["code"]["commit"],
    }


def _go_on(config: TrainConfig, run_dir: Path) -> None:
    """Trains up to `config.steps`, unless the run is there already."""
    resume = (run_dir / "config.json").exists()
    if resume:
        with RunDirectory.open(run_dir) as run:
            if run.manifest()["steps"] >= config.steps:
                return
    if trainer.train(config, run_dir, resume=resume).status == "interrupted":
        raise KeyboardInterrupt


def _last_loss(run_dir: Path) -> float:
    with RunDirectory.open(run_dir) as run:
        _, columns, rows = run.telemetry.read()
    return float(np.mean(rows[-TAIL:, list(columns).index("loss")]))


def _record(cell: Cell, run_dir: Path, stopped: bool, budget: float) -> dict[str, Any]:
    with RunDirectory.open(run_dir) as run:
        steps, columns, rows = run.telemetry.read()
    losses = rows[:, list(columns).index("loss")].astype(float)
    guessing = math.log(10)
    last = float(np.mean(losses[-TAIL:]))
    if stopped:
        outcome = f"NaN at step {int(steps[-1])}"
    elif last < LEARNT * guessing:
        outcome = f"trains: loss {last:.2f} after {len(losses):,} steps"
    else:
        outcome = f"stalled: loss {last:.3f} after {len(losses):,} steps"
    kept = np.unique(np.linspace(0, len(losses) - 1, 200).astype(int))
    return {
        "arch": cell.arch,
        "method": cell.method,
        "init": cell.init,
        "outcome": outcome,
        "kind": outcome.partition(" ")[0].rstrip(":"),
        "steps": len(losses),
        "last_loss": last,
        "losses": [[int(steps[i]), float(losses[i])] for i in kept],
        "diagnosis": _diagnosis(run_dir, budget),
    }


def _diagnosis(run_dir: Path, budget: float) -> dict[str, Any]:
    try:
        found = diagnose(VggRun(run_dir), budget_seconds=budget)
    except NothingToDiagnose as error:
        return {"cause": None, "said": error.message.partition(" left ")[2]}
    place, onset = found.first_nonfinite, found.onset
    return {
        "verdict": found.verdict,
        "cause": found.cause.kind,
        "confidence": found.cause.confidence,
        "evidence": list(found.cause.evidence),
        "place": place and f"{place.stage} {place.layer or ''} {place.op or ''}".strip(),
        "onset": onset and f"step {onset.step}, {onset.layer} {onset.quantity}",
        "recommendation": found.recommendation and found.recommendation.command,
    }


def _precision() -> str:
    """bfloat16 where the processor has instructions for it."""
    flags = describe_environment()["hardware"]["cpu_flags"]
    return "bfloat16" if any("bf16" in flag for flag in flags) else "float32"


def _publish(out: Path, directory: Path) -> None:
    """The table and the picture of the cells that are done."""
    done = [json.loads(file.read_text()) for file in sorted((out / "cells").glob("*.json"))]
    missing = len(cells()) - len(done)
    text = table(done, ARCHS, missing, describe_environment())
    text = text.replace(f"{out / 'runs'}/", "")  # of a run that was inherited from
    write_whole(directory / "initialisation.md", text.encode())
    write_whole(directory / "initialisation.svg", figure(done, ARCHS).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/initialisation-study"))
    parser.add_argument("--only", default="", metavar="WORD", help="only cells that hold it")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tested fixes a cell")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="where table and picture go")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default=_precision())
    options = parser.parse_args()
    out = options.out.resolve()
    data = ensure_synthetic(out / "images")
    for cell in cells():
        file = out / "cells" / f"{cell.name}.json"
        if file.exists() or options.only not in cell.name:
            continue
        record = run_cell(cell, data, out, options.precision, options.budget)
        write_json(file, record)
        _publish(out, out)
        cause = record["diagnosis"]["cause"] or "healthy"
        seconds = record["training_seconds"]
        print(f"{cell.name:<28}{record['outcome']:<44}{cause:<14}{seconds:5.0f} s", flush=True)
    _publish(out, options.publish or out)


if __name__ == "__main__":
    main()
