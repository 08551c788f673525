"""Files that are whole or absent, whatever moment the process is killed at.

Everything is written beside its final place under a name that starts with
`TEMPORARY_PREFIX`, synced, and renamed. Whoever owns the directory may delete
names with that prefix that a killed process left (`remove_temporaries`).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.errors import InputError

TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY_NAME = re.compile(re.escape(TEMPORARY_PREFIX) + r"(.+)-[0-9a-f]{8}")
_ASIDE_PREFIX = ".aside-"

_REMEDIES = {
    errno.ENOSPC: "Free some space or choose another directory, then resume",
    errno.EDQUOT: "Your disk quota is used up: free some space, then resume",
    errno.EFBIG: "The file size limit (ulimit -f) is too small for it",
    errno.EACCES: "Check the permissions or choose another directory",
    errno.EPERM: "Check the permissions or choose another directory",
    errno.EROFS: "The file system is read-only: choose another directory",
    errno.ENOLCK: "The file system has no locks: choose a local directory",
    errno.EOPNOTSUPP: "The file system has no locks: choose a local directory",
}


def write_error(path: Path, code: int | None, reason: str) -> InputError:
    """The one-line error of a failed write to `path`; `code` is the errno."""
    remedy = _REMEDIES.get(code or 0, "Check the disk or choose another directory")
    # Inside `new_directory` the path has a temporary part, which nobody will find.
    shown = Path(*(_TEMPORARY_NAME.sub(r"\1", part) for part in path.parts))
    return InputError(f"cannot write {shown}: {reason}", remedy)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into an `InputError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error.errno, error.strerror or str(error)) from error


def sync(path: Path) -> None:
    """Forces a file's bytes, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory that becomes `path` when the block ends.

    An older directory at `path` is replaced. If the block raises, nothing of the
    new one is left and the older one stays.

    Raises:
      InputError: the disk is full or not writable; any `OSError` of the block
        counts as that.
    """
    temporary = _temporary_beside(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for entry in temporary.rglob("*"):
                sync(entry)
            sync(temporary)
            _replace_directory(temporary, path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_directory(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    # A directory cannot be renamed onto a full one, so the old one steps aside;
    # `remove_temporaries` puts it back if the process dies between the renames.
    aside = path.with_name(_ASIDE_PREFIX + path.name)
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    try:
        temporary.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside)


def remove_directory(path: Path) -> None:
    """Deletes a directory so that no half of it is ever seen under its name."""
    temporary = _temporary_beside(path)
    with disk_errors(path):
        path.rename(temporary)
        shutil.rmtree(temporary)


def remove_temporaries(directory: Path) -> None:
    """Clears away what a killed process left directly in `directory`.

    Only for the one process that writes there: another's unfinished files would go.
    """
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        if entry.name.startswith(_ASIDE_PREFIX):
            final = entry.with_name(entry.name[len(_ASIDE_PREFIX) :])
            if not final.exists():
                entry.rename(final)
                continue
        elif not entry.name.startswith(TEMPORARY_PREFIX):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def plain(value: Any) -> Any:
    """The value as strict JSON knows it.

    numpy scalars and arrays become numbers and lists, paths become strings, and
    NaN and infinities the strings "NaN", "Infinity" and "-Infinity" (JSON has no
    such numbers; `float` reads all three).
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON in ASCII (file names may hold bytes that are no UTF-8); see `plain`."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file atomically and durably; makes its directory if need be.

    Raises:
      InputError: the disk is full or not writable; an older file stays.
    """
    temporary = _temporary_beside(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        # It may not be there, nor may its directory; the error above is the one to tell.
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a value as indented, strict JSON."""
    write_whole(path, (json_text(value, indent=2) + "\n").encode())


def append_whole(descriptor: int, data: bytes, path: Path) -> None:
    """Appends all of `data` to an open file, or nothing.

    Raises:
      InputError: the disk is full or not writable; the file is as it was.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    with disk_errors(path):
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except BaseException:
            os.ftruncate(descriptor, end)
            raise
