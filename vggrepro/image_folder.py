"""A directory of images in the ILSVRC layout: what is in it, and what is wrong with it.

`root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`, the same classes in both.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError

_SUFFIXES = (".jpeg", ".jpg")
_JPEG_MAGIC = b"\xff\xd8\xff"
_LAYOUT = "Expected DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG"


@dataclass(frozen=True)
class ExampleIndex:
    """The examples of one split; an example's id is its place in `paths`.

    Attributes:
      root: the data directory.
      split: 'train' or 'val'.
      paths: relative to root, with '/', sorted.
      labels: int32 [n], index into class_names.
      class_names: sorted names of the class directories.
      fingerprint: sha256 of paths, labels and file sizes.
    """

    root: Path
    split: str
    paths: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.paths)

    def name_of(self, example_id: int) -> str:
        """Path of an example, relative to `root`."""
        return self.paths[example_id]


def index_folder(root: str | os.PathLike[str], split: str) -> ExampleIndex:
    """Lists `root/split/<class>/*.JPEG` (.jpeg, .jpg, any case; dotfiles are skipped).

    Raises:
      InputError: train/ or val/ is missing, the two have different classes, a class is
        empty, or a class directory holds something that is not a JPEG file by its name.
    """
    base = Path(root)
    classes = {name: _class_names(base, name) for name in ("train", "val")}
    for name, other in (("val", "train"), ("train", "val")):
        unknown = sorted(set(classes[name]) - set(classes[other]))
        if unknown:
            raise InputError(
                f"{base}: class '{unknown[0]}' is in {name}/ but not in {other}/", _LAYOUT
            )
    paths: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for label, class_name in enumerate(classes[split]):
        for file_name, size in _image_files(base / split / class_name):
            paths.append(f"{split}/{class_name}/{file_name}")
            labels.append(label)
            digest.update(_utf8(f"{paths[-1]}\0{label}\0{size}\n"))
    return ExampleIndex(
        base,
        split,
        tuple(paths),
        np.array(labels, np.int32),
        tuple(classes[split]),
        digest.hexdigest(),
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"file name {text!a} is not valid UTF-8", "Rename the file") from error


def _class_names(base: Path, split: str) -> list[str]:
    try:
        with os.scandir(base / split) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot list {base / split}: {error.strerror}", _LAYOUT) from error
    if not names:
        raise InputError(f"{base / split} has no class directories", _LAYOUT)
    return names


def _image_files(folder: Path) -> list[tuple[str, int]]:
    """Sorted (file name, size in bytes) of a class directory."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                (e.name, e.is_file(), e.stat().st_size)
                for e in entries
                if not e.name.startswith(".")
            )
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}", _LAYOUT) from error
    if not found:
        raise InputError(f"class directory {folder} is empty", "Add images or remove it")
    for name, is_file, _ in found:
        if not (is_file and name.lower().endswith(_SUFFIXES)):
            raise InputError(f"{folder / name} is not a .JPEG file", "Convert it or move it away")
    return [(name, size) for name, _, size in found]


def find_bad_example(index: ExampleIndex, example_ids: Iterable[int]) -> InputError | None:
    """Says which of the examples cannot be decoded, and why; None: all can.

    For use after a pipeline failed: it decodes the files one by one, whole.
    """
    for example_id in example_ids:
        if example_id < 0:  # padding of the last evaluation batch
            continue
        path = index.root / index.name_of(int(example_id))
        fault = _fault_of(path)
        if fault:
            return InputError(f"{path}: {fault}", "Replace the file or delete it")
    return None


def _fault_of(path: Path) -> str:
    """What keeps a file from being used as an image; '' if nothing does."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not content:
        return "the file is empty"
    try:
        tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
    except tf.errors.InvalidArgumentError:
        is_jpeg = content.startswith(_JPEG_MAGIC)
        return "truncated or damaged JPEG data" if is_jpeg else "not a JPEG file"
    return ""
