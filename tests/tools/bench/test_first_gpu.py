"""The stages of the first half hour on a GPU: their commands, their limits, and what is left of a
stage that is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import ablation
import device_facts
import pytest

from errors import lines_with
from recipes import recipe
from tunesmith.cli.main import Parser
from tunesmith.config.dump import to_yaml
from tunesmith.config.schema import Run
from tunesmith.tools.bench.cli import add_arguments, check_arguments, stated_recipe
from tunesmith.tools.bench.shape import shape_recipe
from waiting import wait_for
from warm import run_warm

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
STAGES = ["A", "B", "C", "D", "E"]
# In the place of Python. It notes its arguments, sleeps, leaves a file in the compile cache, writes
# a report, and fails for the words in FAILS. What gathers the results, and a line of code, run in
# the real interpreter.
STAND_IN = """#!{python} -IS
import json, os, pathlib, sys, time
words = sys.argv[1:]
if words[0] == "-c" or "first_gpu_results" in words[0]:
    os.execv({python!r}, [{python!r}, *words])
with open(os.environ["NOTED"], "a") as noted:
    noted.write(json.dumps(words) + "\\n")
time.sleep(float(os.environ["SLEEPS"]))
compiled = pathlib.Path(os.environ["XDG_CACHE_HOME"], "tunesmith", "compiled")
compiled.mkdir(parents=True, exist_ok=True)
(compiled / f"graph-{{os.environ['OUT'].rsplit('-', 1)[1]}}").write_bytes(os.urandom(int(os.environ["CACHED_BYTES"])))
for option in ("--json", "--output"):
    if option in words:
        report = {{"name": "NVIDIA H200", "figures": {{"tokens_per_second": 20000.0}}}}
        pathlib.Path(words[words.index(option) + 1]).write_text(json.dumps(report))
sys.exit(any(word in os.environ["FAILS"].split() for word in words))
"""


def stage_environment(folder: Path, stage: str, **changes: object) -> dict[str, str]:
    """The environment of a stage whose Python is the stand-in; `changes` win."""
    python = folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    (folder / f"noted-{stage}").touch()
    variables: dict[str, object] = {
        "OUT": folder / f"out-{stage}",
        "PYTHON": python,
        "NOTED": folder / f"noted-{stage}",
        "FAILS": "",
        "SLEEPS": 0,
        "CACHED_BYTES": 10,
        "TMPDIR": folder,
        "FOLDER": folder,  # a checkout may hold the one that was made for a machine
        **changes,
    }
    return os.environ | {name: str(value) for name, value in variables.items()}


def stage_command(stage: str) -> list[str]:
    return ["bash", str(BENCHMARKS / "first_gpu.sh"), stage]


def run_stage(folder: Path, stage: str, **changes: object) -> tuple[list[list[str]], str]:
    """The arguments of each Python that a stage starts, and what the stage prints."""
    environment = stage_environment(folder, stage, **changes)
    done = subprocess.run(
        stage_command(stage),
        cwd=BENCHMARKS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert not done.stderr
    noted = (folder / f"noted-{stage}").read_text().splitlines()
    return [json.loads(line) for line in noted], done.stdout


def read_results(folder: Path, stage: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(
        (folder / f"out-{stage}" / f"results-{stage}.json").read_text()
    )
    return results


def recipe_of_shape(args: argparse.Namespace, folder: Path) -> Run:
    """The checked recipe of a shape, as `bench` makes it; its model is not written."""
    return shape_recipe(
        folder,
        data=args.data,
        rows="alpaca",
        overrides=[word for word in args.words if "=" in word],
    )


def bench_words(command: list[str]) -> list[list[str]]:
    """What follows `tunesmith bench` in a command, for each variant of an ablation."""
    if command[:3] == ["-m", "tunesmith", "bench"]:
        return [command[3:]]
    if command[0] != "benchmarks/speed/ablation.py":
        return []
    options, bench = ablation.parse(command[1:])
    return [[*bench, *([name] if "=" in name else [])] for name in options.only]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shapes", [True, False], ids=["true shapes", "a recipe"])
def test_every_command_of_a_stage_is_one_that_bench_takes_and_their_limits_fit_the_stage(
    stage: str, shapes: bool, tiny: Path, tmp_path: Path
) -> None:
    """Stage C alone has more to do than time: its last comparison, of attention, gets what is left."""
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False, model={"dtype": "bf16"})))
    commands, shown = run_stage(tmp_path, stage, **({} if shapes else {"RECIPE": file}))
    assert "skipped" not in shown
    checked = 0
    for command in commands:
        for words in bench_words(command):
            parser = Parser()
            add_arguments(parser)
            args = parser.parse_intermixed_args(words)
            args.typed = parser.typed_options(args)
            args.json = None  # its folder is there: the script has made it
            check_arguments(args)
            assert stated_recipe(args) or recipe_of_shape(args, tmp_path / "model")
            checked += 1
    assert checked >= (0 if stage == "E" else 3)
    steps = read_results(tmp_path, stage)["steps"]
    limits = [step["limit"] for name, step in steps.items() if name != "attention"]
    assert sum(limits) + 25 <= 580


@pytest.mark.parametrize("name", ["packing", "r.yaml"])
def test_an_ablation_of_an_unknown_name_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        ablation.parse(["--only", "data.pack=false", name])
    assert ended.value.code == 2
    assert lines_with(capsys.readouterr().err, name)


def test_a_variant_that_fails_costs_only_itself_and_the_recipe_itself_must_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Commands of other programs stand in for bench."""
    figures = {"figures": {"tokens_per_second": 10.0, "peak_memory_gib": 1.0, "last_loss": 2.0}}
    write = f"import sys; open(sys.argv[2], 'w').write({json.dumps(figures)!r})"
    good = [sys.executable, "-ISc", write]
    bad = [sys.executable, "-ISc", "import sys; sys.exit('error: no memory')"]
    found = ablation.run_in_turns({ablation.BASELINE: good, "other": bad}, rounds=2)
    shown = capsys.readouterr()
    assert list(ablation.table_of(found)) == [ablation.BASELINE]
    assert (len(found[ablation.BASELINE]), len(found["other"])) == (2, 0)
    assert "error: no memory" in shown.out
    with pytest.raises(SystemExit):
        ablation.table_of({ablation.BASELINE: [], "other": found[ablation.BASELINE]})


