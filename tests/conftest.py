"""Hypothesis profiles (`HYPOTHESIS_PROFILE` or `--hypothesis-profile`) and quiet logs."""

import gc
import os
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

# Before any test imports TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# No deadline: the first call of a test may compile a graph.
settings.register_profile(
    "quick", max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("quick"), max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Files of most seconds first, so that two processes end at about the same time.
HEAVY = """
    distributed keras_guard_breadth kill_resume pjrt fault_campaign keras_guard trainer loss_scale
    diagnose_command shards trace emulation keras_domains train_step diagnose
""".split()


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(HEAVY)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish(session):
    """What the imports left is not searched for garbage at each of Keras's many collections."""
    search_once()


@pytest.fixture(scope="module", autouse=True)
def survivors_are_searched_once():
    """What a module leaves alive is not searched for garbage again by those after it.

    Else each of Keras's collections takes longer, at the end of a process ten times as long.
    """
    yield
    search_once()


def search_once():
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def budgets_are_of_cpu_time(monkeypatch):
    """So that a busy machine tries the same fixes as an idle one."""
    idle = SimpleNamespace(monotonic=time.process_time)
    monkeypatch.setattr("diagnostics.counterfactual.time", idle)


@pytest.fixture
def without_op_determinism():
    """Which other tests of the process may have turned on: Keras uses no XLA under it."""
    import tensorflow as tf
    from tensorflow.python.framework import config

    on = config.is_op_determinism_enabled()
    config.disable_op_determinism()
    yield
    if on:
        tf.config.experimental.enable_op_determinism()


@pytest.fixture(scope="module")
def shared_training():
    """The module's runs of one kind share a compiled step; test_kill_resume.py's never do."""
    from fault_sharing import shared_training as sharing

    with sharing():
        yield
