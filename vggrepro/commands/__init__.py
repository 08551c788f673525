"""The commands, one module each.

A command module defines `add_parser(subparsers)`, which declares its options and
calls `set_defaults(run=run)`, and `run(args) -> int`, which does the work and
returns the exit code. Heavy imports belong inside `run`: `vggrepro --help` must
not load TensorFlow. A package is a command with subcommands (`vggrepro data make`).
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterable


def add_commands(subparsers: argparse._SubParsersAction, package: str, path: Iterable[str]) -> None:
    """Adds the command of every module of a package, in alphabetical order."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}").add_parser(subparsers)
