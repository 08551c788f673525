"""A TensorBoard Debugger V2 dump of exactly one step.

TensorBoard shows it on its Debugger V2 page if --logdir is the dump's own
directory, not one above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from diagnostics.durable_files import new_directory


def dump_step(directory: Path, step: Callable[[], object]) -> bool:
    """Runs `step` once and records of every op's output: NaN, Inf, zeros, shape, stack.

    The step becomes one graph of its own, so that TensorBoard shows every op by its
    name and layer; inner `tf.function`s are inlined, those compiled earlier too, and
    without XLA. A step that cannot be traced (it asks a tensor for its value) runs
    op by op instead, and TensorBoard shows the ops by their stack only.

    Nothing of the recording is left in this process: a function that kept it would
    crash when called later, so none is kept.

    Args:
      directory: becomes the dump; an older one there is replaced. It holds the
        source files of the stack with their full paths, and this machine's name.
      step: may be called a second time if the first cannot be traced.

    Returns:
      Whether the dump is of a graph.

    Raises:
      InputError: the disk is full or not writable.
    """
    try:
        _record(directory, lambda: _run_as_graph(step))
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # What TensorFlow raises where code needs a value that a graph does not have yet.
        _record(directory, step)
        return False
    return True


def _run_as_graph(step: Callable[[], object]) -> None:
    def traced() -> None:
        step()

    # Recording ops are stateful, so nothing is pruned although nothing is returned.
    tf.function(traced, autograph=False).get_concrete_function()()


def _record(directory: Path, run: Callable[[], object]) -> None:
    debugging = tf.debugging.experimental
    with new_directory(directory) as temporary, _functions_inlined(), _quiet():
        debugging.enable_dump_debug_info(
            str(temporary), tensor_debug_mode="FULL_HEALTH", circular_buffer_size=-1
        )
        try:
            run()
        finally:
            debugging.disable_dump_debug_info()


@contextmanager
def _functions_inlined() -> Iterator[None]:
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TensorFlow from warning of frames without a source file, as '<frozen runpy>'."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(before)
