"""`tunesmith.train` as a program calls it: overrides, records, what is shown, how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from pathlib import Path

import pytest

import tunesmith
from errors import holds, refuses
from logged import logged_lines
from ranks import run_ranks
from recipes import recipe
from tunesmith.config.dump import to_yaml
from tunesmith.host.logger import PACKAGE
from tunesmith.metrics.record import StepRecord, read_records
from warm import run_python

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe_file(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe(tiny, tmp_path)))
    return path


def test_each_record_is_handed_over_as_it_is_written(recipe_file: Path) -> None:
    seen: list[StepRecord] = []

    def note(record: StepRecord) -> None:
        written = read_records(recipe_file.parent / "run" / "metrics.jsonl")
        assert written[-1] == record, "a record is in metrics.jsonl before the function sees it"
        seen.append(record)

    result = tunesmith.train(
        recipe_file, {"train.duration": "5 steps", "train.seed": 7}, on_record=note, quiet=True
    )
    assert seen == result.records
    assert [record.step for record in seen] == [1, 2, 3, 4, 5]
    assert [record.step for record in seen if record.val_loss is not None] == [4, 5]
    assert "records" not in repr(result)


def test_what_on_record_raises_ends_the_run_unchanged(recipe_file: Path) -> None:
    """As sweeps need it: Optuna's TrialPruned, raised in a callback, must reach Optuna."""

    class Pruned(Exception):
        pass

    def prune(record: StepRecord) -> None:
        if record.step == 5:
            raise Pruned("not worth it")

    with pytest.raises(Pruned) as raised:
        tunesmith.train(recipe_file, on_record=prune, quiet=True)
    assert raised.value.__cause__ is None
    out = recipe_file.parent / "run"
    failure = json.loads((out / "failure.json").read_text())
    assert holds(failure["what"], "on_record", f"Pruned: {raised.value}")
    assert failure["where"] == "step 5"
    assert holds(failure["next"], "checkpoint-4")
    result = tunesmith.train(recipe_file, quiet=True)
    assert (result.first_step, result.steps) == (4, 8)
    assert not (out / "failure.json").exists()


def test_a_signal_raised_in_on_record_saves_and_stops(recipe_file: Path) -> None:
    """What a notebook's stop button sends to the kernel."""

    def stop(record: StepRecord) -> None:
        if record.step == 3:
            signal.raise_signal(signal.SIGINT)

    with refuses(tunesmith.StoppedError, names=["SIGINT", "step 3"]) as raised:
        tunesmith.train(recipe_file, on_record=stop, quiet=True)
    assert raised.value._render_traceback_()[0] == raised.value.what
    assert tunesmith.train(recipe_file, quiet=True).first_step == 3


def end_after_3(record: StepRecord) -> None:
    if record.step == 3:
        raise StopIteration


def test_on_record_finishes_a_run_early(recipe_file: Path) -> None:
    """A stop of the caller's own: the run has finished, and a longer one goes on from it."""
    result = tunesmith.train(recipe_file, on_record=end_after_3, quiet=True)
    assert (result.steps, len(result.records)) == (3, 3)
    assert result.final_step is not None
    again = tunesmith.train(recipe_file, quiet=True)
    assert again.finished_before
    assert [record.step for record in again.records] == [1, 2, 3]
    assert tunesmith.load_run(again).location == tunesmith.load_run(result.output_dir).location
    longer = tunesmith.train(recipe_file, {"train.duration": "9 steps"}, quiet=True)
    assert (longer.first_step, longer.steps) == (3, 9)


def ended_on_ranks(file: str) -> tuple[int, Path]:
    result = tunesmith.train(file, on_record=end_after_3, quiet=True)
    return result.steps, result.output_dir


@pytest.mark.nightly
def test_all_ranks_end_after_the_same_step(recipe_file: Path) -> None:
    (steps, folder), second = run_ranks(2, ended_on_ranks, str(recipe_file))
    assert (steps, folder) == second
    assert steps == 4
    # Rank 0 writes it, perhaps after the other has ended.
    assert (folder / "final" / "manifest.json").is_file()


@pytest.mark.parametrize("setting", ["by default", "quiet", "own handler"])
def test_what_is_shown(recipe_file: Path, capfd: pytest.CaptureFixture[str], setting: str) -> None:
    """Lines go to stderr, or to the program's handler in its place; `quiet` prints nothing."""
    quiet = setting.endswith("quiet")
    own_handler = logged_lines() if setting.startswith("own") else contextlib.nullcontext([])
    with own_handler as taken:
        tunesmith.train(recipe_file, {"train.duration": "2 steps"}, quiet=quiet)
    shown = capfd.readouterr()
    assert shown.out == ""
    schedule = "steps: 2"
    assert any(holds(text, schedule) for text in taken) == setting.startswith("own")
    assert holds(shown.err, schedule) == (setting == "by default")
    assert ("step 2/2" in shown.err) != quiet
    assert not quiet or shown.err == ""
    log = (recipe_file.parent / "run" / "log.txt").read_text()
    assert holds(log, schedule)
    assert "step 2/2" in log
    assert (PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate) == ([], logging.NOTSET, True)


# What a program does before it trains -> whether its stderr has the line as it is, and as logging
# has it.
PROGRAMS = {
    "logging.basicConfig()": (True, False),  # as Colab: a root logger at WARNING
    "logging.basicConfig(level=logging.INFO)": (False, True),
    "logging.getLogger('tunesmith').setLevel(logging.WARNING)": (False, False),
    "pass": (True, False),
    "logging.basicConfig(); logging.getLogger('tunesmith').setLevel(logging.INFO)": (False, True),
    "logging.getLogger('tunesmith').addHandler(logging.NullHandler())": (False, False),
}
SETUPS = [
    pytest.param(name, marks=() if number < 2 else pytest.mark.nightly)
    for number, name in enumerate(PROGRAMS)
]


@pytest.mark.parametrize("setup", SETUPS)
def test_a_program_that_has_set_up_logging_keeps_it(recipe_file: Path, setup: str) -> None:
    program = f"""
import logging
import tunesmith
{setup}
tunesmith.train({str(recipe_file)!r}, {{"train.duration": "1 steps", "train.warmup": "0 steps"}})
"""
    done = run_python([sys.executable, program])
    assert done.returncode == 0, done.stderr
    # The first line of its record
    lines = [line for line in done.stderr.splitlines() if "48 of 48" in line]
    plain = [line for line in lines if not line.startswith("INFO:tunesmith:")]
    assert (bool(plain), len(plain) < len(lines)) == PROGRAMS[setup]
    assert done.stdout == ""


def test_an_error_reads_well_in_python_and_in_a_notebook(recipe_file: Path) -> None:
    with pytest.raises(tunesmith.TunesmithError) as raised:
        tunesmith.train(recipe_file, {"train.learning_rate": "fast"})
    lines = str(raised.value).splitlines()
    assert lines[0] == raised.value.what
    assert lines[1] == "  where: overrides: train.learning_rate"
    assert holds(lines[0], "train.learning_rate:", "fast")
    assert lines[2].startswith("  fix: ")
    # A notebook shows it without the name of its class.
    assert raised.value._render_traceback_() == [f"error: {lines[0]}", *lines[1:]]
