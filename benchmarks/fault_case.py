"""A faulty Keras program with its clean twin, in the words of ../shared/cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Built(NamedTuple):
    """What `fit` needs."""

    model: Any
    x: Any
    y: Any
    batch_size: int
    epochs: int


@dataclass(frozen=True)
class FaultCase:
    """One known fault.

    Attributes:
      source: where idea and figures come from; the code is ours.
      cause, accept_causes: of the schema of diagnosis.json; any of them is right.
      stage: where it first shows; '' where several answers are right.
      layer, op, samples: what to blame, if there is one thing to blame.
      build: (faulty, seed) -> Built; the twin carries the known fix.
    """

    id: str
    source: str
    cause: str
    stage: str
    build: Callable[..., Built]
    layer: str = ""
    op: str = ""
    samples: tuple[int, ...] = ()
    accept_causes: tuple[str, ...] = ()
    accept_culprits: tuple[str, ...] = ()
    shuffle: bool = False


def seeded(seed: int) -> np.random.Generator:
    """Fresh Keras names and seeds; a numpy generator of the same seed."""
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(4321 + seed)
    return np.random.default_rng(4321 + seed)


def blobs(draw: np.random.Generator, n: int, d: int, classes: int) -> tuple:
    """Points float32 [n, d] around one centre per class, and their classes int [n]."""
    y = draw.integers(0, classes, n)
    centres = draw.normal(size=(classes, d)) * 2
    return (centres[y] + draw.normal(size=(n, d))).astype("float32"), y


def logits_loss() -> Any:
    """Keras' cross-entropy of logits and class numbers."""
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def registering(cases: list[FaultCase]) -> Callable[..., Any]:
    """A decorator factory: `@case(id=..., ...)` over a `build` adds a case to the list."""

    def case(**known: Any) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
        def register(build: Callable[..., Built]) -> Callable[..., Built]:
            cases.append(FaultCase(build=build, **known))
            return build

        return register

    return case
