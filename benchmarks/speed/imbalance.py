"""The share of time that data ranks wait for the costliest micro batch, from the batches alone:
nothing is trained.

    python benchmarks/speed/imbalance.py --data ROWS --tokenizer DIR [--ranks 2 16] [--shape llama3-8b] [--json FILE]

A micro batch costs its tokens and its attention, by the model's FLOPs. Sharded ranks meet at every
micro batch, so a micro step takes as long as its costliest. Three ways to share the examples of a
step, packed into micro batches of `--tokens`:

    dealt      the examples are dealt to the ranks in order, and each rank packs its own (a
    distributed sampler) in order   the micro batches of one rank are dealt in order balanced   as
    the loader does

Given are the mean over the steps of an epoch, and the number of micro batches that a rank takes a
step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.data.loader import Loader
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.hub.fetch import fetch_without_weights
from tunesmith.model.shapes import SHAPES, find_shape
from tunesmith.model.spec import ModelSpec, flops, read_spec
from tunesmith.model.tokenizer import eos_ids, load_tokenizer
from tunesmith.units import Size


def attention_weight(spec: ModelSpec) -> float:
    """FLOPs of one attended pair over those of a token's matmuls, for LoRA with three of four
    tokens supervised.
    """
    one, two = (flops(spec, [n], 0, trained="lora") for n in (1, 2))  # 1 and 3 pairs
    pair = two - 2 * one
    return pair / (flops(spec, [1] * 4, 3, trained="lora") / 4 - pair)


def read_rows(a: argparse.Namespace, batch: str, cache: Path) -> TrainingData:
    """The rows as a run trains on them."""
    values = {
        "model": {"name": a.tokenizer},
        "data": {
            "train": {"source": str(Path(a.data).resolve()), "format": a.format},
            "seq_len": a.seq,
        },
        "train": {"global_batch": batch},
        "output_dir": str(cache / "run"),
    }
    run: Run = from_mapping(values, where="imbalance", base=Path.cwd())
    folder = fetch_without_weights(a.tokenizer)
    tokenizer = load_tokenizer(folder, run.model)
    return prepare_data(run, tokenizer, eos_ids(folder, tokenizer), len(tokenizer), cache=cache)


def idle_share(micro_steps: list[list[float]], ranks: int) -> float:
    """Share of the ranks' time without work; micro_steps are the costs on each rank that has work."""
    return 1 - sum(map(sum, micro_steps)) / (ranks * sum(map(max, micro_steps)))


def naive(
    data: TrainingData, step: int, tokens: int, ranks: int, weight: float
) -> dict[str, list[list[float]]]:
    """Costs by micro step of the two ways without balancing."""

    def groups(members: np.ndarray) -> list[float]:
        lengths = data.train.lengths[members]
        bins = best_fit_decreasing(lengths, max(tokens, int(lengths.max(initial=0))))
        return [float((n + weight * n * (n + 1) / 2).sum()) for n in (lengths[b] for b in bins)]

    members = np.array(data.schedule.examples(step))
    own = [groups(members[r::ranks]) for r in range(ranks)]
    whole = groups(members)
    return {
        "dealt": [[g[k] for g in own if k < len(g)] for k in range(max(map(len, own)))],
        "in order": [whole[k : k + ranks] for k in range(0, len(whole), ranks)],
    }


def measure(data: TrainingData, tokens: int, ranks: int, weight: float) -> dict[str, Any]:
    """Mean idle share and micro batches a rank takes, of each way over one epoch."""
    found: dict[str, list[tuple[float, int]]] = {}
    loader = Loader(
        data.train,
        data.schedule,
        pad_id=0,
        micro_batch=Size(tokens, "tokens"),
        share=(0, ranks),
        attention_weight=weight,
    )
    for step in range(data.schedule.steps_per_epoch(0)):
        for way, costs in naive(data, step, tokens, ranks, weight).items():
            found.setdefault(way, []).append((idle_share(costs, ranks), len(costs)))
        batch = loader.batch(step)
        found.setdefault("balanced", []).append((batch.idle_share, len(batch.micro)))
    loader.close()
    means = {way: np.mean(values, axis=0).tolist() for way, values in found.items()}
    return {
        way: {"idle_share": idle, "micro_batches": count} for way, (idle, count) in means.items()
    }


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--data", required=True, help="rows, in the form that --format names")
    p.add_argument("--format", default="alpaca", help="as in a recipe")
    p.add_argument("--tokenizer", required=True, help="a model's folder or Hub id")
    p.add_argument("--ranks", type=int, nargs="+", default=[2, 16])
    p.add_argument(
        "--batch", nargs="+", default=["64 examples", "128 examples"], help="global batches"
    )
    p.add_argument(
        "--tokens", type=int, nargs="+", default=[2048, 8192, 16384], help="of a micro batch"
    )
    p.add_argument("--seq", type=int, default=2048)
    p.add_argument("--shape", default="llama3-8b", choices=list(SHAPES))
    p.add_argument("--json")
    a = p.parse_args()
    weight = attention_weight(read_spec(find_shape(a.shape).config, where=a.shape))
    rows = []
    print(f"one attended pair costs {weight:.2e} of a token's matmuls ({a.shape}, LoRA)")
    print(
        f"{'global batch':>14} {'micro batch':>11} {'ranks':>5} {'dealt':>16} {'in order':>16} {'balanced':>16}"
    )
    with tempfile.TemporaryDirectory() as cache:
        for batch in a.batch:
            data = read_rows(a, batch, Path(cache))
            for tokens, ranks in product(a.tokens, a.ranks):
                found = measure(data, tokens, ranks, weight)
                rows.append({"global_batch": batch, "tokens": tokens, "ranks": ranks, **found})
                cells = (
                    f"{f['idle_share']:7.1%} in {f['micro_batches']:5.2f}" for f in found.values()
                )
                print(f"{batch:>14} {tokens:11} {ranks:5} {' '.join(cells)}", flush=True)
    if a.json:
        Path(a.json).write_text(
            json.dumps({"shape": a.shape, "attention_weight": weight, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
