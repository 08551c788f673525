"""What the diagnosis needs of a run. It knows no net: only named arrays and steps.

A `ReplayableRun` is a stopped or finished run that can be asked for states and
batches and can make a `Program`: its training step, compiled as it trained, or
with one thing changed. VGG (`vggrepro/replay_adapter.py`), any Keras model
(`diagnostics/keras_replay.py`) and the toy of the tests implement it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from diagnostics.diagnosis import FirstNonfinite
    from diagnostics.op_trace import OpTrace

State = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

STAGES = ("data", "weights", "forward", "loss", "backward", "update")


class Check(NamedTuple):
    """One thing the tripwire looks at."""

    stage: str  # one of STAGES
    layer: str  # "" where there is none
    quantity: str

    def describe(self) -> str:
        """As in 'gradient of block5_conv1'."""
        return f"{self.quantity} of {self.layer}" if self.layer else self.quantity


@dataclass(frozen=True)
class LayerFacts:
    """A layer in forward order, as far as it is known.

    Attributes:
      kind: 'conv', 'dense' or the layer's class name.
      weight: name of its kernel in the state ('params/fc1/kernel'), or None.
      fan_in, fan_out: of the kernel; None without one.
      activation: 'relu', 'linear', ... ; None if unknown.
    """

    name: str
    kind: str
    weight: str | None = None
    fan_in: int | None = None
    fan_out: int | None = None
    activation: str | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a run was asked to do. None or 0 where it is not known or not used.

    Attributes:
      init: the initialiser asked for, in the program's own words.
      init_note: what a user should know of that initialiser, a sentence.
      loss: the loss's name; chance_loss: the loss of guessing, as ln(classes).
      input_kind: 'pixels' where inputs are images in grey levels, else 'numbers'.
      extra: further facts for the report, text by name.
    """

    layers: tuple[LayerFacts, ...]
    learning_rate: float | None = None
    warmup_steps: int = 0
    clip_norm: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = ""
    optimizer_epsilon: float | None = None
    precision: str = "float32"
    init: str | None = None
    init_note: str = ""
    loss: str = ""
    classes: int | None = None
    chance_loss: float | None = None
    batch_size: int | None = None
    input_kind: str = "numbers"
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Telemetry:
    """Recorded numbers of every step: rows float32 [steps, columns].

    Columns: `loss`, `grad_norm`, `lr`, `input_max`, `input_min`, and per layer
    `<layer>/preactivation_max`, `.../preactivation_min`, `.../gradient_norm`,
    `.../weight_norm`, `.../update_ratio`; some may be missing. Of a guarded Keras model some
    are as last read (`keras_norms`, `keras_convolutions`): weight norms, and the
    pre-activations of a convolution in front of a batch normalisation.
    """

    steps: np.ndarray
    columns: tuple[str, ...]
    rows: np.ndarray

    def column(self, name: str) -> np.ndarray | None:
        """One column over the steps, or None if it was not recorded."""
        return self.rows[:, self.columns.index(name)] if name in self.columns else None


@dataclass(frozen=True)
class StepOutcome:
    """What one run of the step showed.

    Attributes:
      applied: whether the update was written.
      failed: the checks that tripped, in order of execution.
      telemetry: the step's numbers by column name.
    """

    applied: bool
    failed: tuple[Check, ...]
    telemetry: Mapping[str, float]


@dataclass(frozen=True)
class Change:
    """One thing done differently in a counterfactual replay.

    Attributes:
      kind: 'init', 'init_scale', 'learning_rate', 'warmup', 'clip_norm',
        'precision', 'input_scale', 'without_examples', 'loss_formula',
        'optimizer_epsilon', 'none' (the control); of Keras runs also 'domain' (an op kept
        inside its domain), 'finite_inputs', 'shift_labels', 'target_scale',
        'optimizer_setting', 'constant_rate', 'layer_epsilon', 'layer_setting',
        'layer_scale', 'loss_weights', 'example_weights', 'batch_size', 'zero_weights',
        'finite_statistics', 'regulariser'.
      value: what it becomes; its type depends on the kind.
      label: as in "learning rate 0.001 instead of 0.01".
      from_start: it only makes sense from step 0 (an initialiser).
      rank: how much it takes a user away from the intended run; 0 is smallest.
    """

    kind: str
    value: Any
    label: str
    from_start: bool = False
    rank: int = 5


