"""Command-line options made from the fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Collection
from typing import Any

from diagnostics.errors import InputError
from vggrepro.config import (
    ARCHITECTURES,
    DECODERS,
    MOMENTUM_FORMS,
    PRECISIONS,
    RESIZE_KERNELS,
    STRATEGIES,
    TrainConfig,
)

# The help's sections: each begins at the field that names it.
SECTIONS = {
    "arch": "the net",
    "data": "data and preprocessing",
    "batch_size": "optimisation",
    "eval_every": "the run",
}
CHOICES = {
    "arch": ARCHITECTURES,
    "resize": RESIZE_KERNELS,
    "decode": DECODERS,
    "momentum_form": MOMENTUM_FORMS,
    "precision": PRECISIONS,
    "strategy": STRATEGIES,
}
METAVARS = {"init": "INIT", "init_from": "PATH", "data": "PATH", "order": "ORDER"}
PAPER_SCALE_RATIO = 256 / 224  # the paper's smaller S over its crop


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds one option per field, and `--scale` for scale_min and scale_max.

    An option that is not given leaves no attribute, so that a recipe or a
    resumed run can supply the value.
    """
    group = parser.add_argument_group()
    for field in dataclasses.fields(TrainConfig):
        if field.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[field.name])
        if field.name == "scale_min":
            _add_scale_option(group)
        elif field.name != "scale_max":
            _add_field_option(group, field)


def given_values(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line sets, by name."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    values = {name: value for name, value in vars(options).items() if name in names}
    if "scale" in options:
        values["scale_min"], values["scale_max"] = options.scale
    elif "image_size" in values:
        values["scale_min"] = values["scale_max"] = _default_scale(values["image_size"])
    return values


def option_name(field_name: str) -> str:
    """The option that sets a field: 'warmup_steps' -> '--warmup-steps'."""
    if field_name in ("scale_min", "scale_max"):
        return "--scale"
    return "--" + field_name.replace("_", "-")


def command_line(config: TrainConfig, said: Collection[str] = ()) -> str:
    """The `vggrepro train` command that gives this configuration, defaults left out.

    Args:
      said: fields that are given all the same.
    """
    words = ["vggrepro", "train"]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if field.name == "scale_max" or field.name == "classes":
            continue  # --scale sets both ends; the number of classes is the data's
        if field.name == "scale_min":
            if {value, config.scale_max} != {_default_scale(config.image_size)}:
                words += ["--scale", f"{value}:{config.scale_max}"]
        elif value != field.default or field.name in said:
            option = option_name(field.name)
            if isinstance(value, bool):
                words.append(option if value else option.replace("--", "--no-", 1))
            else:
                words += [option, str(value)]  # str keeps every digit
    return shlex.join(words)


def _default_scale(image_size: int) -> int:
    """S where --scale is not given, pixels."""
    return round(image_size * PAPER_SCALE_RATIO)


def _add_scale_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scale",
        type=_scale,
        metavar="MIN[:MAX]",
        default=argparse.SUPPRESS,
        help="shorter side S of the rescaled image, pixels; drawn per image from a range. "
        "Default: --image-size times 256/224 [paper: 256, 384, 256:512]",
    )


def _add_field_option(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    kind = type(field.default)
    reading: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    if kind is not bool:
        choices = CHOICES.get(field.name)
        named = METAVARS.get(field.name, kind.__name__.upper())
        metavar = "{" + ",".join(choices) + "}" if choices else named
        reading = {"type": kind, "metavar": metavar}
    group.add_argument(
        option_name(field.name),
        dest=field.name,
        default=argparse.SUPPRESS,
        help=_help_text(field).replace("%", "%%"),
        **reading,
    )


def _help_text(field: dataclasses.Field) -> str:
    meta = field.metadata
    unit = f", {meta['unit']}" if meta["unit"] else ""
    source = meta["silent"]
    if not source and meta["paper"]:
        source = "paper: " + ", ".join(_plain(value) for value in meta["paper"])
    note = f" [{source}]" if source else ""
    return f"{meta['help']}{unit}. Default: {_plain(field.default)}{note}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def _scale(text: str) -> tuple[int, int]:
    smallest, _, largest = text.partition(":")
    try:
        return int(smallest), int(largest or smallest)
    except ValueError:
        raise InputError(f"--scale '{text}' is not MIN or MIN:MAX", "As 256 or 256:512") from None
