"""sweep.json: what a sweep was asked for, what it fixed at its start, and what came out."""

from pathlib import Path

from typing_extensions import TypedDict  # that pydantic reads also before Python 3.12

from tunesmith.config import schema
from tunesmith.run_dir import Count, read_object


class FixedValues(TypedDict):
    """The values that all candidates of a sweep share."""

    steps: Count
    rungs: list[Count]
    micro_batch: str
    validate_every: str | None
    dtype: schema.StatedDtype


class CandidateResult(TypedDict):
    """One candidate; `losses` by step, null where it diverged."""

    name: str
    run_dir: str
    values: dict[str, str]
    state: str
    step: Count
    loss: float | None
    losses: dict[str, float | None]


class SweepResult(TypedDict):
    """The content of sweep.json; `asked`: recipe, keys and search."""

    asked: dict[str, object]
    fixed: FixedValues
    compared_by: str
    stopped: str
    best: str | None
    candidates: list[CandidateResult]


def read_sweep(path: Path) -> SweepResult:
    """sweep.json; OSError where it cannot be read, ValueError where it is torn or no sweep's."""
    return read_object(path, SweepResult)
