"""TensorBoard: curves, per-layer norms and histograms, input images, config, hparams.

A validation after k steps is drawn at step k - 1, the step whose weights it judges,
as in metrics.jsonl. Resuming at step k removes everything from step k on from the
older event files, so no reader ever sees two curves for the same steps.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS, STATUS_UNKNOWN
from tensorboard.plugins.hparams.summary import session_end_pb
from tensorboard.plugins.hparams.summary_v2 import (
    HParam,
    Metric,
    hparams_config_pb,
    hparams_pb,
)
from tensorboard.plugins.image.summary import pb as image_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vggrepro.hooks import Hook, StateView

if TYPE_CHECKING:
    from vggrepro.config import TrainConfig
    from vggrepro.run_directory import RunDirectory

SCALARS_PER_RUN = 1000  # what TensorBoard keeps of a curve
HISTOGRAMS_PER_RUN = 20
SAMPLE_IMAGES = 8
FLUSH_SECONDS = 10

# TensorBoard sorts sections by name: the curves a person wants first come first.
TAGS = {
    "loss": "batch/loss",
    "top1_accuracy": "batch/top1_accuracy",
    "top5_accuracy": "batch/top5_accuracy",
    "lr": "batch/learning_rate",
    "grad_norm": "numerics/gradient_norm",
    "headroom": "numerics/headroom_bits",
    "loss_scale": "numerics/loss_scale",
    "skipped": "numerics/skipped_by_loss_scale",
    "input_absmax": "numerics/input_absmax",
    "images_per_second": "speed/images_per_second",
    "data_wait_share": "speed/data_wait_share",
    "val_loss": "evaluation/loss",
    "val_top1_error": "evaluation/top1_error_percent",
    "val_top5_error": "evaluation/top5_error_percent",
}
# The columns of the HParams table; every field of the configuration is in the Text tab.
COMPARED = (
    *("arch", "width", "image_size", "init", "lr", "batch_size", "steps"),
    *("warmup_steps", "clip_norm", "precision", "seed"),
)
RESULTS = {
    TAGS["val_top1_error"]: "top-1 error, %",
    TAGS["val_top5_error"]: "top-5 error, %",
    TAGS["val_loss"]: "validation loss",
    TAGS["loss"]: "last batch's loss",
}
LAYER_QUANTITIES = ("preactivation_absmax", "gradient_norm", "weight_norm", "update_ratio")


class _Message(Protocol):
    def SerializeToString(self) -> bytes: ...


class TensorBoardLog(Hook):
    """Writes `tensorboard/` in the run directory. Use as a context manager."""

    chief_only = True

    def __init__(self) -> None:
        self._writer: EventFileWriter | None = None
        self._steps = 0
        self._done = 0
        self._status = STATUS_UNKNOWN
        self._gradient_norms: dict[str, list[float]] = defaultdict(list)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        self._add(self._done, session_end_pb(STATUS_FAILURE if error else self._status))
        self._writer.close()
        self._writer = None

    def on_start(
        self, run: RunDirectory, config: TrainConfig, first_step: int, info: Mapping[str, Any]
    ) -> None:
        directory = run.path / "tensorboard"
        directory.mkdir(exist_ok=True)
        drop_events(directory, first_step)
        self._steps, self._done = config.steps, first_step
        self._writer = EventFileWriter(str(directory), flush_secs=FLUSH_SECONDS)
        restart = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=restart))
        if first_step == 0:
            values = config.to_dict()
            columns = [HParam(name) for name in COMPARED]
            results = [Metric(tag, display_name=name) for tag, name in RESULTS.items()]
            self._add(
                0,
                hparams_config_pb(columns, results),
                hparams_pb(values, trial_id=run.path.name),
            )
        samples = np.clip(np.rint(info["sample_images"][:SAMPLE_IMAGES]), 0, 255)
        self._add(
            first_step,
            text_pb("config", config_table(config)),
            text_pb("manifest", _code_block(run.manifest())),
            image_pb("images/augmented", samples.astype(np.uint8), max_outputs=SAMPLE_IMAGES),
        )

    def on_step(self, step: int, state: StateView, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if name.endswith("/gradient_norm"):
                self._gradient_norms[name.removesuffix("/gradient_norm")].append(value)
        self._done = step + 1
        last = self._done == self._steps
        if last or step % max(1, self._steps // SCALARS_PER_RUN) == 0:
            self._add(step, *_scalars(metrics))
        if last or step % max(1, self._steps // HISTOGRAMS_PER_RUN) == 0:
            self._add_histograms(step, state)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(step - 1, *_scalars(metrics))

    def on_checkpoint(self, step: int) -> None:
        if self._writer is not None:  # a resumed run must not miss what came before
            self._writer.flush()

    def on_end(self, result: Any) -> None:
        self._status = STATUS_SUCCESS if result.status == "finished" else STATUS_UNKNOWN

    def _add_histograms(self, step: int, state: StateView) -> None:
        """Weights now; gradient norms of every step since the last histogram."""
        summaries = [
            histogram_pb(f"gradient_norms/{layer}", np.array(norms))
            for layer, norms in self._gradient_norms.items()
        ]
        self._gradient_norms.clear()
        for name, array in state.numpy().items():
            group, _, tensor = name.partition("/")
            if group == "params":
                summaries.append(histogram_pb(f"weights/{tensor}", array.astype(np.float32)))
        self._add(step, *summaries)

    def _add(self, step: int, *summaries: _Message) -> None:
        if self._writer is None:
            raise RuntimeError("TensorBoardLog: on_start has not been called")
        merged = Summary()
        for summary in summaries:
            merged.MergeFromString(summary.SerializeToString())
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=merged))


def drop_events(directory: Path, first_step: int) -> None:
    """Removes events of step >= `first_step`, and half-written ones, from event files."""
    temporary = directory / "rewritten.part"
    for file in sorted(directory.glob("events.out.tfevents.*")):
        with tf.io.TFRecordWriter(str(temporary)) as kept:
            for record in _whole_records(file):
                event = Event.FromString(record)
                if event.step < first_step or event.HasField("file_version"):
                    kept.write(record)
        temporary.replace(file)


def _whole_records(file: Path) -> Iterator[bytes]:
    """The records of an event file; a killed process leaves a half-written tail."""
    records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    while True:
        try:
            yield next(records)
        except (StopIteration, tf.errors.DataLossError):
            return


def config_table(config: TrainConfig) -> str:
    """The configuration as a Markdown table: field, value, origin."""
    origins = config.origins()
    rows = [f"| {name} | {value} | {origins[name]} |" for name, value in config.to_dict().items()]
    return "\n".join(["| field | value | origin |", "|---|---|---|", *rows])


def _code_block(value: Mapping[str, Any]) -> str:
    return "```json\n" + json.dumps(value, indent=2) + "\n```"


def _scalars(metrics: Mapping[str, Any]) -> list[Summary]:
    tagged = {TAGS[name]: value for name, value in metrics.items() if name in TAGS}
    for name, value in metrics.items():
        layer, _, quantity = name.rpartition("/")
        if quantity in LAYER_QUANTITIES and layer:
            tagged[f"{quantity}/{layer}"] = value
    return [scalar_pb(tag, value) for tag, value in tagged.items()]
