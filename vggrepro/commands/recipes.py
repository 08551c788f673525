"""`vggrepro recipes`: the named configurations, and what each would do."""

from __future__ import annotations

import argparse
from typing import Any

from diagnostics.durable_files import json_text
from vggrepro.recipes import RECIPES, Recipe, recipe

_YOURS = ("data", "init_from")  # no field of a recipe: the command above names them
_HEAD = ("recipe", "images", "FLOP", "hours", "at TFLOP/s")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "recipes",
        help="list the named configurations, or show one",
        description="Lists the named configurations, or shows one: command, cost, "
        "expected result, and each field with its origin.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show in full")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the list, or one recipe."""
    if options.json:
        entries = RECIPES.values() if options.name is None else [recipe(options.name)]
        print(json_text({"recipes": [_values(entry) for entry in entries]}, indent=2))
    elif options.name is None:
        print("\n".join(_list()))
    else:
        print("\n".join(_description(recipe(options.name))))
    return 0


def _values(entry: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON values."""
    return {
        "name": entry.name,
        "purpose": entry.purpose,
        "command": entry.command,
        "images": entry.images,
        "flop": entry.flop,
        "hours": entry.hours,
        "flop_per_second": entry.rate,
        "expected": entry.expected,
        "source": entry.source or None,
        "config": entry.config().to_dict(),
    }


def _list() -> list[str]:
    """A line of cost and two of words for each recipe."""
    width = max(map(len, RECIPES))
    lines = [f"{_HEAD[0]:<{width}}" + "".join(f"{word:>14}" for word in _HEAD[1:])]
    for entry in RECIPES.values():
        hours = f"{entry.hours:,.0f}" if entry.hours >= 10 else f"{entry.hours:.2f}"
        cells = (f"{entry.images:,}", f"{entry.flop:.1e}", hours, f"{entry.rate / 1e12:g}")
        lines.append(f"{entry.name:<{width}}" + "".join(f"{cell:>14}" for cell in cells))
        lines.append(f"  {entry.purpose}")
        lines.append(f"  expected: {entry.expected}")
    return lines


def _description(entry: Recipe) -> list[str]:
    config = entry.config()
    origins = config.origins()
    return [
        f"{entry.name}: {entry.purpose}",
        f"  command   {entry.command}",
        f"  cost      {entry.cost}",
        f"  expected  {entry.expected}",
        "",
        *(
            f"  {name:<18}{value!s:<16}{origins[name]}"
            for name, value in config.to_dict().items()
            if name not in _YOURS
        ),
    ]
