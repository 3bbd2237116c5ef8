"""A start that goes on: what it keeps, refuses and says of micro batch, base, data and duration."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from errors import refuses
from recipes import make_run, merge
from tunesmith.errors import DataError, ModelError, RecipeError, StoppedError
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.model.weights.safetensors_files import weights_digest
from tunesmith.planning import micro_batch
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import MemoryEstimate
from tunesmith.start.run import train
from tunesmith.training.result import Result

pytestmark = pytest.mark.slow


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


def go(model: Path, folder: Path, /, **changes: Any) -> Result:
    both = merge({"train": {"duration": "4 steps"}}, changes)
    return train(make_run(model, folder, **both), quiet=True)


def numbers(folder: Path) -> list[tuple[float, ...]]:
    records = read_records(folder / "run" / "metrics.jsonl")
    return [(r.loss, r.grad_norm, r.learning_rate, r.val_loss or 0.0) for r in records]


def progress(folder: Path, step: int) -> dict[str, Any]:
    file = folder / "run" / f"checkpoint-{step}" / "state" / "progress.json"
    return dict(json.loads(file.read_text()))


DROPOUT = {
    "adapter": {"dropout": 0.2},
    "train": {"duration": "4 steps", "global_batch": "24 examples"},
}


def stop_at_2(record: StepRecord) -> None:
    if record.step == 2:
        signal.raise_signal(signal.SIGTERM)


def test_other_free_memory_does_not_change_the_numbers(tiny, tmp_path, monkeypatch):
    """With dropout they depend on the micro batch; memory alone would choose another one after the
    stop.
    """
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run = make_run(tiny, tmp_path / "cut", **DROPOUT)
    with refuses(StoppedError, names=["SIGTERM"]):
        train(run, quiet=True, on_record=stop_at_2)
    kept = int(progress(tmp_path / "cut", 2)["micro_batch"].split()[0])

    def choose(estimator: MemoryEstimator, *args: Any, **options: Any) -> MemoryEstimate:
        return estimator.estimate(128)

    with monkeypatch.context() as patch:
        patch.setattr(micro_batch, "fastest_micro_batch", choose)
        train(run, quiet=True)
    go(tiny, tmp_path / "whole", **DROPOUT)
    assert kept > 128
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_recompute_changes_no_number_with_dropout(tiny: Path, tmp_path: Path) -> None:
    """So a resumed run may recompute other layers."""
    for name in ("none", "full"):
        (tmp_path / name).mkdir()
        go(tiny, tmp_path / name, **merge(DROPOUT, {"train": {"recompute": name}}))
    assert numbers(tmp_path / "none") == numbers(tmp_path / "full")


def test_dropout_is_on_in_every_step_also_after_a_validation(tiny: Path, tmp_path: Path) -> None:
    losses = {}
    for name, changes in {
        "validated": {"validate": {"every": "1 steps"}},
        "alone": {"held": False},
        "without": {"adapter": {"dropout": 0.0}},
    }.items():
        (tmp_path / name).mkdir()
        go(tiny, tmp_path / name, **merge(DROPOUT, changes))
        losses[name] = [loss for loss, *_ in numbers(tmp_path / name)]
    assert losses["validated"] == losses["alone"]
    # B is zero in the first step, so dropout on the input of A changes only the later losses.
    assert losses["without"][0] == losses["alone"][0]
    assert losses["without"][1] != losses["alone"][1]


@pytest.mark.parametrize(
    ("file", "error", "where", "kind"),
    [
        ("base/model.safetensors", ModelError, "model.name: ", "none"),
        ("train.jsonl", DataError, "data.train: ", "lora"),
        ("held.jsonl", DataError, "data.validation: ", "none"),
    ],
)
def test_a_base_or_rows_changed_under_their_name_are_refused(
    file, error, where, kind, own, tmp_path
):
    def start(steps: int, **more: Any) -> Result:
        duration = {"duration": f"{steps} steps"}
        return go(own, tmp_path, train=duration, adapter={"kind": kind}, **more)

    start(2)
    path = tmp_path / file
    if path.suffix == ".jsonl":
        path.write_text(path.read_text().replace("amber", "umber", 1))
    else:
        tensors = {name: 1.01 * tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    with refuses(error, fix=["checkpoint.resume=force"]) as raised:
        start(3)
    assert raised.value.where.startswith(where)
    assert start(3, checkpoint={"resume": "force"}).steps == 3


def test_the_hash_of_weights_knows_tensors_and_not_places(own: Path, tmp_path: Path) -> None:
    before = weights_digest(own)
    model = AutoModelForCausalLM.from_pretrained(own)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "shards") == before
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.001)
        model.save_pretrained(tmp_path / name)
        assert weights_digest(tmp_path / name) != before, name


# 48 rows in steps of 8: 6 steps an epoch
@pytest.mark.parametrize(
    ("old", "new", "steps"), [("4 steps", "2 epochs", 12), ("0.5 epochs", "1 epochs", 6)]
)
def test_a_longer_duration_is_taken_in_any_unit(old, new, steps, tiny, tmp_path):
    go(tiny, tmp_path, train={"duration": old})
    assert go(tiny, tmp_path, train={"duration": new}).steps == steps
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record.step for record in records] == list(range(1, steps + 1))


def test_a_shorter_duration_is_refused_in_any_unit(tiny, tmp_path):
    go(tiny, tmp_path, train={"duration": "7 steps"})
    for new, told in (
        ("1 epochs", "1 epochs (= 6 steps)"),
        ("0.000001 s", "1e-06 s (about 0 steps)"),
    ):
        where = f"train.duration: 7 steps -> {told}"
        with refuses(RecipeError, where=where, fix=["train.duration", "--fresh"]):
            go(tiny, tmp_path, train={"duration": new})
    go(tiny, tmp_path, train={"duration": "1 epochs"}, checkpoint={"resume": "force"})
