"""What the stages' steps wrote becomes results, and the results become the tables of the pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import first_gpu_tables
import kill_and_resume
import pytest
import step_reports

ROOT = Path(__file__).parents[3]

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite>
<testcase classname="tests.quant.test_fp8" name="test_rows"/>
<testcase classname="tests.quant.test_fp8" name="test_scales"><failure message="assert 1 == 2">trace</failure></testcase>
<testcase classname="tests.quant.test_nf4" name="test_blocks"><error message="does not allow this operator"/></testcase>
<testcase classname="tests.quant.test_nf4" name="test_more"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""
"""The form of `pytest --junitxml`."""


def test_the_tests_of_a_stage_are_counted_and_failures_named(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    (tmp_path / "8b-fp8.json").write_text('{"figures": {"tokens_per')
    assert step_reports.read_report(tmp_path, "8b-fp8") is None, "it was cut off while it wrote"
    report = step_reports.read_tests(tmp_path / "tests.xml")
    assert report is not None
    assert (report["passed"], report["failed"], report["skipped"]) == (1, 2, 1)
    messages = [failure["message"] for failure in report["failures"]]
    assert messages == ["assert 1 == 2", "does not allow this operator"]
    assert report["skip_reasons"] == {"needs two GPUs": 1}


@pytest.mark.parametrize("page", ["README.md", "docs/measurements/README.md"])
def test_the_pages_show_the_results_that_are_in_the_repository(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["first_gpu_tables.py", "--check", page])
    block = (
        first_gpu_tables.readme_block if page == "README.md" else first_gpu_tables.measurements_page
    )
    assert first_gpu_tables.write_or_check("", first_gpu_tables.SCRIPT, block) == 0


def write_run(folder: Path, *, loss: float, weights: bytes) -> Path:
    """A run directory with three records and a final adapter."""
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "adapter_model.safetensors").write_bytes(weights)
    record = {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 10, "examples": 2}
    lines = [json.dumps({"step": step, "loss": 2.0, **record}) for step in (1, 2)]
    lines.append(json.dumps({"step": 3, "loss": loss, **record}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "los')
    return folder


def test_a_resumed_run_is_compared_step_by_step_and_file_by_file(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", loss=2.0, weights=b"a")
    same = kill_and_resume.compare(whole, write_run(tmp_path / "same", loss=2.0, weights=b"a"))
    assert (same["steps"], same["unequal_steps"], same["unequal_weight_files"]) == (3, [], [])
    other = kill_and_resume.compare(whole, write_run(tmp_path / "other", loss=2.5, weights=b"b"))
    assert other["unequal_steps"] == [3]
    assert other["largest_relative_difference_of_loss"] == pytest.approx(0.25)
    assert other["unequal_weight_files"] == ["adapter_model.safetensors"]
