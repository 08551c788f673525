"""The C files of `compiled/` as TensorFlow ops, where there is a C compiler.

Compiled once for a source, a TensorFlow and a compiler, in a second, and kept under
$XDG_CACHE_HOME/vggrepro. Without a compiler, or with one that fails (CC=false turns it
off), TensorFlow's own ops do the same with the same bits, see `vggrepro.resampling` and
`vggrepro.example_reader`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

_SOURCES = Path(__file__).with_name("compiled")
# Contraction would fuse a product and a sum into one rounding: other bits.
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared")
_PATIENCE = 60  # seconds


class CompiledOps(NamedTuple):
    """What the library holds.

    Attributes:
      window: (box, scale, shift) of one image, as `resampling.Crop.windows`.
      crop: one crop, as `resampling.Crop.with_tensorflow`.
      new_images: (int64 [n], side=) -> a batch, float32 [n, side, side, 3], not yet written, and
        how many of its rows are, int64.
      crop_into: what `crop` takes, these two and a row (int64): writes and counts that row, and
        gives the batch, not a copy. All but the pixels may also be given for every row.
      read_record: (files, offsets, number), string [m], int64 [m] and scalar, or all scalars: of
        records of local TFRecord files the one of that number, scalar. Raises DataLossError
        where it is damaged. None: not on this processor.
      read_ahead: (files, offsets, ends, same), string and int64 [m]: has the kernel read these
        bytes of local files into its page cache, does not wait for them, and gives `same`, an
        int64 that somebody must use. None likewise.
    """

    window: Callable[..., Any]
    crop: Callable[..., tf.Tensor]
    new_images: Callable[..., Any]
    crop_into: Callable[..., tf.Tensor]
    read_record: Callable[..., tf.Tensor] | None
    read_ahead: Callable[..., tf.Tensor] | None


def load() -> CompiledOps | None:
    """The ops; None: the machine cannot compile or load them."""
    path = library()
    if path is None:
        return None
    try:
        module = tf.load_op_library(str(path))
        return CompiledOps(
            module.vggrepro_crop_window,
            module.vggrepro_resampled_crop,
            module.vggrepro_new_images,
            module.vggrepro_crop_into,
            getattr(module, "vggrepro_read_record", None),
            getattr(module, "vggrepro_read_ahead", None),
        )
    except (tf.errors.OpError, AttributeError):  # AttributeError: an op could not be registered
        return None


def library() -> Path | None:
    """The shared library with the ops, if need be made now; None: it cannot be made or kept."""
    command = _command()
    if command is None:
        return None
    try:
        return _made(command)
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home
        return None


def _command() -> list[str] | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        return None
    return [
        *(*compiler, *_FLAGS, f"-I{tf.sysconfig.get_include()}", str(_SOURCES / "library.c")),
        *(*tf.sysconfig.get_link_flags(), "-lm"),
    ]


def _made(command: list[str]) -> Path:
    """The library that the command makes."""
    sources = [file.read_text("utf-8") for file in sorted(_SOURCES.glob("*.[ch]"))]
    key = "\0".join([*command, tf.__version__, *sources])
    name = f"compiled_ops-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path = _cache() / name
    if not path.exists():
        # Compiled beside and renamed: another process may be at it as well.
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            made = Path(temporary) / name
            subprocess.run(
                [*command, "-o", str(made)], check=True, capture_output=True, timeout=_PATIENCE
            )
            made.replace(path)
    return path


def _cache() -> Path:
    """A directory of this user's own: what lies in it is loaded into the process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "vggrepro"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
