"""Run directories and files at `gs://…` and the like: worked on in a local copy.

A bucket has no locks, appends or renames, which a run directory needs. So a command gets a
local copy, and what it changed there is sent back every minute and at its end: everything
of a snapshot before the manifest that makes it one, deletions last. A process that is killed
loses what came after the last time; one that cannot send its work keeps the copy and says so.
The lock of a run is in the copy: it keeps out no other machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diagnostics.errors import InputError, ToolError

_SECONDS = 60.0
_SCHEME = "://"

_mirrors: list[Mirror] = []


class RemotePath(str):
    """An option's value that is a URL."""


def path_or_url(text: str) -> Path | RemotePath:
    """The type of an option that takes a run directory or a file."""
    return RemotePath(text.rstrip("/")) if _SCHEME in text else Path(text)


def shown(place: str | os.PathLike[str]) -> str:
    """What the user calls a path: that of a local copy is its URL."""
    text = os.fspath(place)
    for mirror in _mirrors:
        text = text.replace(str(mirror.local), mirror.url)
    return text


@contextmanager
def local_paths(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options with local copies in the place of URLs, which get the changes back.

    Raises:
      InputError: a URL cannot be read or written.
    """
    with ExitStack() as stack:
        try:
            values = {name: _localised(value, stack) for name, value in vars(options).items()}
            yield argparse.Namespace(**values)
        except ToolError as error:
            error.message, error.remedy = shown(error.message), shown(error.remedy)
            raise


def _localised(value: Any, stack: ExitStack) -> Any:
    if isinstance(value, list):
        return [_localised(part, stack) for part in value]
    return stack.enter_context(local_copy(value)) if isinstance(value, RemotePath) else value


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """A copy of a remote file or directory, which may not exist yet; changes are sent back.

    Raises:
      InputError: it cannot be read, or at the end not be written.
    """
    mirror = Mirror(url)
    _mirrors.append(mirror)
    stop = threading.Event()
    sender = threading.Thread(target=mirror.keep_sending, args=(stop,), daemon=True)
    try:
        mirror.fetch()
        sender.start()
        try:
            yield mirror.local
        finally:
            stop.set()
            sender.join()
            mirror.send()
    finally:
        _mirrors.remove(mirror)
        shutil.rmtree(mirror.local.parent)


class Mirror:
    """A local copy of what is at a URL.

    Attributes:
      local: the copy.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        name = url.rpartition("/")[2] or "copy"
        self.local = Path(tempfile.mkdtemp(prefix="vggrepro-remote-")) / name
        self._sent: dict[str, tuple[int, int]] = {}  # by relative path: size, time of change

    def fetch(self) -> None:
        """Copies what is there.

        Raises:
          InputError: it cannot be read.
        """
        import tensorflow as tf

        from vggrepro.storage import storage_errors

        with storage_errors(self.url, "read"):
            if not tf.io.gfile.exists(self.url):
                return
            if not tf.io.gfile.isdir(self.url):
                tf.io.gfile.copy(self.url, str(self.local))
            else:
                for directory, _, names in tf.io.gfile.walk(self.url):
                    inside = directory.rstrip("/").removeprefix(self.url).strip("/")
                    (self.local / inside).mkdir(parents=True, exist_ok=True)
                    for name in names:
                        place = f"{directory.rstrip('/')}/{name}"
                        tf.io.gfile.copy(place, str(self.local / inside / name))
        self._sent = self._now()

    def keep_sending(self, stop: threading.Event) -> None:
        """Sends changes every minute; a failure is left to the next time."""
        while not stop.wait(_SECONDS):
            try:
                self._send_changes()
            except InputError:
                continue  # the last call of `send` tells the user

    def send(self) -> None:
        """Sends what has changed.

        Raises:
          InputError: it cannot be written; the copy is kept beside the one that goes.
        """
        try:
            self._send_changes()
        except InputError as error:
            kept = Path(tempfile.mkdtemp(prefix="vggrepro-kept-")) / self.local.name
            shutil.move(self.local, kept)
            raise InputError(error.message, f"All of it is kept in {kept}: copy it") from error

    def _send_changes(self) -> None:
        import tensorflow as tf

        from vggrepro.storage import storage_errors

        found = self._now()
        with storage_errors(self.url, "write"):
            for inside in sorted(found, key=lambda inside: ("manifest.json" in inside, inside)):
                if self._sent.get(inside) == found[inside]:
                    continue
                target = f"{self.url}/{inside}" if inside else self.url
                tf.io.gfile.makedirs(target.rpartition("/")[0])
                tf.io.gfile.copy(str(self.local / inside), target, overwrite=True)
                self._sent[inside] = found[inside]
            for inside in self._sent.keys() - found.keys():
                tf.io.gfile.remove(f"{self.url}/{inside}")
                del self._sent[inside]

    def _now(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every finished file; '' is the copy itself, a file."""
        from diagnostics.durable_files import TEMPORARY_PREFIX
        from vggrepro.run_lock import LOCK_FILE

        files = [self.local] if self.local.is_file() else self.local.rglob("*")
        found = {}
        for file in files:
            parts = file.relative_to(self.local).parts
            if any(part == LOCK_FILE or part.startswith(TEMPORARY_PREFIX) for part in parts):
                continue
            try:
                facts = file.stat()
            except FileNotFoundError:  # renamed or deleted meanwhile
                continue
            if file.is_file():
                found["/".join(parts)] = (facts.st_size, facts.st_mtime_ns)
        return found
