"""Options of the commands that ask about a net without training it."""

from __future__ import annotations

import argparse

from vggrepro.config import ARCHITECTURES, PRECISIONS, TrainConfig
from vggrepro.config_options import given_values
from vggrepro.recipes import recipe

PAPER_CLASSES = 1000
_PAPER_SCALE = {"width": 1.0, "image_size": 224, "scale_min": 256, "scale_max": 256}


def add_net_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Declares --recipe and the options of the net, at the paper's scale by default.

    Args:
      batch_size: the default.
    """
    parser.add_argument(
        "--recipe", metavar="NAME", help="the net and data of a recipe, instead of the paper's"
    )
    types = ", ".join(PRECISIONS)
    for name, kind, value, what in (
        ("--arch", str, "NET", "the net: " + ", ".join(ARCHITECTURES) + ". Default: A"),
        ("--width", float, "FLOAT", "multiplier of every layer's width. Default: 1"),
        ("--image-size", int, "INT", "side of the input in pixels. Default: 224"),
        ("--classes", int, "INT", "number of classes. Default: 1000, or those of the data"),
        ("--batch-size", int, "INT", f"examples of the batch. Default: {batch_size}"),
        ("--precision", str, "TYPE", f"compute type: {types}. Default: float32"),
    ):
        parser.add_argument(name, type=kind, metavar=value, default=argparse.SUPPRESS, help=what)


def net_config(options: argparse.Namespace, batch_size: int) -> TrainConfig:
    """The configuration that the options describe; `classes` may be 0."""
    base = {**_PAPER_SCALE, "batch_size": batch_size}
    if options.recipe:
        base = dict(recipe(options.recipe).values)
    return TrainConfig(**{**base, **given_values(options)})
