"""Named configurations: the demo and the paper's runs at S=256.

A recipe is a set of overrides of `TrainConfig`'s defaults. `vggrepro recipes`
lists them; `vggrepro recipes NAME` prints command, cost, expected result and
every field with its origin; `vggrepro train --recipe NAME` runs one, and any
option beside it overrides a field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import InputError
from vggrepro import paper
from vggrepro.config import TrainConfig

# Forward, gradient by activations and gradient by weights: three passes, each of
# one multiplication and one addition per multiply-add.
FLOP_PER_MULTIPLY_ADD = 6


@dataclass(frozen=True)
class Recipe:
    """A run that has a name: what to type, what it costs, what should come out."""

    name: str
    purpose: str
    command: str
    cost: str
    expected: str
    values: Mapping[str, Any]

    def config(self) -> TrainConfig:
        """The recipe's configuration."""
        return TrainConfig(**self.values)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      InputError: there is none.
    """
    if name not in RECIPES:
        raise InputError(f"recipe '{name}' does not exist", "Known: " + ", ".join(RECIPES))
    return RECIPES[name]


def _demo() -> Recipe:
    """A narrow VGG-A on synthetic JPEG files: the whole pipeline in a minute or two."""
    config = TrainConfig()
    return Recipe(
        name="demo",
        purpose="net A at a quarter of its width on synthetic images: the whole pipeline, quickly",
        command="vggrepro train",
        cost=f"{config.steps * config.batch_size:,} images of {config.image_size} pixels",
        expected="a falling loss; the figures have no cell in the paper to stand beside",
        values={},
    )


def _paper_256(arch: str) -> Recipe:
    """One net of the paper, trained at the fixed scale S=256 (section 3.1).

    The initialiser is the sigma=0.01 of the authors' later code (see
    `vggrepro train --help`, `--init`). The paper starts B to E from a trained A;
    from random weights of this size it found that deeper nets stall.
    """
    values: dict[str, Any] = {
        "arch": arch,
        "width": 1.0,
        "image_size": 224,
        "classes": paper.CLASSES,
        "init": "normal:0.01",
        "scale_min": 256,
        "scale_max": 256,
        "batch_size": 256,
        "steps": 370_000,
        "eval_every": 5_000,  # about an epoch of 5,004.6 steps
        "checkpoint_every": 1_000,
    }
    images = values["steps"] * values["batch_size"]
    flop = images * paper.NETS[arch].multiply_adds * FLOP_PER_MULTIPLY_ADD
    result = paper.single_scale_result(paper.Trained(arch, 256, 256))
    start = "" if arch in ("A", "A-LRN") else "; the paper starts this net from a trained A"
    name = f"paper-{arch}-256"
    return Recipe(
        name=name,
        purpose=f"the paper's net {arch}, S=256, from random weights{start}",
        command=f"vggrepro train --recipe {name} --data IMAGENET_DIR",
        cost=f"{images:,} images ({images / paper.TRAINING_IMAGES:.0f} epochs of ImageNet), "
        f"{flop:.1e} floating-point operations",
        expected=f"the paper's Table 3, dense evaluation at Q=256: top-1 error "
        f"{result.top1_error} %, top-5 error {result.top5_error} %; never run here",
        values=values,
    )


RECIPES = {r.name: r for r in (_demo(), *(_paper_256(arch) for arch in paper.NETS))}
