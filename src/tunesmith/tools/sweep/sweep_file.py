"""sweep.json: the request, the values that are fixed at the start, and the results."""

from typing_extensions import TypedDict  # that pydantic reads also before Python 3.12

from tunesmith.config import schema
from tunesmith.run_dir import Count


class FixedValues(TypedDict):
    """The values that all candidates of a sweep share."""

    steps: Count
    micro_batch: str
    dtype: schema.StatedDtype


class CandidateResult(TypedDict):
    """One candidate; `state`: finished, diverged or waiting; `loss`: null unless finished."""

    name: str
    run_dir: str
    values: dict[str, str]
    state: str
    step: Count
    loss: float | None


class SweepResult(TypedDict):
    """The content of sweep.json; `asked`: recipe and keys."""

    asked: dict[str, object]
    fixed: FixedValues
    compared_by: str
    stopped: str
    best: str | None
    candidates: list[CandidateResult]
