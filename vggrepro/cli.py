"""The command line: finds the commands, turns every error into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from diagnostics.errors import InputError, ToolError
from vggrepro import commands, quiet_import
from vggrepro.remote_paths import local_paths

DESCRIPTION = """\
Reproduces VGG (Simonyan and Zisserman, arXiv 1409.1556) in TensorFlow."""

EXIT_CODES = """\
exit codes: 0 done, 1 fault of ours or a worker was lost, 2 bad usage,
configuration or data, 3 the guard stopped the run and left an incident, 4 nothing to diagnose,
5 the failure did not recur on replay, or verify found a difference,
130 interrupted, state saved"""

INTERRUPTED = 130
PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s and which takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"See {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what it does not know here, where the command and its options are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = list(self._option_string_actions)
            near = [name for name in known if name.startswith(unknown[0])]
            near = near or difflib.get_close_matches(unknown[0], known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown


class _PrintVersion(argparse.Action):
    """`--version`; looks the number up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print("vggrepro", version("vggrepro"))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command of `vggrepro.commands`."""
    parser = _Parser(
        prog="vggrepro",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", nargs=0, action=_PrintVersion, help="print the version")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_commands(subparsers, commands.__name__, commands.__path__)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    # TensorFlow's C++ chatter would break the progress display; a user's own choice stays.
    # Of several workers it would tell at length of an operation that another one's end aborts.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if "TF_CONFIG" in os.environ else "2")
    quiet_import.install()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except ToolError as error:
        _print_error(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; keep Python from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "tensorflow":
            return _report_missing_tensorflow()
        return _report_fault(error)
    except Exception as error:
        return _report_fault(error)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as end:  # after --help or --version
        return int(end.code or 0)
    with local_paths(options) as options:
        return int(options.run(options))


def _report_missing_tensorflow() -> int:
    from vggrepro.environment import missing_tensorflow_error

    error = missing_tensorflow_error()
    _print_error(f"error: {error}")
    return error.exit_code


def _report_fault(error: Exception) -> int:
    """One line for the user, the traceback in a file; exit code 1."""
    trace = traceback.format_exc()
    with tempfile.NamedTemporaryFile(
        "w", prefix="vggrepro-fault-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"command: {' '.join(sys.argv)}\n\n{trace}")
    if os.environ.get("VGGREPRO_TRACEBACK") == "1":
        print(trace, file=sys.stderr)
    summary = " ".join(f"{type(error).__name__}: {error}".split())
    _print_error(
        f"internal fault: {summary[:300]} (traceback saved in {file.name}; "
        "set VGGREPRO_TRACEBACK=1 to show)"
    )
    return 1


def _print_error(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(
        " ".join(text.split()), style="red", markup=False, highlight=False, soft_wrap=True
    )
