"""Types of the values in sweep.json: recipe and keys of a sweep, fixed values, and results."""

from typing_extensions import TypedDict  # pydantic needs this TypedDict before Python 3.12

from tunesmith.config import schema
from tunesmith.run_dir import Count


class FixedValues(TypedDict):
    """Values that are determined when the sweep starts, and that all candidates use."""

    steps: Count
    micro_batch: str
    dtype: schema.StatedDtype


class CandidateResult(TypedDict):
    """The result of one candidate.

    `state` is finished, diverged or waiting. `loss` is None unless the candidate is finished.
    """

    name: str
    run_dir: str
    values: dict[str, str]
    state: str
    step: Count
    loss: float | None


class SweepResult(TypedDict):
    """Content of sweep.json. `asked` has the recipe and the varied keys of the sweep."""

    asked: dict[str, object]
    fixed: FixedValues
    compared_by: str
    stopped: str
    best: str | None
    candidates: list[CandidateResult]
