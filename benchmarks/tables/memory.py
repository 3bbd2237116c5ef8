"""The table of docs/memory.md: estimated device memory by model and training method.

    python benchmarks/tables/memory.py --write docs/memory.md
    python benchmarks/tables/memory.py --check docs/memory.md

With --check, the exit status is 1 if the page differs from the estimate. The estimate is the one
that `tunesmith train` uses for its plan. Nothing is downloaded or allocated: the shapes are those
of `tunesmith bench --shape`, and the models are built on the meta device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from generated import table, write_or_check
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapter.lora import attach_lora, count_adapter_parameters
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.arch.spec import ModelSpec, read_spec
from tunesmith.planning.memory import USABLE_SHARE, MemoryEstimator
from tunesmith.planning.run_plan import Machine

MODELS = ("llama3-3b", "llama3-8b", "llama3-70b")
METHODS = {
    "full": {"adapter": {"kind": "none"}},
    "full, 8-bit, stochastic": {
        "adapter": {"kind": "none"},
        "train": {"optimizer": "adamw-8bit", "master_weights": "stochastic"},
    },
    "LoRA r 16": {"adapter": {"rank": 16, "alpha": 32}},
    "QLoRA r 16 (nf4)": {"adapter": {"rank": 16, "alpha": 32}, "model": {"quantize": "nf4"}},
}
CARDS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "Spark": 119 * 2**30, "141 GB": 141e9}


def recipe(name: str, method: dict[str, dict[str, object]], recompute: str) -> Run:
    """Return a recipe with bf16 weights and the default sequence length of 2,048."""
    values = {
        "model": {"name": name, "dtype": "bf16", **method.get("model", {})},
        "adapter": method["adapter"],
        "data": {"train": {"source": "rows.jsonl"}},
        "train": {"recompute": recompute, **method.get("train", {})},
        "output_dir": "runs/none",
    }
    return from_mapping(values, where="memory.py", base=Path.cwd())


def trained_parameters(name: str, run: Run, spec: ModelSpec) -> int:
    """Return the number of parameters that the recipe trains."""
    if run.adapter.kind == "none":
        return spec.parameters
    values = dict(SHAPES[name].config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attach_lora(model, run.adapter, seed=run.train.seed)
    return count_adapter_parameters(model, run.adapter)


def cell(name: str, method: str) -> str:
    """Return a table cell for a model and a method: the memory in three cases, and the smallest GPU
    that has enough memory for the first case.

    The cases are 2,048 tokens with all layers recomputed, and 2,048 and 16,384 tokens without
    recomputed layers.
    """
    machine = Machine("cuda", 0, ("varlen", ""), (True, ""))
    spec = read_spec(SHAPES[name].config, where=name)
    keys = METHODS[method]
    least = recipe(name, keys, "full")
    trained = trained_parameters(name, least, spec)
    cases = (
        (least, 2048),
        (recipe(name, keys, "none"), 2048),
        (recipe(name, keys, "none"), 16384),
    )
    bytes_ = [
        MemoryEstimator(run, spec, machine, trained).estimate(tokens).total for run, tokens in cases
    ]
    cards = [card for card, size in CARDS.items() if bytes_[0] <= size * USABLE_SHARE]
    gib = " / ".join(f"{b / 2**30:,.0f}" for b in bytes_)
    return f"{gib}; {(*cards, 'several')[0]}"


def rows() -> Iterator[tuple[str, ...]]:
    """Yield a table row for each method."""
    for method in METHODS:
        yield (method, *(cell(name, method) for name in MODELS))


def page() -> str:
    """Return the table in Markdown."""
    models = [SHAPES[name].source.partition("/")[2] for name in MODELS]
    return table(("method", *models), rows())


if __name__ == "__main__":
    sys.exit(write_or_check(__doc__, "benchmarks/tables/memory.py", page))
