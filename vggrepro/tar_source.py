"""The official tars of ILSVRC2012: listed, never unpacked.

ILSVRC2012_img_train.tar holds a tar for each class, ILSVRC2012_img_val.tar the images of
the validation set; none is compressed, so an image is a run of bytes of the outer file.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from diagnostics.errors import InputError
from vggrepro.ilsvrc_labels import validation_classes
from vggrepro.source_image import SourceImage
from vggrepro.storage import is_url, join

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"


def open_tars(root: str) -> tuple[list[SourceImage], list[SourceImage]]:
    """The training and validation images.

    Raises:
      InputError: a tar or the validation classes are missing or damaged, or a tar holds
        what no image tar should: absolute or `..` names, links, devices.
    """
    if is_url(root):
        raise InputError(f"{root}: tars must be on a local disk", "Copy them first")
    train = []
    outer = join(root, TRAIN_TAR)
    for name, offset, size in tar_members(outer, 0, os.path.getsize(outer)):
        class_name, _, suffix = name.rpartition(".")
        if suffix != "tar" or not class_name:
            raise InputError(f"{outer} holds {name}, which is no tar of a class")
        for file, start, length in tar_members(outer, offset, size):
            train.append(SourceImage(f"train/{class_name}/{file}", length, outer, start))
    inner = join(root, VAL_TAR)
    if not os.path.exists(inner):
        raise InputError(f"{inner} is missing", f"It belongs beside {TRAIN_TAR}")
    found = sorted(tar_members(inner, 0, os.path.getsize(inner)))
    classes = validation_classes(root)
    if len(classes) != len(found):
        raise InputError(
            f"{inner} holds {len(found):,} images, its ground truth is of {len(classes):,}"
        )
    val = [
        SourceImage(f"val/{class_name}/{file}", length, inner, start)
        for class_name, (file, start, length) in zip(classes, found, strict=True)
    ]
    return train, val


def tar_members(path: str, offset: int, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of the files of a tar that lies inside a file.

    Raises:
      InputError: it is no uncompressed tar, is cut off, or a member is refused.
    """
    with open(path, "rb") as file:
        part = _Part(file, offset, size)
        try:
            with tarfile.open(fileobj=part, mode="r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    name = _checked_name(path, member)
                    yield name, offset + member.offset_data, member.size
        except tarfile.TarError as error:
            raise InputError(f"{path}: no readable tar ({error})", "Download it again") from error


def _checked_name(path: str, member: tarfile.TarInfo) -> str:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise InputError(f"{path} holds '{member.name}', a name that leaves its directory")
    if not member.isreg() or member.issparse():
        raise InputError(f"{path} holds '{member.name}', which is no plain file")
    if len(name.parts) != 1:
        raise InputError(f"{path} holds '{member.name}' in a directory of its own")
    return name.name


class _Part(io.RawIOBase):
    """A run of bytes of an open file as a file of its own, for reading."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        super().__init__()
        self._file = file
        self._offset = offset
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + place
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._place, 0)
        self._file.seek(self._offset + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data
