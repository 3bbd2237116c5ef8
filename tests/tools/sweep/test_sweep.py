"""Candidates over one base learn, bit for bit, what `train` of their recipes learns."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import check_shown, holds, refuses
from invoke import invoke
from ranks import run_ranks
from recipes import merge, recipe
from tunesmith.checkpoint.manifest import list_checkpoints
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import (
    EXIT_STOPPED,
    EXIT_USAGE,
    LowMemoryError,
    RecipeError,
    RunError,
    StoppedError,
    UsageError,
)
from tunesmith.host.chips import Chip
from tunesmith.host.signals import LowMemory
from tunesmith.metrics.record import read_records
from tunesmith.run_dir import SWEEP, weights_step
from tunesmith.start import plan as plan_stage
from tunesmith.start.run import StartOptions, joined, start_run
from tunesmith.tools.report.run_files import RunFiles
from tunesmith.tools.sweep import run as sweep_module
from tunesmith.tools.sweep import shared_base
from tunesmith.tools.sweep.run import run_sweep
from tunesmith.tools.sweep.space import read_space
from tunesmith.tools.sweep.table import sweep_lines
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from warm import Warm, run_warm

SAME = "step epoch loss grad_norm learning_rate tokens supervised_tokens examples val_loss".split()
RATES, RANKS = "train.learning_rate=1e-3,1e-2", "adapter.rank=2,8"
WORDS = [RATES, RANKS]
Outcome = dict[str, Any]


def write_recipe(base: Path, folder: Path, /, **changes: Any) -> Path:
    values = merge(
        recipe(base, folder, train={"duration": "4 steps"}),
        {"validate": {"every": "2 steps"}, "output_dir": str(folder / "sweep")},
    )
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(merge(values, changes)))
    return file


def sweep(file: Path, words: list[str] = WORDS) -> Outcome:
    return run_sweep(file, read_space(words))


def numbers(folder: str | Path) -> list[tuple[Any, ...]]:
    records = read_records(Path(folder, "metrics.jsonl"))
    return [tuple(getattr(record, name) for name in SAME) for record in records]


def tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def train_alone(candidate: dict[str, Any], folder: Path) -> Path:
    """Train the recipe of a candidate in a run of its own."""
    out = folder / f"alone-{candidate['name']}"
    run = replace(load_recipe(Path(candidate["run_dir"], "config.yaml")), output_dir=str(out))
    with joined(run) as (request, ranks):
        start_run(run, StopControl(request, out, ranks), ranks, StartOptions(quiet=True))
    return out


def assert_equals_train(outcome: Outcome, folder: Path) -> None:
    for candidate in outcome["candidates"]:
        alone, run_dir = train_alone(candidate, folder), Path(candidate["run_dir"])
        found = numbers(run_dir)
        assert found == numbers(alone)
        assert candidate["state"] == "finished"
        assert len(found) == candidate["step"] == outcome["fixed"]["steps"]
        assert tensors(run_dir / "final") == tensors(alone / "final")
        best = [path / "best.json" for path in (run_dir, alone)]
        assert best[0].exists() == best[1].exists() == (outcome["compared_by"] == "val_loss")
        assert not best[0].exists() or best[0].read_text() == best[1].read_text()


@pytest.fixture(scope="module")
def swept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of a whole sweep of WORDS, for tests that only read it."""
    return sweep(write_recipe(tiny, tmp_path_factory.mktemp("swept")))


