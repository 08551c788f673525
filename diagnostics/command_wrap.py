"""A long shell command in lines that can be copied."""

from __future__ import annotations

import re

_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*"|['"])+""")


def wrap_command(command: str, width: int) -> list[str]:
    """A shell command in lines of at most `width`, joined by backslashes where it is cut.

    Cut only between words, if possible before an option; one longer word stays whole.
    """
    if len(command) <= width:
        return [command]
    groups: list[str] = []
    for word in _WORD.findall(command):
        if groups and not word.startswith("-") and groups[-1].startswith("-"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines: list[str] = []
    for group in groups:
        if lines and len(lines[-1]) + 1 + len(group) <= width - 2:
            lines[-1] += f" {group}"
        else:
            lines.append(f"  {group}" if lines else group)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
