"""How well a number of images fixes an error."""

from __future__ import annotations

import math

_Z95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def wilson(error: float, images: int) -> tuple[float, float]:
    """The 95 % score interval (Wilson 1927) of an error.

    It counts only the chance of having drawn these images, not that of training again.

    Args:
      error: percent.
      images: how many it was counted on, at least 1.

    Returns:
      Ends in percent, within [0, 100].
    """
    share, squared = error / 100.0, _Z95**2 / images
    centre = (share + squared / 2) / (1 + squared)
    half = _Z95 * math.sqrt(share * (1 - share) / images + squared / (4 * images)) / (1 + squared)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
