"""A start that goes on: what it keeps, refuses and says of micro batch, base, data and duration."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import holds, lines_with, refuses
from logged import logged_lines
from recipes import make_run, merge
from tunesmith.errors import DataError, ModelError, RecipeError, StoppedError, TunesmithError
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.model.safetensors_files import weights_digest
from tunesmith.planning import micro_batch
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.run_plan import MemoryEstimate
from tunesmith.training.result import Result
from tunesmith.training.run import train

pytestmark = pytest.mark.slow


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@pytest.fixture
def shown() -> list[str]:
    return []


def go(model: Path, folder: Path, shown: list[str], /, **changes: Any) -> Result:
    both = merge({"train": {"duration": "4 steps"}}, changes)
    with logged_lines() as lines:
        try:
            return train(make_run(model, folder, **both))
        finally:
            shown.extend("\n".join(lines).splitlines())


def numbers(folder: Path) -> list[tuple[float, ...]]:
    records = read_records(folder / "run" / "metrics.jsonl")
    return [(r.loss, r.grad_norm, r.learning_rate, r.val_loss or 0.0) for r in records]


def progress(folder: Path, step: int) -> dict[str, Any]:
    return dict(
        json.loads((folder / "run" / f"checkpoint-{step}" / "state" / "progress.json").read_text())
    )


# --- micro batch

DROPOUT = {
    "adapter": {"dropout": 0.2},
    "train": {"duration": "4 steps", "global_batch": "24 examples"},
}


def stopping(step: int) -> Callable[[StepRecord], object]:
    import signal

    def stop(record: StepRecord) -> None:
        if record.step == step:
            signal.raise_signal(signal.SIGTERM)

    return stop


def test_other_free_memory_does_not_change_the_numbers(tiny, tmp_path, shown, monkeypatch):
    """With dropout they depend on the micro batch.

    Here the memory alone would choose another one after the stop.
    """
    chosen: list[int] = []
    fastest = micro_batch.fastest_micro_batch

    def choose(estimator: MemoryEstimator, *args: Any, **options: Any) -> MemoryEstimate:
        memory = estimator.estimate(128) if chosen else fastest(estimator, *args, **options)
        chosen.append(memory.tokens)
        return memory

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(micro_batch, "fastest_micro_batch", choose)
        run = make_run(tiny, tmp_path / "cut", **DROPOUT)
        with refuses(StoppedError, names=["SIGTERM"]):
            train(run, quiet=True, on_record=stopping(2))
        kept = progress(tmp_path / "cut", 2)["micro_batch"]
        with logged_lines() as lines:
            train(run)
        assert chosen == [int(kept.split()[0])], "it is not chosen again"
    assert not [line for line in lines if "micro batch changes" in line]
    go(tiny, tmp_path / "whole", [], **DROPOUT)
    assert int(kept.split()[0]) > 128
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_another_micro_batch_is_told(tiny: Path, tmp_path: Path, shown: list[str]) -> None:
    train_ = {"duration": "1 steps", "warmup": "0 steps", "micro_batch": "256 tokens"}
    go(tiny, tmp_path, [], train=train_)
    go(tiny, tmp_path, shown, train=train_ | {"duration": "2 steps", "micro_batch": "128 tokens"})
    (told,) = lines_with("\n".join(shown), "128 tokens", "256 tokens")
    assert holds(told, "train.micro_batch='256 tokens'")


def test_recompute_changes_no_number_with_dropout(tiny: Path, tmp_path: Path) -> None:
    """So a resumed run may recompute other layers. checkpoint() restores the state of the random
    generator.
    """
    for name in ("none", "full"):
        (tmp_path / name).mkdir()
        go(tiny, tmp_path / name, [], **merge(DROPOUT, {"train": {"recompute": name}}))
    assert numbers(tmp_path / "none") == numbers(tmp_path / "full")


# --- base and data


def one_weight(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    file.unlink()
    save_file(tensors, file, {"format": "pt"})


def words(name: str) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base.parent / f"{name}.jsonl"
        path.write_text(path.read_text().replace("amber", "umber", 1))

    return change


CHANGED: dict[str, tuple[Callable[[Path], None], type[TunesmithError], str]] = {
    "base": (one_weight, ModelError, "model.name: "),
    "training rows": (words("train"), DataError, "data.train: "),
    "validation rows": (words("held"), DataError, "data.validation: "),
}


@pytest.mark.parametrize(
    ("part", "kind"), [("base", "none"), ("training rows", "lora"), ("validation rows", "none")]
)
def test_a_base_or_rows_changed_under_their_name_are_refused(part, kind, own, tmp_path, shown):
    change, error, where = CHANGED[part]
    again: dict[str, Any] = {
        "adapter": {"kind": kind},
        "train": {"duration": "2 steps", "warmup": "0 steps"},
    }
    go(own, tmp_path, [], **again)
    hashes = {key: value for key, value in progress(tmp_path, 2).items() if key.endswith("_hash")}
    assert hashes.pop("reference_hash") is None, "nothing is compared with an adapter"
    assert hashes.keys() == {"model_hash", "data_hash", "validation_hash"}
    identity = json.loads((tmp_path / "run" / "env.json").read_text())
    assert hashes == {key: identity[key] for key in hashes}
    change(own)
    again["train"]["duration"] = "3 steps"
    with refuses(error, fix=["checkpoint.resume=force"]) as raised:
        go(own, tmp_path, shown, **again)
    assert raised.value.where.startswith(where)
    assert go(own, tmp_path, shown, **again, checkpoint={"resume": "force"}).steps == 3
    if part == "base":
        again["train"]["duration"] = "4 steps"
        assert go(own, tmp_path, shown, **again).steps == 4, "from here on these are its own"


@pytest.mark.nightly
def test_fewer_validation_examples_and_checkpoints_without_hashes_go_on(own, tmp_path, shown):
    go(own, tmp_path, [])
    go(own, tmp_path, [], train={"duration": "5 steps"}, validate={"max_examples": 3})
    identity = json.loads((tmp_path / "run" / "env.json").read_text())
    assert identity["validation_hash"] == progress(tmp_path, 5)["validation_hash"], (
        "of all rows, whatever is measured"
    )
    from tunesmith.checkpoint.manifest import flush_files, write_manifest

    file = tmp_path / "run" / "checkpoint-5" / "state" / "progress.json"
    new = ("validation_hash", "model_hash", "micro_batch")
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in new})
    )
    folder = tmp_path / "run" / "checkpoint-5"
    write_manifest(folder, 5, flush_files(folder))
    one_weight(own)
    assert go(own, tmp_path, shown, train={"duration": "6 steps"}).steps == 6


def test_the_hash_of_weights_knows_tensors_and_not_places(own: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = weights_digest(own)
    other = own.rename(tmp_path / "elsewhere")
    assert weights_digest(other) == before
    model = AutoModelForCausalLM.from_pretrained(other)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "shards") == before
    for name in (
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
    ):
        with torch.no_grad():
            model.get_parameter(name).mul_(1.001)
        model.save_pretrained(tmp_path / name)
        assert weights_digest(tmp_path / name) != before, name
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert weights_digest(tmp_path / "bf16") != before


# --- duration and learning rate

# 48 rows in steps of 8: 6 steps an epoch.
LONGER = [
    ("4 steps", "2 epochs", "train.duration: 4 steps -> 2 epochs (= 12 steps)", 12),
    ("0.5 epochs", "1 epochs", "train.duration: 0.5 epochs (= 3 steps) -> 1 epochs (= 6 steps)", 6),
]


@pytest.mark.parametrize(("old", "new", "line", "steps"), LONGER)
def test_a_longer_duration_is_taken_in_any_unit(old, new, line, steps, tiny, tmp_path, shown):
    first = go(tiny, tmp_path, [], train={"duration": old}).steps
    assert go(tiny, tmp_path, shown, train={"duration": new}).steps == steps
    checkpoint = tmp_path / "run" / f"checkpoint-{first}"
    assert lines_with("\n".join(shown), first, steps, checkpoint)
    assert line in shown
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [record.step for record in records] == list(range(1, steps + 1))


def test_a_shorter_duration_is_refused_in_any_unit(tiny, tmp_path, shown):
    changes: dict[str, Any] = {"train": {"duration": "7 steps", "warmup": "0 steps"}}
    go(tiny, tmp_path, [], **changes)
    for new, told in (
        ("1 epochs", "1 epochs (= 6 steps)"),
        ("0.000001 s", "1e-06 s (about 0 steps)"),
    ):
        changes["train"]["duration"] = new
        where = f"train.duration: 7 steps -> {told}"
        with refuses(RecipeError, where=where, fix=["train.duration", "--fresh"]):
            go(tiny, tmp_path, shown, **changes)
    go(tiny, tmp_path, shown, **changes, checkpoint={"resume": "force"})


def test_a_time_is_compared_by_the_speed_so_far(tiny, tmp_path, shown):
    changes: dict[str, Any] = {"train": {"duration": "4 steps", "warmup": "0 steps"}}
    go(tiny, tmp_path, [], **changes)
    seconds = progress(tmp_path, 4)["seconds"]
    changes["train"]["duration"] = f"{seconds * 3:.6f} s"
    go(tiny, tmp_path, shown, **changes)
    (line,) = (line for line in shown if line.startswith("train.duration"))
    assert line == f"train.duration: 4 steps -> {float(f'{seconds * 3:.6f}')} s (about 12 steps)"


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_jump_of_the_learning_rate_is_told(schedule, tiny, tmp_path, shown):
    """Cosine to 0 in 4 steps, after 2 of warm-up; stretched to 12 it stands near its peak of 1e-3
    again.
    """
    go(tiny, tmp_path, [], train={"schedule": schedule})
    go(tiny, tmp_path, shown, train={"schedule": schedule, "duration": "12 steps"})
    told = lines_with("\n".join(shown), "learning rate", "12 steps")
    assert len(told) == (schedule == "cosine")
    if schedule == "cosine":
        after = read_records(tmp_path / "run" / "metrics.jsonl")[4].learning_rate
        assert after == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 2 / 10)))
