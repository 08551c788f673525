"""Our errors beside the paper's, where they may stand there; and what keeps them away.

A cell of the paper is one net (or fusion), training scale S, test scales Q and protocol, on
all 50,000 validation images of 1000 classes. Nothing else is put beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vggrepro import paper
from vggrepro.config import TrainConfig
from vggrepro.interval import wilson
from vggrepro.recipes import paper_recipe, recipe

# Fields that say where and how a run was kept, not what was trained.
_BOOKKEEPING = {
    *("data", "init_from", "seed", "strategy", "eval_every", "checkpoint_every"),
    *("keep_checkpoints", "steps", "steps_per_loop", "classes", "decode", "order"),
}
SCHEDULE_NOTE = (
    "the validation images also steered the learning-rate schedule, here as in the paper"
)


@dataclass(frozen=True)
class Comparison:
    """One evaluation and what stands beside it.

    Attributes:
      title: nets, S, protocol, Q.
      intervals: 95 % (Wilson, from the number of images) of top-1 and top-5, percent.
      cells: the paper's results for the same question; the same figures in several tables.
      refusals: why there are none.
      differences: how the training differs from the paper's, and where it is silent.
      calibration: other people's figures for the same nets.
    """

    record: Mapping[str, Any]
    title: str
    intervals: tuple[tuple[float, float], tuple[float, float]]
    cells: tuple[paper.PaperResult, ...]
    refusals: tuple[str, ...]
    differences: tuple[str, ...]
    calibration: tuple[paper.Calibration, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        cell = self.cells[0] if self.cells else None
        kept = ("protocol", "scales", "images", "split", "classes", "top1_error", "top5_error")
        return {
            "title": self.title,
            **{name: self.record[name] for name in kept},
            "top1_interval": self.intervals[0],
            "top5_interval": self.intervals[1],
            "paper": cell
            and {
                "tables": [one.table for one in self.cells],
                "top1_error": cell.top1_error,
                "top5_error": cell.top5_error,
                "test_top5_error": cell.test_top5_error,
            },
            "refused": list(self.refusals),
            "differences": list(self.differences),
            "calibration": [dataclasses.asdict(one) for one in self.calibration],
        }


def compare(record: Mapping[str, Any]) -> Comparison:
    """What may stand beside an evaluation's figures (`evaluation_record`)."""
    refusals = _refusals(record)
    cells: tuple[paper.PaperResult, ...] = ()
    calibration: tuple[paper.Calibration, ...] = ()
    if not refusals:
        # Here the images and the net are the paper's; the question may still not be.
        archs = {net["arch"] for net in record["nets"]} if len(record["nets"]) == 1 else set()
        calibration = tuple(one for one in paper.CALIBRATION if one.arch in archs)
        cells = _cells(record)
        refusals = [] if cells else [_no_cell(record)]
    images = record["images"]
    return Comparison(
        record=record,
        title=title(record),
        intervals=(wilson(record["top1_error"], images), wilson(record["top5_error"], images)),
        cells=cells,
        refusals=tuple(refusals),
        differences=_all_differences(record),
        calibration=calibration,
    )


def _all_differences(record: Mapping[str, Any]) -> tuple[str, ...]:
    several = len(record["nets"]) > 1
    found = [text for net in record["nets"] for text in _differences(net, several)]
    if record.get("stored_resize"):
        found.append(f"evaluated images {_stored(record['stored_resize'])}")
    return tuple(found)


def title(record: Mapping[str, Any]) -> str:
    """As in 'D, S=256, dense, Q=256'."""
    nets = " + ".join(f"{net['arch']}, {_scale_text(net)}" for net in record["nets"])
    sides = record["scales"] or "each net's own three"
    scales = ",".join(map(str, sides)) if isinstance(sides, list) else sides
    rounding = ", pools rounding up" if record["pool_rounding"] == "up" else ""
    return f"{nets}, {record['protocol']}, Q={scales}{rounding}"


def _scale_text(net: Mapping[str, Any]) -> str:
    if net["scale_min"] is None:
        return "S unknown"
    if net["scale_min"] == net["scale_max"]:
        return f"S={net['scale_min']}"
    return f"S=[{net['scale_min']};{net['scale_max']}]"


