"""Diagnosis of training runs that go NaN, run away or never learn.

`NumericGuard` is made on first use: importing this package imports no TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnostics.keras_guard import NumericGuard

__all__ = ["NumericGuard"]


def __getattr__(name: str) -> Any:
    if name == "NumericGuard":
        from diagnostics.keras_guard import NumericGuard

        return NumericGuard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
