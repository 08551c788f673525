"""`vggrepro data`: makes, and looks after, image directories."""

from __future__ import annotations

import argparse

from vggrepro.commands import add_commands


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command; its subcommands are this package's modules."""
    parser = subparsers.add_parser(
        "data", help="make image directories", description="Works on image directories."
    )
    add_commands(
        parser.add_subparsers(title="commands", metavar="COMMAND", required=True),
        __name__,
        __path__,
    )
