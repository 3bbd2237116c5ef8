"""Tables of the first measurements on GPUs, for README.md and docs/measurements/README.md.

    python benchmarks/tables/first_gpu_tables.py --write docs/measurements/README.md
    python benchmarks/tables/first_gpu_tables.py --check README.md

With --check, the exit status is 1 if the page differs from the results. The measurements ran in
four stages, A to D, which wrote docs/measurements/gpu/DEVICE/results-A.json to results-D.json. The
file beside.json contains the figures of other programs on the same type of device. README.md gets
only the table of speeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from generated import table, write_or_check

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from gpu_goals import GOALS, device_key

RESULTS = Path(__file__).parents[2] / "docs" / "measurements" / "gpu"
SCRIPT = "benchmarks/tables/first_gpu_tables.py"
NOTHING_YET = "\nNo results yet: none of these runs has been measured on a GPU.\n\n"
GOAL_OF_STEP = {goal.step: goal for goal in GOALS}
# Titles of the runs without a goal, which ran in stage C or D. The runs with a goal are in stage A.
OTHER_RUNS = {
    "own-batch": "8B LoRA, bf16, 64 rows per step",
    "least-memory": "8B LoRA, every layer recomputed, 2,048 tokens",
    "30b-experts": "Qwen3-30B-A3B LoRA, also on the experts, bf16",
}

Stages = Mapping[str, dict[str, Any]]  # results by the stage's letter


def read_devices(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the results of each device's stages. The keys are the names of the device folders."""
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/results-*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        devices.setdefault(file.parent.name, {})[results["stage"]] = results
    return devices


def read_beside(device: str) -> dict[str, dict[str, Any]]:
    """Return the figures of other programs by step, or {} if there is no such file."""
    file = RESULTS / device / "beside.json"
    beside: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    return beside


def report_of(stages: Stages, stage: str, step: str) -> dict[str, Any]:
    """Return the report of a step. Return {} if the stage did not run or the step has no report."""
    steps = stages.get(stage, {}).get("steps", {})
    report: dict[str, Any] = steps.get(step, {}).get("report", {})
    return report


def number(value: float | None, form: str = ",.0f") -> str:
    return "not measured" if value is None else format(value, form)