@pytest.mark.slow
def test_each_candidate_is_its_run_alone_and_the_lowest_val_loss_is_best(
    swept: Outcome, tmp_path: Path
) -> None:
    assert_equals_train(swept, tmp_path)
    runs = {candidate["name"]: Path(candidate["run_dir"]) for candidate in swept["candidates"]}
    losses = {
        name: RunFiles(run).figures.validations[weights_step(run / "final")]
        for name, run in runs.items()
    }
    assert {each["name"]: each["loss"] for each in swept["candidates"]} == losses
    assert swept["best"] == min(losses, key=losses.__getitem__)
    assert json.loads((runs[swept["best"]].parent / SWEEP).read_text()) == swept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"dtype": "bf16", "quantize": "nf4"}}, [RANKS]),
        ({"adapter": {"dropout": 0.1, "modules_to_save": ["norm"]}},
         ["adapter.rank=4,2", "train.seed=2", "train.micro_batch=4 examples", "adapter.rslora=true"]),
    ],
    ids=["nf4", "dropout"],
)  # fmt: skip
def test_each_candidate_of_another_base_or_adapter_is_its_run_alone(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    assert_equals_train(sweep(write_recipe(tiny, tmp_path, **changes), words), tmp_path)


@pytest.mark.slow
def test_the_same_command_trains_only_what_is_missing_and_another_one_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(run: Run, *arguments: Any, **options: Any) -> Any:
        started.append(Path(run.output_dir).name[:2])
        return start_run(run, *arguments, **options)

    monkeypatch.setattr(sweep_module, "start_run", start)
    file = write_recipe(tiny, tmp_path, train={"clip_norm": None, "warmup": "0 steps"})
    words = ["train.learning_rate=1e-3,1e30,1e-2"]
    outcome = sweep(file, words)
    first, second, third = outcome["candidates"]
    assert (second["state"], second["loss"]) == ("diverged", None)
    assert second["step"] < outcome["fixed"]["steps"]
    assert first["state"] == third["state"] == "finished"
    shutil.rmtree(third["run_dir"])
    assert sweep(file, words) == outcome
    assert started == ["01", "02", "03", "03"]
    monkeypatch.delattr(shared_base, "build")  # nothing is loaded
    assert sweep(file, words) == outcome
    with refuses(UsageError, where=SWEEP, fix=["output_dir"]):
        sweep(file, [RANKS])
    metrics = Path(first["run_dir"], "metrics.jsonl")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    with refuses(RunError, where=str(metrics), names=["val_loss"]):
        sweep(file, words)


@pytest.mark.parametrize("text", ['{"asked": {"rec', '{"asked": {}, "fixed": {"rungs": 3}}'])
def test_a_torn_or_foreign_sweep_json_is_refused(tiny: Path, tmp_path: Path, text: str) -> None:
    file, saved = write_recipe(tiny, tmp_path), tmp_path / "sweep" / SWEEP
    saved.parent.mkdir()
    saved.write_text(text)
    done = invoke("sweep", file, *WORDS)
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=str(saved))
    assert saved.read_text() == text


@pytest.mark.slow
def test_training_losses_are_compared_without_held_out_rows(tiny: Path, tmp_path: Path) -> None:
    file = write_recipe(tiny, tmp_path, data={"validation": None}, train={"duration": "3 steps"})
    outcome = sweep(file, ["adapter.rank=2,4"])
    assert outcome["compared_by"] == "loss"
    runs = {each["name"]: RunFiles(Path(each["run_dir"])) for each in outcome["candidates"]}
    losses = {name: run.figures.loss for name, run in runs.items()}
    assert {each["name"]: each["loss"] for each in outcome["candidates"]} == losses
    assert outcome["best"] == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    ("changes", "word", "name"),
    [
        ({"adapter": {"kind": "none"}}, "train.seed=1,2", "adapter"),
        ({"train": {"duration": "10 min"}}, "train.seed=1,2", "train.duration"),
        ({"parallel": {"tensor": 2}}, "train.seed=1,2", "parallel"),
        # Another seed would hold out other rows.
        ({"data": {"validation": None, "hold_out": "4 examples"}}, "train.seed=1,2", "train.seed"),
        ({}, "train.learning_rate=1e-4,fast", "train.learning_rate"),
        ({}, "adapter.rank=0,8", "adapter.rank"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_loaded(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], word: str, name: str
) -> None:
    values = json.loads(write_recipe(tiny, tmp_path).read_text())
    if "adapter" in changes:
        del values["adapter"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(merge(values, changes)))
    with refuses(RecipeError) as caught:
        sweep(tmp_path / "recipe.yaml", [word])
    assert name in caught.value.where + caught.value.what
    assert not (tmp_path / "sweep").exists()


@pytest.mark.nightly
def test_kill_9_anywhere_and_the_same_command_goes_on(
    tiny: Path, tmp_path: Path, swept: Outcome
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", str(write_recipe(tiny, tmp_path)), *WORDS]

    def steps() -> int:
        return sum(path.read_bytes().count(b"\n") for path in out.glob("*/metrics.jsonl"))

    for wanted, number in ((1, signal.SIGKILL), (5, signal.SIGTERM), (10, signal.SIGKILL)):
        process = Warm(command)
        while steps() < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.wait() == (EXIT_STOPPED if number == signal.SIGTERM else -signal.SIGKILL)
        assert ("SIGTERM: " in said) == (number == signal.SIGTERM)
    ended = run_warm(command)
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads((out / SWEEP).read_text())
    for ours, theirs in zip(outcome["candidates"], swept["candidates"], strict=True):
        assert {**ours, "run_dir": ""} == {**theirs, "run_dir": ""}
        assert numbers(ours["run_dir"]) == numbers(theirs["run_dir"])
        (newest, *_) = list_checkpoints(Path(theirs["run_dir"])).values()
        assert tensors(Path(ours["run_dir"], newest.name)) == tensors(newest)
    assert outcome["best"] == swept["best"]
    assert ended.stdout.splitlines() == [*sweep_lines(outcome)]


@pytest.mark.slow
def test_layers_are_compiled_once_a_rank_as_in_a_run_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[list[tuple[Any, ...]]] = []

    def note(graph: Any, inputs: list[Any]) -> Any:
        graphs.append([tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor)])
        return graph.forward

    def of_rank(rank: int) -> int:
        return sum((rank, 64) in shapes for shapes in graphs)

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: compiled(function, **{**given, "backend": note})
    )
    train = {"compile": "on", "duration": "2 steps"}
    file = write_recipe(tiny, tmp_path, data={"validation": None}, train=train)
    outcome = sweep(file, [RATES, "adapter.rank=8"])
    count = of_rank(8)
    torch._dynamo.reset()
    graphs.clear()
    candidate = outcome["candidates"][1]
    assert numbers(train_alone(candidate, tmp_path)) == numbers(candidate["run_dir"])
    assert of_rank(8) == count > 0


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, interrupt: Any) -> None:
    """Call `interrupt(trainer)` before a step of each candidate."""
    train_step = Trainer.train_step

    def step(trainer: Trainer, batch: Any) -> Any:
        if batch.step == at:
            interrupt(trainer)
        return train_step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", step)


