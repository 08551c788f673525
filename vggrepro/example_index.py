"""What a data set holds, whatever it is stored in: names, labels, places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diagnostics.errors import InputError
from vggrepro.storage import join


@dataclass(frozen=True)
class RecordTable:
    """Where the examples of a split lie in its shards; arrays are by example id.

    Attributes:
      files: full paths of the shards.
      shard: int32 [n], index into `files`.
      offset: int64 [n], of the record in its shard, bytes.
      size: int64 [n], of the image, bytes.
      image_size: int32 [n, 2], height and width, pixels; None: the index does not say.
    """

    files: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    image_size: np.ndarray | None = None

    @cached_property
    def ids_in_storage_order(self) -> np.ndarray:
        """int64 [n]: the example at each place, shard after shard."""
        return np.lexsort((self.offset, self.shard))


@dataclass(frozen=True)
class ExampleIndex:
    """The examples of one split; an example's id is its place in `paths`.

    Attributes:
      root: the data directory, local or a URL.
      split: 'train' or 'val'.
      paths: `split/class/file`, sorted by class and file name.
      labels: int32 [n], index into class_names.
      class_names: sorted names of the classes.
      fingerprint: sha256 of paths, labels and sizes of the images.
      records: where the images lie in shards; None: each is a file, root/path.
    """

    root: str
    split: str
    paths: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    records: RecordTable | None = None

    @property
    def classes_sha256(self) -> str:
        """Of the class names in order: what a net's class numbers mean."""
        return hashlib.sha256("\n".join(self.class_names).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ids_in_storage_order(self) -> np.ndarray:
        """int64 [n]: the order in which all examples are read fastest."""
        return np.arange(len(self)) if self.records is None else self.records.ids_in_storage_order

    def name_of(self, example_id: int) -> str:
        """Path of an example, relative to `root`."""
        return self.paths[example_id]

    def location(self, example_id: int) -> str:
        """Where an example is, for messages and, if it is a file, for opening it."""
        path = self.paths[example_id]
        if self.records is None:
            return join(self.root, path)
        file = self.records.files[self.records.shard[example_id]]
        return f"{path} in {file} at byte {self.records.offset[example_id]}"


def fingerprint(examples: Iterable[tuple[str, int, int]]) -> str:
    """The hash of (path, label, size in bytes) of every example, in order of their ids.

    Raises:
      InputError: a path is not valid UTF-8.
    """
    digest = hashlib.sha256()
    for path, label, size in examples:
        try:
            digest.update(f"{path}\0{label}\0{size}\n".encode())
        except UnicodeEncodeError as error:
            raise InputError(f"file name {path!a} is not valid UTF-8", "Rename the file") from error
    return digest.hexdigest()
