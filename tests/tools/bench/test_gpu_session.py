"""The calls of a GPU session: their commands, their limits, what is left of one that ends early."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ablation
import device_facts
import gpu_session
import pytest

from errors import lines_with
from tunesmith.cli.main import Parser
from tunesmith.tools.bench.cli import add_arguments, check_arguments, stated_recipe
from tunesmith.tools.bench.shape import shape_recipe

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
# In the place of Python: it sleeps, writes a report, and fails for the word in FAILS.
STAND_IN = """#!{python} -IS
import json, os, pathlib, sys, time
words = sys.argv[1:]
time.sleep(float(os.environ["SLEEPS"]))
for option in ("--json", "--output"):
    if option in words:
        report = {{"name": "NVIDIA H200", "figures": {{"tokens_per_second": 20000.0}}}}
        pathlib.Path(words[words.index(option) + 1]).write_text(json.dumps(report))
sys.exit(any(os.environ["FAILS"] in word for word in words))
"""


def run_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, fails: str = "nothing", **options: Any
) -> dict[str, Any]:
    """The results of a call whose steps are the stand-in; with a limit they sleep."""
    folder.mkdir(exist_ok=True)
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv("SLEEPS", "60" if options else "0")
    monkeypatch.setenv("FAILS", fails)
    given = {"limit": None, "only": None, "dry_run": False} | options
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        words = argparse.Namespace(call=call, output=folder / "out", folder=folder, **given)
        gpu_session.run_call(words)
    results: dict[str, Any] = json.loads((folder / f"out/results-{call}.json").read_text())
    return results


def bench_words(command: list[str]) -> list[list[str]]:
    """What follows `tunesmith bench` in a command, for each variant of an ablation."""
    if command[:3] == ["-m", "tunesmith", "bench"]:
        return [command[3:]]
    if command[0] != "benchmarks/speed/ablation.py":
        return []
    options, bench = ablation.parse(command[1:])
    return [[*bench, *([name] if "=" in name else [])] for name in options.only]


@pytest.mark.parametrize("dry", [False, True], ids=["true shapes", "dry run"])
@pytest.mark.parametrize("call", gpu_session.LIMITS)
def test_each_command_is_one_that_bench_takes_and_their_limits_fit_the_call(
    call: str, dry: bool, tmp_path: Path
) -> None:
    steps = gpu_session.steps_of_call(call, tmp_path, tmp_path, dry=dry)
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
    assert len(commands) == (3 if call == "1" else 0)
    assert sum(step.seconds for step in steps) <= gpu_session.LIMITS[call]


def test_a_variant_that_fails_costs_only_itself_and_the_recipe_itself_must_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Commands of other programs stand in for bench."""
    figures = {"figures": {"tokens_per_second": 10.0, "peak_memory_gib": 1.0, "last_loss": 2.0}}
    write = f"import sys; open(sys.argv[2], 'w').write({json.dumps(figures)!r})"
    good = [sys.executable, "-ISc", write]
    bad = [sys.executable, "-ISc", "import sys; sys.exit('error: no memory')"]
    found = ablation.run_in_turns({ablation.BASELINE: good, "other": bad}, rounds=2)
    assert list(ablation.table_of(found)) == [ablation.BASELINE]
    assert (len(found[ablation.BASELINE]), len(found["other"])) == (2, 0)
    assert "error: no memory" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ablation.table_of({ablation.BASELINE: [], "other": found[ablation.BASELINE]})


def test_a_step_is_killed_at_its_limit_and_what_does_not_fit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step has what is left of the call, and leaves nothing to the others."""
    found = run_call(tmp_path / "short", monkeypatch, "2", limit=10)["steps"]
    assert {step["exit"] for step in found.values()} == {None}
    monkeypatch.setattr(gpu_session, "FITS", 0.01)
    found = run_call(tmp_path / "next", monkeypatch, "2", limit=1)["steps"]
    first, *others = found.values()
    assert (first["exit"], first["limit"]) == (124, 1)
    assert {step["exit"] for step in others} == {None}


@pytest.mark.slow
def test_a_failure_ends_nothing_and_results_are_written_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, replace = [], Path.replace

    def noted(self: Path, target: Path) -> Path:
        written.append(json.loads(self.read_text())["steps"])
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    results = run_call(tmp_path, monkeypatch, "1", fails="gemma3")
    steps = results["steps"]
    assert [len(of_step) for of_step in written] == [*range(1, len(steps) + 1)]
    assert [name for name, step in steps.items() if step["exit"]] == ["gemma3"]
    assert results["device"]["name"] == "NVIDIA H200"
    assert steps["30b-experts"]["report"]["figures"] == {"tokens_per_second": 20000.0}


def test_missing_packages_are_named_as_pip_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ruamel", None)
    monkeypatch.delitem(sys.modules, "ruamel.yaml", raising=False)
    monkeypatch.setattr(sys, "argv", ["device_facts.py"])
    with pytest.raises(SystemExit) as ended:
        device_facts.main()
    assert ended.value.code == device_facts.MISSING_PACKAGES
    printed = capsys.readouterr().out
    assert [name for name in device_facts.NEEDED if name in printed.split()] == []
    assert lines_with(printed.replace(";", ""), "ruamel.yaml", "PACKAGES")
