"""A model of another process, made again from its serialised configuration."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from diagnostics.errors import InputError

# As Keras words it: "Could not locate class 'Scale'", "Unknown loss function: 'focal'".
_MISSING = re.compile(r"(?:class|function|object|Unknown [\w ]+):? '([\w.>]+)'")


def rebuild_model(config: dict[str, Any], imports: Sequence[str]) -> Any:
    """The compiled model of a run's config.json; nothing of it is executed but the user's classes.

    Args:
      imports: modules with the custom classes and functions.

    Raises:
      InputError: the model could not be serialised, or a custom object is missing;
        the message names it.
    """
    objects = _custom_objects(imports)
    serialised = config.get("model")
    if serialised is None:
        raise InputError(
            f"the model of this run cannot be made again: {config.get('model_problem', '')}",
            "Give its class a get_config method, or call guard.diagnose() in the process "
            "that trained",
        )
    serialised = {key: value for key, value in serialised.items() if key != "compile_config"}
    with keras.saving.custom_object_scope(objects):
        model = _made(lambda: keras.saving.deserialize_keras_object(serialised), "model", config)
        compile_config = config.get("compile")
        if compile_config is None:
            raise InputError("the optimizer or the loss of this run could not be serialised")
        _made(lambda: model.compile_from_config(compile_config), "loss or optimizer", config)
    if model.optimizer is None:
        raise InputError(
            "the loss or optimizer of this run cannot be made again",
            f"Name the module that defines it with --import ({_own(config)})",
        )
    model.jit_compile = config["jit_compile"]
    model.run_eagerly = config["run_eagerly"]
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return model


def float32_twin(model: Any) -> Any:
    """The live model made again with every layer in float32, compiled alike.

    Raises:
      InputError: the model cannot be made from its configuration.
    """
    own = {type(layer) for layer in model._flatten_layers(include_self=True, recursive=True)}
    own.add(type(model.optimizer))
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # of layers that a custom layer makes
    try:
        with keras.saving.custom_object_scope({kind.__name__: kind for kind in own}):
            serialised = json.dumps(model.get_config())
            for name in ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16"):
                serialised = serialised.replace(f'"{name}"', '"float32"')
            twin = type(model).from_config(json.loads(serialised))
            optimizer = keras.optimizers.serialize(model.optimizer)
            twin.compile(
                keras.optimizers.deserialize(optimizer),
                loss=model.loss,
                jit_compile=bool(model.jit_compile),
                run_eagerly=bool(model.run_eagerly),
            )
        twin.optimizer.build(twin.trainable_variables)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"the model cannot be made again in float32: {reason}") from error
    finally:
        keras.config.set_dtype_policy(policy)
    return twin


def _custom_objects(imports: Sequence[str]) -> dict[str, Any]:
    """Classes and functions of the named modules, by name and by 'module>name'."""
    found: dict[str, Any] = {}
    here = str(Path.cwd())
    if imports and here not in sys.path:
        sys.path.insert(0, here)
    for name in imports:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"cannot import '{name}': {error}", "Run from its directory, or set PYTHONPATH"
            ) from error
        for key, value in vars(module).items():
            if inspect.isclass(value) or inspect.isfunction(value):
                found[key] = value
    return found


def _made(make: Any, what: str, config: dict[str, Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        text = str(error)
        match = re.search(
            r"(?:class|function|locate|loss function|Unknown \w+):? '([\w.>]+)'", text
        )
        missing = f"'{match.group(1)}'" if match else text.strip().split("\n")[0]
        raise InputError(
            f"the {what} of this run needs the custom object {missing}",
            f"Name the module that defines it with --import; the run used {_own(config)}",
        ) from error


def _own(config: dict[str, Any]) -> str:
    return ", ".join(config.get("own_code", [])) or "no code of its own"
