"""The gain of each technique: the same steps again, with one of them switched off at a time.

    python benchmarks/ablation.py --json out.json RECIPE [key=value ...]
    python benchmarks/ablation.py --json out.json --shape llama3-8b --tokenizer DIR --data rows.json [key=value ...]

Every variant runs in a process of its own through `tunesmith.bench`, in turns, `--rounds` times; the median counts. A
variant either changes a key of the recipe or replaces fast code by plain code, here and only here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith import build_model
from tunesmith.adapter import lora
from tunesmith.bench.measure import BenchPlan, measure
from tunesmith.bench.shape import shape_recipe, write_shape
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.data.batch import Batch
from tunesmith.methods import base
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.model import attention, fused
from tunesmith.model.shapes import find_shape


@dataclass(frozen=True)
class Variant:
    """One technique switched off.

    does: what replaces it. keys: of the recipe. patch: replaces the code. only: the device it is for.
    """

    does: str
    keys: tuple[str, ...] = ()
    patch: Callable[[], None] = lambda: None
    only: str = ""


def adapters_alone() -> None:
    """Every layer reads x itself, twice: once for W, once for A."""

    def alone(x: Tensor, linears: Any) -> list[Tensor]:
        def one(m: Any) -> Tensor:
            low = torch.nn.functional.linear(x, m.lora_A.to(x.dtype))
            return m.base(x) + torch.nn.functional.linear(low, m.lora_B.to(x.dtype)) * m.scaling

        return [one(m) if isinstance(m, lora.Lora) else m(x) for m in linears]

    lora.project = alone
    build_model.lora.project = alone


def transformers_parts() -> None:
    """Transformers' own norms, rotary embedding, gated MLP and projections."""
    fused.fuse_modules = lambda model, **_: 0


def head_everywhere() -> None:
    """The head computes logits for prompts and padding too."""

    def whole(self: SupervisedFineTuning, model: base.TrainModel, batch: Batch) -> base.MethodOutput:
        hidden, targets = model.hidden(batch), batch.targets.flatten()
        index, labels = base.supervised_positions(batch)
        rest = torch.nonzero_static(targets == base.IGNORE, size=targets.numel() - batch.supervised).squeeze(1)
        wasted = model.loss(hidden.index_select(0, rest), torch.zeros_like(rest))
        return base.MethodOutput(model.loss(hidden.index_select(0, index), labels) + wasted * 0, batch.supervised)

    SupervisedFineTuning.__call__ = whole


def whole_logits() -> None:
    """All logits of the supervised positions at once, and torch's cross-entropy in fp32."""

    def loss(self: base.TrainModel, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(hidden).float() * self.logit_scale
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    base.TrainModel.loss = loss


def document_by_document() -> None:
    """torch's scaled_dot_product_attention, one call a document."""
    attention.select_attention_backend = lambda *_, **__: ("sdpa", "switched on for this measurement")


def default_malloc() -> None:
    """glibc gives freed activations back to the kernel."""
    build_model.keep_freed_pages = lambda: False


VARIANTS = {
    "all on": Variant("nothing switched off"),
    "compile": Variant("no compiled layers, no compiled loss", keys=("train.compile=off",), only="cuda"),
    "attention": Variant("one document at a time", patch=document_by_document),
    "packing": Variant("one example a row, padded", keys=("data.pack=false",)),
    "grouped adapters": Variant("each layer reads its input for itself", patch=adapters_alone),
    "fused parts": Variant("Transformers' norms, rotary embedding and MLP", patch=transformers_parts),
    "head on labels only": Variant("the head on every position", patch=head_everywhere),
    "chunked loss": Variant("all logits at once, in fp32", patch=whole_logits),
    "no recompute": Variant("every layer run again in the backward", keys=("train.recompute=full",)),
    "freed pages": Variant("glibc's defaults", patch=default_malloc, only="cpu"),
    "bf16": Variant("weights and products in fp32", keys=("model.dtype=fp32",)),
    "dense base": Variant("the base in nf4", keys=("model.quantize=nf4",)),
    "bf16 base": Variant("the base in fp8", keys=("model.quantize=fp8",)),
}


def recipe(a: argparse.Namespace, folder: Path) -> Run:
    keys = [w for w in a.words if "=" in w] + list(VARIANTS[a.one].keys if a.one else ())
    if a.shape is None:
        return load_recipe(next(w for w in a.words if "=" not in w), keys)
    (folder / "model").mkdir()
    run = shape_recipe(folder / "model", data=a.data, rows="alpaca", overrides=keys)
    write_shape(folder / "model", find_shape(a.shape).config, a.tokenizer)
    return run


def one(a: argparse.Namespace) -> None:
    """Measure one variant in this process and print its figures as JSON."""
    VARIANTS[a.one].patch()
    with tempfile.TemporaryDirectory() as name:
        run = recipe(a, Path(name))
        (Path(name) / "run").mkdir()
        weights = "stored" if a.shape is None else "random"
        measured = measure(BenchPlan(run, a.steps, a.warmup, weights=weights), Path(name) / "run")
    print(json.dumps(vars(measured.figures)))


def main() -> None:
    """All variants in turns."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("words", nargs="*", metavar="RECIPE | key=value")
    p.add_argument("--shape")
    p.add_argument("--tokenizer")
    p.add_argument("--data")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants beside `all on`")
    p.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    p.add_argument("--json")
    a = p.parse_args()
    if a.one:
        one(a)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [n for n, v in VARIANTS.items() if v.only in ("", device) and (not a.only or n in a.only or n == "all on")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    command = [sys.executable, __file__, *(w for w in sys.argv[1:])]
    for turn in range(a.rounds):
        for name in chosen:
            done = subprocess.run([*command, "--one", name], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name}: failed\n{done.stderr[-800:]}", flush=True)
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            found[name].append(figures)
            print(f"round {turn + 1}: {name:22} {figures['tokens_per_second']:10,.0f} tokens/s", flush=True)
    table = {}
    for name, runs in found.items():
        if not runs:
            continue
        speed = statistics.median(r["tokens_per_second"] for r in runs)
        peak = max(r["peak_memory_gib"] for r in runs)
        table[name] = {"switched_to": VARIANTS[name].does, "tokens_per_second": speed, "peak_gib": peak}
    whole = table["all on"]["tokens_per_second"]
    print(f"\n{'off':22} {'tokens/s':>10} {'of all on':>10} {'GiB':>6}  in its place")
    for name, row in table.items():
        row["of_all_on"] = row["tokens_per_second"] / whole
        print(
            f"{name:22} {row['tokens_per_second']:10,.0f} {row['of_all_on']:10.1%} {row['peak_gib']:6.1f}  "
            f"{row['switched_to']}"
        )
    if a.json:
        Path(a.json).write_text(json.dumps({"command": sys.argv, "table": table, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
