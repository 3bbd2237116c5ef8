"""Stopped in the middle, a run on other layers than Llama's resumes bit for bit too: a delta rule
that runs by document, attention in chunks, and the text model of a vision-language model.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import vision_models
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.errors import StoppedError
from tunesmith.metrics.record import StepRecord
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer

pytestmark = pytest.mark.slow

# Settings of the text part: with 4 layers the last one of Llama 4 attends to the whole document.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5": {},
    "llama4": {"num_hidden_layers": 4, "floor_scale": 4},
    "gemma3": {},
}
STOP_AFTER = 3  # steps


def run_of(model: Path, folder: Path, kind: str, name: str) -> Run:
    return make_run(
        model,
        folder,
        held=False,
        adapter={"kind": kind},
        train={"duration": "6 steps", "micro_batch": "128 tokens"},
        checkpoint={"every": None},
        output_dir=str(folder / name),
    )


def train_until_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that gets SIGTERM in its step STOP_AFTER."""
    step = Trainer.train_step

    def signalled(self: Trainer, batch: Any) -> Any:
        if batch.step + 1 == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(StoppedError):
            train(run, quiet=True)


def figures(record: StepRecord) -> tuple[float, ...]:
    return record.step, record.loss, record.grad_norm, record.tokens


@pytest.mark.parametrize("kind", ["lora", "none"])
@pytest.mark.parametrize("model_type", MODELS)
def test_resumed_is_never_stopped(
    model_type: str, kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vision_models.build(model_type, tmp_path / "model", tiny, **MODELS[model_type])
    whole = train(run_of(model, tmp_path, kind, "whole"), quiet=True)
    cut = run_of(model, tmp_path, kind, "cut")
    train_until_stopped(cut, monkeypatch)
    resumed = train(cut, quiet=True)
    assert STOP_AFTER <= resumed.first_step < 6
    expected = [figures(record) for record in whole.records if record.step > resumed.first_step]
    assert [figures(record) for record in resumed.records] == expected
    files = list((tmp_path / "whole/final").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "cut/final" / file.name).read_bytes() == file.read_bytes()
