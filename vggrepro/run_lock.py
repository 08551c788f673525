"""One writer at a time: an operating-system lock, which dies with its process."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path

from diagnostics.durable_files import disk_errors
from diagnostics.errors import RunLocked

LOCK_FILE = ".lock"


def acquire_lock(directory: Path) -> int:
    """Locks a directory for this process; closing the returned descriptor unlocks it.

    No lock outlives its process, not even a killed one. The file only says who
    holds the lock; it stays when the lock is gone.

    Raises:
      RunLocked: another process holds it; the message names its pid and host.
      InputError: the directory is not writable, or its file system has no locks.
    """
    file = directory / LOCK_FILE
    with disk_errors(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {platform.node()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise RunLocked(
                f"run {directory} is being written by another process ({holder or 'just started'})",
                "Wait for it to end, stop it, or choose another --run-dir",
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor
