"""A compiler's message as one line: memory, or the op and the source line that made it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_MEMORY = re.compile(
    r"Used (?P<needs>[\d.]+\w) of (?P<has>[\d.]+\w) hbm"  # libtpu 0.0.24
    r"|temporaries \((?P<temporaries>[\d.]+\w)\) exceeds available HBM \((?P<room>[\d.]+\w)\)"
)
_KERNEL = re.compile(r"No registered '(\w+)' OpKernel")


def explained(message: str, operations: Callable[[], Iterable[Any]]) -> str:
    """One line of what a compiler says.

    Args:
      message: TensorFlow's, with the stack of the op, or the TPU compiler's, which names
        only the kind of op.
      operations: the step's tf.Operations; called only for the second.
    """
    memory = _MEMORY.search(message)
    if memory:
        needs = memory["needs"] or f"{memory['temporaries']} of temporaries"
        return f"out of memory: needs {needs}, a device offers {memory['has'] or memory['room']}"
    kernel = _KERNEL.search(message)
    if kernel:
        frames = ((file, int(line), where) for file, line, where in _FRAME.findall(message))
        return f"XLA has no kernel for op {kernel[1]}{_place(frames)}"
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    return f"{first}{_suspects(first, operations())}"


def _suspects(message: str, operations: Iterable[Any]) -> str:
    """The first op of each kind that the message names, with its place."""
    words = {word.lower() for word in re.findall(r"\w+", message)}
    found: dict[str, str] = {}
    for operation in operations:
        if operation.type.lower() in words and operation.type not in found:
            stack = operation.traceback
            place = _place((frame.filename, frame.lineno, frame.name) for frame in stack)
            found[operation.type] = f"; op {operation.type}{place}"
    return "".join(found.values())


def _place(frames: Iterable[tuple[str, int, str]]) -> str:
    """' at vggrepro/model.py:7 in forward': the innermost frame of this project."""
    ours = [(inside, line, where) for file, line, where in frames if (inside := _inside(file))]
    return " at {}:{} in {}".format(*ours[-1]) if ours else ""


def _inside(file: str) -> str | None:
    """The file within the two packages; None if it is not of them."""
    found = re.fullmatch(r"(?:.*/)?((?:vggrepro|diagnostics)/.+)", file)
    # A checkout called vggrepro may hold the virtual environment.
    return found[1] if found and "site-packages/" not in found[1] else None
