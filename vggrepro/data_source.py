"""Everything a run reads: both splits, their statistics, and their fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from diagnostics.errors import InputError, ToolError
from vggrepro import resampling
from vggrepro.config import TrainConfig
from vggrepro.dataset import Batch, EvaluationStream, TrainingStream
from vggrepro.example_index import ExampleIndex
from vggrepro.example_reader import find_bad_example
from vggrepro.image_folder import index_folder
from vggrepro.preprocessing import Preprocessing
from vggrepro.shards import check_sizes, holds_shards, index_shards, read_manifest
from vggrepro.statistics import ColourStatistics, training_statistics
from vggrepro.storage import is_url
from vggrepro.workers import ALONE, Workers

STATISTICS_FILE = "vggrepro-statistics.json"


@dataclass(frozen=True)
class DataSource:
    """A run's data.

    Attributes:
      record: what the manifest keeps: fingerprints, counts, colour statistics, and
        whether the stored images are smaller than the originals (a deviation), and what
        resamples them (the bits are the same).
    """

    training: TrainingStream
    validation: EvaluationStream
    record: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.training.index.class_names

    @property
    def mean_rgb(self) -> tuple[float, float, float]:
        """Grey levels (0..255) that preprocessing subtracted."""
        return self.training.preprocessing.mean_rgb

    def training_batch(self, step: int) -> Batch:
        """The batch of one step.

        Raises:
          InputError: an image cannot be read; names the file.
        """
        try:
            return self.training.batch(step)
        except tf.errors.OpError as error:
            raise self.explain(step, error) from error

    def explain(self, step: int, error: Exception) -> ToolError:
        """Why the batch of a training step could not be read; names the file."""
        found = find_bad_example(self.training.index, self.training.example_ids(step))
        return found or InputError(
            f"the batch of step {step} cannot be read: {str(error).splitlines()[0][:200]}",
            "Check the data directory",
        )

    def explain_validation(self, error: Exception) -> ToolError:
        """The same for the validation images."""
        found = find_bad_example(self.validation.index, range(len(self.validation.index)))
        return found or InputError(
            f"a validation image cannot be read: {str(error).splitlines()[0][:200]}",
            "Check the data directory",
        )


def open_data(
    config: TrainConfig,
    announce: Callable[[str], None],
    recorded: Mapping[str, Any] | None = None,
    workers: Workers = ALONE,
) -> DataSource:
    """Indexes the data, and measures the training set's colours unless known.

    Args:
      announce: is told what takes long.
      recorded: `DataSource.record` of the run being resumed; the data must still
        be the same.
      workers: the streams give this one's rows of every batch.

    Raises:
      InputError: the directory is not in the ILSVRC layout, has other classes than the
        configuration, a file cannot be read, or the data differs from what the run was
        started on.
    """
    root = config.data
    train, validation = open_index(root, "train"), open_index(root, "val")
    if config.classes not in (0, len(train.class_names)):
        raise InputError(
            f"--classes {config.classes}, but {root} has {len(train.class_names)}",
            "--classes 0 takes as many as the data has",
        )
    fingerprints = {"train": train.fingerprint, "val": validation.fingerprint}
    if recorded is not None and recorded["fingerprints"] != fingerprints:
        raise InputError(
            f"the images in {root} are not those the run was started on",
            "Restore them; a resumed run must read the same data",
        )
    if recorded is None:
        colours = _measured(root, train, announce)
    else:
        colours = ColourStatistics.from_dict(recorded["colours"])
    preprocessing = Preprocessing(
        image_size=config.image_size,
        scale_min=config.scale_min,
        scale_max=config.scale_max,
        flip=config.flip,
        colour_shift=config.colour_shift,
        resize=config.resize,
        decode=config.decode,
        mean_rgb=colours.mean_rgb,
        colour_components=colours.colour_components,
    )
    share = (workers.index, workers.count)
    return DataSource(
        TrainingStream(train, preprocessing, config.batch_size, config.seed, config.order, *share),
        EvaluationStream(validation, preprocessing, config.batch_size, *share),
        {
            "fingerprints": fingerprints,
            "train_images": len(train),
            "val_images": len(validation),
            "classes": len(train.class_names),
            "classes_sha256": train.classes_sha256,
            "colours": colours.to_dict(),
            "resized": stored_resize(root),
            "resampling": "tensorflow" if resampling.compiled_ops() is None else "compiled",
        },
    )


def open_index(root: str | os.PathLike[str], split: str) -> ExampleIndex:
    """The examples of a split of a directory of shards or of images, local or a URL.

    Raises:
      InputError: it is neither, or damaged.
    """
    if not holds_shards(root):
        return index_folder(root, split)
    index = index_shards(root, split)
    check_sizes(index)
    return index


def stored_resize(root: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `data build --resize` did to the images of a data directory; None: nothing."""
    return read_manifest(root)["resize"] if holds_shards(root) else None


def statistics_cache(root: str | os.PathLike[str]) -> Path | None:
    """Where the colour statistics of a data directory are kept; None: it is not writable."""
    # Data directories are often mounted read-only; the manifest keeps the numbers too.
    writable = not is_url(root) and os.access(root, os.W_OK)
    return Path(root) / STATISTICS_FILE if writable else None


def _measured(root: str, train: ExampleIndex, announce: Callable[[str], None]) -> ColourStatistics:
    announce(f"mean RGB and colour covariance of {len(train):,} training images")
    return training_statistics(train, statistics_cache(root))
