"""Scripts of benchmarks/: each reads, computes or names what its figures stand on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ablation
import decoding
import first_gpu_tables
import gpu_session
import kill_and_resume
import pytest
import same_bits
import step_reports
from gpu_rates import RATES, with_measured
from kernel_terms import ATTENTION, OTHER, PRODUCTS, SKINNY, terms_of

from tunesmith.cli.main import Parser
from tunesmith.tools.bench.cli import add_arguments, check_arguments, stated_recipe
from tunesmith.tools.bench.shape import shape_recipe

ROOT = Path(__file__).parents[3]
# The form of `pytest --junitxml`.
JUNIT = """<testsuites><testsuite><testcase classname="tests.quant.test_fp8" name="test_rows"/>
<testcase classname="a" name="b"><failure message="assert 1 == 2">trace</failure></testcase>
<testcase classname="a" name="c"><error message="does not allow this operator"/></testcase>
<testcase classname="a" name="d"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def test_the_tests_of_a_stage_are_counted_and_failures_named(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    report = step_reports.read_tests(tmp_path / "tests.xml")
    assert report is not None
    assert (report["passed"], report["failed"], report["skipped"]) == (1, 2, 1)
    messages = [failure["message"] for failure in report["failures"]]
    assert messages == ["assert 1 == 2", "does not allow this operator"]


def test_the_tests_of_a_killed_stage_are_named(tmp_path: Path) -> None:
    """Lines of `pytest -vv`, of one process and of xdist. The last test was killed."""
    log = tmp_path / "log-1.txt"
    log.write_text(
        "tests/a.py::test_a[cuda, no gaps] PASSED              [ 50%]\n"
        "tests/a.py::test_b \n[gw1] [ 75%] FAILED tests/a.py::test_c[one two] \ntests/a.py::test_d "
    )
    report = step_reports.read_report(tmp_path, "tests", log)
    names = {
        "passed": ["tests/a.py::test_a[cuda, no gaps]"],
        "failed": ["tests/a.py::test_c[one two]"],
    }
    assert report == names


def test_the_profile_of_decoded_tokens_counts_launches_and_matmuls_by_keys() -> None:
    inputs = {"External id": 1, "Input Dims": [[8, 4, 16], [8, 16, 33]]}
    events = [
        {"cat": "cpu_op", "name": "aten::bmm", "dur": 9, "args": inputs},
        *[{"cat": "kernel", "name": "gemm", "dur": 6, "args": {"External id": 1}}] * 2,
        {"cat": "kernel", "name": "add", "dur": 3, "args": {"External id": 2}},
        *[{"cat": "cuda_runtime", "name": "cudaLaunchKernelExC", "dur": 1, "args": {}}] * 6,
    ]
    found = decoding.profile_figures(events)
    assert found["launches_a_token"] == 6 / decoding.PROFILED
    assert found["kernel_ms_a_token"] == pytest.approx(15e-3 / decoding.PROFILED)
    assert found["bmm_us_by_keys"] == {33: 12}


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


def test_a_resumed_run_is_compared_step_by_step_and_file_by_file(tmp_path: Path) -> None:
    record = {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 10, "examples": 2}
    for name, last, weights in (("whole", 2.0, b"a"), ("same", 2.0, b"a"), ("other", 2.5, b"b")):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final" / "adapter_model.safetensors").write_bytes(weights)
        steps = [
            json.dumps({"step": n, "loss": loss, **record}) for n, loss in ((1, 2.0), (2, last))
        ]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(steps) + '\n{"step": 3, "los')
    same, other = (
        kill_and_resume.compare(tmp_path / "whole", tmp_path / n) for n in ("same", "other")
    )
    assert (same["steps"], same["unequal_steps"], same["unequal_weight_files"]) == (2, [], [])
    assert other["unequal_steps"] == [2]
    assert other["largest_relative_difference_of_loss"] == pytest.approx(0.25)
    assert other["unequal_weight_files"] == ["final/adapter_model.safetensors"]


def test_measured_figures_take_the_place_of_assumed_ones() -> None:
    milliseconds = {
        "x W^T, 4096 x 4096": 0.8,
        "x W^T, 1024 x 4096": "OutOfMemoryError('no room')",  # left out
        "x A^T, 4096 x 4096": 0.05,
        "low B^T, 14336 x 4096": 0.2,
        "fp8 product of 16384 rows": 1.4,
        "varlen, bound 768": 1.0,
        "varlen, bound 768, both ways": 3.5,
    }
    step = {"exit": 0, "seconds": 9.0, "report": {"milliseconds": milliseconds}}
    device = {"name": "NVIDIA H200", "copy_tb_per_s": 4.2, "product_tflops": 780.0}
    rates = with_measured(RATES["h200"], {"device": device, "steps": {"micro": step}})
    n = 16384
    assert (rates.copy, rates.product) == (4.2e12, 780e12)
    moved = 2 * (n * 4096 + 8 * (n + 4096)) + 2 * (n * 14336 + 8 * (n + 14336))
    assert rates.skinny_bandwidth == pytest.approx(moved / 0.25e-3)
    assert rates.eight_bit_product == pytest.approx(2 * n * 4096 * 14336 / 1.4e-3)
    assert rates.attention_ms == pytest.approx((32 * 1.0, 32 * 2.5))


