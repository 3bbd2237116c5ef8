"""Candidates over one base learn, bit for bit, what `train` of their recipes learns; kills and
ranks included.
"""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import error_in, holds, is_at, refuses
from logged import logged_lines
from ranks import run_ranks
from recipes import merge, recipe
from tunesmith.checkpoint.manifest import list_checkpoints
from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import (
    EXIT_STOPPED,
    EXIT_USAGE,
    LowMemoryError,
    NonFiniteError,
    RecipeError,
    RunError,
    StoppedError,
    UsageError,
)
from tunesmith.host.chips import Chip
from tunesmith.host.signals import LowMemory
from tunesmith.metrics.record import read_records
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import SWEEP
from tunesmith.tools.sweep import run as sweep_module
from tunesmith.tools.sweep import shared_base
from tunesmith.tools.sweep.run import check_sweep, run_sweep
from tunesmith.tools.sweep.search import Search
from tunesmith.tools.sweep.space import read_space
from tunesmith.tools.sweep.table import sweep_lines
from tunesmith.training import prepare
from tunesmith.training.run import joined, start_run, train
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from waiting import TIME
from warm import Warm, run_warm

pytestmark = pytest.mark.slow

SAME = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "examples",
    "val_loss",
)
HALVING = Search(rungs=2)  # of the few steps here, which the default does not stop
WORDS = ["train.learning_rate=1e-3,1e-2", "adapter.rank=2,8"]


def write_recipe(base: Path, folder: Path, /, **changes: Any) -> Path:
    values = merge(
        recipe(base, folder),
        {"validate": {"every": "2 steps"}, "output_dir": str(folder / "sweep")},
    )
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(merge(values, changes)))
    return file


def sweep(file: Path, words: list[str] = WORDS, search: Search = HALVING) -> dict[str, Any]:
    return run_sweep(file, read_space(words), search)


def numbers(folder: str | Path) -> list[tuple[Any, ...]]:
    return [
        tuple(getattr(record, name) for name in SAME)
        for record in read_records(Path(folder, "metrics.jsonl"))
    ]


def tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def train_alone(candidate: dict[str, Any], folder: Path, until: int | None = None) -> Path:
    """The recipe of a candidate, trained by itself to its end, or until a step of it."""
    out = folder / f"alone-{candidate['name']}"
    run = replace(load_recipe(Path(candidate["run_dir"], "config.yaml")), output_dir=str(out))
    with joined(run) as (request, ranks):
        stop = StopControl(request, out, ranks)
        start_run(run, stop, ranks, quiet=True, pause_after=until)
    return out


def train_as_far(candidate: dict[str, Any], folder: Path) -> Path:
    """The same until the step at which the sweep left the candidate.

    That stopping changes nothing of a run's steps is seen in the one that goes on to the end.
    """
    finished = candidate["state"] == "finished"
    return train_alone(candidate, folder, None if finished else candidate["step"])


def assert_equals_train(outcome: dict[str, Any], folder: Path) -> None:
    for candidate in outcome["candidates"]:
        alone, run_dir = train_as_far(candidate, folder), Path(candidate["run_dir"])
        found = numbers(run_dir)
        assert found == numbers(alone)
        assert len(found) == candidate["step"]
        assert (
            (candidate["state"] == "finished")
            == (run_dir / "final").is_dir()
            == (candidate["step"] == outcome["fixed"]["steps"])
        )
        if candidate["state"] == "finished":
            assert tensors(run_dir / "final") == tensors(alone / "final")
            best = [path / "best.json" for path in (run_dir, alone)]
            assert best[0].exists() == best[1].exists() == (outcome["compared_by"] == "val_loss")
            assert not best[0].exists() or best[0].read_text() == best[1].read_text()
        assert {"config.yaml", "env.json", "metrics.jsonl", "log.txt"} <= {
            path.name for path in run_dir.iterdir()
        }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, WORDS),
        ({"model": {"dtype": "bf16", "quantize": "nf4"}}, WORDS),
        ({"model": {"dtype": "bf16"}, "adapter": {"dropout": 0.1, "modules_to_save": ["norm"]}},
         ["adapter.rank=4,2", "train.seed=1,2", "train.micro_batch=4 examples", "adapter.rslora=true"]),
    ],
    ids=["fp32", "nf4", "dropout"],
)  # fmt: skip
def test_each_candidate_is_its_run_alone(
    tiny: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
):
    outcome = sweep(write_recipe(tiny, tmp_path, **changes), words)
    assert [c["state"] for c in outcome["candidates"]].count("finished") == 1
    assert sorted(c["step"] for c in outcome["candidates"]) == [2, 2, 4, 8]
    assert_equals_train(outcome, tmp_path)


