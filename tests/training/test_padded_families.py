"""Families whose layers do not keep packed documents apart: each sequence has a row, in training and
in whatever else is computed beside it.

Runs of small and of large micro batches give the same numbers only if no document sees another.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer
from recipes import make_run, write_feedback, write_pairs
from tunesmith.metrics.record import StepRecord
from tunesmith.model import tiny_model
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

FULL = {"adapter": {"kind": "none"}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # model type, method, what else
    "sft on a recurrent model": ("rwkv", "sft", FULL),
    "dpo on a recurrent model": ("rwkv", "dpo", FULL),
    "kto in full": ("falcon", "kto", FULL),
    "dpo": ("falcon", "dpo", {}),
}


def write_model(model_type: str, folder: Path) -> Path:
    """A tiny random model of a type, with a tokenizer of bytes."""
    config = tiny_model.shrink(AutoConfig.for_model(model_type))
    tokenizer = byte_tokenizer()
    config.vocab_size = 272
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def records(model: Path, folder: Path, method: str, **changes: Any) -> list[StepRecord]:
    """Two steps of four examples, with held-out rows."""
    settings: dict[str, Any] = {
        "train": {"duration": "2 steps", "global_batch": "4 examples", "warmup": "0 steps"},
        "validate": {"every": "1 steps"},
        "data": {"seq_len": 96},
    }
    if method != "sft":
        write, form = write_pairs, "preference"
        if method == "kto":
            write, form = write_feedback, "feedback"
        sources = {}
        for name in ("train", "validation"):
            path = write(folder / f"{name}.jsonl", 8, first=0 if name == "train" else 40)
            sources[name] = {"source": str(path), "format": form}
        settings["data"] |= sources
        settings["method"] = method
    for section, values in changes.items():
        known = settings.get(section)
        settings[section] = {**known, **values} if isinstance(known, dict) else values
    return train(make_run(model, folder, **settings), quiet=True).records


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all runs: to measure a recurrent model on meta takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    model_type, method, changes = CASES[name]
    model = write_model(model_type, tmp_path / "model")
    numbers = []
    least = 192 if method == "dpo" else 96
    for size in (f"{least} tokens", "2048 tokens"):
        # The base scores its answers anew, in the layout of this run.
        shutil.rmtree(cache / "tokens", ignore_errors=True)
        of_run = records(
            model,
            tmp_path,
            method,
            output_dir=str(tmp_path / size),
            **{**changes, "train": {"micro_batch": size}},
        )
        numbers.append(of_run)
    for one, other in zip(*numbers, strict=True):
        expected = {"loss": one.loss, "grad_norm": one.grad_norm, "val_loss": one.val_loss}
        values = {"loss": other.loss, "grad_norm": other.grad_norm, "val_loss": other.val_loss}
        # Before the first update margins are 0 but for rounding.
        keys = [key for key in one.extra if not key.endswith("reward_accuracy")]
        expected |= {key: one.extra[key] for key in keys}
        values |= {key: other.extra[key] for key in keys}
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    if method == "dpo":
        assert numbers[0][0].loss == pytest.approx(math.log(2), abs=1e-5)
