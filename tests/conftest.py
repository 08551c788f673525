"""Hypothesis profiles (`HYPOTHESIS_PROFILE` or `--hypothesis-profile`) and quiet logs."""

import os

from hypothesis import HealthCheck, settings

# Before any test imports TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# No deadline: the first call of a test may compile a graph.
settings.register_profile(
    "quick", max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("quick"), max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
