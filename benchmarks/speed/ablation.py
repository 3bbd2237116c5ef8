"""Measurement of the gain of each technique (ablation).

    python benchmarks/speed/ablation.py BENCH... [--rounds 2] [--only NAME ...] [--json out.json]

The same steps run with the unchanged recipe and with variants. A variant replaces the code of one
technique, or changes one key of the recipe. BENCH are the arguments of `tunesmith bench`: a recipe,
or --shape, --tokenizer and --data, then key=value and --steps. NAME is the name of a replacement,
or a changed key such as data.pack=false.

Each variant runs in a new process. The variants run in turns for several rounds, and the median of
the rounds is reported. Compare only results of the same call, because the speed of a shared machine
changes by more than the gain of most techniques. FlashAttention 3 and 4 are measured if their
packages are installed. They need a version of torch that supports them.
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
from tunesmith import train_model as base
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch
from tunesmith.cli.main import main as tunesmith
from tunesmith.formats import nf4
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.model.layers import attention, fused, packed_attention
from tunesmith.quant import expert_rows, grouped_experts
from tunesmith.units import ratio

BASELINE = "as given"


def adapters_alone() -> None:
    """Let every layer read its input x separately, once for W and once for A."""

    def alone(x: Tensor, linears: Any) -> list[Tensor]:
        def one(m: Any) -> Tensor:
            low = torch.nn.functional.linear(x, m.lora_A.to(x.dtype))
            return m.base(x) + torch.nn.functional.linear(low, m.lora_B.to(x.dtype)) * m.scaling

        return [one(m) if isinstance(m, lora.LoraLinear) else m(x) for m in linears]

    lora.project = alone
    build_model.lora.project = alone


def transformers_parts() -> None:
    """Use Transformers' own norms, rotary embedding, gated MLP and projections."""
    fused.fuse_modules = lambda model, **_: 0


