"""A run's configuration in the words that the diagnosis understands."""

from __future__ import annotations

import math

from diagnostics.protocol import LayerFacts, RunFacts
from vggrepro.config import TrainConfig
from vggrepro.init_notes import init_note
from vggrepro.model import Network


def run_facts(config: TrainConfig, network: Network) -> RunFacts:
    """What the run was asked to do; `config.classes` must be set."""
    layers = tuple(
        LayerFacts(
            layer.name,
            "conv" if layer.is_convolution else "dense",
            f"params/{layer.name}/kernel",
            layer.fan_in,
            layer.fan_out,
            "relu" if layer.relu else "linear",
        )
        for layer in network.weight_layers
    )
    return RunFacts(
        layers=layers,
        learning_rate=config.lr,
        warmup_steps=config.warmup_steps,
        clip_norm=config.clip_norm,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        optimizer="momentum SGD",
        precision=config.precision,
        init=config.init,
        init_note=init_note(config.init) or "",
        loss="softmax cross-entropy",
        classes=config.classes,
        chance_loss=math.log(config.classes),
        batch_size=config.batch_size,
        input_kind="pixels",
        extra={
            "net": f"VGG-{config.arch}, width {config.width:g}, {config.image_size} px",
            "parameters": f"{network.parameter_count():,}",
        },
    )
