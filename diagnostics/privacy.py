"""Takes private paths and user names out of JSON values that leave the machine."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

PATH_PLACEHOLDER = "<path>"
USER_PLACEHOLDER = "<user>"

# An absolute path, a home directory or a URL; not the '/' inside a relative path.
_START = r"(?:[A-Za-z][A-Za-z0-9+]*:[\\/]|~|/|\\\\)"
_WHOLE_PATH = re.compile(rf"{_START}\S")
_NOT_WITHIN = r"(?<![\w.~/\\-])"
_PATH_IN_TEXT = re.compile(rf"{_NOT_WITHIN}{_START}[^\s:;,\"'<>|()]+")
_REST_OF_PATH = r"[^\n:;,\"'<>|]*"
# Names of accounts that many people share say nothing of anyone.
_SHARED_ACCOUNTS = frozenset(["root", "user", "admin", "ubuntu", "jupyter", "jovyan", "kaggle"])


class Scrubber:
    """Removes absolute paths, given private ones, the home directory and the user's name.

    Args:
      private: further paths to take out, as the data directory; may be relative.
    """

    def __init__(self, private: Sequence[str] = ()) -> None:
        given = {path.rstrip("/\\") for path in (*private, _home()) if path.strip("/\\.")}
        self._roots = sorted(given, key=len, reverse=True)
        absolute = [root for root in self._roots if _WHOLE_PATH.match(root)]
        pattern = "|".join(map(re.escape, absolute))
        self._known = (
            re.compile(rf"{_NOT_WITHIN}(?:{pattern}){_REST_OF_PATH}") if absolute else None
        )
        self._user = _user_pattern()

    def value(self, value: Any) -> Any:
        """A JSON value with every string in it cleaned, keys too."""
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def text(self, text: str) -> str:
        """A string: a path becomes '<path>', in a sentence only the path does."""
        if _WHOLE_PATH.match(text) or self._below_root(text) is not None:
            return PATH_PLACEHOLDER
        if self._known is not None:
            text = self._known.sub(PATH_PLACEHOLDER, text)
        return self._without_user(_PATH_IN_TEXT.sub(PATH_PLACEHOLDER, text))

    def example_name(self, name: str) -> str:
        """A relative file name stays; of any other only what is below a private path, or
        the last part."""
        below = self._below_root(name)
        if below is None:
            parts = PurePosixPath(name.replace("\\", "/")).parts
            relative = not _WHOLE_PATH.match(name) and ".." not in parts
            below = name if relative else parts[-1]
        return self._without_user(below)

    def _below_root(self, text: str) -> str | None:
        for root in self._roots:
            if text == root:
                return ""
            if text.startswith((f"{root}/", f"{root}\\")):
                return text[len(root) + 1 :]
        return None

    def _without_user(self, text: str) -> str:
        # A word on its own is a setting, whoever bears its name.
        if self._user is None or not re.search(r"[\s/\\@]", text):
            return text
        return self._user.sub(USER_PLACEHOLDER, text)


def _home() -> str:
    """The home directory; '' if the account has none."""
    try:
        return str(Path.home())
    except RuntimeError:
        return ""


def _user_pattern() -> re.Pattern[str] | None:
    """The user's names as whole words; None if they tell nothing."""
    names = {Path(_home()).name}
    try:
        names.add(getpass.getuser())
    except (KeyError, OSError):
        # A container's user id may have no name at all.
        names.add("")
    telling = [name for name in names if len(name) > 2 and name.lower() not in _SHARED_ACCOUNTS]
    if not telling:
        return None
    alternatives = "|".join(map(re.escape, telling))
    return re.compile(rf"(?<![^\W_])(?:{alternatives})(?![^\W_])", re.IGNORECASE)
