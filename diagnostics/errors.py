"""The exception tree: each error carries its exit code and a remedy.

The command line turns any `ToolError` into one line on standard error; a
traceback shown to a user is a defect. Exit codes: 1 fault of ours, 2 bad usage,
configuration or data, 3 stopped by the guard, 4 nothing to diagnose, 5 the
failure did not recur.
"""


class ToolError(Exception):
    """Base of every error that a user may see as one line.

    Args:
      message: names the thing that is wrong (file, array, option, step).
      remedy: what the user can do about it; one sentence, may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}" if self.remedy else self.message


class InputError(ToolError):
    """Bad usage, configuration or data."""

    exit_code = 2


class SnapshotDamaged(InputError):
    """A snapshot is missing a file, or its bytes do not match its hashes."""


class RunLocked(InputError):
    """Another process is writing the run directory."""


class GuardFailure(ToolError):
    """The guard's self-test did not fire: the tripwire cannot be trusted here."""


class WorkerLost(ToolError):
    """Another process of the same run failed or cannot be reached; resuming goes on."""


class StoppedByGuard(ToolError):
    """A step held a non-finite value; the update was refused, an incident saved."""

    exit_code = 3


class NothingToDiagnose(ToolError):
    """The run is healthy and finished, or left no incident."""

    exit_code = 4


class NotReproduced(ToolError):
    """The recorded failure did not recur on replay."""

    exit_code = 5