def test_the_best_is_named_and_a_stopped_one_goes_on_by_train(tiny: Path, tmp_path: Path):
    file = write_recipe(tiny, tmp_path, validate={"every": "3 steps"})
    outcome = sweep(file)
    assert json.loads((tmp_path / "sweep" / SWEEP).read_text()) == outcome
    assert outcome["fixed"]["validate_every"] == "2 steps"
    assert outcome["fixed"]["rungs"] == [2, 4]
    by_rung = [
        {c["name"]: c["losses"].get(step) for c in outcome["candidates"]}
        for step in ("2", "4", "8")
    ]
    first, second, last = (
        {name: loss for name, loss in rung.items() if loss is not None} for rung in by_rung
    )
    assert {*second} == {*sorted(first, key=first.__getitem__)[:2]}
    assert {*last} == {min(second, key=second.__getitem__)} == {outcome["best"]}
    stopped = next(c for c in outcome["candidates"] if c["step"] == 2)
    assert RunFiles(stopped["run_dir"]).state == "stopped"
    assert json.loads(Path(stopped["run_dir"], "stopped.json").read_text())["reason"] == "sweep"
    result = train(load_recipe(Path(stopped["run_dir"], "config.yaml")), quiet=True)
    assert RunFiles(stopped["run_dir"]).state == "finished"
    assert (result.first_step, result.steps) == (2, 8)
    assert numbers(stopped["run_dir"]) == numbers(train_alone(stopped, tmp_path))
    lines = "\n".join(sweep_lines(outcome))
    assert f"best: {outcome['best']}, val_loss" in lines
    assert "of 4: 1 finished, 3 stopped" in lines
    assert "/config.yaml" in lines
    assert "config.yaml" in lines


def test_the_same_command_again_trains_nothing_and_another_one_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[tuple[str, int | None]] = []

    def start(run: Run, *arguments: Any, pause_after: int | None, **options: Any) -> Any:
        started.append((Path(run.output_dir).name[:2], pause_after))
        if started[-1][1] == 4 and len(started) == 5:  # the first one of the second rung
            raise NonFiniteError("the loss is not finite")
        return start_run(run, *arguments, pause_after=pause_after, **options)

    monkeypatch.setattr(sweep_module, "start_run", start)
    file = write_recipe(tiny, tmp_path)
    outcome = sweep(file)
    assert len(started) == 7
    out = next(c for c in outcome["candidates"] if c["state"] == "diverged")
    assert out["losses"]["2"] > 0
    assert out["losses"]["4"] is out["loss"] is None
    monkeypatch.delattr(shared_base, "build")  # nothing is loaded
    assert sweep(file) == outcome
    assert len(started) == 7
    for words, search in ((["adapter.rank=2,4"], HALVING), (WORDS, Search(rungs=0))):
        with refuses(UsageError, where=SWEEP, fix=["output_dir"]):
            sweep(file, words, search)
    with pytest.raises(UsageError, match="contains a run"):
        sweep(file, [*WORDS, f"output_dir={outcome['candidates'][0]['run_dir']}"])


