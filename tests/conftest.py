"""Hypothesis profiles (`HYPOTHESIS_PROFILE` or `--hypothesis-profile`) and quiet logs."""

import gc
import os

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


def pytest_collection_finish(session):
    """What the imports left is not searched for garbage at each of Keras's many collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def shared_training():
    """The module's runs of one kind share a compiled step; test_kill_resume.py's never do."""
    from fault_sharing import shared_training as sharing

    with sharing():
        yield
