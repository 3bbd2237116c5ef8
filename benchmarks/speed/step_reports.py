"""Reports of the steps of a GPU session: JSON files, results of GPU tests, and profiles."""

from __future__ import annotations

import gc
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kernel_terms import terms_of

# A line of `pytest -vv`, with and without pytest-xdist.
TEST_LINE = re.compile(r"(?P<test>tests/\S+::.*?) (?P<state>PASSED|FAILED|ERROR|SKIPPED)\b")
TEST_LINE_OF_WORKER = re.compile(
    r"\] (?P<state>PASSED|FAILED|ERROR|SKIPPED) (?P<test>tests/\S+::.*)"
)


def measure_cases(
    cases: Mapping[str, Callable[[], Any]], file: Path, facts: Mapping[str, Any] = {}
) -> None:
    """Measure the cases of a step. Write the report after each case, because a step can be killed.

    Args:
        cases: the name of each case, and the function that measures it and returns its report.
        file: JSON file of the report. Its key `errors` has the cases that failed.
        facts: further keys and values of the report.

    Raise SystemExit with status 1 at the end if a case failed.
    """
    # Not at the top, because gpu_session.py reads reports before the packages are unpacked.
    from tunesmith.runtime.device import free_device_memory

    report: dict[str, Any] = {**facts, "errors": {}}
    for case, measure in cases.items():
        try:
            report[case] = measure()
            print(f"{case}: {json.dumps(report[case])}", flush=True)
        except Exception as error:  # the next case is measured anyway
            report["errors"][case] = repr(error)[:2000]
            print(f"{case}: {error!r}", flush=True)
        gc.collect()
        free_device_memory()
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["errors"]:
        raise SystemExit(1)


def read_report(work: Path, name: str, log: Path) -> dict[str, Any] | None:
    """Return the report of a step. Return None if there is no complete report.

    Args:
        log: output of the steps. If pytest was killed, its lines replace its report.
    """
    if name == "tests":
        return read_tests(work / "tests.xml") or read_test_lines(log)
    file = work / f"{name}.json"
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "profile" in report:
        report |= read_profile(report)
    return report


def read_tests(file: Path) -> dict[str, Any] | None:
    """Return the counts of the GPU tests, the failures, and the reasons of skipped tests. Return
    None if there is no complete file.
    """
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


def read_test_lines(log: Path) -> dict[str, Any] | None:
    """Return the names of the tests by state, as `pytest -vv` printed them. Return None if it
    printed none.
    """
    names: dict[str, list[str]] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        found = TEST_LINE_OF_WORKER.search(line) or TEST_LINE.search(line)
        if found:
            names.setdefault(found["state"].lower(), []).append(found["test"].strip())
    return names or None


def read_profile(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the milliseconds per profiled step by term of kernel_terms.py, and the number of
    kernels per step.
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
    return {
        "terms_ms_a_step": {
            name: milliseconds / profiled_steps for name, milliseconds in terms.items()
        },
        "kernels_a_step": kernels / profiled_steps,
    }
