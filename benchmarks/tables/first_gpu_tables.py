"""The tables of what first_gpu.sh measured, for README.md and docs/measurements/README.md.

    python benchmarks/tables/first_gpu_tables.py --write docs/measurements/README.md
    python benchmarks/tables/first_gpu_tables.py --check README.md       # exit status 1 if the page differs from the results

The results are docs/measurements/gpu/DEVICE/results-A.json, -B.json and -C.json, as the stages
wrote them. README.md gets the goals alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generated import table, write_or_check

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from gpu_goals import GOALS

RESULTS = Path(__file__).parents[2] / "docs" / "measurements" / "gpu"
SCRIPT = "benchmarks/tables/first_gpu_tables.py"
NOTHING_YET = "\nNo results yet: none of these runs has been measured on a GPU.\n\n"
STEP_OF_GOAL = {goal.title: goal.step for goal in GOALS}

Stages = Mapping[str, dict[str, Any]]  # results by the stage's letter


def read_devices(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """The results of each device's stages, by the name of the device's folder."""
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/results-*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        devices.setdefault(file.parent.name, {})[results["stage"]] = results
    return devices


def report_of(stages: Stages, stage: str, step: str) -> dict[str, Any]:
    """What a step reported; empty where the stage did not run, or the step failed."""
    steps = stages.get(stage, {}).get("steps", {})
    report: dict[str, Any] = steps.get(step, {}).get("report", {})
    return report


def number(value: float | None, form: str = ",.0f") -> str:
    return "not measured" if value is None else format(value, form)


def goals_table(stages: Stages) -> str:
    """Each goal beside its figure, with the memory that it took and what it recomputed."""
    head = (
        "run",
        "tokens/s",
        "goal",
        "reached",
        "of the measured peak",
        "peak GiB",
        "micro batch",
        "layers recomputed",
    )
    rows = []
    for goal in stages["A"]["goals"]:
        figures = report_of(stages, "A", STEP_OF_GOAL[goal["goal"]]).get("figures", {})
        reached = {None: "", True: "yes", False: "no"}[goal["reached"]]
        rows.append(
            (
                goal["goal"],
                number(goal["tokens_per_second"]),
                number(goal["target"]) if goal["target"] else "none",
                reached,
                number(
                    figures.get("mfu_of_fp8_peak") or figures.get("mfu_of_measured_peak"), ".1%"
                ),
                number(figures.get("peak_memory_gib"), ".1f"),
                figures.get("micro_batch", ""),
                str(figures.get("recomputed_layers", "")),
            )
        )
    return table(head, rows)


def device_line(stages: Stages) -> str:
    """What the device is and reaches, in one sentence."""
    results = next(iter(stages.values()))
    device = results["device"]
    versions = device["versions"]
    return (
        f"{device['name']}, {device['memory_gib']} GiB; a copy moves {device['copy_tb_per_s']:.2f} TB/s, a bf16 product of "
        f"8192^3 runs at {device['product_tflops']:.0f} TFLOP/s. torch {versions['torch']}, Transformers "
        f"{versions['transformers']}, CUDA {versions['cuda']}; commit {results['commit']}, {results['date'][:10]}.\n"
    )


def variants_table(report: Mapping[str, Any]) -> str:
    """The variants of an ablation beside the recipe itself."""
    head = ("variant", "changed", "tokens/s", "of the recipe", "peak GiB", "last loss")
    rows = [
        (
            name,
            f"`{report['changes'][name]}`" if report["changes"][name] else "",
            number(row["tokens_per_second"]),
            f"{row['of_baseline']:.1%}",
            f"{row['peak_memory_gib']:.1f}",
            f"{row['last_loss']:.4f}",
        )
        for name, row in report["table"].items()
    ]
    return table(head, rows)


def tests_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The counts of the GPU tests, and each that failed."""
    yield f"\nGPU tests: {report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped.\n"
    for failure in report["failures"]:
        yield f"\n- failed: `{failure['test']}`\n"


def first_step_line(report: Mapping[str, Any]) -> str:
    """Seconds to the end of the first step, with an empty and with a filled compile cache."""
    cold = report["cold"]
    empty_cache = cold["build_seconds"] + cold["first_step_seconds"]
    warm_cache = cold["warm_build_seconds"] + cold["warm_first_step_seconds"]
    return (
        f"\n8B LoRA, build and first step: {empty_cache:.1f} s with an empty compile cache (of them "
        f"{cold['first_step_seconds']:.1f} s the step), {warm_cache:.1f} s with a warm one "
        f"({cold['warm_first_step_seconds']:.1f} s).\n"
    )


def single_runs_table(stages: Stages) -> str:
    """The runs of stage C that are compared with nothing."""
    titles = {
        "own-batch": "8B LoRA, steps of 64 examples",
        "least-memory": "8B LoRA, every layer recomputed, 2,048 tokens",
    }
    rows = []
    for step, title in titles.items():
        figures = report_of(stages, "C", step).get("figures", {})
        rows.append(
            (
                title,
                number(figures.get("tokens_per_second")),
                number(figures.get("peak_memory_gib"), ".1f"),
            ),
        )
    return table(("run", "tokens/s", "peak GiB"), rows)


def resume_line(report: Mapping[str, Any]) -> str:
    """Whether a killed run goes on bit for bit."""
    outcome = (
        "equal bit for bit" if report["equal"] else f"different at steps {report['unequal_steps']}"
    )
    return (
        f"\nKilled with SIGKILL after step {report['killed_at_step']} and started again: {report['steps']} losses and norms "
        f"and {report['weight_files']} weight files are {outcome} beside a run that was not killed.\n"
    )


def failed_lines(stages: Stages) -> Iterator[str]:
    """Every step that failed or had no time."""
    for letter, results in stages.items():
        for name, step in results["steps"].items():
            if step["exit"] is None:
                yield f"\n- stage {letter}, {name}: no time was left\n"
            elif step["exit"]:
                yield f"\n- stage {letter}, {name}: ended with {step['exit']} after {step['seconds']} s\n"


def device_page(name: str, stages: Stages) -> Iterator[str]:
    """Everything that was measured on a device."""
    yield f"\n### {name}\n\n"
    yield device_line(stages)
    if "A" in stages:
        yield goals_table(stages)
    if tests := report_of(stages, "B", "tests"):
        yield from tests_lines(tests)
    if cold := report_of(stages, "B", "8b-cold"):
        yield first_step_line(cold)
    for step in ("bases", "attention"):
        report = report_of(stages, "C", step)
        if "table" in report:
            yield f"\nStage C, {step}:\n"
            yield variants_table(report)
    if "C" in stages:
        yield single_runs_table(stages)
    if resume := report_of(stages, "C", "kill-and-resume"):
        yield resume_line(resume)
    yield from failed_lines(stages)


def measurements_page() -> str:
    """All devices, for docs/measurements/README.md."""
    devices = read_devices()
    if not devices:
        return NOTHING_YET
    parts = [part for name, stages in devices.items() for part in device_page(name, stages)]
    return "".join(parts)


def readme_block() -> str:
    """The goals of each device, for README.md."""
    goals = [
        device_line(stages) + goals_table(stages)
        for stages in read_devices().values()
        if "A" in stages
    ]
    return "\n" + "".join(goals) if goals else NOTHING_YET


if __name__ == "__main__":
    pages = {"README.md": readme_block, "docs/measurements/README.md": measurements_page}
    make = pages.get(sys.argv[-1], readme_block)
    sys.exit(write_or_check(__doc__, SCRIPT, make))
