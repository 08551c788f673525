"""`vggrepro data`: makes images and shards, and looks after them."""

from __future__ import annotations

import argparse

from vggrepro.commands import add_commands


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command; its subcommands are this package's modules."""
    parser = subparsers.add_parser(
        "data",
        help="make images; build, check and measure shards",
        description="Works on directories of images and of shards.",
    )
    add_commands(
        parser.add_subparsers(title="commands", metavar="COMMAND", required=True),
        __name__,
        __path__,
    )
