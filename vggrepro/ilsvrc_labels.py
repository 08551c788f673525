"""The classes of ILSVRC2012's validation images, from its development kit.

The ground truth is a number (ILSVRC2012_ID) a line; the kit's meta.mat, a MATLAB file of
version 5, says which class (WNID) that is. A ground truth that holds class names is taken
as it is.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zlib
from typing import Any

import numpy as np

from diagnostics.errors import InputError
from vggrepro.storage import decoded

KIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"

_COMPRESSED = 15
_STRUCT, _CHAR = 2, 4
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
_TYPES |= {13: "u8", 16: "u1", 17: "u2"}


def validation_classes(root: str) -> list[str]:
    """The class of every validation image, in the order of their names.

    Raises:
      InputError: ground truth or meta.mat are missing or damaged.
    """
    lines = decoded(_kit_file(root, TRUTH), f"{TRUTH} in {root}").split()
    if not all(line.isdecimal() for line in lines):
        return lines
    names = _class_of_number(_kit_file(root, META))
    unknown = next((line for line in lines if int(line) not in names), None)
    if unknown is not None:
        raise InputError(f"{TRUTH} in {root}: {META} knows no class {unknown}")
    return [names[int(line)] for line in lines]


def _kit_file(root: str, name: str) -> bytes:
    for place in (f"{root}/{name}", f"{root}/{KIT}/data/{name}"):
        if os.path.exists(place):
            with open(place, "rb") as file:
                return file.read()
    archive = f"{root}/{KIT}.tar.gz"
    if os.path.exists(archive):
        try:
            with tarfile.open(archive) as kit:
                member = kit.extractfile(f"{KIT}/data/{name}")
                if member is not None:
                    return member.read()
        except (tarfile.TarError, KeyError, OSError, EOFError) as error:
            raise InputError(f"{archive} is damaged: {error}", "Download it again") from error
    raise InputError(
        f"{root} holds neither {name} nor {KIT}.tar.gz",
        "The development kit comes from the same page as the images",
    )


def _class_of_number(meta: bytes) -> dict[int, str]:
    try:
        synsets = _matrices(meta)["synsets"]
        return {int(row["ILSVRC2012_ID"].item()): row["WNID"] for row in synsets}
    except (struct.error, zlib.error, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{META} cannot be read: {error}", "Download the kit again") from error


def _matrices(data: bytes) -> dict[str, Any]:
    """The named arrays of a MATLAB file."""
    found = {}
    for kind, body in _elements(data[128:]):
        while kind == _COMPRESSED:
            ((kind, body),) = _elements(zlib.decompress(body))
        name, value = _matrix(body)
        found[name] = value
    return found


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    """(type, content) of the data elements, one after the other."""
    found, place = [], 0
    while place < len(data):
        kind, size = struct.unpack_from("<II", data, place)
        if kind >> 16:  # a small element: type, size and content in eight bytes
            kind, size, start, step = kind & 0xFFFF, kind >> 16, place + 4, 8
        else:  # padded to eight bytes, unless compressed
            start, step = place + 8, 8 + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError("the file is cut off")
        found.append((kind, data[start : start + size]))
        place += step
    return found


def _matrix(body: bytes) -> tuple[str, Any]:
    """Name and value: a list of dicts (struct), a string, or an array."""
    parts = _elements(body)
    if not parts:
        return "", np.zeros(0)
    kind, name = parts[0][1][0], parts[2][1].decode()
    if kind == _STRUCT:
        width = struct.unpack("<i", parts[3][1])[0]
        fields = [
            parts[4][1][i : i + width].rstrip(b"\0").decode()
            for i in range(0, len(parts[4][1]), width)
        ]
        values = [_matrix(content)[1] for _, content in parts[5:]]
        rows = range(0, len(values), len(fields))
        return name, [dict(zip(fields, values[i:], strict=False)) for i in rows]
    if kind == _CHAR:
        size = np.dtype(_TYPES[parts[3][0]]).itemsize
        return name, parts[3][1].decode("utf-16-le" if size == 2 else "utf-8")
    return name, np.frombuffer(parts[3][1], "<" + _TYPES[parts[3][0]]) if len(parts) > 3 else None