def _refusals(record: Mapping[str, Any]) -> list[str]:
    """Why the figures are of another kind than any in the paper or its calibration."""
    found = []
    if record["split"] != "val":
        found.append("these are training images: the paper's errors are on images never trained on")
    if record["classes"] != paper.CLASSES:
        found.append(f"{record['classes']:,} classes, the paper's have {paper.CLASSES:,}")
    if record["images"] != paper.VALIDATION_IMAGES and record["split"] == "val":
        found.append(
            f"{record['images']:,} images, the paper's errors are on all "
            f"{paper.VALIDATION_IMAGES:,} validation images of ILSVRC-2012"
        )
    if record["classes"] == paper.CLASSES:
        for net in record["nets"]:
            whole = paper.NETS[net["arch"]].parameters
            if net["parameters"] != whole or net["image_size"] != 224:
                found.append(
                    f"a net {net['arch']} of {net['parameters']:,} parameters and "
                    f"{net['image_size']} pixels, the paper's has {whole:,} and 224"
                )
    return found


def _trained(net: Mapping[str, Any]) -> paper.Trained:
    return paper.Trained(net["arch"], net["scale_min"], net["scale_max"])


def _cells(record: Mapping[str, Any]) -> tuple[paper.PaperResult, ...]:
    nets = record["nets"]
    if any(net["scale_min"] is None for net in nets):
        return ()
    key = sorted(map(repr, map(_trained, nets)))
    own = all(
        sorted(net["scales"]) == list(paper.own_test_scales(net["scale_min"], net["scale_max"]))
        for net in nets
    )
    return tuple(
        cell
        for cell in paper.RESULTS
        if sorted(map(repr, cell.nets)) == key
        and cell.protocol == record["protocol"]
        and (sorted(cell.test_scales) == sorted(record["scales"]) if cell.test_scales else own)
    )


def _no_cell(record: Mapping[str, Any]) -> str:
    if record["protocol"] == "center":
        return (
            "the paper has no figure for one centre crop: its evaluations are dense or "
            f"multi-crop; on the same weights one crop costs about {paper.CENTRE_CROP_LOSS} points "
            "of top-1 against multi-scale dense"
        )
    if any(net["scale_min"] is None for net in record["nets"]):
        return "a file of weights does not say at which scale S its net was trained"
    return f"the paper has no cell for {title(record)}"


def _differences(net: Mapping[str, Any], several: bool) -> list[str]:
    """How the training of a net differs from the paper's."""
    if net["run_dir"] is None:
        return [f"trained by others: {net['weights_file']}"]
    config, origins = net["config"], net["config_origins"]
    fields = {field.name: field.metadata for field in dataclasses.fields(TrainConfig)}
    found, silent = [], []
    for name, tag in origins.items():
        if name in _BOOKKEEPING or name not in fields:
            continue
        if tag == "deviation":
            said = ", ".join(map(str, fields[name]["paper"])) or "another value in the recipe"
            found.append(f"{name} {config[name]}, the paper: {said}")
        elif tag == "interpretation":
            silent.append(f"{name} {config[name]}")
    if net["step"] != 370_000 or net["status"] != "finished":
        found.append(f"after {net['step']:,} steps ({net['status']}), the paper: 370,000")
    if net["training_images"] != paper.TRAINING_IMAGES:
        found.append(
            f"{net['training_images']:,} training images, the paper: {paper.TRAINING_IMAGES:,}"
        )
    found += _stage_differences(net)
    if net.get("training_resized"):
        found.append(f"training images {_stored(net['training_resized'])}")
    if silent:
        found.append("where the paper is silent or ambiguous: " + ", ".join(silent))
    return [f"{net['arch']}: {text}" for text in found] if several else found


def _stage_differences(net: Mapping[str, Any]) -> list[str]:
    """First weights and first learning rate, which the paper has by net and S (section 3.1)."""
    theirs = paper_recipe(net["arch"], net["scale_min"], net["scale_max"])
    first = theirs or recipe(f"paper-{net['arch']}-256")
    source = recipe(first.source).config().arch if first.source else None
    found = []
    if net["inheritance"] != source and (theirs or net["inheritance"] is None):
        found.append(f"{_start(net['inheritance'])}, the paper: {_start(source)}")
    rate, tag = net["config"]["lr"], net["config_origins"]["lr"]
    # Of the jittered stage the paper does not say it.
    if theirs and net["scale_min"] == net["scale_max"] and tag == "paper":
        usual = theirs.config().lr
        found += [f"lr {rate}, the paper at this S: {usual}"] if rate != usual else []
    return found


def _start(source: str | None) -> str:
    return f"from a trained {source}" if source else "from random weights"


def _stored(resize: Mapping[str, Any]) -> str:
    return f"stored at shorter side {resize['shorter_side']}, the paper: as they came"
