"""The stages of the first half hour on a GPU: what they would run is what the commands take, and a failure ends nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import recipe
from tunesmith.bench.ablation import variants
from tunesmith.bench.shape import shape_recipe
from tunesmith.cli.bench import add_arguments, check_arguments, recipe_of
from tunesmith.config.dump import to_yaml
from tunesmith.config.schema import Run
from warm import run_warm

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
# Notes its arguments, one JSON list a line, and ends as FAILS says: a script of the interpreter in the place of Python
STAND_IN = """#!{python}
import json, os, sys
open(os.environ["NOTED"], "a").write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(any(word in os.environ["FAILS"].split() for word in sys.argv))
"""


def run_stage(folder: Path, stage: int, *, fails: str = "", **env: object) -> tuple[list[list[str]], str]:
    """The arguments of each Python that a stage starts, and what it prints."""
    noted, python = folder / f"noted-{stage}", folder / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    given = {"OUT": folder / "out", "PYTHON": python, "NOTED": noted, "FAILS": fails, "TMPDIR": folder}
    given |= {"FOLDER": folder, **env}  # a checkout may hold the one that was made for a machine
    done = subprocess.run(
        ["bash", SCRIPTS / "first_gpu.sh", str(stage)], cwd=SCRIPTS.parent, env=os.environ | {k: str(v) for k, v in given.items()},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert not done.stderr
    noted.touch()
    return [json.loads(line) for line in noted.read_text().splitlines()], done.stdout


def recipe_of_shape(args: argparse.Namespace, folder: Path) -> Run:
    """The checked recipe of a shape, as `recipe_of` makes it; its model is not written."""
    return shape_recipe(folder, data=args.data, rows="alpaca", overrides=[word for word in args.words if "=" in word])


@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shapes", [True, False], ids=["true shapes", "a recipe"])
def test_every_command_of_a_stage_is_one_that_bench_takes(stage: int, shapes: bool, tiny: Path, tmp_path: Path) -> None:
    file, checked = tmp_path / "recipe.yaml", 0
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False, model={"dtype": "bf16"})))
    commands, shown = run_stage(tmp_path, stage, **({} if shapes else {"RECIPE": file}))
    read = recipe_of_shape if shapes else recipe_of
    assert "skipped" not in shown
    assert len({word for command in commands for word in command if word.endswith(".json")}) >= len(commands) - 1
    for command in commands:
        if command[:3] == ["-m", "tunesmith", "bench"]:
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            args = parser.parse_intermixed_args(command[3:])
            args.json = None  # its folder is there: the script has made it
            check_arguments(args)
            run = read(args, tmp_path / "model")
            for key in args.only.split(",") if args.ablation else ():
                changes = [change for _, change in variants(run, gpu=shapes) if change.partition("=")[0] == key]
                assert changes, f"{key} has no variant"
                for change in changes:  # RecipeError where a variant cannot run
                    read(argparse.Namespace(**{**vars(args), "words": [*args.words, change]}), tmp_path / "model")
            checked += 1
    assert checked


def test_a_failure_ends_nothing_and_8b_is_measured_uncompiled_where_compiled_it_fails(tmp_path: Path) -> None:
    commands, shown = run_stage(tmp_path, 1, fails=f"pytest {tmp_path}/out/8b-bf16.json")
    assert "tests ended with 1" in shown
    assert "8b-bf16 ended with 1" in shown
    assert "8b-bf16-eager ended with 0" in shown
    assert any("train.compile=off" in command for command in commands)
    assert "Filesystem" in (tmp_path / "out" / "stage1.log").read_text(), "the log begins with what the machine has"
    assert "8b-least-memory ended with 0" in shown


def test_what_a_stage_has_no_time_for_is_named(tmp_path: Path) -> None:
    commands, shown = run_stage(tmp_path, 2, LIMIT=10)
    assert len(commands) == 0
    assert shown.count("no time is left in this stage") == 3


def test_the_preparation_is_a_script_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", SCRIPTS / "first_gpu_prep.sh"], check=True)


def test_the_micro_timings_run_and_tell_what_failed(tmp_path: Path) -> None:
    """A CPU lacks the fp32 output of a bf16 product, and our kernels in Triton."""
    out = tmp_path / "micro.json"
    words = [out, "--tokens", "64", "--divide", "16", "--repeat", "1"]
    done = run_warm(words, program=SCRIPTS / "micro.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["milliseconds"]
    failed = {name for name, value in found.items() if isinstance(value, str)}
    kernels = {name for name in found if "in one pass" in name or ("fused" in name and "quantize" not in name)}
    assert failed == {name for name in found if "in fp32" in name} | kernels
    assert len(found) > 50
