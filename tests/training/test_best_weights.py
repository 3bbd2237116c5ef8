"""final/ holds the weights of the best validation, and the run goes on from its last step."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errors import holds, lines_with, refuses
from ranks import run_ranks
from recipes import make_run, merge
from tunesmith.answers.load_run import locate_run
from tunesmith.checkpoint.resume import Progress
from tunesmith.checkpoint.sharded import export_sharded
from tunesmith.config.load import load_recipe
from tunesmith.errors import StoppedError
from tunesmith.run_dir import read_manifest
from tunesmith.start.run import train
from tunesmith.train_model import ValidationResult
from tunesmith.training import session as session_module
from tunesmith.training.result import Result

pytestmark = pytest.mark.slow

ADAPTER = "adapter_model.safetensors"
# Validated after each step; a periodic checkpoint would come after the run's end.
RULES: dict[str, Any] = {
    "validate": {"every": "1 steps"},
    "checkpoint": {"every": "100 steps", "keep": 1},
}
Losses = Callable[[Sequence[float]], None]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    """Sets what the next validations measure: a run so short does not overfit by itself."""

    def set_losses(values: Sequence[float]) -> None:
        results = iter(values)
        monkeypatch.setattr(
            session_module,
            "validation_loss",
            lambda *_, **__: ValidationResult(next(results), 1, {}),
        )

    return set_losses


def go(tiny: Path, folder: Path, steps: int, **changes: Any) -> Result:
    changes = merge(merge(RULES, {"train": {"duration": f"{steps} steps"}}), changes)
    return train(make_run(tiny, folder, **changes), quiet=True)


def steps_of(folder: Path) -> tuple[int, int]:
    values = read_manifest(folder / "run" / "final")
    assert values is not None
    return values["step"], values["last_step"]


def same_weights(folder: Path, step: int, name: str = ADAPTER) -> bool:
    run = folder / "run"
    return (run / "final" / name).read_bytes() == (run / f"checkpoint-{step}" / name).read_bytes()


def test_final_is_the_best_step_and_everything_says_so(tiny, tmp_path, losses):
    losses([3.0, 2.0, 2.5, 2.6])
    result = go(tiny, tmp_path, 4)
    run = tmp_path / "run"
    assert (result.steps, result.final_step, result.values()["final_step"]) == (4, 2, 2)
    assert steps_of(tmp_path) == (2, 4)
    assert same_weights(tmp_path, 2)
    assert not same_weights(tmp_path, 4)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert holds(locate_run(run).note, "final", 2, 4)
    assert holds(str(result), "final/", 2, 4)
    again = go(tiny, tmp_path, 4)
    assert (again.finished_before, again.steps, again.final_step) == (True, 4, 2)


def test_a_longer_run_goes_on_from_the_last_step(tiny, tmp_path, losses):
    schedule = {"schedule": "constant"}
    losses([3.0, 2.0, 2.5, 2.6, 2.4, 2.3])
    whole = go(tiny, tmp_path, 6, train=schedule, output_dir=str(tmp_path / "whole"))
    losses([3.0, 2.0, 2.5, 2.6])
    go(tiny, tmp_path, 4, train=schedule)
    losses([2.4, 2.3])
    longer = go(tiny, tmp_path, 6, train=schedule)
    assert (longer.first_step, longer.steps, longer.final_step) == (4, 6, 2)
    assert [r.loss for r in longer.records] == [r.loss for r in whole.records[4:]]
    assert steps_of(tmp_path) == (2, 6)
    final = [tmp_path / name / "final" / ADAPTER for name in ("run", "whole")]
    assert final[0].read_bytes() == final[1].read_bytes()


@pytest.mark.parametrize(
    ("measured", "changes", "final"),
    [
        ([3.0, 2.0, 2.5], {"checkpoint": {"final": "last"}}, 3),
        ([3.0, math.nan, 3.5], {}, 1),  # a NaN is no best
        ([math.nan, math.nan, 2.0], {}, 3),
        ([math.nan, math.nan, math.nan], {}, 3),  # there is no best
        ([2.0, 2.0, 2.0], {}, 1),  # of equal ones the first
        ([2.5], {"validate": {"every": None}}, 3),  # measured once, at the end
    ],
)
def test_which_step_final_is_of(tiny, tmp_path, losses, measured, changes, final):
    losses(measured)
    result = go(tiny, tmp_path, 3, **changes)
    assert result.final_step == final
    assert steps_of(tmp_path) == (final, result.steps)
    assert same_weights(tmp_path, final)


def test_a_model_trained_in_full_is_the_best_of_its_checkpoints(tiny, tmp_path, losses):
    """Its checkpoints are large, so the best validation alone saves none."""
    losses([1.0, 2.0, 2.5, 2.6, 2.7])
    full = {"adapter": {"kind": "none"}, "model": {"dtype": "bf16"}}
    go(tiny, tmp_path, 5, checkpoint={"every": "2 steps"}, **full)
    run = tmp_path / "run"
    assert steps_of(tmp_path) == (2, 5)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}
    assert same_weights(tmp_path, 2, "model.safetensors")


def train_on_ranks(model: Path, folder: Path) -> int | None:
    results = iter([3.0, 2.0, 2.5, 2.6])
    session_module.validation_loss = lambda *_, **__: ValidationResult(next(results), 1, {})
    shards = {"parallel": {"shard": 2}, "adapter": {"kind": "none"}}
    return go(model, folder, 4, checkpoint={"every": "2 steps"}, **shards).final_step


def test_shards_gather_the_best_step(tiny: Path, tmp_path: Path) -> None:
    assert run_ranks(2, train_on_ranks, tiny, tmp_path) == [2, 2]
    run = tmp_path / "run"
    assert steps_of(tmp_path) == (2, 4)
    recipe = load_recipe(run / "config.yaml")
    export_sharded(run / "checkpoint-2", tmp_path / "exported", recipe)
    final, exported = (
        load_file(folder / "model.safetensors") for folder in (run / "final", tmp_path / "exported")
    )
    assert final.keys() == exported.keys()
    assert all(torch.equal(final[name], exported[name]) for name in final)


def test_a_damaged_best_checkpoint_is_said_and_the_last_step_taken(tiny, tmp_path, losses):
    losses([3.0, 2.0, 2.5])
    go(tiny, tmp_path, 3)
    run = tmp_path / "run"
    file = run / "checkpoint-2" / ADAPTER
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    losses([2.6])
    assert go(tiny, tmp_path, 4).final_step == 4
    assert same_weights(tmp_path, 4)
    assert lines_with((run / "log.txt").read_text(), "warning:", "checkpoint-2", ADAPTER)


def test_a_kill_before_final_is_written_loses_nothing(tiny, tmp_path, losses):
    losses([3.0, 2.0, 2.5])
    go(tiny, tmp_path, 3)
    run = tmp_path / "run"
    kept = (run / "final" / ADAPTER).read_bytes()
    shutil.rmtree(run / "final")
    losses([])
    assert go(tiny, tmp_path, 3).final_step == 2
    assert (run / "final" / ADAPTER).read_bytes() == kept
    assert Progress.read(run / "checkpoint-3").kept_step == 2


def test_a_validation_that_a_stop_cut_off_counts_once_it_is_measured(
    tiny, tmp_path, losses, monkeypatch
):
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(session_module, "validation_loss", interrupted)
    with refuses(StoppedError):
        go(tiny, tmp_path, 3)
    assert not Progress.read(tmp_path / "run" / "checkpoint-1").validated
    losses([2.0, 2.5, 2.6])
    assert go(tiny, tmp_path, 3).final_step == 1
    assert same_weights(tmp_path, 1)
