"""What was chosen for this machine, and why: said in one line at the start, and in full where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """One thing that the machine decided: `attention`, `varlen`, and the reason."""

    part: str
    taken: str
    why: str


def choices_line(choices: Sequence[Choice]) -> str:
    """attention: varlen; loss: fused; ..."""
    return "; ".join(f"{c.part}: {c.taken}" for c in choices)


def choices_table(choices: Sequence[Choice]) -> list[str]:
    """One line a choice, with its reason."""
    width = max(len(f"{c.part}: {c.taken}") for c in choices)
    return [f"{f'{c.part}: {c.taken}':<{width}}  {c.why}" for c in choices]
