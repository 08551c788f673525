"""Which line of the user's code is running, read from Python's stack.

Frames of TensorFlow, Keras, numpy, the standard library and this package are
not the user's. The eager tape runs gradient functions from C++, so a backward
op has no line of its own: its frame of `_gradient_function` holds the tensors
of the forward op that it differentiates, and the line is that op's.
"""

from __future__ import annotations

import functools
import linecache
import os
import sysconfig
from types import FrameType
from typing import Any, NamedTuple

from diagnostics import guard

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_STANDARD = tuple(
    os.path.abspath(sysconfig.get_paths()[key]) + os.sep for key in ("stdlib", "platstdlib")
)
_SITE = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_TENSORFLOW = tuple(f"{os.sep}{name}{os.sep}" for name in ("tensorflow", "tensorflow_core"))
_LIBRARIES = tuple(
    f"{os.sep}{name}{os.sep}" for name in ("keras", "tf_keras", "numpy", "ml_dtypes")
)
_GRADIENT_FUNCTIONS = ("_gradient_function", "actual_grad_fn")


class SourceLine(NamedTuple):
    """A place in a Python file."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        """'file.py:123 in function: code'; the file without its directories."""
        code = linecache.getline(self.file, self.line).strip()
        place = f"{os.path.basename(self.file)}:{self.line} in {self.function}"
        return f"{place}: {code}" if code else place


class StackView(NamedTuple):
    """What the stack of one op shows.

    Attributes:
      line: the innermost line of the user's code; for a backward op only a line
        inside the gradient function itself.
      gradient: the tape's frame variables if this op is part of a gradient.
      bookkeeping: the guard's own reading of a tensor, not part of the step.
    """

    line: SourceLine | None
    gradient: dict[str, Any] | None
    bookkeeping: bool


def view_stack(frame: FrameType | None, outermost: FrameType | None) -> StackView:
    """Walks outwards from `frame` up to and including `outermost`."""
    line, bookkeeping, outside_tensorflow = None, False, False
    while frame is not None:
        owner = _owner(frame.f_code.co_filename)
        if owner == "tensorflow":
            if _runs_gradient(frame):
                return StackView(line, frame.f_locals, bookkeeping)
        elif not outside_tensorflow:
            outside_tensorflow = True
            bookkeeping = frame.f_code.co_filename == guard.__file__
        if owner == "user" and line is None:
            code = frame.f_code
            line = SourceLine(code.co_filename, frame.f_lineno, code.co_name)
        if frame is outermost:
            break
        frame = frame.f_back
    return StackView(line, None, bookkeeping)


def _runs_gradient(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name in _GRADIENT_FUNCTIONS or code.co_filename.endswith("imperative_grad.py")


@functools.lru_cache(maxsize=4096)
def _owner(filename: str) -> str:
    """'tensorflow', 'library', or 'user' where it is neither."""
    if filename.startswith(("<frozen", "<string", "<__array")):
        return "library"
    if filename.startswith(_PACKAGE):
        return "library"
    site = next((place for place in _SITE if place in filename), None)
    if site is None:
        return "library" if filename.startswith(_STANDARD) else "user"
    inside = os.sep + filename.rpartition(site)[2]
    if inside.startswith(_TENSORFLOW):
        return "tensorflow"
    return "library" if inside.startswith(_LIBRARIES) else "user"