class Program(Protocol):
    """A training step with a state of its own on the device."""

    def load(self, state: State) -> None:
        """Replaces the state and re-arms the guard."""
        ...

    def state(self) -> State:
        """The state as named arrays."""
        ...

    def run(self, batch: Batch, step: int) -> StepOutcome:
        """One guarded step; writes nothing if anything is not finite."""
        ...

    def trace(self, batch: Batch, step: int, tracer: OpTrace) -> None:
        """Runs the step op by op (eagerly), writing no state or restoring what it wrote.

        The caller has entered `tracer`; functions run eagerly inside it. The
        program calls `tracer.phase(...)` with 'forward', 'loss', 'backward' and
        'update' as it enters them, keeps to the calling thread (no replicas of
        `tf.distribute`), and runs each layer in a name scope that holds its name as
        `facts` has it. The update should end in the new state's tensors or writes;
        what `diagnostics.guard` computes is never taken for a fault, other norms and
        metrics are best left out.
        """
        ...

    def release(self) -> None:
        """Frees what it holds on the device; it may be loaded again."""
        ...


class ReplayableRun(Protocol):
    """A run as the diagnosis sees it."""

    name: str
    facts: RunFacts

    def incident_step(self) -> int | None:
        """The step that the guard refused; None if it never did."""
        ...

    def recorded_failures(self) -> tuple[Check, ...]:
        """The checks that tripped at the incident, in order; empty without one."""
        ...

    def telemetry(self) -> Telemetry:
        """Every recorded step, the refused one included."""
        ...

    def state_steps(self) -> Sequence[int]:
        """Steps whose state is stored or can be made (0 from the seed), ascending."""
        ...

    def state_before(self, step: int) -> State:
        """The exact state before `step`, which must be one of `state_steps`."""
        ...

    def batch(self, step: int) -> Batch | None:
        """The batch of a step as fed; None if the data is gone."""
        ...

    def example_names(self, batch: Batch) -> list[tuple[int, str]]:
        """(dataset id, file or other name) of every row."""
        ...

    def program(self, change: Change | None = None) -> Program:
        """The step as it trained, or with one change.

        For a change of data ('without_examples', 'input_scale') `run` alters the
        batch it is given. For 'init' and 'init_scale' see `start_state`.
        """
        ...

    def start_state(self, change: Change | None = None) -> State:
        """Step 0's state, with the change's initialiser."""
        ...

    def changes(self, step: int, suspects: Sequence[int]) -> Sequence[Change]:
        """Changes that make sense for this run; `suspects` are dataset ids."""
        ...

    def command(self, change: Change) -> str:
        """What the user types (or writes) to train with this change; '' if no option does it."""
        ...

    def environment(self) -> Mapping[str, Any]:
        """What the run was recorded on, for the report."""
        ...

    def conditions(self) -> Sequence[str]:
        """How this replay's conditions differ from the recorded ones, in sentences:
        versions, hardware, data gone, a rebuilt batch of other bits. Empty if nothing does."""
        ...


@runtime_checkable
class Emulates(Protocol):
    """A run that can be replayed with another machine's arithmetic."""

    def emulating(self, machine: str) -> ReplayableRun:
        """The same run, whose programs compute so; its `changes` hold the way back, a
        'precision' of float32.

        Raises:
          InputError: the machine is not known, or computes this run as it was recorded.
        """
        ...


@runtime_checkable
class RepairsFormulas(Protocol):
    """A run whose own formulas can be replayed inside their domain."""

    def formula_changes(self, place: FirstNonfinite) -> Sequence[Change]:
        """Changes that keep the op at fault inside its domain; empty if it did not leave it."""
        ...