def head_everywhere() -> None:
    """Let the head compute logits at prompts and padding too."""

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
    """Compute all logits of the supervised positions at once, and torch's cross-entropy in fp32."""

    def loss(self: base.TrainModel, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(hidden).float() * self.logit_scale
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    base.TrainModel.loss = loss


def document_by_document() -> None:
    """Use torch's scaled_dot_product_attention, with one call per document."""
    attention.select_attention_backend = lambda *_, **__: (
        "sdpa",
        "selected for this measurement",
    )


def default_malloc() -> None:
    """Let glibc return freed activations to the kernel, as it does by default."""
    build_model.keep_freed_pages = lambda: False


def flash_attention(version: str) -> Callable[[], None]:
    """Return a function that selects FlashAttention for torch's varlen attention.

    The function also turns off our attention kernels.

    Args:
        version: "FA3" or "FA4".
    """

    def activate() -> None:
        attention_of_torch()
        torch.nn.attention.activate_flash_attention_impl(version)

    return activate


def attention_of_torch() -> None:
    """Use torch's attention kernel for packed documents instead of ours."""
    packed_attention.takes = lambda *_: False


def attention_everywhere() -> None:
    """Use our attention kernels for all numbers of query heads per key head, measured or not."""
    packed_attention.MEASURED_GROUPS = range(1, 128)


def nf4_of_bitsandbytes() -> None:
    """Dequantize nf4 with bitsandbytes' kernel instead of ours."""
    nf4._has_kernel = lambda _: False


def experts_by_row() -> None:
    """Compute the experts' LoRA updates for each row, and move rows with torch's kernels."""
    grouped_experts.DENSE_COLUMNS = 0
    expert_rows._has_kernels = lambda _: False


class Replacement(NamedTuple):
    """A variant that replaces the code of one technique.

    Attributes:
        replace: replaces the code in this process.
        does: describes the replacement.
        only: the device type of the technique, or "" for all devices.
        package: the module that the replacement needs, or "".
    """

    replace: Callable[[], None]
    does: str
    only: str = ""
    package: str = ""

    def missing(self, device: str) -> str:
        """Return the reason why the variant cannot be measured on this device, or ""."""
        if self.only not in ("", device):
            return f"it requires the device {self.only}"
        if self.package and not is_installed(self.package):
            return f"{self.package} is not installed"
        return ""


def is_installed(module: str) -> bool:
    """Return whether a module can be imported. Only its parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


REPLACEMENTS = {
    "attention": Replacement(document_by_document, "one document at a time"),
    "grouped adapters": Replacement(adapters_alone, "each layer reads its input separately"),
    "fused modules": Replacement(
        transformers_parts, "Transformers' norms, rotary embedding and MLP"
    ),
    "head on labels only": Replacement(head_everywhere, "the head on every position"),
    "chunked loss": Replacement(whole_logits, "all logits at once, in fp32"),
    "freed pages": Replacement(default_malloc, "glibc's defaults", only="cpu"),
    "attention kernels": Replacement(attention_of_torch, "torch's kernel", only="cuda"),
    "attention everywhere": Replacement(
        attention_everywhere, "ours with any number of query heads per key head", only="cuda"
    ),
    "nf4 kernel": Replacement(nf4_of_bitsandbytes, "bitsandbytes' kernel", only="cuda"),
    "experts by token": Replacement(experts_by_row, "updates by row, torch's kernels", only="cuda"),
    "FlashAttention 3": Replacement(
        flash_attention("FA3"), "FlashAttention 3", "cuda", "flash_attn_interface"
    ),
    "FlashAttention 4": Replacement(
        flash_attention("FA4"), "FlashAttention 4", "cuda", "flash_attn.cute.interface"
    ),
}


def run_in_turns(
    commands: Mapping[str, Sequence[str]], *, rounds: int, partial: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run each command `rounds` times, in turns. Return the reports by name.

    `--json FILE` is appended to each command, and the command writes its report to this file. The
    speed is printed. If a command fails, the end of its stderr is printed, and this run has no
    report.

    Args:
        partial: file for the reports so far, which is written after each run.
    """
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(prefix="tunesmith-turns-") as folder:
        file = Path(folder) / "report.json"
        # Run the variants in turns, so that a machine that becomes slower affects all of them.
        for turn in range(1, rounds + 1):
            for name, command in commands.items():
                # Start a new process, so that compiled code, settings and memory of one variant do
                # not affect the next.
                process = subprocess.run(
                    [*command, "--json", str(file)], capture_output=True, text=True, check=False
                )
                if process.returncode:
                    failure = (
                        f"failed with exit status {process.returncode}\n{process.stderr[-800:]}"
                    )
                    print(f"round {turn}: {name} {failure}", flush=True)
                    # The table omits a variant that failed. The other variants are still measured.
                    continue
                report = json.loads(file.read_text(encoding="utf-8"))
                reports[name].append(report)
                if partial:
                    partial.write_text(json.dumps({"runs": reports}, indent=1) + "\n")
                speed = report["figures"]["tokens_per_second"]
                print(f"round {turn}: {name:26} {speed:10,.0f} tokens/s", flush=True)
    return reports


def table_of(reports: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Summarize each variant: median tokens/s, ratio to the baseline, maximum of the peak GiB, and
    last loss.

    Exit if all runs of the baseline failed.
    """
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
        sys.exit("the unchanged recipe failed, so there is no table; see the messages above")
    for row in table.values():
        row["of_baseline"] = ratio(row["tokens_per_second"], table[BASELINE]["tokens_per_second"])
    return table


def lines_of(table: Mapping[str, Mapping[str, float]], changes: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the table as text. `changes` describes the change of each variant."""
    yield f"{'':26} {'tokens/s':>10} {'of recipe':>10} {'GiB':>6} {'loss':>8}"
    for name, row in table.items():
        speed = f"{row['tokens_per_second']:10,.0f} {row['of_baseline']:10.1%}"
        figures = f"{speed} {row['peak_memory_gib']:6.1f} {row['last_loss']:8.4f}"
        yield f"{name:26} {figures}  {changes[name]}"


def parse(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and BENCH. Exit if a NAME is unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure only these variants")
    parser.add_argument("--one", choices=list(REPLACEMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--json")
    options, bench = parser.parse_known_args(words)
    for name in options.only or ():
        if name not in REPLACEMENTS and "=" not in name:
            known = ", ".join(REPLACEMENTS)
            parser.error(
                f"--only {name}: this name is unknown; use key=value or one of {known}. If"
                " it is the recipe, write it before --only"
            )
    return options, bench


def main() -> None:
    """Measure all variants in turns. With --one, measure one replacement in this process."""
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
        # A variant in --only runs on any device, so that it can be tested on a CPU.
        if reason := replacement.missing(replacement.only if options.only else device):
            left_out[name] = reason
            continue
        commands[name] = [sys.executable, __file__, "--one", name, *bench]
        changes[name] = replacement.does
    for name, reason in left_out.items():
        print(f"{name} is not measured: {reason}")
    report: dict[str, Any] = {"command": sys.argv, "left_out": left_out}
    if len(commands) > 1:
        partial = Path(options.json) if options.json else None
        runs = run_in_turns(commands, rounds=options.rounds, partial=partial)
        table = table_of(runs)
        print(*lines_of(table, changes), sep="\n")
        report |= {"changes": changes, "table": table, "runs": runs}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
