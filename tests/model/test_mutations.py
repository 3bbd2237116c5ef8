"""Folders damaged at random, by fixed seeds: each loads or is refused by name. No other error, no
hang.

Of `train` and `generate` as a whole, 750 further seeds were run by hand in the same way.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import peft_model
from time_limit import time_limit
from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Model
from tunesmith.errors import UsageError
from tunesmith.hub.fetch import fetch
from tunesmith.hub.model_files import read_model_files
from tunesmith.model import load
from tunesmith.model.tokenizer import eos_ids
from tunesmith.model.weights import load_weights

from .mutations import VALUES, mutate

SECONDS = 30  # a load takes a tenth of one


def use_model(folder: Path) -> None:
    """All that `train` reads of a model's folder."""
    model = Model(name=str(folder), dtype="fp32")
    files = read_model_files(fetch(model), model)
    eos_ids(folder, files.tokenizer)
    built = load.build_on_meta(files.config, model, rows=files.vocab_rows)
    load.materialize(built, torch.device("cpu"))
    load_weights(built, folder)


def outcome(use: Callable[[], Any], what: str) -> str:
    with time_limit(SECONDS, what):
        try:
            use()
        except UsageError as error:
            found = error
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            return "loaded"
    assert found.where, what
    assert found.fix, what
    return "refused"


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["50GB", "100KB"], ids=["one file", "shards"])
def test_a_damaged_model_loads_or_is_refused_by_name(
    shards: str, tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    good = Path(shutil.copytree(tiny, tmp_path / "good"))
    (good / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(good, max_shard_size=shards)
    (good / "special_tokens_map.json").write_text(
        '{"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}'
    )
    found: Counter[str] = Counter()
    for seed in range(80):
        folder = Path(shutil.copytree(good, tmp_path / f"{seed}"))
        what = mutate(folder, seed)
        found[outcome(lambda folder=folder: use_model(folder), what)] += 1
        shutil.rmtree(folder)
    assert min(found["loaded"], found["refused"]) > 5, found


@pytest.mark.slow
def test_a_damaged_adapter_loads_or_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    peft_model(tiny).save_pretrained(tmp_path / "good")
    spec = Model(name=str(tiny), dtype="fp32")
    base = load.build_on_meta(load.load_configs(tiny, spec)[0], spec)
    load.materialize(base, torch.device("cpu"))
    load_weights(base, tiny)
    lora.attach_lora(base, peft_files.read_adapter(tmp_path / "good"), seed=0)
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora")
    cases: list[Any] = [*product(keys, VALUES), *range(80)]
    found: Counter[str] = Counter()
    for n, case in enumerate(cases):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / f"{n}"))
        if isinstance(case, tuple):
            file = folder / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), case[0]: case[1]}))
            what = f"{case[0]}: {str(case[1])[:40]}"
        else:
            what = mutate(folder, case)
        found[outcome(lambda folder=folder: peft_files.load_adapter(base, folder), what)] += 1
        shutil.rmtree(folder)
    assert min(found["loaded"], found["refused"]) > 20, found
