"""Named configurations: the demo, the paper's runs, their small twins, the first users' run.

A recipe is a set of overrides of `TrainConfig`'s defaults. `vggrepro recipes`
lists them; `vggrepro recipes NAME` prints command, cost, expected result and
every field with its origin; `vggrepro train --recipe NAME` runs one, and any
option beside it overrides a field, which the manifest then tags as a deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostics.errors import InputError
from vggrepro import paper
from vggrepro.config import TrainConfig

# Forward, gradient by activations and gradient by weights: three passes, each of
# one multiplication and one addition per multiply-add.
FLOP_PER_MULTIPLY_ADD = 6
# What the hours below are reckoned with, floating-point operations a second.
ACCELERATOR_RATE = 1e13  # one accelerator, sustained
TWO_CORES_RATE = 2e10  # measured on narrow nets of 32 pixels, two AVX2 cores

# The paper's stages by name: S, first learning rate, the stage whose weights it takes.
_STAGES = {
    "256": (paper.FIXED_256, 0.01, ""),
    "384": (paper.FIXED_384, 0.001, "256"),
    "jitter": (paper.JITTERED, 0.001, "384"),
}
_SHALLOW = ("A", "A-LRN")
_FINE_TUNED = ("C", "D", "E")
_SMALL_SIDE = 32 / 224  # of the twins' images to the paper's
_SYNTHETIC_CLASSES = 10
_SMALL_STEPS = {"256": 4000, "384": 500, "jitter": 500}


@dataclass(frozen=True)
class Recipe:
    """A run that has a name: what to type, what it costs, what should come out.

    Attributes:
      flop: floating-point operations of all training steps.
      rate: floating-point operations a second that `hours` is reckoned with.
      source: the recipe whose run it starts from; '' for random weights.
    """

    name: str
    purpose: str
    expected: str
    flop: float
    rate: float
    source: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What to type."""
        if self.name == "demo":
            return "vggrepro train"
        data = "" if self.config().width < 1 else " --data IMAGENET_DIR"
        start = f" --init-from RUN_OF_{self.source}" if self.source else ""
        return f"vggrepro train --recipe {self.name}{data}{start}"

    @property
    def images(self) -> int:
        """Training images over all steps."""
        return self.config().steps * self.config().batch_size

    @property
    def hours(self) -> float:
        """At `rate`."""
        return self.flop / self.rate / 3600

    @property
    def cost(self) -> str:
        """Images, operations and hours in a sentence."""
        where = "one accelerator at" if self.rate == ACCELERATOR_RATE else "two CPU cores at"
        hours = f"{self.hours:,.0f}" if self.hours >= 10 else f"{self.hours:.2f}"
        return (
            f"{self.images:,} images, {self.flop:.1e} floating-point operations: "
            f"{hours} hours on {where} {self.rate / 1e12:g} TFLOP/s"
        )

    def config(self) -> TrainConfig:
        """The recipe's configuration; without the source, whose place is the user's."""
        return TrainConfig(**self.values)

    def overridden(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Fields of a run that are not the recipe's: name to (recipe's, run's).

        Where the data and the source lie is no field of the recipe; that a source is
        missing is.
        """
        mine, theirs = self.config().to_dict(), config.to_dict()
        mine["init_from"] = f"RUN_OF_{self.source}" if self.source else ""
        alike = {"data"} | ({"init_from"} if bool(self.source) == bool(config.init_from) else set())
        if mine["classes"] == 0:
            alike.add("classes")  # as many as the data has
        return {
            name: (value, theirs[name])
            for name, value in mine.items()
            if name not in alike and value != theirs[name]
        }


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      InputError: there is none.
    """
    if name not in RECIPES:
        raise InputError(f"recipe '{name}' does not exist", "Known: " + ", ".join(RECIPES))
    return RECIPES[name]


def paper_recipe(arch: str, scale_min: int, scale_max: int) -> Recipe | None:
    """The paper's run of a net and its training scale; None: it has no such run."""
    for stage, (scales, _, _) in _STAGES.items():
        if scales == (scale_min, scale_max):
            return RECIPES.get(f"paper-{arch}-{stage}")
    return None


def recipe_entries(config: TrainConfig, name: str, training_images: int) -> dict[str, Any]:
    """What a run's manifest keeps of its recipe, and its fields' origins.

    A field that is not the recipe's is a deviation, whatever it is by itself. Data of the
    paper's numbers of classes and training images is taken for the paper's.
    """
    overridden = recipe(name).overridden(config) if name else {}
    whole = (config.classes, training_images) == (paper.CLASSES, paper.TRAINING_IMAGES)
    return {
        "recipe": {"name": name, "overridden": overridden} if name else None,
        "config_origins": {
            **config.origins(),
            "data": "paper" if whole else "deviation",
            **dict.fromkeys(overridden, "deviation"),
        },
    }


def override_line(name: str, overridden: Mapping[str, tuple[Any, Any]]) -> str:
    """As in 'recipe paper-D-384, but lr 0.01 for 0.001'."""
    changes = [f"{key} {theirs} for {mine}" for key, (mine, theirs) in overridden.items()]
    return f"recipe {name}" + (", but " + ", ".join(changes) if changes else "")


def _demo() -> Recipe:
    """A narrow VGG-A on synthetic JPEG files: the whole pipeline in a minute or two."""
    return Recipe(
        name="demo",
        purpose="net A at a quarter of its width on synthetic images: the whole pipeline, quickly",
        expected="a falling loss; the figures have no cell in the paper to stand beside",
        flop=_flop("A", TrainConfig(), _SYNTHETIC_CLASSES),
        rate=TWO_CORES_RATE,
    )


def _paper(arch: str, stage: str) -> Recipe:
    """One run of the paper (section 3.1).

    A and A-LRN start from random weights, B to E from A; S=384 starts from the same
    net's S=256 with a tenth of the learning rate, [256;512] from S=384. The paper says
    neither how long the later stages train (here: as long as the first) nor the first
    learning rate of the jittered one (here: that of S=384). The initialiser is the
    sigma=0.01 of the authors' later code (see `vggrepro train --help`, `--init`).
    """
    (scale_min, scale_max), lr, before = _STAGES[stage]
    values: dict[str, Any] = {
        "arch": arch,
        "width": 1.0,
        "image_size": 224,
        "classes": paper.CLASSES,
        "init": "normal:0.01",
        "scale_min": scale_min,
        "scale_max": scale_max,
        "batch_size": 256,
        "steps": 370_000,
        "lr": lr,
        "eval_every": 5_000,  # about an epoch of 5,004.6 steps
        "checkpoint_every": 1_000,
    }
    source = _source("paper", arch, before)
    scale = f"S={scale_min}" if scale_min == scale_max else f"S in [{scale_min};{scale_max}]"
    start = f"from {source}" if source else "from random weights"
    return Recipe(
        name=f"paper-{arch}-{stage}",
        purpose=f"the paper's net {arch}, {scale}, {start}",
        expected=_expected(paper.Trained(arch, scale_min, scale_max)),
        flop=_flop(arch, TrainConfig(**values), paper.CLASSES),
        rate=ACCELERATOR_RATE,
        source=source,
        values=values,
    )


def _small(arch: str, stage: str) -> Recipe:
    """The twin of a run of the paper that two cores finish: a quarter of the width, 32 pixels.

    S shrinks with the crop. sigma=0.0225 gives this narrow A the logits that sigma=0.01
    gives the paper's A, so that it leaves its plateau, after some 1,700 steps.
    """
    twin = _paper(arch, stage)
    scales = (twin.values["scale_min"], twin.values["scale_max"])
    scale_min, scale_max = (round(side * _SMALL_SIDE) for side in scales)
    steps = _SMALL_STEPS[stage]
    source = _source("small", arch, _STAGES[stage][2])
    values: dict[str, Any] = {
        "arch": arch,
        "init": "normal:0.0225",
        "scale_min": scale_min,
        "scale_max": scale_max,
        "batch_size": 16,
        "steps": steps // 2 if source and stage == "256" else steps,
        "lr": twin.values["lr"],
        "eval_every": 500,
        "checkpoint_every": 500,
    }
    return Recipe(
        name=f"small-{arch}-{stage}",
        purpose=f"the small twin of {twin.name}, {f'from {source}' if source else 'from scratch'}",
        expected="the loss leaves ln(10) = 2.30; no cell of the paper to stand beside",
        flop=_flop(arch, TrainConfig(**values), _SYNTHETIC_CLASSES),
        rate=TWO_CORES_RATE,
        source=source,
        values=values,
    )


def _first_users() -> Recipe:
    """The run that the first users asked for: VGG-11 on 150,000 images, batch 32, 50 epochs.

    They read "10^-2 variance" as sigma=0.1, which goes NaN within two steps; this is the
    same run with Glorot's initialiser, which the paper itself recommends.
    """
    images, epochs, batch_size = 150_000, 50, 32
    values: dict[str, Any] = {
        "arch": "A",
        "width": 1.0,
        "image_size": 224,
        "scale_min": 256,
        "scale_max": 256,
        "batch_size": batch_size,
        "steps": images * epochs // batch_size,
        "eval_every": images // batch_size,
        "checkpoint_every": 1_000,
    }
    return Recipe(
        name="first-users",
        purpose="VGG-11 (net A) on 150,000 images, batch 32, 50 epochs, with Glorot's initialiser",
        expected="no figure of the paper: a subset of the images is no cell of its tables",
        flop=_flop("A", TrainConfig(**values), paper.CLASSES),
        rate=ACCELERATOR_RATE,
        values=values,
    )


def _source(family: str, arch: str, before: str) -> str:
    """The recipe whose run a stage starts from; '' for random weights."""
    if before:
        return f"{family}-{arch}-{before}"
    return "" if arch in _SHALLOW else f"{family}-A-256"


def _expected(trained: paper.Trained) -> str:
    """The paper's cells of this one net."""
    cells = [result for result in paper.RESULTS if result.nets == (trained,)]
    told = [
        f"Table {cell.table} ({cell.protocol}, Q={','.join(map(str, cell.test_scales))}) "
        f"{cell.top1_error}/{cell.top5_error}"
        for cell in cells
    ]
    return "top-1/top-5 error in %: " + "; ".join(told) + ". Never run here"


def _flop(arch: str, config: TrainConfig, classes: int) -> float:
    """Of all training steps; a narrower net scales with the square of its width.

    The paper's count is for 224 pixels; only convolutions scale with the area of the crop.
    """
    fully_connected = (25_088 + paper.CLASSES + 4_096) * 4_096
    convolutions = paper.NETS[arch].multiply_adds - fully_connected
    side = config.image_size // 32
    here = (side**2 * 512 + 4_096 + classes / config.width) * 4_096
    multiply_adds = convolutions * (config.image_size / 224) ** 2 + here
    images = config.steps * config.batch_size
    return images * multiply_adds * config.width**2 * FLOP_PER_MULTIPLY_ADD


def _all() -> list[Recipe]:
    runs = [(arch, "256") for arch in paper.NETS]
    runs += [(arch, stage) for stage in ("384", "jitter") for arch in _FINE_TUNED]
    families = (_paper, _small)
    made = [family(arch, stage) for family in families for arch, stage in runs]
    return [_demo(), *made, _first_users()]


RECIPES = {entry.name: entry for entry in _all()}
