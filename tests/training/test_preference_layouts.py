"""A run that learns from preferences has the same numbers in each layout: packed or not, in any micro
batch, recomputed or compiled.

Ranks: tests/parallel/test_preferences_on_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import tunesmith
from conftest import byte_tokenizer
from recipes import make_run, merge, write_feedback, write_pairs, write_rows
from tunesmith.model import tiny_model

pytestmark = pytest.mark.slow

FULL = {"adapter": {"kind": "none"}}
METHODS: dict[str, dict[str, Any]] = {
    "dpo and cross-entropy": {"method": {"name": "dpo", "sft_weight": 0.5}},
    "kto in full": {"method": "kto", **FULL},
    "orpo": {"method": "orpo"},
    "dpo in full": {"method": "dpo", **FULL},
    "simpo in full": {"method": "simpo", **FULL},
    "kto": {"method": "kto"},
}
# Families whose layers do not keep packed documents apart: each sequence has a row.
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "sft on a recurrent model": ("rwkv", {"method": "sft", **FULL}),
    "dpo on a recurrent model": ("rwkv", {"method": "dpo", **FULL}),
    "kto in full on padded rows": ("falcon", {"method": "kto", **FULL}),
    "dpo on padded rows": ("falcon", {"method": "dpo"}),
}
TIER_1 = ("dpo and cross-entropy", "kto in full")
NAMES = [
    pytest.param(name, id=name, marks=() if name in TIER_1 else pytest.mark.nightly)
    for name in (*METHODS, *PADDED)
]
# Each layout changes what the others leave: one by which the numbers change shows it, whatever else
# is changed beside it.
SMALL: dict[str, Any] = {"train": {"micro_batch": "1 examples", "recompute": "full"}}
UNPACKED: dict[str, Any] = {"data": {"pack": False}, "train": {"micro_batch": "3 examples"}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one example at a time, recomputed": SMALL,
    "unpacked, three examples": UNPACKED,
}
# Of one method: layers and their loss are the same code in all. Traced, not compiled: that the
# compiler itself answers alike is shown in runtime/test_compilation.py. Few graphs: by documents,
# each layer is cut in two.
COMPILED = {"train": {"compile": "on"}, "model": {"attention": "eager"}}


def numbers(tiny: Path, folder: Path, name: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Loss, gradient norm and the method's metrics of each of two steps, and of held-out rows."""
    is_kto = changes["method"] == "kto"
    write, form = (write_feedback, "feedback") if is_kto else (write_pairs, "preference")
    sources = {}
    for split, first in (("train", 0), ("validation", 40)):
        file = folder / f"{split}-{form}.jsonl"
        if changes["method"] == "sft":
            sources[split] = {"source": str(write_rows(file, 12)), "format": "prompt-completion"}
        else:
            sources[split] = {"source": str(write(file, 12, first)), "format": form}
    base = {
        "data": {**sources, "seq_len": 96},
        "train": {
            "duration": "2 steps",
            "global_batch": "8 examples",
            "micro_batch": "192 tokens",
            "warmup": "0 steps",
        },
        "validate": {"every": "2 steps"},
        "checkpoint": {"every": None},
        "output_dir": str(folder / name),
    }
    found = []
    for record in tunesmith.train(make_run(tiny, folder, **merge(base, changes))).records:
        values = {"loss": record.loss, "grad_norm": record.grad_norm}
        # Before the first update margins are 0 but for rounding, and their signs mean nothing.
        extra = {name: value for name, value in record.extra.items() if name != "reward_accuracy"}
        found.append({**values, "val_loss": record.val_loss or 0.0, **extra})
    return found


def differences(one: list[dict[str, float]], other: list[dict[str, float]]) -> list[float]:
    """Of each number, relative to it; of one next to 0, in ten of these."""
    found = []
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            found.append(abs(right[name] - value) / max(abs(value), 0.1))
    return found


def write_model(model_type: str, folder: Path) -> Path:
    """A tiny random model of a type, with a tokenizer of bytes."""
    config, tokenizer = tiny_model.shrink(AutoConfig.for_model(model_type)), byte_tokenizer()
    config.vocab_size = 272
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_changes_nothing(name, tiny, tmp_path, monkeypatch, request):
    """1e-4: fp32 sums in another order."""
    model, layouts = tiny, dict(LAYOUTS)
    if name in PADDED:
        model_type, what = PADDED[name]
        model = write_model(model_type, tmp_path / "model")
        layouts = {"one example at a time": {"train": {"micro_batch": "1 examples"}}}
    else:
        what = METHODS[name]
    if name == "dpo and cross-entropy":
        request.getfixturevalue("eager_compiler")
        layouts["compiled"] = COMPILED
    found = {}
    for layout, changes in {"packed": {}, **layouts}.items():
        # The base scores its answers in the layout of each run, not in one of other code before.
        monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / f"cache, {layout}"))
        found[layout] = numbers(model, tmp_path, layout, merge(what, changes))
    largest = {layout: max(differences(found["packed"], found[layout])) for layout in layouts}
    assert max(largest.values()) < 1e-4, largest
