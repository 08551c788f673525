"""What a training loop tells the outside: subclass `Hook`, override what you need.

The trainer calls every hook in order, on the host, after the step's numbers have
arrived. A hook reads; nothing that it returns goes back into the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from vggrepro.config import TrainConfig
    from vggrepro.run_directory import RunDirectory


class StateView(Protocol):
    """The state after a step; reading it copies every array off the device."""

    def numpy(self) -> dict[str, np.ndarray]:
        """Named arrays, as `params/<layer>/kernel`. Costly: not at every step."""
        ...


class Hook:
    """Base of every hook; each method does nothing.

    Attributes:
      chief_only: of several workers, only that of the chief is called: it writes files.
    """

    chief_only = False

    def on_start(
        self, run: RunDirectory, config: TrainConfig, first_step: int, info: Mapping[str, Any]
    ) -> None:
        """Before the first step. `info`: parameter count, data sizes, device, sample images."""

    def on_step(self, step: int, state: StateView, metrics: Mapping[str, Any]) -> None:
        """After step `step`. `metrics`: numbers by name; `headroom_layer` is a string."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a validation. val_loss, val_top1_error and val_top5_error (percent), val_images."""

    def on_checkpoint(self, step: int) -> None:
        """After the checkpoint of `step` is on disk."""

    def on_message(self, level: str, text: str) -> None:
        """Something to tell the user; `level` is 'info' or 'warning'."""

    def on_end(self, result: Any) -> None:
        """The training is over (finished or interrupted); `result` is its TrainResult."""


class Announcer:
    """Speaks to every hook."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = tuple(hooks)

    def info(self, text: str) -> None:
        self._message("info", text)

    def warning(self, text: str) -> None:
        self._message("warning", text)

    def _message(self, level: str, text: str) -> None:
        for hook in self.hooks:
            hook.on_message(level, text)
