"""What a technique brings that no key switches off: the same steps again, with other code in its
place.

    python benchmarks/speed/ablation.py [--rounds 2] [--only NAME ...] [--json out.json] BENCH...

BENCH is what follows `tunesmith bench`: a recipe or --shape, --tokenizer and --data, key=value,
--steps. What keys switch is measured by `tunesmith bench --ablation`, whose runner this shares.
FlashAttention 3 and 4 take the place of torch's own where their packages are installed and this
torch knows them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith import build_model
from tunesmith.adapter import lora
from tunesmith.cli.main import main as tunesmith
from tunesmith.data.batches.batch import Batch
from tunesmith.methods import base
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.model import attention, fused
from tunesmith.tools.bench.ablation import BASELINE, lines_of, run_in_turns, table_of


def adapters_alone() -> None:
    """Every layer reads x itself, twice: once for W, once for A."""

    def alone(x: Tensor, linears: Any) -> list[Tensor]:
        def one(m: Any) -> Tensor:
            low = torch.nn.functional.linear(x, m.lora_A.to(x.dtype))
            return m.base(x) + torch.nn.functional.linear(low, m.lora_B.to(x.dtype)) * m.scaling

        return [one(m) if isinstance(m, lora.LoraLinear) else m(x) for m in linears]

    lora.project = alone
    build_model.lora.project = alone


def transformers_parts() -> None:
    """Transformers' own norms, rotary embedding, gated MLP and projections."""
    fused.fuse_modules = lambda model, **_: 0


def head_everywhere() -> None:
    """The head computes logits for prompts and padding too."""

    def whole(
        self: SupervisedFineTuning,
        model: base.TrainModel,
        batch: Batch,
        totals: base.StepTotals | None = None,
    ) -> base.MethodOutput:
        hidden, targets = model.hidden(batch), batch.targets.flatten()
        index, labels = base.supervised_positions(batch)
        rest = torch.nonzero_static(
            targets == base.IGNORE, size=targets.numel() - batch.supervised
        ).squeeze(1)
        wasted = model.loss(hidden.index_select(0, rest), torch.zeros_like(rest))
        return base.MethodOutput(
            model.loss(hidden.index_select(0, index), labels) + wasted * 0, batch.supervised
        )

    SupervisedFineTuning.__call__ = whole


def whole_logits() -> None:
    """All logits of the supervised positions at once, and torch's cross-entropy in fp32."""

    def loss(self: base.TrainModel, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(hidden).float() * self.logit_scale
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    base.TrainModel.loss = loss


def document_by_document() -> None:
    """torch's scaled_dot_product_attention, one call a document."""
    attention.select_attention_backend = lambda *_, **__: (
        "sdpa",
        "switched on for this measurement",
    )


def default_malloc() -> None:
    """glibc gives freed activations back to the kernel."""
    build_model.keep_freed_pages = lambda: False


def flash_attention(version: str) -> Callable[[], None]:
    """Activates FlashAttention "FA3" or "FA4" in place of torch's own, below torch's varlen
    attention.
    """

    def activate() -> None:
        torch.nn.attention.activate_flash_attention_impl(version)

    return activate


class Replacement(NamedTuple):
    """Other code in place of a technique.

    replace: changes this process. does: what it does instead. only: its device. package: the module
    that it needs.
    """

    replace: Callable[[], None]
    does: str
    only: str = ""
    package: str = ""

    def missing(self, device: str) -> str:
        """Why it cannot be measured here, or ""."""
        if self.only not in ("", device):
            return f"it is for {self.only}"
        if self.package and not is_installed(self.package):
            return f"{self.package} is not installed"
        return ""


def is_installed(module: str) -> bool:
    """Whether a module, or one in a package, can be imported; nothing but its packages is."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


REPLACEMENTS = {
    "attention": Replacement(document_by_document, "one document at a time"),
    "grouped adapters": Replacement(adapters_alone, "each layer reads its input for itself"),
    "fused modules": Replacement(
        transformers_parts, "Transformers' norms, rotary embedding and MLP"
    ),
    "head on labels only": Replacement(head_everywhere, "the head on every position"),
    "chunked loss": Replacement(whole_logits, "all logits at once, in fp32"),
    "freed pages": Replacement(default_malloc, "glibc's defaults", only="cpu"),
    "FlashAttention 3": Replacement(
        flash_attention("FA3"), "in place of torch's", "cuda", "flash_attn_interface"
    ),
    "FlashAttention 4": Replacement(
        flash_attention("FA4"), "in place of torch's", "cuda", "flash_attn.cute.interface"
    ),
}


def main() -> None:
    """All of them in turns; with --one one of them, in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(REPLACEMENTS), help="these alone")
    parser.add_argument("--one", choices=list(REPLACEMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options, bench = parser.parse_known_args()
    if options.one:
        REPLACEMENTS[options.one].replace()
        sys.exit(tunesmith(["bench", *bench, "--json", options.json]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    commands = {BASELINE: [sys.executable, "-m", "tunesmith", "bench", *bench]}
    changes = {BASELINE: ""}
    left_out = {}
    for name in options.only or REPLACEMENTS:
        replacement = REPLACEMENTS[name]
        if reason := replacement.missing(device):
            left_out[name] = reason
            continue
        commands[name] = [sys.executable, __file__, "--one", name, *bench]
        changes[name] = replacement.does
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    report: dict[str, Any] = {"command": sys.argv, "left_out": left_out}
    if len(commands) > 1:
        runs = run_in_turns(commands, rounds=options.rounds)
        table = table_of(runs)
        print(*lines_of(table, changes), sep="\n")
        report |= {"changes": changes, "table": table, "runs": runs}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
