"""What a technique brings that no key switches off: the same steps again, its fast code replaced by plain code.

    python benchmarks/ablation.py [--rounds 2] [--only NAME ...] [--json out.json] BENCH...

BENCH is what follows `tunesmith bench`: a recipe or --shape, --tokenizer and --data, key=value, --steps. What keys switch
is measured by `tunesmith bench --ablation`, whose runner this shares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith import build_model
from tunesmith.adapter import lora
from tunesmith.bench.ablation import BASELINE, lines_of, run_in_turns, table_of
from tunesmith.cli.main import main as tunesmith
from tunesmith.data.batch import Batch
from tunesmith.methods import base
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.model import attention, fused


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


class Plain(NamedTuple):
    """Plain code in place of a technique. replace: changes this process. does: what it does instead. only: its device."""

    replace: Callable[[], None]
    does: str
    only: str = ""


PLAIN = {
    "attention": Plain(document_by_document, "one document at a time"),
    "grouped adapters": Plain(adapters_alone, "each layer reads its input for itself"),
    "fused modules": Plain(transformers_parts, "Transformers' norms, rotary embedding and MLP"),
    "head on labels only": Plain(head_everywhere, "the head on every position"),
    "chunked loss": Plain(whole_logits, "all logits at once, in fp32"),
    "freed pages": Plain(default_malloc, "glibc's defaults", only="cpu"),
}


def main() -> None:
    """All of them in turns; with --one one of them, in this process."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--only", nargs="+", choices=list(PLAIN), help="these alone")
    p.add_argument("--one", choices=list(PLAIN), help=argparse.SUPPRESS)
    p.add_argument("--json")
    a, bench = p.parse_known_args()
    if a.one:
        PLAIN[a.one].replace()
        sys.exit(tunesmith(["bench", *bench, "--json", a.json]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [name for name, plain in PLAIN.items() if plain.only in ("", device) and name in (a.only or PLAIN)]
    commands = {name: [sys.executable, __file__, "--one", name, *bench] for name in chosen}
    commands = {BASELINE: [sys.executable, "-m", "tunesmith", "bench", *bench], **commands}
    found = run_in_turns(commands, rounds=a.rounds, say=lambda text: print(text, flush=True))
    table, changes = table_of(found), {BASELINE: "", **{name: PLAIN[name].does for name in chosen}}
    print(*lines_of(table, changes), sep="\n")
    if a.json:
        report = {"command": sys.argv, "changes": changes, "table": table, "runs": found}
        Path(a.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