@pytest.mark.parametrize(
    "text", ['{"asked": {"rec', "[]", '{"candidates": 3}', '{"asked": {}, "fixed": {"rungs": 3}}']
)
def test_a_torn_or_foreign_sweep_json_is_refused(
    tiny: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
):
    file = write_recipe(tiny, tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / SWEEP).write_text(text)
    assert main(["sweep", str(file), *WORDS]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert is_at(error_in(err).where, SWEEP)
    assert f"where: {tmp_path / 'sweep' / SWEEP}" in err
    assert (tmp_path / "sweep" / SWEEP).read_text() == text


def test_a_candidate_whose_records_were_cut_is_named(tiny: Path, tmp_path: Path):
    file = write_recipe(tiny, tmp_path)
    candidate = sweep(file)["candidates"][0]
    metrics = Path(candidate["run_dir"], "metrics.jsonl")
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    with refuses(RunError, names=["val_loss", "step 2"]) as caught:
        sweep(file)
    assert caught.value.where == str(metrics)


def test_a_range_is_drawn_from_and_one_that_diverges_is_out(tiny: Path, tmp_path: Path):
    file = write_recipe(
        tiny, tmp_path, train={"clip_norm": None, "warmup": "0 steps"}, model={"dtype": "fp32"}
    )
    words = ["train.learning_rate=1e-3..1e38", "adapter.rank=2,4"]
    search = Search(rungs=2, candidates=5)
    outcome = sweep(file, words, search)
    states = {c["name"]: c["state"] for c in outcome["candidates"]}
    assert len(states) == 5
    assert {"finished", "diverged"} <= {*states.values()}
    assert states[outcome["best"]] == "finished"
    assert sweep(file, words, search) == outcome
    assert "diverged" in "\n".join(sweep_lines(outcome))


def test_to_the_end_without_held_out_rows(tiny: Path, tmp_path: Path):
    file = write_recipe(tiny, tmp_path, data={"validation": None}, train={"duration": "3 steps"})
    with refuses(RecipeError, where="data.validation", fix=["--to-the-end"]) as caught:
        sweep(file)
    assert "--to-the-end" in caught.value.fix
    with logged_lines() as said:
        outcome = sweep(file, ["adapter.rank=2,4"], Search(rungs=0))
    begun = [line for line in said if "2 candidates, trains to step" in line]
    assert [line.split(" of ")[0] for line in begun] == ["01-rank-2: 1", "02-rank-4: 2"]
    assert [c["state"] for c in outcome["candidates"]] == ["finished"] * 2
    assert outcome["compared_by"] == "loss"
    assert_equals_train(outcome, tmp_path)


def test_the_default_waits_for_the_longest_warmup(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep_module, "halve", lambda *given: None)  # nothing is trained
    for longest, rungs in ((4, [8]), (5, [])):
        changes = {"train": {"duration": "16 steps"}, "output_dir": str(tmp_path / str(longest))}
        space = read_space([f"train.warmup=0 steps,{longest} steps", "adapter.rank=2,4"])
        with logged_lines() as said:
            outcome = run_sweep(write_recipe(tiny, tmp_path, **changes), space, Search())
        assert outcome["fixed"]["rungs"] == rungs
        told = [text for text in said if text.startswith("every candidate ")]
        assert bool(told) == (not rungs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {"kind": "none"}}, "needs a frozen base"),
        ({"train": {"duration": "10 min"}}, "duration in steps"),
        ({"parallel": {"tensor": 2}}, "does not support tensor parallelism"),
        ({"data": {"validation": None, "hold_out": "4 examples"}}, "selects the held-out rows"),
    ],
)
def test_recipes_that_are_refused(tiny: Path, tmp_path: Path, changes: dict[str, Any], said: str):
    values = json.loads(write_recipe(tiny, tmp_path).read_text())
    if "adapter" in changes:
        del values["adapter"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(merge(values, changes)))
    with pytest.raises(RecipeError, match=said) as caught:
        sweep(tmp_path / "recipe.yaml", ["train.seed=1,2"])
    assert caught.value.fix
    assert not (tmp_path / "sweep").exists()


def test_seeds_are_swept_where_another_draws_the_held_out_rows(tiny: Path, tmp_path: Path) -> None:
    space = read_space(["train.seed=1,2"])
    drawn = {"validation": None, "hold_out": "4 examples"}
    run = load_recipe(write_recipe(tiny, tmp_path, data=drawn))
    with refuses(RecipeError, where="train.seed", fix=["data.hold_out_seed=42"]):
        check_sweep(run, space, Search())
    check_sweep(replace(run, data=replace(run.data, hold_out_seed=42)), space, Search())


