"""What the paper says of its initialiser, where a user's choice meets the ambiguity."""

from __future__ import annotations

from vggrepro.config import parse_init

_LITERAL_STD = 0.1


def init_note(init: str) -> str | None:
    """A sentence for an initialiser that reads the paper's variance literally; else None."""
    kind, std = parse_init(init)
    if kind != "normal" or abs(std - _LITERAL_STD) > 0.1 * _LITERAL_STD:
        return None
    return (
        "The paper draws its weights from a normal distribution with '10^-2 variance' "
        "(section 3.1). Read literally that is a standard deviation of 0.1, as here, and it "
        "explodes; the authors' later code uses a standard deviation of 0.01 (normal:0.01), "
        "and the paper itself names Glorot's initialiser as the better way"
    )
