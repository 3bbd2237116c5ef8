"""The gain of each technique: the same steps again, with one key of the recipe changed at a time.

Every variant runs in a process of its own, in turns, several rounds; the median counts. A shared
machine drifts by more than most techniques bring, so compare only within one call.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.schema import Run
from tunesmith.errors import RunError
from tunesmith.quant.schemes import DENSE, SCHEMES, SHIPPED, scheme_of
from tunesmith.units import ratio

BASELINE = "as given"


def variants(run: Run, *, gpu: bool) -> Iterator[tuple[str, str]]:
    """(name, key=value) of what may be changed in a recipe to another value than its own."""
    train = run.train
    model = run.model
    if train.compile == "on" or (gpu and train.compile == "auto"):
        yield "not compiled", "train.compile=off"
    # A batch in tokens needs packed rows.
    if run.data.pack and train.global_batch.unit == "examples":
        yield "not packed", "data.pack=false"
    if train.recompute != "full":
        yield "recomputed", "train.recompute=full"
    if model.dtype != "fp32" and scheme_of(model) is DENSE:
        yield "fp32", "model.dtype=fp32"
    if run.adapter.kind != "lora":
        return
    for base, scheme in SCHEMES.items():
        # Not of every base; a base that stays as it ships is compared with the others.
        if scheme is not scheme_of(model) and scheme is not SHIPPED:
            name = "dense base" if base == "none" else f"base in {base}"
            yield name, f"model.quantize={base}"


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

    RunError where the baseline failed.
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
        what = "the unchanged recipe could not be measured; see the messages above"
        fix = "run bench without --ablation and fix what it reports"
        raise RunError(what, where="bench --ablation", fix=fix)
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