def test_a_value_is_refused_before_anything_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(shared_base, "build")
    for word in ("train.learning_rate=1e-4,fast", "adapter.rank=0..8"):
        with pytest.raises(RecipeError, match=r"learning_rate: expected|adapter\.rank is 0"):
            sweep(write_recipe(tiny, tmp_path), [word])


def test_kill_9_anywhere_and_the_same_command_goes_on(tiny: Path, tmp_path: Path):
    whole = sweep(write_recipe(tiny, tmp_path))
    out = tmp_path / "killed"
    command = [
        "sweep",
        str(write_recipe(tiny, tmp_path, output_dir=str(out))),
        *WORDS,
        "--rungs",
        "2",
    ]
    for steps, number in (
        (1, signal.SIGKILL),
        (4, signal.SIGKILL),
        (9, signal.SIGTERM),
        (13, signal.SIGKILL),
    ):
        process, deadline = Warm(command), time.monotonic() + TIME
        while sum(path.read_bytes().count(b"\n") for path in out.glob("*/metrics.jsonl")) < steps:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.wait() == (EXIT_STOPPED if number == signal.SIGTERM else -signal.SIGKILL)
        assert ("SIGTERM: " in said) == (number == signal.SIGTERM)
    ended = run_warm(command)
    assert ended.returncode == 0, ended.stderr
    outcome = json.loads((out / SWEEP).read_text())
    for ours, theirs in zip(outcome["candidates"], whole["candidates"], strict=True):
        assert {**ours, "run_dir": ""} == {**theirs, "run_dir": ""}
        assert numbers(ours["run_dir"]) == numbers(theirs["run_dir"])
        for newest in [*list_checkpoints(Path(theirs["run_dir"])).values()][:1]:
            assert tensors(Path(ours["run_dir"], newest.name)) == tensors(newest)
    assert outcome["best"] == whole["best"]
    assert ended.stdout.splitlines() == [*sweep_lines(outcome), f"report: {out / 'report.html'}"]
    page = (out / "report.html").read_text()
    assert f"best: {outcome['best']}" in page
    assert all(c["name"] in page for c in outcome["candidates"])


def test_layers_are_compiled_once_a_rank_as_in_a_run_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graphs: list[list[tuple[Any, ...]]] = []

    def note(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(
            [tuple(tensor.shape) for tensor in inputs if isinstance(tensor, torch.Tensor)]
        )
        return graph.forward

    def of_rank(rank: int) -> int:
        return sum((rank, 64) in shapes for shapes in graphs)

    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: compiled(function, **{**given, "backend": note})
    )
    file = write_recipe(
        tiny, tmp_path, data={"validation": None}, train={"compile": "on", "duration": "2 steps"}
    )
    outcome = sweep(file, search=Search(rungs=0))
    count = of_rank(8)
    torch._dynamo.reset()
    graphs.clear()
    candidate = outcome["candidates"][1]
    assert numbers(train_alone(candidate, tmp_path)) == numbers(candidate["run_dir"])
    assert of_rank(8) == count > 0


