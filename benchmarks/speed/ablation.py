"""The gain of each technique: the same steps again, with a key changed or with other code in its
place.

    python benchmarks/speed/ablation.py BENCH... [--rounds 2] [--only NAME ...] [--json out.json]

BENCH is what follows `tunesmith bench`: a recipe or --shape, --tokenizer and --data, key=value,
--steps. A NAME with = in it is a key and its other value, such as data.pack=false. Every variant
runs in a process of its own, in turns, several rounds; the median counts. A shared machine drifts
by more than most techniques bring, so compare only within one call. FlashAttention 3 and 4 take the
place of torch's own where their packages are installed and this torch knows them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith import build_model
from tunesmith.adapter import lora
from tunesmith.cli.main import main as tunesmith
from tunesmith.data.batches.batch import Batch
from tunesmith.formats import nf4
from tunesmith.methods import base
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.model import attention, fused, packed_attention
from tunesmith.quant import expert_rows, grouped_experts
from tunesmith.units import ratio

BASELINE = "as given"


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
    """Activates FlashAttention "FA3" or "FA4" in place of torch's own and of ours, below torch's
    varlen attention.
    """

    def activate() -> None:
        attention_of_torch()
        torch.nn.attention.activate_flash_attention_impl(version)

    return activate


def attention_of_torch() -> None:
    """The kernel for packed documents that torch would take."""
    packed_attention.takes = lambda *_: False


def attention_everywhere() -> None:
    """Use our kernels for any number of query heads per key head, also where not measured."""
    packed_attention.MEASURED_GROUPS = range(1, 128)


def nf4_of_bitsandbytes() -> None:
    """Dequantize nf4 with the kernel of bitsandbytes."""
    nf4._has_kernel = lambda _: False


def experts_by_row() -> None:
    """The updates of experts are products of all rows, and torch's kernels move rows."""
    grouped_experts.DENSE_COLUMNS = 0
    expert_rows._has_kernels = lambda _: False


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
    "attention kernels": Replacement(attention_of_torch, "that of torch", only="cuda"),
    "attention everywhere": Replacement(
        attention_everywhere, "ours with any number of query heads a key head", only="cuda"
    ),
    "nf4 kernel": Replacement(nf4_of_bitsandbytes, "that of bitsandbytes", only="cuda"),
    "experts by token": Replacement(experts_by_row, "updates by row, torch's kernels", only="cuda"),
    "FlashAttention 3": Replacement(
        flash_attention("FA3"), "in place of ours", "cuda", "flash_attn_interface"
    ),
    "FlashAttention 4": Replacement(
        flash_attention("FA4"), "in place of ours", "cuda", "flash_attn.cute.interface"
    ),
}


def run_in_turns(
    commands: Mapping[str, Sequence[str]], *, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run each command `rounds` times, in turns; the reports by name.

    A command writes its report to the file that follows as `--json FILE`. Its speed is printed on
    stdout; of one that fails the end of what it wrote, and it leaves no report.
    """
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(prefix="tunesmith-turns-") as folder:
        file = Path(folder) / "report.json"
        # In turns: a machine that slows down in an hour slows all variants alike.
        for turn in range(1, rounds + 1):
            for name, command in commands.items():
                # A process of its own: compiled code, settings and memory of one variant do not
                # reach the next.
                process = subprocess.run(
                    [*command, "--json", str(file)], capture_output=True, text=True, check=False
                )
                if process.returncode:
                    failure = f"failed with {process.returncode}\n{process.stderr[-800:]}"
                    print(f"round {turn}: {name} {failure}", flush=True)
                    # A variant that fails is left out of the table; the others are still measured.
                    continue
                report = json.loads(file.read_text(encoding="utf-8"))
                reports[name].append(report)
                speed = report["figures"]["tokens_per_second"]
                print(f"round {turn}: {name:26} {speed:10,.0f} tokens/s", flush=True)
    return reports


def table_of(reports: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Summarize each variant: median tokens/s, ratio to the baseline, peak GiB, last loss.

    The process ends where the baseline failed.
    """
    # The median of the rounds for speed, the largest for memory.
    table: dict[str, dict[str, float]] = {}
    for name, variant_reports in reports.items():
        runs = [report["figures"] for report in variant_reports]
        if runs:
            table[name] = {
                "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
                "peak_memory_gib": max(run["peak_memory_gib"] for run in runs),
                "last_loss": runs[-1]["last_loss"],
            }
    if BASELINE not in table:
        sys.exit("the unchanged recipe could not be measured; see the messages above")
    for row in table.values():
        row["of_baseline"] = ratio(row["tokens_per_second"], table[BASELINE]["tokens_per_second"])
    return table


def lines_of(table: Mapping[str, Mapping[str, float]], changes: Mapping[str, str]) -> Iterator[str]:
    """The table as text; `changes` holds what each variant has changed."""
    yield f"{'':26} {'tokens/s':>10} {'of recipe':>10} {'GiB':>6} {'loss':>8}"
    for name, row in table.items():
        speed = f"{row['tokens_per_second']:10,.0f} {row['of_baseline']:10.1%}"
        figures = f"{speed} {row['peak_memory_gib']:6.1f} {row['last_loss']:8.4f}"
        yield f"{name:26} {figures}  {changes[name]}"


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and BENCH; the process ends where a NAME is unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--one", choices=list(REPLACEMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options, bench = parser.parse_known_args(words)
    for name in options.only or ():
        if name not in REPLACEMENTS and "=" not in name:
            known = ", ".join(REPLACEMENTS)
            parser.error(
                f"--only {name}: it is none of {known}, and no key=value; a recipe stands before"
                " --only"
            )
    return options, bench


def main() -> None:
    """All of them in turns; with --one one of them, in this process."""
    options, bench = parse()
    if options.one:
        REPLACEMENTS[options.one].replace()
        sys.exit(tunesmith(["bench", *bench, "--json", options.json]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    commands = {BASELINE: [sys.executable, "-m", "tunesmith", "bench", *bench]}
    changes = {BASELINE: ""}
    left_out = {}
    for name in options.only or REPLACEMENTS:
        if "=" in name:
            commands[name] = [*commands[BASELINE], name]
            changes[name] = name
            continue
        replacement = REPLACEMENTS[name]
        # A variant that --only names runs on any device, so that it can be tested on a CPU.
        if reason := replacement.missing(replacement.only if options.only else device):
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