def bench_words(command: list[str]) -> list[list[str]]:
    """What follows `tunesmith bench` in a command, for each variant of an ablation."""
    if command[:3] == ["-m", "tunesmith", "bench"]:
        return [command[3:]]
    if command[0] != "benchmarks/speed/ablation.py":
        return []
    options, bench = ablation.parse(command[1:])
    return [[*bench, *([name] if "=" in name else [])] for name in options.only]


@pytest.mark.parametrize("call", gpu_session.LIMITS)
def test_each_command_of_a_gpu_session_is_one_that_bench_takes_and_fits_the_call(
    call: str, tmp_path: Path
) -> None:
    steps = gpu_session.steps_of_call(call, tmp_path, tmp_path, dry=False)
    commands = [words for step in steps for words in bench_words(step.command[1:])]
    for words in commands:
        parser = Parser()
        add_arguments(parser)
        args = parser.parse_intermixed_args(words)
        args.typed = parser.typed_options(args)
        check_arguments(args)
        overrides = [word for word in args.words if "=" in word]
        assert stated_recipe(args) or shape_recipe(
            tmp_path / "model", data=args.data, rows="alpaca", overrides=overrides
        )
    assert len(commands) == (3 if call == "2" else 0)
    assert sum(step.seconds for step in steps) <= gpu_session.LIMITS[call]


def test_a_variant_of_an_ablation_that_fails_costs_only_itself() -> None:
    """Commands of other programs stand in for bench."""
    figures = {"figures": {"tokens_per_second": 10.0, "peak_memory_gib": 1.0, "last_loss": 2.0}}
    write = f"import sys; open(sys.argv[2], 'w').write({json.dumps(figures)!r})"
    good = [sys.executable, "-ISc", write]
    bad = [sys.executable, "-ISc", "import sys; sys.exit('error: no memory')"]
    found = ablation.run_in_turns({ablation.BASELINE: good, "other": bad}, rounds=1)
    assert list(ablation.table_of(found)) == [ablation.BASELINE]
    with pytest.raises(SystemExit):
        ablation.table_of({ablation.BASELINE: [], "other": found[ablation.BASELINE]})


def test_every_kernel_of_a_trace_is_in_its_term() -> None:
    """In the form of torch's traces (Kineto): `dur` in microseconds, `External id` in both."""
    launches: list[tuple[str, str | None, list[list[int]], str]] = [
        ("nvjet_tst_256x128", "aten::mm", [[16384, 4096], [4096, 4096]], PRODUCTS),
        ("nvjet_tst_64x8", "aten::mm", [[16384, 4096], [4096, 8]], SKINNY),
        # The summand comes first, the output of `out=` last.
        ("nvjet_tst_128x256", "aten::addmm_", [[16384, 4096], [16384, 8], [8, 4096], [], []], SKINNY),
        ("sm90_xmma_gemm_bf16bf16", "aten::addmm", [[4096], [512, 4096], [4096, 4096], [], [], [512, 4096]], PRODUCTS),
        ("flash::flash_fwd_kernel", "torch_attn::_varlen_attn", [], ATTENTION),
        ("triton_red_fused_mul_varlen_attn_1", "triton_red_fused_mul_varlen_attn_1", [], OTHER),
    ]  # fmt: skip
    expected = dict.fromkeys((PRODUCTS, SKINNY, OTHER, ATTENTION), 0.0)
    events: list[dict[str, Any]] = [{"ph": "i", "name": "[memory]", "args": {}}]
    for number, (kernel, operator, shapes, term) in enumerate(launches):
        inputs = {"External id": number, "Input Dims": shapes}
        events += [
            {"ph": "X", "cat": "cpu_op", "name": operator, "ts": 0, "dur": 3, "args": inputs},
            {"ph": "X", "cat": "kernel", "name": kernel, "ts": 9, "dur": 2**number, "args": inputs},
        ]
        expected[term] += 2**number / 1e3  # powers of two: a sum tells which ones are in it
    assert terms_of(events) == pytest.approx(expected)


def test_the_smallest_change_of_a_record_is_named(tmp_path: Path) -> None:
    files = [tmp_path / "plans.json", tmp_path / "others.json"]
    for size, file in enumerate(files, start=1):
        file.write_text(f'{{"a on h100": {{"room": {size}}}}}')
    assert same_bits.text_apart(*files) == ["a on h100.room: 1 | 2"]
