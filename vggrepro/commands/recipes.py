"""`vggrepro recipes`: the named configurations, and what each would do."""

from __future__ import annotations

import argparse

from vggrepro.recipes import RECIPES, Recipe, recipe


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = subparsers.add_parser(
        "recipes",
        help="list the named configurations, or show one",
        description="Lists the named configurations, or shows one: command, cost, "
        "expected result, and each field with its origin.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show in full")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the list, or one recipe."""
    if options.name is None:
        width = max(map(len, RECIPES))
        for entry in RECIPES.values():
            print(f"{entry.name:<{width}}  {entry.purpose}")
    else:
        print("\n".join(_description(recipe(options.name))))
    return 0


def _description(entry: Recipe) -> list[str]:
    config = entry.config()
    origins = config.origins()
    return [
        f"{entry.name}: {entry.purpose}",
        f"  command   {entry.command}",
        f"  cost      {entry.cost}",
        f"  expected  {entry.expected}",
        "",
        *(f"  {name:<18}{value!s:<16}{origins[name]}" for name, value in config.to_dict().items()),
    ]
