"""What a guarded Keras fit leaves in its run directory, and how it is read back.

config.json      kind "keras", the model's serialised configuration, how it was
                 compiled, the facts, what of it is the user's own code
manifest.json    status, steps, environment
telemetry/  incidents/step-00000001/
start/           snapshot of the state before step 0, if it is small enough
batches/step-…   the first batches and those before the incident, bounded
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
import platform
import re
from pathlib import Path
from typing import Any

import keras

from diagnostics.durable_files import remove_directory, write_json
from diagnostics.errors import InputError
from diagnostics.protocol import RunFacts

KIND = "keras"
_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy")


def claim(directory: Path) -> None:
    """Makes room for a new run: one that left an incident is moved aside, not lost.

    Raises:
      InputError: the directory holds something that no guard wrote.
    """
    if not directory.exists() or not any(directory.iterdir()):
        directory.mkdir(parents=True, exist_ok=True)
        return
    if read_json(directory / "config.json").get("kind") != KIND:
        raise InputError(
            f"{directory} is not empty, and no NumericGuard wrote it",
            "Give NumericGuard another directory",
        )
    if any((directory / "incidents").glob("step-*")):
        number = 1
        while (moved := directory.with_name(f"{directory.name}.{number}")).exists():
            number += 1
        directory.rename(moved)
    else:
        remove_directory(directory)
    directory.mkdir(parents=True)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is not there or holds something else."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_config(directory: Path, model: Any, batch_structure: Any, facts: RunFacts) -> None:
    """Writes config.json: what another process needs to make the model again."""
    serialised, problem = _serialised(model)
    write_json(
        directory / "config.json",
        {
            "kind": KIND,
            "model": serialised,
            "model_problem": problem,
            "compile": _compile_config(model),
            "jit_compile": bool(model.jit_compile),
            "run_eagerly": bool(model.run_eagerly),
            "own_code": own_code(model),
            "batch_structure": batch_structure,
            "dtype_policy": keras.dtype_policies.serialize(keras.dtype_policies.get(None)),
            "facts": dataclasses.asdict(facts),
        },
    )


def _serialised(model: Any) -> tuple[dict[str, Any] | None, str]:
    """The model's configuration, or why there is none."""
    try:
        return keras.saving.serialize_keras_object(model), ""
    except (NotImplementedError, TypeError, ValueError) as error:
        return None, str(error).strip().split("\n")[0]


def _compile_config(model: Any) -> dict[str, Any] | None:
    """Optimizer, loss and metrics as Keras serialises them; None if it cannot."""
    try:
        return model.get_compile_config()
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return None


def own_code(model: Any) -> list[str]:
    """'module.Name' of classes and functions that are not Keras' own."""
    found: list[Any] = [
        type(layer) for layer in model._flatten_layers(include_self=True, recursive=True)
    ]
    found += [type(model.optimizer)] if model.optimizer is not None else []
    loss = getattr(model, "loss", None)
    flat = keras.tree.flatten(loss) if not callable(loss) else [loss]
    found += [item if inspect.isroutine(item) else type(item) for item in flat if callable(item)]
    names = (f"{item.__module__}.{item.__qualname__}" for item in found)
    return sorted({name for name in names if not name.startswith(("keras.", "builtins."))})


def describe_packages() -> dict[str, Any]:
    """Versions and machine, for the manifest; nothing private."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "packages": packages,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def numbered(directory: Path) -> dict[int, Path]:
    """'step-00000001' directories by step, ascending."""
    found = {}
    for path in sorted(directory.glob("step-*")):
        match = re.fullmatch(r"step-(\d{8,})", path.name)
        if match:
            found[int(match.group(1))] = path
    return found


def step_directory(directory: Path, step: int) -> Path:
    """`directory`/step-00000012."""
    return directory / f"step-{step:08d}"
