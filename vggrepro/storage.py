"""Reading directories and files, local or of any scheme that TensorFlow knows (gs://…).

Local paths go through the operating system, which lists a million files much faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import tensorflow as tf

from diagnostics.errors import InputError

_SCHEME = "://"


class Entry(NamedTuple):
    """What a directory holds: `size` in bytes, 0 for a directory."""

    name: str
    is_file: bool
    size: int


def is_url(path: str | os.PathLike[str]) -> bool:
    """True for `gs://bucket/file` and the like, `file://` too; False for a local path."""
    return _SCHEME in os.fspath(path)


def join(directory: str | os.PathLike[str], *parts: str) -> str:
    """The path of something inside a directory."""
    return "/".join([os.fspath(directory).rstrip("/") or "/", *parts])


def list_directory(path: str) -> list[Entry]:
    """What a directory holds, sorted by name; names that start with a dot are left out.

    Raises:
      InputError: it does not exist or cannot be read.
    """
    with storage_errors(path, "list"):
        found = list(_list_url(path) if is_url(path) else _list_local(path))
    return sorted(entry for entry in found if not entry.name.startswith("."))


def read_bytes(path: str) -> bytes:
    """The content of a file.

    Raises:
      InputError: it does not exist or cannot be read.
    """
    with storage_errors(path, "read"):
        if is_url(path):
            with tf.io.gfile.GFile(path, "rb") as remote:
                return remote.read()
        with open(path, "rb") as local:
            return local.read()


def decoded(data: bytes, place: str) -> str:
    """The text that a file holds.

    Raises:
      InputError: it is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text", "Download it again") from error


def file_size(path: str) -> int:
    """Bytes of a file.

    Raises:
      InputError: it does not exist, or the place cannot be asked.
    """
    with storage_errors(path, "look at"):
        return tf.io.gfile.stat(path).length if is_url(path) else os.path.getsize(path)


def exists(path: str) -> bool:
    """Whether there is such a file or directory.

    Raises:
      InputError: the place cannot be asked.
    """
    if not is_url(path):
        return os.path.exists(path)
    with storage_errors(path, "look for"):
        return tf.io.gfile.exists(path)


@contextmanager
def storage_errors(path: str, verb: str) -> Iterator[None]:
    """Turns the errors of both file systems into an `InputError` that names `path`."""
    try:
        yield
    except tf.errors.UnimplementedError as error:  # a scheme without its plug-in
        raise InputError(
            f"cannot {verb} {path}: this TensorFlow has no file system for it",
            "For gs:// paths: pip install 'tensorflow[gcs-filesystem]'",
        ) from error
    except (tf.errors.OpError, OSError) as error:
        reason = error.message if isinstance(error, tf.errors.OpError) else error.strerror
        raise InputError(
            f"cannot {verb} {path}: {str(reason).splitlines()[0][:200]}",
            "Check the path and its permissions",
        ) from error


def _list_local(path: str) -> Iterator[Entry]:
    with os.scandir(path) as entries:
        for entry in entries:
            is_file = entry.is_file()
            yield Entry(entry.name, is_file, entry.stat().st_size if is_file else 0)


def _list_url(path: str) -> Iterator[Entry]:
    for name in tf.io.gfile.listdir(path):
        name = name.rstrip("/")
        found = tf.io.gfile.stat(join(path, name))
        yield Entry(name, not found.is_directory, 0 if found.is_directory else found.length)
