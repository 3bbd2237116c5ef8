"""A recipe and a record to vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config.schema import Data, Model, Run, Source
from tunesmith.metrics.record import StepRecord


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(
        model=Model(name="org/base"), data=Data(train=(Source(source="rows.jsonl"),)), output_dir=str(tmp_path / "run")
    )


@pytest.fixture
def record() -> Callable[..., StepRecord]:
    def make(step: int = 1, **changed: Any) -> StepRecord:
        values: dict[str, Any] = {
            "epoch": step / 10,
            "loss": 2.0 / step,
            "learning_rate": 1e-4,
            "grad_norm": 0.5,
            "tokens": 100,
            "supervised_tokens": 40,
            "examples": 4,
            "step_seconds": 0.25,
            "data_seconds": 0.01,
            "tokens_per_second": 400.0,
            "mfu": None,
            "memory_gib": 1.5,
        }
        return StepRecord(step=step, **(values | changed))

    return make
