"""From a name scope to the layer it belongs to."""

from __future__ import annotations

from collections.abc import Sequence

_TAPE = "gradient_tape"


class LayerScopes:
    """Finds layer names among the components of a name scope.

    Args:
      layers: names to look for; 'encoder/dense' stands for nested scopes. With
        none, the outermost scope is the layer.
    """

    def __init__(self, layers: Sequence[str] = ()) -> None:
        self._layers = [(name, tuple(name.split("/"))) for name in layers]
        self._found: dict[str, str | None] = {}

    def layer(self, scope: str | None) -> str | None:
        """The innermost layer named in the scope, the longer name of two that end alike."""
        if not scope:
            return None
        if scope not in self._found:
            parts = tuple(part for part in scope.split("/") if part and part != _TAPE)
            self._found[scope] = self._match(parts)
        return self._found[scope]

    def _match(self, parts: tuple[str, ...]) -> str | None:
        if not self._layers:
            return parts[0] if parts else None
        best: tuple[int, int] = (0, 0)
        found = None
        for name, wanted in self._layers:
            for start in range(len(parts) - len(wanted) + 1):
                end = start + len(wanted)
                if parts[start:end] == wanted and (end, len(wanted)) > best:
                    best, found = (end, len(wanted)), name
        return found