@pytest.mark.slow
def test_a_step_is_killed_at_its_own_limit_and_the_next_ones_run(tmp_path: Path) -> None:
    commands, shown = run_stage(tmp_path, "A", SLEEPS=2, SHORTEST=1, LIMIT_8B_FP8=1)
    steps = read_results(tmp_path, "A")["steps"]
    exits = {name: step["exit"] for name, step in steps.items()}
    assert exits.pop("8b-fp8") == 124
    assert steps["8b-fp8"]["limit"] == 1
    assert set(exits.values()) == {0}
    assert "skipped" not in shown
    assert len(commands) == len(steps)


@pytest.mark.slow
def test_a_stage_keeps_to_its_limit_and_names_what_it_had_no_time_for(tmp_path: Path) -> None:
    """Its first step is worth 25 s, gets what the stage has, and leaves nothing to the others."""
    commands, shown = run_stage(tmp_path, "A", SLEEPS=60, LIMIT=6, RESERVE=1, SHORTEST=1)
    steps = read_results(tmp_path, "A")["steps"]
    device = steps.pop("device")
    assert device["exit"] == 124
    assert device["limit"] <= 5
    assert {step["exit"] for step in steps.values()} == {None}
    assert lines_with(shown, "70b-nf4")
    assert len(commands) == 1


@pytest.mark.slow
def test_a_stage_that_is_killed_keeps_the_results_of_the_steps_before(tmp_path: Path) -> None:
    environment = stage_environment(tmp_path, "A", SLEEPS=1.5)
    stage = subprocess.Popen(
        stage_command("A"),
        cwd=BENCHMARKS.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    results = tmp_path / "out-A" / "results-A.json"
    wait_for(lambda: results.exists() and "8b-bf16" in json.loads(results.read_text())["steps"])
    os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()
    kept = json.loads(results.read_text())
    assert kept["device"]["name"] == "NVIDIA H200"
    assert kept["steps"]["8b-bf16"]["report"]["figures"] == {"tokens_per_second": 20000.0}
    assert kept["goals"][0] == {
        "goal": "8B LoRA, bf16",
        "tokens_per_second": 20000.0,
        "target": 19000,
        "reached": True,
    }


@pytest.mark.slow
def test_a_failure_ends_nothing_and_8b_is_measured_uncompiled_where_compiled_it_fails(
    tmp_path: Path,
) -> None:
    report = f"{tmp_path}/tunesmith-first-gpu/stage-A/8b-bf16.json"
    commands, shown = run_stage(tmp_path, "A", FAILS=report)
    assert lines_with(shown, "8b-bf16", 1)
    assert lines_with(shown, "70b-nf4", 0)
    assert lines_with(shown, "8b-bf16-eager", 0)
    assert "train.compile=off" in commands[-1]
    assert "Filesystem" in (tmp_path / "out-A" / "stage-A.log").read_text(), (
        "the log begins with what the machine has"
    )


@pytest.mark.slow
def test_a_stage_leaves_three_files_and_the_next_one_takes_the_caches_back(tmp_path: Path) -> None:
    run_stage(tmp_path, "A")
    left = {file.name for file in (tmp_path / "out-A").iterdir()}
    assert left == {"results-A.json", "stage-A.log", "caches-A.tar.gz"}
    other_machine = tmp_path / "other"
    other_machine.mkdir()
    (other_machine / "caches-A.tar.gz").write_bytes(
        (tmp_path / "out-A" / "caches-A.tar.gz").read_bytes()
    )
    run_stage(other_machine, "B")
    with tarfile.open(other_machine / "out-B" / "caches-B.tar.gz") as archive:
        graphs = {Path(name).name for name in archive.getnames()}
    assert {"graph-A", "graph-B"} <= graphs


@pytest.mark.slow
def test_caches_that_are_too_large_to_send_stay(tmp_path: Path) -> None:
    _, shown = run_stage(tmp_path, "A", CACHED_BYTES=2 << 20, CACHE_MIB=1)
    assert lines_with(shown, "1 MiB")
    assert not (tmp_path / "out-A" / "caches-A.tar.gz").exists()


@pytest.mark.parametrize("script", ["first_gpu.sh", "first_gpu_prep.sh"])
def test_bash_reads_the_scripts(script: str) -> None:
    subprocess.run(["bash", "-n", BENCHMARKS / script], check=True)


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        stage_command("F"),
        env=os.environ | {"OUT": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2


@pytest.mark.slow
def test_the_micro_timings_run_and_tell_what_failed(tmp_path: Path) -> None:
    """A CPU lacks the fp32 output of a bf16 product, and our kernels in Triton."""
    out = tmp_path / "micro.json"
    words = [out, "--tokens", "64", "--divide", "16", "--repeat", "1"]
    done = run_warm(words, program=BENCHMARKS / "speed" / "micro.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["milliseconds"]
    failed = {name for name, value in found.items() if isinstance(value, str)}
    kernels = {
        name
        for name in found
        if "in one pass" in name or ("fused" in name and "quantize" not in name)
    }
    assert failed == {name for name in found if "in fp32" in name} | kernels
    assert len(found) > 50


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
