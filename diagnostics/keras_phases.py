"""A Keras train step run op by op, telling a tracer which phase it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diagnostics.keras_names import LayerNames, StateNames, find_optimizers
from diagnostics.keras_taps import Recorder, recording


class _PhaseRecorder(Recorder):
    """Passes phases on; what follows the model's outermost call counts as the loss."""

    def __init__(self, names: LayerNames, tell: Callable[[str], None]) -> None:
        super().__init__(names)
        self._tell = tell
        self._depth = 0

    def enter(self, phase: str) -> None:
        self._tell(phase)

    def layer_call(self, layer: Any, call: Callable[[], Any], inputs: Any) -> Any:
        if self._depth == 0:
            self._tell("forward")
        self._depth += 1
        try:
            return call()
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._tell("loss")

    def checked_labels(self, labels: Any, predictions: Any) -> Any:
        return labels

    def note_loss(self, loss: Any) -> None:
        return None


def run_by_phases(model: Any, state: StateNames, data: Any, phase: Callable[[str], None]) -> None:
    """Runs the model's own `train_step` eagerly; the state is the same afterwards."""
    before = state.arrays()
    recorder = _PhaseRecorder(LayerNames(model), phase)
    try:
        with recording(recorder, model, find_optimizers(model)):
            model.train_step(data)
    finally:
        state.load(before)