def test_a_signal_before_the_validation_of_a_rung_loses_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The checkpoint of the rung's step is saved, and its record is not written: the next start
    measures and writes it.
    """
    file, train_step = write_recipe(tiny, tmp_path), Trainer.train_step

    def signalled(trainer: Trainer, batch: Any) -> Any:
        if batch.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return train_step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with refuses(StoppedError, where="checkpoint-2", names=["step 2"]):
            sweep(file)
    assert_equals_train(sweep(file), tmp_path)


def test_the_words_of_several_ranks(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tunesmith.tools.sweep import cli as sweep_cli

    told: list[Any] = []
    monkeypatch.setattr(sweep_cli, "run_agent", lambda words: told.append(words) or EXIT_STOPPED)
    file = str(write_recipe(tiny, tmp_path))
    assert (
        main(
            [
                "sweep",
                file,
                "train.learning_rate=1e-4..1e-3",
                "--ranks",
                "2",
                "--candidates",
                "3",
                "--rungs",
                "2",
                "--json",
            ]
        )
        == EXIT_STOPPED
    )
    words = [
        "sweep",
        file,
        "train.learning_rate=1e-4..1e-3",
        "--candidates",
        "3",
        "--rungs",
        "2",
        "--json",
    ]
    assert told == [["--ranks", "2", "--", *words]]
    assert main(["sweep", file, *WORDS, "--candidates", "3"]) == EXIT_USAGE


def test_a_sweep_that_memory_stops_goes_on_with_its_micro_batch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No smaller one is named: all candidates share it.

    Of several ranks sweep.json tells the stop.
    """
    from tunesmith.tools.sweep import cli as sweep_cli

    file, words, train_step = write_recipe(tiny, tmp_path), WORDS[:1], Trainer.train_step

    def short(trainer: Trainer, batch: Any) -> Any:
        if batch.step == 1:
            trainer.stop.request.low_memory = LowMemory("no room", {})
        return train_step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", short)
        patch.setattr("tunesmith.training.result.is_launched", lambda: True)
        with refuses(LowMemoryError, where="checkpoint-1", cause="memory") as caught:
            sweep(file, words)
    size = json.loads((tmp_path / "sweep" / SWEEP).read_text())["fixed"]["micro_batch"]
    assert holds(caught.value.fix, size)
    assert caught.value.exit_code == 0
    monkeypatch.setattr(sweep_cli, "run_agent", lambda words: 0)
    assert main(["sweep", str(file), *words, "--ranks", "2"]) == EXIT_STOPPED
    assert_equals_train(sweep(file, words), tmp_path)
    assert main(["sweep", str(file), *words, "--ranks", "2"]) == 0


def test_a_sweep_goes_on_in_the_dtype_that_it_began_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins where there are no units for bf16, and goes on where there are."""
    file, train_step = write_recipe(tiny, tmp_path, model={"dtype": "auto"}), Trainer.train_step

    def stopped(trainer: Trainer, batch: Any) -> Any:
        trainer.stop.request.low_memory = LowMemory("no room", {})
        return train_step(trainer, batch)

    chip = Chip("cpu", 64.0)
    monkeypatch.setattr(prepare, "chip_of", lambda device, ranks: replace(chip, bf16=False))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(LowMemoryError):
            sweep(file)
    monkeypatch.setattr(prepare, "chip_of", lambda device, ranks: chip)
    outcome = sweep(file)
    assert outcome["fixed"]["dtype"] == "fp32"
    configs = [Path(each["run_dir"], "config.yaml") for each in outcome["candidates"]]
    assert {load_recipe(config).model.dtype for config in configs} == {"fp32"}


def sweep_and_train(file: Path, words: list[str]) -> dict[str, Any]:
    """A sweep on this rank, then the recipes of those that did not diverge, each by itself."""
    outcome = sweep(file, words)
    for candidate in outcome["candidates"]:
        if candidate["state"] != "diverged":
            train_as_far(candidate, file.parent)
    return outcome


def test_two_ranks_agree_on_what_stops(tiny: Path, tmp_path: Path):
    words = ["train.learning_rate=1e-3,1e30", "adapter.rank=2,8"]
    micro = {"micro_batch": "128 tokens", "clip_norm": None, "warmup": "0 steps"}
    file = write_recipe(tiny, tmp_path, train=micro, parallel={"shard": 2})
    outcome, other = run_ranks(2, sweep_and_train, file, words)
    assert outcome == other
    assert [c["state"] for c in outcome["candidates"]].count("diverged") == 2
    assert [c["state"] for c in outcome["candidates"]].count("finished") == 1
    for candidate in outcome["candidates"]:
        if candidate["state"] == "diverged":
            failure = json.loads(Path(candidate["run_dir"], "failure.json").read_text())
            assert failure["cause"] == "not-finite"
        else:
            found = numbers(candidate["run_dir"])
            assert found == numbers(tmp_path / f"alone-{candidate['name']}")
            assert all(math.isfinite(row[2]) for row in found)
