"""`vggrepro data make`: a synthetic data set of real JPEG files."""

from __future__ import annotations

import argparse

from vggrepro.remote_paths import path_or_url


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Declares the command and its options; the defaults are those of `train`'s data."""
    parser = subparsers.add_parser(
        "make",
        help="make synthetic images",
        description="Makes JPEG files of varied size in the ILSVRC layout: "
        "DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG. The same seed makes the same files.",
    )
    parser.add_argument(
        "directory", type=path_or_url, metavar="DIR", help="must not hold anything else"
    )
    for name, default, text in (
        ("seed", 0, "what the images are drawn from"),
        ("classes", 10, "number of classes"),
        ("train-per-class", 100, "training images a class"),
        ("val-per-class", 20, "validation images a class"),
    ):
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="INT",
            help=f"{text}. Default: {default}",
        )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Makes the files unless they are there already."""
    from vggrepro.synthetic import ensure_synthetic

    directory = ensure_synthetic(
        options.directory,
        seed=options.seed,
        classes=options.classes,
        train_per_class=options.train_per_class,
        val_per_class=options.val_per_class,
    )
    images = options.classes * (options.train_per_class + options.val_per_class)
    print(f"{images:,} images of {options.classes} classes in {directory}")
    return 0
