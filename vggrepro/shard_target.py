"""Where shards are built: a local directory, or a URL that `tf.io.gfile` writes to.

Every shard is written to a local file first; `put` moves or sends it when it is whole.
A local directory is locked. A URL is not: buckets have no locks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

from diagnostics.durable_files import (
    TEMPORARY_PREFIX,
    disk_errors,
    json_text,
    remove_temporaries,
    sync,
    write_error,
    write_whole,
)
from diagnostics.errors import InputError, RunLocked
from vggrepro.run_lock import LOCK_FILE, acquire_lock
from vggrepro.storage import is_url, join, storage_errors

PARTS = "parts"  # a file for every finished shard, until all are


class ShardTarget(ABC):
    """A place for the files of a build, each named by its path in it.

    All methods raise InputError if the place cannot be read or written.

    Attributes:
      place: the directory's path or URL.
    """

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/") or "/"

    def path(self, name: str) -> str:
        """Path or URL of a file."""
        return join(self.place, name)

    @abstractmethod
    def names(self) -> set[str]:
        """What is there, but for what building itself leaves: locks and temporary files."""

    @abstractmethod
    def opened(self) -> AbstractContextManager[None]:
        """While a build writes here."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file; None: there is none."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None: there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Writes a small file, which is whole or absent whenever the process is killed."""

    @abstractmethod
    def put(self, scratch: Path, name: str) -> None:
        """Brings a whole file of `scratch` to its place."""

    @abstractmethod
    def check_space(self, shards: Sequence[int], index: int, workers: int) -> None:
        """Refuses to start without room for shards and index of so many bytes."""

    @abstractmethod
    def remove_temporaries(self) -> None:
        """Clears away what a killed build left half written."""

    @abstractmethod
    def finish(self, names: Sequence[str]) -> None:
        """Removes `PARTS`, and these files if they are there."""

    @abstractmethod
    def _scratch(self, name: str) -> tuple[Path, Path]:
        """The local file to write a shard to, and what an error calls it."""

    def write_json(self, name: str, value: Any) -> None:
        """`write` of a value as indented, strict JSON."""
        self.write(name, (json_text(value, indent=2) + "\n").encode())

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A local file to write a shard to; gone in the end. The writer's errors are told."""
        file, called = self._scratch(name)
        try:
            yield file
        except tf.errors.OpError as error:
            raise write_error(called, None, error.message.splitlines()[0]) from error
        finally:
            file.unlink(missing_ok=True)


class LocalTarget(ShardTarget):
    """A local directory."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self._directory = Path(place)

    def names(self) -> set[str]:
        with disk_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            return {entry.name for entry in self._directory.iterdir()} - {LOCK_FILE}

    @contextmanager
    def opened(self) -> Iterator[None]:
        try:
            lock = acquire_lock(self._directory)
        except RunLocked as error:
            raise InputError(
                f"{self.place} is being built by another process",
                "Wait for it to end, or stop it",
            ) from error
        try:
            yield
        finally:
            os.close(lock)

    def read(self, name: str) -> bytes | None:
        file = self._directory / name
        with storage_errors(str(file), "read"):
            return file.read_bytes() if file.exists() else None

    def size(self, name: str) -> int | None:
        file = self._directory / name
        return file.stat().st_size if file.exists() else None

    def write(self, name: str, data: bytes) -> None:
        write_whole(self._directory / name, data)

    def put(self, scratch: Path, name: str) -> None:
        with disk_errors(self._directory / name):
            sync(scratch)
            os.replace(scratch, self._directory / name)

    def check_space(self, shards: Sequence[int], index: int, workers: int) -> None:
        _check_free(self._directory, sum(shards) + index, "the shards need", "choose another disk")

    def remove_temporaries(self) -> None:
        remove_temporaries(self._directory)

    def finish(self, names: Sequence[str]) -> None:
        shutil.rmtree(self._directory / PARTS)
        for name in names:
            (self._directory / name).unlink(missing_ok=True)

    def _scratch(self, name: str) -> tuple[Path, Path]:
        return self._directory / f"{TEMPORARY_PREFIX}{name}", self._directory / name


class RemoteTarget(ShardTarget):
    """A URL. Shards wait in TMPDIR until they are whole, one for each worker."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self._waiting = Path(tempfile.gettempdir())  # a directory of its own when opened

    def names(self) -> set[str]:
        return {name for name in self._listed() if not name.startswith(TEMPORARY_PREFIX)}

    @contextmanager
    def opened(self) -> Iterator[None]:
        with storage_errors(self.place, "write"):
            tf.io.gfile.makedirs(self.path(PARTS))
        with tempfile.TemporaryDirectory(prefix="vggrepro-shards-") as waiting:
            self._waiting = Path(waiting)
            yield

    def read(self, name: str) -> bytes | None:
        with storage_errors(self.path(name), "read"):
            try:
                with tf.io.gfile.GFile(self.path(name), "rb") as file:
                    return file.read()
            except tf.errors.NotFoundError:
                return None

    def size(self, name: str) -> int | None:
        with storage_errors(self.path(name), "look at"):
            try:
                return tf.io.gfile.stat(self.path(name)).length
            except tf.errors.NotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        # Not every scheme has files that appear only when they are closed.
        temporary = self.path(f"{TEMPORARY_PREFIX}{name.replace('/', '-')}")
        with storage_errors(self.path(name), "write"):
            with tf.io.gfile.GFile(temporary, "wb") as file:
                file.write(data)
            tf.io.gfile.rename(temporary, self.path(name), overwrite=True)

    def put(self, scratch: Path, name: str) -> None:
        with storage_errors(self.path(name), "write"):
            tf.io.gfile.copy(str(scratch), self.path(name), overwrite=True)

    def check_space(self, shards: Sequence[int], index: int, workers: int) -> None:
        needed = sum(sorted(shards)[-workers:])
        _check_free(
            self._waiting, needed, f"shards of {workers} workers need", "set TMPDIR to another disk"
        )

    def remove_temporaries(self) -> None:
        with storage_errors(self.place, "write"):
            for name in self._listed():
                if name.startswith(TEMPORARY_PREFIX):
                    tf.io.gfile.remove(self.path(name))

    def finish(self, names: Sequence[str]) -> None:
        with storage_errors(self.place, "write"):
            tf.io.gfile.rmtree(self.path(PARTS))
            for name in names:
                if tf.io.gfile.exists(self.path(name)):
                    tf.io.gfile.remove(self.path(name))

    def _scratch(self, name: str) -> tuple[Path, Path]:
        return self._waiting / name, self._waiting / name

    def _listed(self) -> list[str]:
        with storage_errors(self.place, "list"):
            if not tf.io.gfile.exists(self.place):
                return []
            return [name.rstrip("/") for name in tf.io.gfile.listdir(self.place)]


def shard_target(place: str) -> ShardTarget:
    """The target at a path or URL."""
    return RemoteTarget(place) if is_url(place) else LocalTarget(place)


def _check_free(directory: Path, needed: int, whose: str, remedy: str) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory} has {free / 1e9:.1f} GB free, {whose} {needed / 1e9:.1f} GB",
            f"Free some space or {remedy}",
        )
