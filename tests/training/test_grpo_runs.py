"""Reinforcement learning: it learns, and a run that is resumed or on ranks is the same run."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig

from errors import is_internal, refuses
from invoke import invoke
from recipes import make_run, merge, recipe, rows
from time_limit import time_limit
from tunesmith import run_dir
from tunesmith.batches.batch import Batch
from tunesmith.errors import DataError, ModelError, StoppedError
from tunesmith.methods.grpo import rollouts as rollouts_module
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.metrics.run_figures import explain_equal_rewards
from tunesmith.presentation.rollouts import read_groups, rollout_lines
from tunesmith.start import session
from tunesmith.start.run import train
from tunesmith.training.result import Result

pytestmark = pytest.mark.slow

REWARD = """
def letters(answer, row):
    \"\"\"The share of the letters a to e.\"\"\"
    return sum(letter in "abcde" for letter in answer) / max(1, len(answer))
"""
RL: dict[str, Any] = {
    "method": {"name": "grpo", "reward": "r.py:letters", "group": 4, "answer_tokens": 8},
    "train": {"duration": "4 steps", "global_batch": "4 examples", "schedule": "constant"},
    "validate": {"every": "2 steps"},
}


def go(model: Path, folder: Path, changes: Any = None, **options: Any) -> Result:
    folder.mkdir(exist_ok=True)
    (folder / "r.py").write_text(REWARD)
    return train(make_run(model, folder, **merge(RL, changes or {})), quiet=True, **options)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records without times."""
    timed = ("seconds", "per_second", "gpu", "host", "memory", "mfu")
    return [
        {key: value for key, value in r.values().items() if not any(t in key for t in timed)}
        for r in read_records(folder / "run" / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, bytes]:
    [file] = (folder / "run" / "final").glob("*.safetensors")
    tensors = load_file(file)
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def rollouts(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {path.name: load_file(path) for path in sorted((folder / "run/rollouts").iterdir())}


def test_it_learns(tiny: Path, tmp_path: Path) -> None:
    changes = {"train": {"duration": "12 steps", "learning_rate": 5e-3, "warmup": "0 steps"}}
    changes |= {"method": {"group": 8}, "adapter": {"kind": "none"}}
    changes |= {"validate": {"every": "12 steps"}}
    go(tiny, tmp_path, changes)
    records = numbers(tmp_path)
    rewards = [record["reward"] for record in records]
    assert np.mean(rewards[-3:]) > 4 * np.mean(rewards[:3])
    # The trainer's probabilities are those of the sampler: fp32 on a CPU.
    assert all(0 <= record["kl_sampler"] < 1e-8 for record in records)
    assert records[-1]["val_reward"] > 4 * rewards[0]
    assert records[-1]["val_loss"] == pytest.approx(1 - records[-1]["val_reward"])


def stop_at_2(record: StepRecord) -> None:
    if record.step == 2:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_resumed_run_is_the_undisturbed_one(kind: str, tiny: Path, tmp_path: Path) -> None:
    changes = {"adapter": {"kind": kind}} if kind == "none" else {}
    go(tiny, tmp_path / "whole", changes)
    with pytest.raises(StoppedError):
        go(tiny, tmp_path / "cut", changes, on_record=stop_at_2)
    (tmp_path / "cut/run/rollouts/step-40.safetensors").touch()  # of a checkpoint that was deleted
    go(tiny, tmp_path / "cut", changes)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    ours, theirs = rollouts(tmp_path / "cut"), rollouts(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for name, arrays in ours.items():
        for key in arrays.keys() - {"texts"}:  # they have the paths of the rows
            assert np.array_equal(arrays[key], theirs[name][key]), key


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"group": 24}, "train": {"micro_batch": "128 tokens"}},
        {"data": {"pack": False}},
    ],
    ids=["whole groups", "cut groups", "a row an answer"],
)
def test_no_batch_is_larger_than_that_of_the_memory_trial(
    changes: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[Batch] = []
    batches: list[Batch] = []
    build = session.build_model
    form = rollouts_module.answer_batches

    def build_model(*args: Any, probe: Batch, **options: Any) -> Any:
        probes.append(probe)
        return build(*args, probe=probe, **options)

    def answer_batches(*args: Any) -> list[Batch]:
        formed = form(*args)
        batches.extend(formed)
        return formed

    monkeypatch.setattr(session, "build_model", build_model)
    monkeypatch.setattr(rollouts_module, "answer_batches", answer_batches)
    go(tiny, tmp_path, merge({"train": {"duration": "2 steps"}}, changes))
    [probe] = probes
    assert probe.supervised % 8 == 0, "it has answers of full length"
    assert len(batches) >= 2
    # A cut group of shorter answers can fill a row better, by less than one answer.
    slack = 8 if "method" in changes else 0
    assert max(batch.input_ids.numel() for batch in batches) <= probe.input_ids.numel() + slack


def test_a_changed_scorer_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        go(tiny, tmp_path, on_record=stop_at_2)
    text = REWARD.replace("abcde", "abcd")
    (tmp_path / "r.py").write_text(text)
    with refuses(DataError) as refused:
        train(make_run(tiny, tmp_path, **RL), quiet=True)
    assert refused.value.where.startswith("method.reward: ")


def test_another_adapter_as_reference_is_refused(tiny: Path, tmp_path: Path) -> None:
    short = {"train": {"duration": "1 steps", "warmup": "0 steps"}}
    go(tiny, tmp_path / "first", short)
    adapter = tmp_path / "first" / "run" / "final"
    changes = merge(short, {"adapter": {"from": str(adapter)}, "method": {"beta": 0.1}})
    go(tiny, tmp_path / "second", changes)
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with refuses(ModelError, where=f"adapter.from: {adapter}"):
        go(tiny, tmp_path / "second", merge(changes, {"train": {"duration": "2 steps"}}))


def test_a_row_that_occurs_twice_in_a_step_gets_other_answers(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    source = {"source": str(file), "format": "prompt-completion", "weight": 2}
    go(tiny, tmp_path, {"data": {"train": source}, "train": {"duration": "2 steps"}})
    groups = read_groups(tmp_path / "run/rollouts/step-1.safetensors")
    assert len({group.row for group in groups}) == 2
    assert len({tuple(sorted(answer.text for answer in group.answers)) for group in groups}) == 4


def command(*words: object) -> str:
    """Run a command, and return what it printed."""
    done = invoke(*words)
    assert done.code == 0, done.err
    return done.out


def test_rows_without_an_answer_are_scored_by_their_columns(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers and their rewards are on the report page, and the plan counts the batch."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Say {letter}", "letter": letter} for letter in "aeioutrn" * 3]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.py").write_text("def own(answer, row):\n    return float(row['letter'] in answer)\n")
    train = {"format": "prompt", "columns": {"prompt": "question"}}
    # With a KL penalty, the groups of equal rewards are in the batch too.
    method = {"reward": "r.py:own", "group": 8, "beta": 0.01}
    changes = merge(RL, {"data": {"train": train}, "method": method})
    Path("r.yaml").write_text(json.dumps(recipe(tiny, tmp_path, held=False, **changes)))
    command("data", "r.yaml")
    command("train", "r.yaml")
    [first, *_] = records = numbers(tmp_path)
    lines = command("data", "--rollouts", "run", "4").splitlines()
    assert sum(line.startswith("── ") for line in lines) == 4
    shown = [float(line[1:5]) for line in lines if re.match(r"\[[01]\.00\] ", line)]
    assert np.mean(shown) == pytest.approx(records[-1]["reward"])
    groups = read_groups(Path("run/rollouts/step-4.safetensors"))
    for place, prompt, answers in groups:
        letter = rows[int(place.rpartition(":")[2]) - 1]["letter"]
        assert f"Say {letter}" in prompt
        assert all(answer.reward == float(letter in answer.text) for answer in answers)
    scores = command("eval", "run", "--data", "train.jsonl", "--score", "r.py:own", "--json")
    assert json.loads(scores)["scores"]
    assert json.loads(scores)["tuned"] == json.loads(scores)["base"] == {"rows": 24}
    shown = command("eval", "run", "--data", "train.jsonl", "--score", "r.py:own", "--no-base")
    assert "loss" not in shown
    assert invoke("eval", "run", "--data", "train.jsonl").code == 2
    command("report", "run")
    best = max(answers[0][0] for _, _, answers in groups)
    assert f"step 4, reward {best:.2f}" in Path("report.html").read_text()
    report = json.loads(command("plan", "r.yaml", "--json"))
    # The plan assumes that no answer ends early. It counts what a template writes after an answer as
    # a part of the prompt: 1 token of 32.
    missing = 4 * 8 * (8 - first["answer_length"])
    planned = report["work"]["step"][0] * report["work"]["whole"]
    assert planned == pytest.approx(first["tokens"] + missing, rel=0.04)
    memory = report["meshes"][0]["plan"]["memory"]
    model = LlamaConfig.from_pretrained(tiny)
    keys = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    assert report["work"]["longest"] == 25 + 8
    assert memory["slots"] == 64 * (25 + 8) * keys * 4 < memory["rollouts"]


def test_files_of_the_first_the_newest_and_some_steps_between_are_kept(tmp_path: Path) -> None:
    for step in range(1, 101):
        (tmp_path / f"step-{step}.safetensors").touch()
        for path in run_dir.outdated_rollouts(tmp_path, step):
            path.unlink()
    assert [*run_dir.rollout_files(tmp_path)] == [1, 16, 32, 48, 64, 80, *range(81, 101)]


def test_a_run_without_different_rewards_says_why_and_what_to_change(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = merge(RL, {"method": {"reward": "exact"}, "log": {"tensorboard": True}})
    Path("r.yaml").write_text(json.dumps(recipe(tiny, tmp_path, **changes)))
    done = invoke("train", "r.yaml")
    warnings = [
        line for line in (done.err + done.out).splitlines() if "method.answer_tokens" in line
    ]
    assert [re.findall(r"in (\d) steps", line) for line in warnings] == [["3"], ["4"]]
    assert re.search(r"^val_reward +0.00 -> 0.00 \(0.00 to", done.out, re.MULTILINE)
    [start, *_] = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    assert (start["step"], start["val_reward"], start["val_reward_low"]) == (0, 0, 0)
    assert json.loads(Path("run/best.json").read_text())["step"] == 0
    assert [record.step for record in read_records(Path("run/metrics.jsonl"))] == [1, 2, 3, 4]
    events = EventAccumulator("run/tensorboard").Reload()
    assert {"train/reward", "train/reward_std"} <= {*events.Tags()["scalars"]}
    assert [event.step for event in events.Scalars("validation/reward")] == [0, 2, 4]
    assert explain_equal_rewards([{"cut_share": 0, "reward": 0}]) != explain_equal_rewards(
        [{"cut_share": 0, "reward": 1}]
    )


def test_records_and_files_hold_the_answers(tiny: Path, tmp_path: Path) -> None:
    go(tiny, tmp_path, {"method": {"reward": ["r.py:letters", "f1"], "reward_weights": [1, 0.5]}})
    record = numbers(tmp_path)[-1]
    file = rollouts(tmp_path)["step-4.safetensors"]
    assert len(file["lengths"]) == len(file["rewards"]) == 16
    assert file["lengths"].sum() == len(file["ids"]) == record["supervised_tokens"]
    assert record["reward"] == pytest.approx(file["rewards"].mean())
    assert record["cut_share"] == pytest.approx(1 - file["finished"].mean())
    groups = file["rewards"].reshape(4, 4)
    means = file["scores"].mean(0)
    assert (record["reward/letters"], record["reward/f1"]) == pytest.approx(tuple(means))
    assert file["rewards"] == pytest.approx(file["scores"] @ [1, 0.5])
    [*lines] = rollout_lines(tmp_path / "run", "4")
    assert (
        sum(bool(re.match(r"\[[\d.]+: letters [\d.]+, f1 [\d.]+\] ", line)) for line in lines) == 16
    )
    assert record["reward_std"] == pytest.approx(groups.std(1, ddof=1).mean())
    assert record["groups_with_variance"] == (groups != groups[:, :1]).any(1).mean()
    text = (tmp_path / "run" / "env.json").read_text()
    assert len(json.loads(text)["reward_hash"]) == 64


def test_data_has_the_rewards_of_the_own_answers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text(REWARD)
    Path("r.yaml").write_text(json.dumps(recipe(tiny, tmp_path, held=False, **RL)))
    own = json.loads(command("data", "r.yaml", "--json"))["own_rewards"]
    lines = Path("train.jsonl").read_text().splitlines()
    answers = [json.loads(line)["completion"] for line in lines]
    shares = [sum(letter in "abcde" for letter in answer) / len(answer) for answer in answers]
    assert own["values"] == pytest.approx(shares)
    zeros = [n for n, share in enumerate(shares, 1) if not share]
    assert own["zeros"] == [f"{tmp_path / 'train.jsonl'}:{n}" for n in zeros]


def test_a_damaged_file_of_answers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("run/rollouts/step-2.safetensors")
    texts = {"prompts": [["Say a", "r.jsonl:1"]], "answers": ["a", "b"], "scorers": ["own"]}
    damages: list[dict[str, Any]] = [
        {"prompts": []},
        {"answers": []},
        {"answers": ["a"]},
        {"prompts": 3},
        {"prompts": [["Say a", 3]]},
        {"answers": ["a", None]},
        {"scorers": ["own", "exact"]},
    ]
    file.parent.mkdir(parents=True)
    # A reward that no float can hold, and a value of an unknown field.
    line = {"step": 10**400, "reward": 10**400}
    Path("run/metrics.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'step': 1})}\n")
    contents = []
    for change in ({}, *damages):
        encoded = json.dumps(texts | change).encode()
        rewards = np.array([0.5, 1.0][: len(texts["answers"])])
        if change == {"answers": []}:
            rewards = np.array([])
        arrays = {"rewards": rewards, "scores": rewards[:, None]}
        save_file(arrays | {"texts": np.frombuffer(encoded, np.uint8)}, file)
        contents.append(file.read_bytes())
    whole, *broken = contents
    for content in (*broken, whole[:-9], whole[:5], b""):
        file.write_bytes(content)
        done = invoke("data", "--rollouts", "run", 2)
        assert done.code == 2
        assert not is_internal(done.err)
        assert str(file) in done.err
        command("report", "run", "--output", "report.html")
    file.unlink()
    os.mkfifo(file)
    with time_limit(30):
        assert invoke("data", "--rollouts", "run", 2).code == 2
        command("report", "run", "--output", "report.html")
    file.unlink()
    file.write_bytes(whole)
    assert "[1.00] b" in command("data", "--rollouts", "run", 2)
    for words in (["run", 3], ["r", 2], ["run", "x"]):
        assert invoke("data", "--rollouts", *words).code == 2
    assert invoke("data", "r.yaml", "--rollouts", "run", 2).code == 2
