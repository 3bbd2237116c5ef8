"""What the stages' steps wrote becomes results, and the results become the tables of the pages."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import first_gpu_tables
import kill_and_resume
import pytest
import step_reports

from errors import holds, lines_with

ROOT = Path(__file__).parents[3]

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite>
<testcase classname="tests.quant.test_fp8" name="test_rows"/>
<testcase classname="tests.quant.test_fp8" name="test_scales"><failure message="assert 1 == 2">trace</failure></testcase>
<testcase classname="tests.quant.test_nf4" name="test_blocks"><error message="does not allow this operator"/></testcase>
<testcase classname="tests.quant.test_nf4" name="test_more"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""
"""The form of `pytest --junitxml`."""


def figures(**changes: Any) -> dict[str, Any]:
    values = {"tokens_per_second": 19_500.0, "mfu_of_measured_peak": 0.721, "peak_memory_gib": 85.2}
    return {
        "figures": {**values, "micro_batch": "16,384 tokens", "recomputed_layers": 0, **changes}
    }


def test_a_step_that_was_cut_off_while_it_wrote_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "8b-bf16.json").write_text(json.dumps(figures()))
    (tmp_path / "8b-fp8.json").write_text('{"figures": {"tokens_per')
    report = step_reports.read_report(tmp_path, "8b-bf16")
    assert report is not None
    assert report["figures"]["tokens_per_second"] == 19_500
    assert step_reports.read_report(tmp_path, "8b-fp8") is None
    assert step_reports.read_report(tmp_path, "3b-full") is None


def test_the_tests_of_a_stage_are_counted_and_failures_named(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    report = step_reports.read_tests(tmp_path / "tests.xml")
    assert report is not None
    assert (report["passed"], report["failed"], report["skipped"]) == (1, 2, 1)
    assert [failure["message"] for failure in report["failures"]] == [
        "assert 1 == 2",
        "does not allow this operator",
    ]
    assert report["skip_reasons"] == {"needs two GPUs": 1}


def test_a_profile_is_told_by_the_step(tmp_path: Path) -> None:
    """Two profiled steps: a kernel of 3 ms in each is 3 ms a step."""
    kernel = {
        "cat": "kernel",
        "name": "triton_fused_mul",
        "ts": 0,
        "dur": 3000,
        "args": {"External id": 1},
    }
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [kernel, kernel]}, file)
    report = {
        "profile": {"traces": [str(tmp_path / "trace.json.gz")]},
        "recipe": {"profile": {"active": 2, "cycles": 1}},
    }
    profile = step_reports.read_profile(report)
    assert sum(profile["terms_ms_a_step"].values()) == pytest.approx(3)
    assert profile["kernels_a_step"] == 1


def stage_results(stage: str, steps: dict[str, Any]) -> dict[str, Any]:
    device = {
        "name": "NVIDIA H200",
        "memory_gib": 139.8,
        "copy_tb_per_s": 4.31,
        "product_tflops": 788.0,
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "cuda": "13.0"},
    }
    return {
        "stage": stage,
        "date": "2026-11-22T10:00:00+00:00",
        "commit": "abc",
        "device": device,
        "steps": steps,
    }


def test_three_results_make_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"tokens_per_second": 100.0, "of_baseline": 1.0, "peak_memory_gib": 1.0, "last_loss": 2.0}
    ablation = {
        "table": {
            "as given": row,
            "base in fp8": {**row, "tokens_per_second": 103.0, "of_baseline": 1.03},
        },
        "changes": {"as given": "", "base in fp8": "model.quantize=fp8"},
    }
    cold = figures(build_seconds=20.0, first_step_seconds=15.0)
    warm = figures(build_seconds=10.0, first_step_seconds=3.0)
    resume = {
        "equal": True,
        "killed_at_step": 5,
        "steps": 12,
        "weight_files": 1,
        "unequal_steps": [],
    }
    done = {"exit": 0, "seconds": 60, "limit": 120}
    stages = {
        "A": {
            "8b-bf16": {**done, "report": figures()},
            "8b-fp8": {"exit": 1, "seconds": 9, "limit": 115},
        },
        "B": {
            "tests": {**done, "report": {"passed": 40, "failed": 0, "skipped": 2, "failures": []}},
            "8b-cold": {**done, "report": cold},
            "8b-warm": {**done, "report": warm},
        },
        "C": {
            "bases": {**done, "report": ablation},
            "least-memory": {**done, "report": figures(peak_memory_gib=16.3)},
            "kill-and-resume": {**done, "report": resume},
            "attention": {**done, "report": {"left_out": {"FlashAttention 4": "not installed"}}},
        },
    }
    (tmp_path / "h200").mkdir()
    for stage, steps in stages.items():
        text = json.dumps(stage_results(stage, steps))
        (tmp_path / "h200" / f"results-{stage}.json").write_text(text)
    other = {"name": "Unsloth", "how": "packed", "tokens_per_second": 1e4, "peak_memory_gib": 79.1}
    beside = {"8b-bf16": {"others": [other]}}
    (tmp_path / "h200" / "beside.json").write_text(json.dumps(beside))
    devices = first_gpu_tables.read_devices(tmp_path)
    monkeypatch.setattr(first_gpu_tables, "read_devices", lambda: devices)
    monkeypatch.setattr(first_gpu_tables, "RESULTS", tmp_path)
    page = first_gpu_tables.measurements_page()
    assert "| 8B LoRA, bf16 | 19,500 | 19,000 | yes | 72.1% | 85.2 |" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| 8B LoRA, fp8 base |")]
    assert holds(row, "28,000")
    assert "19,500" not in row
    assert lines_with(page, "8b-fp8", 1, "9 s")
    assert "40 passed, 0 failed, 2 skipped" in page
    assert holds(page, "35.0 s")
    assert "| `model.quantize=fp8` | 103 | 103.0% |" in page
    assert "| 16.3 |" in page
    readme = first_gpu_tables.readme_block()
    assert "| 8B LoRA, bf16 | 19,500 | 85 | Unsloth 10,000 (79) |" in readme
    (row,) = [line for line in readme.splitlines() if line.startswith("| 70B LoRA")]
    assert first_gpu_tables.number(None) in row
    assert "model.quantize=fp8" not in readme


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