def runs_of(stages: Stages) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield step, title and figures of each run with a goal, then of other runs with results."""
    for step, goal in GOAL_OF_STEP.items():
        yield step, goal.title, report_of(stages, "A", step).get("figures", {})
    for step, title in OTHER_RUNS.items():
        for stage in ("C", "D"):
            if figures := report_of(stages, stage, step).get("figures", {}):
                yield step, title, figures


def speed_table(device: str, stages: Stages) -> str:
    """Return a table with the speed and memory of each run and of other programs."""
    head = ("run", "tokens/s", "peak GiB", "other tools: tokens/s (peak GiB)")
    beside = read_beside(device)
    rows = []
    for step, title, figures in runs_of(stages):
        known = beside.get(step, {})
        others = [
            f"{other['name']} {number(other['tokens_per_second'])} ({other['peak_memory_gib']:.0f})"
            for other in known.get("others", [])
        ]
        rows.append(
            (
                title,
                number(figures.get("tokens_per_second")),
                number(figures.get("peak_memory_gib"), ".0f"),
                "; ".join(others),
            )
        )
    return table(head, rows)


def details_table(stages: Stages) -> str:
    """Return a table with each run's speed, goal, fraction of the GPU's peak, and settings."""
    head = (
        "run",
        "tokens/s",
        "target",
        "reached",
        "of the measured peak",
        "peak GiB",
        "micro batch",
        "layers recomputed",
        "first step, s",
    )
    key = device_key(stages["A"]["device"]["name"])
    rows = []
    for step, title, figures in runs_of(stages):
        speed = figures.get("tokens_per_second")
        goal = GOAL_OF_STEP[step].tokens_per_second[key] if key and step in GOAL_OF_STEP else None
        of_fp8 = figures.get("mfu_of_fp8_peak")
        # Reports of later versions only contain the fraction of the data sheet's peak.
        share = number(of_fp8 or figures.get("mfu_of_measured_peak"), ".1%")
        if figures.get("mfu") is not None:
            share = f"{figures['mfu']:.1%} (data sheet)"
        rows.append(
            (
                title,
                number(speed),
                number(goal) if goal else "none",
                ("yes" if speed >= goal else "no") if speed and goal else "",
                f"{share} (fp8)" if of_fp8 else share,
                number(figures.get("peak_memory_gib"), ".1f"),
                figures.get("micro_batch", ""),
                str(figures.get("recomputed_layers", "")),
                number(figures.get("first_step_seconds"), ".1f"),
            )
        )
    return table(head, rows)


def how_lines(device: str, stages: Stages) -> Iterator[str]:
    """Yield how other programs were started, and how runs with special settings were started."""
    others = [
        (other["name"], other["how"])
        for known in read_beside(device).values()
        for other in known["others"]
    ]
    for name, how in dict.fromkeys(others):
        yield f"- {name}: {how}\n"
    for results in stages.values():
        for name, step in results["steps"].items():
            if how := step.get("report", {}).get("how"):
                yield f"- `{name}`: {how}\n"


def device_line(stages: Stages) -> str:
    """Return a description of the device, its measured speed, and the versions of the software."""
    results = next(iter(stages.values()))
    device = results["device"]
    versions = device["versions"]
    commit = f"commit {results['commit']}, " if results["commit"] else ""
    return (
        f"{device['name']}, {device['memory_gib']} GiB; measured: memory copies at "
        f"{device['copy_tb_per_s']:.2f} TB/s, a bf16 matmul of "
        f"8192^3 at {device['product_tflops']:.0f} TFLOP/s.\n"
        f"torch {versions['torch']}, Transformers {versions['transformers']}, CUDA "
        f"{versions['cuda']}; {commit}{results['date'][:10]}.\n"
    )


def variants_table(report: Mapping[str, Any]) -> str:
    """Return a table that compares the variants of an ablation with the unchanged recipe."""
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
    """Yield the counts of the GPU tests, and a line for each failed test."""
    yield (
        f"\nGPU tests: {report['passed']} passed, {report['failed']} failed, "
        f"{report['skipped']} skipped.\n\n"
    )
    for failure in report["failures"]:
        yield f"- failed: `{failure['test']}`\n"


def first_step_line(cold: Mapping[str, Any], warm: Mapping[str, Any]) -> str:
    """Return the seconds to the end of the first step, with empty and with warm compile cache."""
    empty_cache = cold["build_seconds"] + cold["first_step_seconds"]
    warm_cache = warm["build_seconds"] + warm["first_step_seconds"]
    return (
        f"\n8B LoRA, build and first step: {empty_cache:.1f} s with an empty compile cache "
        f"({cold['first_step_seconds']:.1f} s for the step), {warm_cache:.1f} s with a warm one "
        f"({warm['first_step_seconds']:.1f} s for the step).\n"
    )


def resume_line(report: Mapping[str, Any]) -> str:
    """Return a sentence that says whether a resumed run equals an uninterrupted run bit for bit."""
    outcome = (
        "equal bit for bit" if report["equal"] else f"different at steps {report['unequal_steps']}"
    )
    return (
        f"\nA run was killed with SIGKILL after step {report['killed_at_step']} and resumed. "
        f"Compared with an uninterrupted run, {report['steps']} losses and gradient norms and "
        f"{report['weight_files']} weight files are {outcome}.\n"
    )


def failed_lines(stages: Stages) -> Iterator[str]:
    """Yield a line for each step that failed or was skipped for lack of time."""
    for letter, results in stages.items():
        for name, step in results["steps"].items():
            if step["exit"] is None:
                yield f"\n- stage {letter}, {name}: skipped, because no time was left\n"
            elif step["exit"]:
                yield (
                    f"\n- stage {letter}, {name}: ended with {step['exit']} after "
                    f"{step['seconds']} s\n"
                )


def device_page(name: str, stages: Stages) -> Iterator[str]:
    """Yield all texts and tables with the measurements on a device."""
    yield f"\n### {name}\n\n"
    yield device_line(stages)
    if "A" in stages:
        yield details_table(stages)
    yield from how_lines(name, stages)
    if tests := report_of(stages, "B", "tests"):
        yield from tests_lines(tests)
    cold, warm = report_of(stages, "B", "8b-cold"), report_of(stages, "B", "8b-warm")
    if cold and warm:
        yield first_step_line(cold["figures"], warm["figures"])
    for step in ("bases", "attention"):
        report = report_of(stages, "C", step)
        if "table" in report:
            yield f"\nStage C, {step}:\n"
            yield variants_table(report)
    if resume := report_of(stages, "C", "kill-and-resume"):
        yield resume_line(resume)
    yield from failed_lines(stages)
    yield "\n"


def measurements_page() -> str:
    """Return the block of docs/measurements/README.md, with all measurements of all devices."""
    devices = read_devices()
    if not devices:
        return NOTHING_YET
    parts = [part for name, stages in devices.items() for part in device_page(name, stages)]
    return "".join(parts)


def readme_block() -> str:
    """Return the block of README.md, with the table of speeds of each device."""
    speeds = [
        device_line(stages) + speed_table(device, stages)
        for device, stages in read_devices().items()
        if "A" in stages
    ]
    return "\n" + "".join(speeds) if speeds else NOTHING_YET


if __name__ == "__main__":
    pages = {"README.md": readme_block, "docs/measurements/README.md": measurements_page}
    make = pages.get(sys.argv[-1], readme_block)
    sys.exit(write_or_check(__doc__, SCRIPT, make))
