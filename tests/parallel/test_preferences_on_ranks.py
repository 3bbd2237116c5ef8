"""What is learned from pairs and from labeled answers on several ranks is what one process learns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ranks import run_each, world_of
from recipes import WORDS, make_run, merge
from tunesmith.start.run import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 2
FULL = {"adapter": {"kind": "none"}}
IN_BACKWARD = {
    "clip_norm": None, "optimizer_in_backward": True, "micro_batch": "auto", "global_batch": "8 examples",
}  # fmt: skip
THREE = {"train": {"global_batch": "3 examples"}}
SHARD, TENSOR, HYBRID = {"shard": 2}, {"tensor": 2}, {"replicate": 2, "shard": 2}
Case = tuple[dict[str, Any], dict[str, int]]  # what is trained, how it is shared
CASES: dict[str, dict[str, Case]] = {
    "two ranks": {
        "dpo in full, shards": ({**FULL, "method": "dpo"}, SHARD),
        "kto, tensor": ({"method": "kto"}, TENSOR),
        "orpo, copies": ({"method": "orpo"}, {"replicate": 2}),
    },
    "more of two": {
        "dpo on nf4, shards": ({"method": "dpo", "model": {"quantize": "nf4"}}, SHARD),
        "dpo in the backward": ({**FULL, "method": "dpo", "train": IN_BACKWARD}, SHARD),
    },
    "four ranks": {
        "kto in full, 3 answers": ({**FULL, **THREE, "method": "kto"}, HYBRID),
        "dpo in full, 3 pairs": ({**FULL, **THREE, "method": "dpo"}, {"shard": 4}),
    },
}


def write_rows(folder: Path) -> None:
    pairs, answers = [], []
    for i in range(24):
        word = WORDS[i % 10]
        prompt = f"Say {word} {i}: "
        long = " ".join([word] * (i % 5 + 2))
        pairs.append({"prompt": prompt, "chosen": word, "rejected": long})
        answers.append({"prompt": prompt, "completion": (word, long)[i % 2], "label": i % 3 > 0})
    for name, rows in (("pairs", pairs), ("answers", answers)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines[:16]))
        (folder / f"{name}-held.jsonl").write_text("".join(lines[16:]))


def numbers(model: Path, folder: Path, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Numbers of each step. Ranks have a cache of their own: they score the answers of the base."""
    if "RANK" in os.environ:
        os.environ["TUNESMITH_CACHE"] = str(folder / "cache of ranks")
    is_kto = changes["method"] == "kto"
    name = "answers" if is_kto else "pairs"
    form = "feedback" if is_kto else "preference"
    base = {
        "data": {
            "train": {"source": str(folder / f"{name}.jsonl"), "format": form},
            "validation": {"source": str(folder / f"{name}-held.jsonl"), "format": form},
            "seq_len": 64,
        },
        "train": {"duration": f"{STEPS} steps", "warmup": "0 steps", "micro_batch": "128 tokens"},
        "validate": {"every": f"{STEPS} steps"},
        "checkpoint": {"every": None},
    }
    result = train(make_run(model, folder, **merge(base, changes)), quiet=True)
    found = []
    for record in result.records:
        values = {"loss": record.loss, "grad_norm": record.grad_norm}
        # Before the first update margins are 0 but for rounding, and their signs mean nothing.
        extra = {name: value for name, value in record.extra.items() if name != "reward_accuracy"}
        found.append({**values, "val_loss": record.val_loss or 0.0, **extra})
    return found


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(name, marks=() if name == "two ranks" else pytest.mark.nightly, id=name)
        for name in CASES
    ],
)
def test_numbers_are_those_of_one_process(group: str, tiny: Path, tmp_path: Path) -> None:
    """fp32 sums in another order: 1e-4 of a number, and 1e-5 where it is next to 0."""
    write_rows(tmp_path)
    alone, cases = {}, []
    for name, (what, mesh) in CASES[group].items():
        out = str(tmp_path / f"{name}, alone")
        alone[name] = numbers(tiny, tmp_path, {**what, "output_dir": out})
        changes = {**what, "parallel": mesh, "output_dir": str(tmp_path / name)}
        cases.append((tiny, tmp_path, changes))
    (world,) = {world_of(mesh) for _, mesh in CASES[group].values()}
    on_ranks = run_each(world, numbers, cases)[0]
    for name, many in zip(alone, on_ranks, strict=True):
        for one, several in zip(alone[name], many, strict=True):
            assert several == pytest.approx(one, rel=1e-4, abs=1e-5), name
