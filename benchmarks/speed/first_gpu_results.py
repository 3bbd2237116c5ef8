"""Gather what the steps of a stage of first_gpu.sh have written into one results file.

    python benchmarks/speed/first_gpu_results.py --stage A --work DIR --output results-A.json

first_gpu.sh calls this after each step, so that a stage that is killed leaves the results of all
steps before. DIR holds steps.tsv (name, exit status, seconds, limit: one line a step; `skipped` in
place of a status where no time was left), the report NAME.json of each step, tests.xml of the GPU
tests and the traces of the profiles.

The file: `stage`, `date`, `commit`, `device` (device_facts.py), `steps` by name with their exit
status, seconds, limit and report, and `goals`: the figure of each goal that the stage measured
beside the goal for this device.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_goals import GOALS, device_key
from kernel_terms import terms_of


def read_steps(work: Path) -> dict[str, dict[str, Any]]:
    """The steps of the stage so far, in their order, each with its report."""
    steps: dict[str, dict[str, Any]] = {}
    for line in (work / "steps.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds, limit = line.split("\t")
        step: dict[str, Any] = {"exit": None if status == "skipped" else int(status)}
        step |= {"seconds": int(seconds), "limit": int(limit)}
        report = read_report(work, name)
        if report is not None:
            step["report"] = report
        steps[name] = step
    return steps


def read_report(work: Path, name: str) -> dict[str, Any] | None:
    """What a step has written about itself; None where it wrote nothing, or was killed while it
    wrote.
    """
    if name == "tests":
        return read_tests(work / "tests.xml")
    file = work / f"{name}.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "profile" in report:
        report |= read_profile(report)
    return report


def read_tests(file: Path) -> dict[str, Any] | None:
    """Counts of the GPU tests, names of those that failed, and why others were skipped."""
    try:
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    failures: list[dict[str, str]] = []
    skip_reasons = Counter[str]()
    for case in cases:
        failure = case.find("failure")
        if failure is None:
            failure = case.find("error")
        skip = case.find("skipped")
        if failure is not None:
            test = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": test, "message": (failure.get("message") or "")[:400]})
        elif skip is not None:
            skip_reasons[skip.get("message") or ""] += 1
    skipped = skip_reasons.total()
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
        "skip_reasons": dict(skip_reasons),
    }


def read_profile(report: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of a profiled step by kind of kernel, as forecast.py counts them, how many kernels
    it launches, and the most expensive operations.
    """
    terms = Counter[str]()
    kernels = 0
    for trace in report["profile"]["traces"]:
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        terms.update(terms_of(events))
        kernels += sum(event.get("cat") == "kernel" for event in events)
    profile = report["recipe"]["profile"]
    profiled_steps = profile["active"] * profile["cycles"]
    tables = [
        Path(table).read_text(encoding="utf-8").splitlines()
        for table in report["profile"]["tables"]
    ]
    return {
        "terms_ms_a_step": {
            name: milliseconds / profiled_steps for name, milliseconds in terms.items()
        },
        "kernels_a_step": kernels / profiled_steps,
        "most_expensive_operations": tables,
    }


def read_device(work: Path) -> dict[str, Any]:
    """What device_facts.py wrote, or nothing where it failed."""
    try:
        facts: dict[str, Any] = json.loads((work / "device.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts


def compare_with_goals(
    steps: Mapping[str, Mapping[str, Any]], device_name: str
) -> list[dict[str, Any]]:
    """Non-padding tokens/s of each goal that was tried; None where the run failed, or has no goal
    on this device.
    """
    key = device_key(device_name)
    rows = []
    for goal in GOALS:
        if goal.step not in steps:
            continue
        figures = steps[goal.step].get("report", {}).get("figures", {})
        measured = figures.get("tokens_per_second")
        target = goal.tokens_per_second[key] if key else None
        reached = measured >= target if measured and target else None
        rows.append(
            {
                "goal": goal.title,
                "tokens_per_second": measured,
                "target": target,
                "reached": reached,
            }
        )
    return rows


def main() -> None:
    """Write the results file in one move: a stage may be killed at any moment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument(
        "--commit", default="", help="of the checkout, where that machine has no git"
    )
    options = parser.parse_args()
    device = read_device(options.work)
    steps = read_steps(options.work)
    results = {
        "stage": options.stage,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or device.get("versions", {}).get("commit"),
        "device": device,
        "goals": compare_with_goals(steps, device.get("name", "")),
        "steps": steps,
    }
    partial = options.output.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(options.output)


if __name__ == "__main__":
    main()
