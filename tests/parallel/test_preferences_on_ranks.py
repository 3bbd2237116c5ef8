"""What is learned from pairs and from labeled answers on several ranks is what one process learns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ranks import free_port, run_ranks, world_of
from recipes import WORDS, make_run, merge
from tunesmith.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 2
FULL = {"adapter": {"kind": "none"}}
IN_BACKWARD = {
    "clip_norm": None,
    "optimizer_in_backward": True,
    "micro_batch": "auto",
    "global_batch": "8 examples",
}
SHARD, TENSOR, HYBRID = {"shard": 2}, {"tensor": 2}, {"replicate": 2, "shard": 2}
Case = tuple[dict[str, Any], dict[str, int]]  # what is trained, how it is shared
CASES: dict[str, dict[str, Case]] = {
    "two ranks": {
        "dpo in full, shards": ({**FULL, "method": "dpo"}, SHARD),
        "kto, tensor": ({"method": "kto"}, TENSOR),
        "orpo, copies": ({"method": "orpo"}, {"replicate": 2}),
    },
    "more of two": {
        "dpo, copies": ({"method": "dpo"}, {"replicate": 2}),
        "dpo on nf4, shards": ({"method": "dpo", "model": {"quantize": "nf4"}}, SHARD),
        "dpo, tensor": ({"method": "dpo"}, TENSOR),
        "dpo in the backward": ({**FULL, "method": "dpo", "train": IN_BACKWARD}, SHARD),
        "simpo in full, shards": ({**FULL, "method": "simpo"}, SHARD),
    },
    "four ranks": {
        "kto, 6 answers": ({"method": "kto", "train": {"global_batch": "6 examples"}}, HYBRID),
        "kto in full, 3 answers": (
            {**FULL, "method": "kto", "train": {"global_batch": "3 examples"}},
            HYBRID,
        ),
        "dpo in full, 3 pairs": (
            {**FULL, "method": "dpo", "train": {"global_batch": "3 examples"}},
            {"shard": 4},
        ),
        "orpo, copies of shards": ({"method": "orpo"}, HYBRID),
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
    """Loss, gradient norm and the method's metrics of each step."""
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


def numbers_of_all(
    model: Path, folder: Path, cases: list[dict[str, Any]], ports: list[int]
) -> list[list[dict[str, float]]]:
    """Of several recipes, one after the other in the same processes.

    With a cache of their own: these ranks score the answers of the base themselves.
    """
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache of ranks")
    found = []
    for changes, port in zip(cases, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        found.append(numbers(model, folder, changes))
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
        cases.append({**what, "parallel": mesh, "output_dir": str(tmp_path / name)})
    (world,) = {world_of(mesh) for _, mesh in CASES[group].values()}
    ports = [free_port() for _ in cases]
    on_ranks = run_ranks(world, numbers_of_all, tiny, tmp_path, cases, ports)[0]
    for name, many in zip(alone, on_ranks, strict=True):
        for one, several in zip(alone[name], many, strict=True):
            assert several == pytest.approx(one, rel=1e-4, abs=1e-5), name
