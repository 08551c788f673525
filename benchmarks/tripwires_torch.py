"""The faults of tripwires.py in PyTorch, under `set_detect_anomaly`. Needs only torch.

python benchmarks/tripwires_torch.py [ROUNDS]
"""

from __future__ import annotations

import io
import statistics
import sys
import time
import warnings
from contextlib import redirect_stderr

import torch
from torch import nn

FAULTS = ("a loss with log(0)", "one NaN in the data", "an initialiser that explodes")
ROWS, FEATURES, CLASSES, BATCH, EPOCHS = 640, 64, 10, 32, 3


def data(fault: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [640, 64] and class numbers; row 211 holds a NaN if that is the fault."""
    torch.manual_seed(0)
    classes = torch.randint(0, CLASSES, (ROWS,))
    x = torch.randn(ROWS, FEATURES) + 2 * torch.randn(CLASSES, FEATURES)[classes]
    if fault == FAULTS[1]:
        x[211, 5] = float("nan")
    return x, classes


def model(fault: str) -> nn.Sequential:
    """Eight ReLU layers and a linear head."""
    sizes = [FEATURES, *[256] * 8]
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layer = nn.Linear(before, after)
        spread = 1.0 if fault == FAULTS[2] else (2.0 / before) ** 0.5
        nn.init.normal_(layer.weight, std=spread)
        layers += [layer, nn.ReLU()]
    head = nn.Linear(sizes[-1], CLASSES)
    nn.init.normal_(head.weight, std=4.0 if fault == FAULTS[0] else 0.06)
    return nn.Sequential(*layers, head)


def loss_of(fault: str, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy; by hand, as the sum over all classes, in the first fault."""
    if fault == FAULTS[0]:
        target = nn.functional.one_hot(classes, CLASSES)
        return -(target * logits.softmax(-1).log()).sum(-1).mean()
    return nn.functional.cross_entropy(logits, classes)


def fit(fault: str, anomaly: bool, epochs: int = EPOCHS) -> tuple[list[float], nn.Module, str]:
    """Seconds of every step, the model afterwards, what PyTorch said."""
    x, classes = data(fault)
    net = model(fault)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    seconds, said = [], io.StringIO()
    warnings.simplefilter("always")
    with redirect_stderr(said), torch.autograd.set_detect_anomaly(anomaly):
        for start in list(range(0, ROWS, BATCH)) * epochs:
            began = time.perf_counter()
            rows = slice(start, start + BATCH)
            optimizer.zero_grad()
            try:
                loss_of(fault, net(x[rows]), classes[rows]).backward()
            except RuntimeError as error:
                traced = said.getvalue()
                lines = [s.strip() for s in traced.splitlines() if "tripwires_torch" in s]
                where = lines[-1] if lines else "no line"
                return seconds, net, f"{error} ({where})"
            optimizer.step()
            seconds.append(time.perf_counter() - began)
    return seconds, net, ""


def main() -> None:
    """Prints what detect_anomaly says of each fault, and its cost on healthy data."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"\nPyTorch {torch.__version__}")
    for fault in FAULTS:
        seconds, net, said = fit(fault, True)
        whole = all(p.isfinite().all() for p in net.parameters())
        words = " ".join(said.split())[:230] or "(nothing)"
        kept = "kept" if whole else "LOST"
        print(f"{fault}\n  detect_anomaly   {len(seconds):>3} steps, weights {kept}: {words}")
    pairs = []
    for _ in range(rounds):
        bare, checked = (statistics.median(fit("none", on)[0][5:]) for on in (False, True))
        pairs.append((bare, checked))
    bare, checked = (1e3 * statistics.median(p[i] for p in pairs) for i in (0, 1))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"healthy data, median step: bare {bare:.2f} ms, detect_anomaly {checked:.2f} ms, ")
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