def lacks_memory(trainer: Trainer) -> None:
    trainer.stop.request.low_memory = LowMemory("no room", {})


@pytest.mark.slow
def test_a_signal_before_a_validation_loses_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start measures and writes the record of the step, whose checkpoint was saved."""
    file = write_recipe(tiny, tmp_path)
    with monkeypatch.context() as patch:
        interrupted(patch, 1, lambda _: signal.raise_signal(signal.SIGTERM))
        with refuses(StoppedError, where="checkpoint-2", names=["step 2"]):
            sweep(file, [RATES])
    assert_equals_train(sweep(file, [RATES]), tmp_path)


@pytest.mark.slow
def test_a_sweep_that_memory_stops_goes_on_with_its_micro_batch_and_dtype(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins where there are no units for bf16, and goes on where there are."""
    from tunesmith.tools.sweep import cli as sweep_cli

    told: list[Any] = []
    chip, file = Chip("cpu", 64.0), write_recipe(tiny, tmp_path, model={"dtype": "auto"})
    with monkeypatch.context() as patch:
        patch.setattr(plan_stage, "chip_of", lambda device, ranks: replace(chip, bf16=False))
        patch.setattr("tunesmith.distributed.ranks.is_launched", lambda: True)
        interrupted(patch, 1, lacks_memory)
        with refuses(LowMemoryError, where="checkpoint-1", cause="memory") as caught:
            sweep(file, [RATES])
    size = json.loads((tmp_path / "sweep" / SWEEP).read_text())["fixed"]["micro_batch"]
    assert holds(caught.value.fix, size)
    assert caught.value.exit_code == 0
    # The agent returns the exit code of its ranks.
    codes = iter([EXIT_STOPPED, 0])
    monkeypatch.setattr(sweep_cli, "run_agent", lambda words: told.append(words) or next(codes))
    words = ["sweep", str(file), RATES, "--json"]
    assert invoke(*words, "--ranks", "2").code == EXIT_STOPPED
    assert told == [["--ranks", "2", "--", *words]]
    monkeypatch.setattr(plan_stage, "chip_of", lambda device, ranks: chip)
    outcome = sweep(file, [RATES])
    assert (outcome["fixed"]["micro_batch"], outcome["fixed"]["dtype"]) == (size, "fp32")
    configs = [Path(each["run_dir"], "config.yaml") for each in outcome["candidates"]]
    assert {load_recipe(config).model.dtype for config in configs} == {"fp32"}
    assert invoke(*words, "--ranks", "2").code == 0


def sweep_and_train(file: Path, words: list[str]) -> Outcome:
    """A sweep on this rank, then the recipe of its first candidate by itself."""
    outcome = sweep(file, words)
    train_alone(outcome["candidates"][0], file.parent)
    return outcome


@pytest.mark.slow
def test_two_ranks_agree_on_what_diverged(tiny: Path, tmp_path: Path) -> None:
    words = ["train.learning_rate=1e-3,1e30"]
    micro = {"micro_batch": "128 tokens", "clip_norm": None, "warmup": "0 steps"}
    file = write_recipe(tiny, tmp_path, train=micro, parallel={"shard": 2})
    outcome, other = run_ranks(2, sweep_and_train, file, words)
    assert outcome == other
    finished, diverged = outcome["candidates"]
    assert (finished["state"], diverged["state"]) == ("finished", "diverged")
    failure = json.loads(Path(diverged["run_dir"], "failure.json").read_text())
    assert failure["cause"] == "not-finite"
    found = numbers(finished["run_dir"])
    assert found == numbers(tmp_path / f"alone-{finished['name']}")
    assert all(math.isfinite(row[2]) for row in found)
