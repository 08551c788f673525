"""Keeps TensorFlow's greetings off the terminal, which would stand in the progress display.

On processors with neural-network instructions TensorFlow 2.21 prints lines of level INFO
while it is imported, before it reads TF_CPP_MIN_LOG_LEVEL.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_INFORMATION = re.compile(rb"I\d{4} \d|WARNING: All log messages before absl::InitializeLog")


def install() -> None:
    """From now on the first import of TensorFlow is quiet; warnings and errors stay."""
    if "tensorflow" not in sys.modules and not any(
        isinstance(finder, _Finder) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, real: Loader) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        with without_lines(_INFORMATION):
            self._real.exec_module(module)


@contextmanager
def without_lines(pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Holds file descriptor 2 back, then writes the lines to it that do not match."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held:
                if not pattern.match(line):
                    os.write(2, line)
