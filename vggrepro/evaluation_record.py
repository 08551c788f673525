"""What is kept of an evaluation: the figures, and all that decides what they may stand beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.durable_files import write_json
from diagnostics.errors import InputError

if TYPE_CHECKING:
    from vggrepro.evaluated_net import EvaluatedNet
    from vggrepro.example_index import ExampleIndex

PROTOCOLS = ("center", "dense", "multicrop", "both")
SCHEMA = 1
DIRECTORY = "evaluations"  # of the (first) run


def make_record(
    protocol: str,
    scales: Sequence[Sequence[int]],
    nets: Sequence[EvaluatedNet],
    index: ExampleIndex,
    found: dict[str, Any],
) -> dict[str, Any]:
    """The JSON object of `vggrepro evaluate`.

    `scales` is empty where each net has its own; they are with the nets then too.
    """
    shared = list(scales[0]) if len({tuple(sides) for sides in scales}) == 1 else []
    described = [
        {**net.description, "scales": list(sides)} for net, sides in zip(nets, scales, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "protocol": protocol,
        "scales": shared,
        **found,
        "split": index.split,
        "classes": len(index.class_names),
        "data_fingerprint": index.fingerprint,
        "nets": described,
    }


def save_record(record: dict[str, Any], run_dir: Path) -> Path:
    """Writes it into the run, replacing an older one of the same question; returns the file."""
    sides = "-".join(map(str, record["scales"])) or "own-scales"
    name = f"{record['protocol']}-{sides}"
    if record["pool_rounding"] == "up":
        name += "-pools-up"
    if record["split"] != "val":
        name += f"-{record['split']}"
    if len(record["nets"]) > 1:
        hashes = " ".join(net["weights_sha256"] for net in record["nets"])
        name += f"-fusion-{hashlib.sha256(hashes.encode()).hexdigest()[:8]}"
    file = run_dir / DIRECTORY / f"{name}.json"
    write_json(file, record)
    return file


def read_records(place: Path) -> list[dict[str, Any]]:
    """The evaluations of a run directory, or the one of a file of `evaluate --json`.

    Raises:
      InputError: it cannot be read, or is no evaluation.
    """
    files = sorted((place / DIRECTORY).glob("*.json")) if place.is_dir() else [place]
    return [_read(file) for file in files]


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_bytes())
        known = record["schema"] == SCHEMA and record["nets"] and record["top1_error"] is not None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no evaluation", "Give what `evaluate` wrote") from error
    if not known:
        raise InputError(f"{file} has another schema than {SCHEMA}", "Evaluate again")
    return record
