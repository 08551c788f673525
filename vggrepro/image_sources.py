"""Where the images of a data set come from: directories, the official tars, Kaggle's layout."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from functools import cached_property

from diagnostics.errors import InputError
from vggrepro.image_folder import image_files, list_examples
from vggrepro.source_image import SourceImage
from vggrepro.storage import decoded, exists, join, list_directory, read_bytes
from vggrepro.tar_source import TRAIN_TAR, open_tars

_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_KAGGLE_LABELS = "LOC_val_solution.csv"


@dataclass(frozen=True)
class Source:
    """All images of a data set.

    Attributes:
      kind: 'folder', 'tars' or 'kaggle'.
      class_names: sorted.
      splits: 'train' and 'val', each sorted by class and file name.
    """

    kind: str
    class_names: tuple[str, ...]
    splits: dict[str, list[SourceImage]]

    def label_of(self, image: SourceImage) -> int:
        """Index of an image's class in `class_names`."""
        return self._labels[image.path.split("/")[1]]

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.class_names)}


def open_source(root: str | os.PathLike[str]) -> Source:
    """Lists the images of a directory in any of the three forms.

    Raises:
      InputError: it is in none of them, or incomplete.
    """
    root = os.fspath(root)
    if exists(join(root, TRAIN_TAR)):
        return _source("tars", *open_tars(root))
    for inner in _KAGGLE:
        if exists(join(root, inner)):
            return _open_kaggle(root, join(root, inner))
    if not exists(join(root, "train")):
        raise InputError(
            f"{root} holds no images in a known layout",
            f"Expected train/ and val/ with a directory for each class, {TRAIN_TAR} and its "
            f"companions, or {_KAGGLE[0]} with {_KAGGLE_LABELS}",
        )
    return _source("folder", _open_folder(root, "train"), _open_folder(root, "val"))


def _open_folder(root: str, split: str) -> list[SourceImage]:
    _, examples = list_examples(root, split)
    return [SourceImage(path, size, join(root, path)) for path, _, size in examples]


def _open_kaggle(root: str, images: str) -> Source:
    """train/<class>/*.JPEG, val/*.JPEG, and a CSV with the classes of val."""
    places = [join(root, _KAGGLE_LABELS), join(images, "../..", _KAGGLE_LABELS)]
    found = next((place for place in places if exists(place)), None)
    if found is None:
        raise InputError(f"{places[0]} is missing", "It comes with Kaggle's download")
    labels = kaggle_labels(decoded(read_bytes(found), found), found)
    val = []
    for name, size in image_files(join(images, "val")):
        stem = name.rpartition(".")[0]
        if stem not in labels:
            raise InputError(f"{found} says nothing of {name}", "Download it again")
        val.append(SourceImage(f"val/{labels[stem]}/{name}", size, join(images, "val", name)))
    train = []
    for entry in list_directory(join(images, "train")):
        for name, size in image_files(join(images, "train", entry.name)):
            path = f"train/{entry.name}/{name}"
            train.append(SourceImage(path, size, join(images, path)))
    return _source("kaggle", train, val)


def kaggle_labels(text: str, place: str) -> dict[str, str]:
    """Image name (no suffix) -> class, from Kaggle's CSV: `ImageId,PredictionString`.

    Raises:
      InputError: a line is of another form.
    """
    labels = {}
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        if number == 1 and row[:1] == ["ImageId"]:
            continue
        if len(row) != 2 or not row[1].split():
            raise InputError(f"{place}, line {number}: not ImageId,PredictionString")
        labels[row[0]] = row[1].split()[0]  # the boxes of an image are of one class
    return labels


def _source(kind: str, train: list[SourceImage], val: list[SourceImage]) -> Source:
    """Sorted as a directory of class directories would be; both splits of the same classes."""
    classes = {
        name: {image.path.split("/")[1] for image in images}
        for name, images in (("train", train), ("val", val))
    }
    for one, other in (("train", "val"), ("val", "train")):
        unknown = sorted(classes[one] - classes[other])
        if unknown:
            raise InputError(f"class '{unknown[0]}' has images in {one} but none in {other}")
    splits = {
        name: sorted(images, key=lambda image: image.path.split("/"))
        for name, images in (("train", train), ("val", val))
    }
    for images in splits.values():
        for one_image, next_image in zip(images, images[1:], strict=False):
            if one_image.path == next_image.path:
                raise InputError(f"{one_image.path} is there twice", "Remove one of them")
    return Source(kind, tuple(sorted(classes["train"])), splits)
