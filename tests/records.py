"""A recipe and step records to vary, for tests of what is told about a run."""

from __future__ import annotations

from typing import Any

from tunesmith.config.schema import Data, Model, Run, Source
from tunesmith.metrics.record import StepRecord

RUN = Run(
    model=Model(name="org/base"), data=Data(train=(Source(source="rows.jsonl"),)), output_dir="run"
)


def record(step: int = 1, **changed: Any) -> StepRecord:
    """The record of a step on a machine without a known peak; a loss of 2 / step."""
    values: dict[str, Any] = {
        "epoch": step / 10, "loss": 2.0 / step, "learning_rate": 1e-4, "grad_norm": 0.5,
        "tokens": 100, "supervised_tokens": 40, "examples": 4, "step_seconds": 0.25,
        "data_seconds": 0.01, "tokens_per_second": 400.0, "mfu": None, "memory_gib": 1.5,
    }  # fmt: skip
    return StepRecord(step=step, **(values | changed))
