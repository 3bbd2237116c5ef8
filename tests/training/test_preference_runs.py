"""Whole runs that learn from preferences: files in, records, checkpoints and a resume."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tunesmith
from errors import holds, refuses, warnings_with
from recipes import make_run, write_feedback, write_pairs
from tunesmith.cli.main import main
from tunesmith.errors import DataError, ModelError, RecipeError, TunesmithError, UsageError
from tunesmith.methods.answers import answer_logprobs
from tunesmith.methods.base import StepTotals, TrainModel
from tunesmith.methods.kto import KahnemanTverskyOptimization
from tunesmith.metrics.record import read_records
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import PAIRS
from tunesmith.training import validation
from tunesmith.training.result import Result
from tunesmith.training.validation_loss import ValidationResult

pytestmark = pytest.mark.slow


def train(tiny: Path, folder: Path, method: Any, name: str = "run", **changes: Any) -> Result:
    """Four steps of eight pairs, with held-out ones, unless `changes` say otherwise."""
    is_kto = method == "kto" or (isinstance(method, dict) and method["name"] == "kto")
    write = write_feedback if is_kto else write_pairs
    data_format = "feedback" if is_kto else "preference"
    train_file = folder / "train.jsonl"
    held_file = folder / "held.jsonl"
    if not train_file.exists():
        write(train_file, 32)
        write(held_file, 8, first=40)
    settings = {
        "method": method,
        "data": {
            "train": {"source": str(train_file), "format": data_format},
            "validation": {"source": str(held_file), "format": data_format},
            "seq_len": 64,
        },
        "train": {
            "duration": "4 steps",
            "schedule": "constant",
            "warmup": "0 steps",
            "micro_batch": "256 tokens",
            "learning_rate": 5e-3,
        },
        "validate": {"every": "2 steps"},
        "output_dir": str(folder / name),
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return tunesmith.train(make_run(tiny, folder, **settings))


def weights(run: Path) -> dict[str, np.ndarray]:
    files = sorted((run / "final").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_equal(first: Path, second: Path) -> None:
    ours = weights(first)
    others = weights(second)
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        assert np.array_equal(value, others[name]), name


@pytest.mark.parametrize(
    "method",
    ["dpo", "kto", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("orpo", "simpo"))],
)
def test_a_run_learns_and_resumes_to_the_same_bits(tiny: Path, tmp_path: Path, method: str) -> None:
    whole = train(tiny, tmp_path, method, "whole")
    train(tiny, tmp_path, method, "parts", train={"duration": "2 steps"})
    train(tiny, tmp_path, method, "parts")
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert records[-1].loss < records[0].loss
    if method == "dpo":  # before the first update the model is its reference
        assert records[0].loss == pytest.approx(np.log(2), abs=1e-12)
        assert records[0].extra["reward_accuracy"] == 0.5
    last = records[-1].extra
    assert last["rewards_chosen"] - last["rewards_rejected"] == pytest.approx(last["reward_margin"])
    assert last["val_reward_margin"] == pytest.approx(
        last["val_rewards_chosen"] - last["val_rewards_rejected"]
    )
    if method == "kto":
        assert last["kl"] >= 0
    else:
        assert 0 <= last["val_reward_accuracy"] <= 1
        best = json.loads((tmp_path / "whole" / "best.json").read_text())
        assert best["val_accuracy"] in [r.extra.get("val_reward_accuracy") for r in whole.records]


@pytest.mark.nightly
def test_kto_with_dropout_resumes_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    """KTO computes mismatched pairs with dropout, before the micro batches of a step."""
    adapter = {"dropout": 0.2}
    # Only good answers are trained, so that KL is above 0.
    method = {"name": "kto", "undesirable_weight": 0.001}
    train(tiny, tmp_path, method, "whole", adapter=adapter)
    train(tiny, tmp_path, method, "parts", adapter=adapter, train={"duration": "2 steps"})
    train(tiny, tmp_path, method, "parts", adapter=adapter)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert whole[-1].extra["kl"] > 0
    assert [record.extra for record in whole] == [record.extra for record in parts]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_a_run_of_whole_sequences_goes_on_with_them(tiny, tmp_path, monkeypatch, kind):
    """As one that an earlier version began: sums over other rows have other bits."""
    adapter = {"kind": kind}
    once = train(tiny, tmp_path, "dpo", "once", adapter=adapter)
    monkeypatch.setattr("tunesmith.stages.tokens.shares_prompts", lambda *_: False)
    whole = train(tiny, tmp_path, "dpo", "whole", adapter=adapter)
    train(tiny, tmp_path, "dpo", "parts", adapter=adapter, train={"duration": "2 steps"})
    monkeypatch.undo()
    train(tiny, tmp_path, "dpo", "parts", adapter=adapter)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    for shared, plain in zip(once.records, whole.records, strict=True):
        assert (shared.tokens, shared.examples) == (plain.tokens, plain.examples)
        # fp32 sums in another order.
        assert shared.loss == pytest.approx(plain.loss, rel=1e-5)
        assert shared.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    for name, shares in (("once", True), ("whole", False), ("parts", False)):
        choices = json.loads((tmp_path / name / "env.json").read_text())["choices"]
        assert ("prompts" in choices) == shares


def test_on_top_of_an_adapter_the_reference_is_that_adapter(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "simpo", "first")
    settings = {"from": str(tmp_path / "first" / "final")}
    whole = train(tiny, tmp_path, "dpo", "whole", adapter={"from": settings["from"]})
    assert whole.records[0].loss == pytest.approx(np.log(2), abs=1e-12)
    part = {"duration": "2 steps"}
    train(tiny, tmp_path, "dpo", "parts", adapter={"from": settings["from"]}, train=part)
    train(tiny, tmp_path, "dpo", "parts", adapter={"from": settings["from"]})
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    # Another adapter under that name would be another reference, without a word.
    train(tiny, tmp_path, "simpo", "other", train={"duration": "1 steps"})
    shutil.rmtree(tmp_path / "first")
    (tmp_path / "other").rename(tmp_path / "first")
    longer = {"duration": "6 steps"}
    with refuses(ModelError, where=f"adapter.from: {settings['from']}"):
        train(tiny, tmp_path, "dpo", "parts", adapter={"from": settings["from"]}, train=longer)


def test_full_fine_tuning_scores_the_base_once_and_keeps_the_numbers(
    tiny, tmp_path, monkeypatch, capsys
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    full = {"kind": "none"}
    whole = train(tiny, tmp_path, "dpo", "whole", adapter=full)
    # Rows are laid out otherwise than in training: fp32 sums in another order.
    assert whole.records[0].loss == pytest.approx(np.log(2), abs=1e-5)
    files = sorted(cache.glob("tokens/reference/*.npy"))
    assert len(files) == 2
    values = [np.load(file) for file in files]
    assert {value.shape for value in values} == {(32, 2), (8, 2)}
    train(tiny, tmp_path, "dpo", "parts", adapter=full, train={"duration": "2 steps"})
    for file in files:
        file.unlink()
    # They are measured again on the base, not on the weights that it goes on with.
    train(tiny, tmp_path, "dpo", "parts", adapter=full)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    for file, value in zip(files, values, strict=True):
        assert np.array_equal(np.load(file), value)
    # A value that has changed on the disk is not used.
    content = bytearray(files[0].read_bytes())
    place = content.index(values[0].tobytes())
    content[place + 7] ^= 1  # the highest byte of a number: another power of two
    files[0].write_bytes(content)
    assert not np.array_equal(np.load(files[0]), values[0])
    capsys.readouterr()
    train(tiny, tmp_path, "dpo", "again", adapter=full)
    assert_equal(tmp_path / "whole", tmp_path / "again")
    assert warnings_with(capsys.readouterr().err, files[0].name)
    assert np.array_equal(np.load(files[0]), values[0])
    # Another row is another file; the held-out rows have theirs.
    write_pairs(tmp_path / "train.jsonl", 32, first=1)
    train(tiny, tmp_path, "dpo", "other", adapter=full, train={"duration": "1 steps"})
    assert len(list(cache.glob("tokens/reference/*.npy"))) == 3


def test_kto_in_full_scores_the_answers_of_each_step_under_other_prompts(
    tiny, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    full = {"kind": "none"}
    whole = train(tiny, tmp_path, "kto", "whole", adapter=full)
    # Before the first update the model is its base: the rows of a step are laid out as in it.
    assert whole.records[0].extra["kl"] == 0
    assert whole.records[0].loss == pytest.approx(0.5, abs=1e-6)
    assert "val_kl" in whole.records[-1].extra
    reference = json.loads((tmp_path / "whole" / "env.json").read_text())["choices"]["reference"]
    assert reference["taken"]
    assert reference["why"]
    values = {file: np.load(file) for file in cache.glob("tokens/reference/*.npy")}
    # Of training: all rows, and those of four steps of eight. Of held-out rows: each twice.
    assert sorted(len(value) for value in values.values()) == [16, 16, 32, 64]
    for file in values:
        file.unlink()
    train(tiny, tmp_path, "kto", "parts", adapter=full, train={"duration": "2 steps"})
    # Of the two steps that it goes on for the base scores the answers now.
    train(tiny, tmp_path, "kto", "parts", adapter=full)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    for file, value in values.items():
        assert np.array_equal(np.load(file), value)


def test_kto_in_full_has_the_bases_numbers_of_every_step(tiny, tmp_path, monkeypatch):
    """Beside a copy of the base, which scores the rows of each step again in the same layout."""
    begin_step = KahnemanTverskyOptimization.begin_step
    bases: list[TrainModel] = []
    compared = []

    def compare(method: Any, model: TrainModel, totals: StepTotals, add_up: Any) -> StepTotals:
        bases.append(copy.deepcopy(model))
        for batch in totals.mismatched:
            assert batch.sequences is not None
            with torch.no_grad():
                plain = bases[0](batch, answer_logprobs).logprobs
            assert torch.equal(batch.sequences.reference, plain)
            compared.append(len(plain))
        return begin_step(method, model, totals, add_up)

    monkeypatch.setattr(KahnemanTverskyOptimization, "begin_step", compare)
    train(tiny, tmp_path, "kto", adapter={"kind": "none"}, data={"validation": []})
    assert sum(compared) == 4 * 8


@pytest.mark.parametrize(("best_by", "steps", "best"), [("accuracy", 4, 2), ("loss", 6, 6)])
def test_patience_goes_by_accuracy(tiny, tmp_path, monkeypatch, best_by, steps, best):
    """The loss falls at each validation, and after the second one fewer pairs are in order."""
    accuracies = iter([0.5, 0.75, 0.625, 0.5, 0.5, 0.5])
    losses = iter([0.7, 0.6, 0.5, 0.4, 0.3, 0.2])

    def measured(*_: Any, **__: Any) -> ValidationResult:
        return ValidationResult(next(losses), 8, {"reward_accuracy": next(accuracies)})

    monkeypatch.setattr(validation, "validation_loss", measured)
    rule = {"every": "1 steps", "best_by": best_by, "patience": 2}
    result = train(tiny, tmp_path, "dpo", validate=rule, train={"duration": "6 steps"})
    assert result.records[-1].step == steps
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == best


def test_a_resume_with_another_method_is_refused(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo", train={"duration": "1 steps"})
    with refuses(RecipeError) as refused:
        train(tiny, tmp_path, {"name": "dpo", "beta": 0.5})
    assert "method.beta" in refused.value.where


def test_eval_says_how_many_pairs_are_in_order(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo", train={"duration": "8 steps"})
    result = tunesmith.evaluate(tmp_path / "run")
    (pairs,) = result.by_scorer
    assert pairs.rows == 8
    for model, score in result.scores.items():
        assert pairs.models[model].mean == pytest.approx(np.mean(score.pairs))
        assert set(score.pairs) <= {0.0, 0.5, 1.0}
        # The loss is that of the chosen answers alone.
        assert 0 < score.tokens < 8 * 12
    assert pairs.models["tuned"].mean >= pairs.models["base"].mean
    # `report` reads it.
    (kept,) = RunFiles(tmp_path / "run").evals
    assert kept["scores"][PAIRS]["tuned"] == list(pairs.models["tuned"])
    assert (kept["rows"], kept["step"]) == (8, 8)


def test_an_sft_run_is_evaluated_on_pairs_by_their_columns(tiny, tmp_path, capsys):
    """The rows that it was trained on have a prompt too, and are no pairs."""
    run = make_run(tiny, tmp_path, train={"duration": "2 steps"})
    tunesmith.train(run)
    held = write_pairs(tmp_path / "pairs.jsonl", 8, first=40)
    folder = tmp_path / "run"
    for more in ([], ["--format", "preference"]):
        assert main(["eval", str(folder), "--data", str(held), "--json", *more]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["scores"][PAIRS]["rows"] == 8
        assert report["tuned"]["rows"] == 8
    (kept,) = RunFiles(folder).evals
    assert kept["scores"][PAIRS]["base"][0] == report["scores"][PAIRS]["base"]["mean"]


@pytest.mark.nightly
def test_a_run_of_pairs_answers_questions_alone(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo", train={"duration": "1 steps"}, log={"samples": 1})
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    loaded = tunesmith.load_run(tmp_path / "run")
    decoding = tunesmith.Decoding(4)
    (alone,) = tunesmith.generate(loaded, [{"prompt": rows[0]["prompt"]}], decoding)
    (of_pair,) = tunesmith.generate(loaded, rows[:1], decoding)
    assert alone["output"] == of_pair["output"]
    assert of_pair["reference"] == rows[0]["chosen"]
    samples = RunFiles(tmp_path / "run").samples
    assert {sample["step"] for sample in samples} >= {0, 1}
    assert {sample["expected"] for sample in samples} == {rows[0]["chosen"]}


# ---- rows that cannot be learned from; single rows: tests/data/test_preference_rows.py ----

PAIR = {"prompt": "Add 1 and 2.", "chosen": "3", "rejected": "It is three."}
CHAT = {
    "prompt": [{"role": "user", "content": "1 + 2?"}],
    "chosen": [{"role": "assistant", "content": "3"}],
    "rejected": [{"role": "assistant", "content": "It is three."}],
}
ANSWER = {"prompt": "Add 1 and 2.", "completion": "3", "label": True}
BAD_ANSWER = ANSWER | {"label": False}
LONG = "1 + 2? " * 40
WITHOUT_REJECTED = {"prompt": "Add 1 and 2.", "chosen": "3"}
EQUAL_ONCE_CUT = {"prompt": "Add.", "chosen": LONG + "3", "rejected": LONG + "4"}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# name: method, rows, more keys of the data, where, values that the error has
FILES: dict[str, tuple[str, list[Any], dict[str, Any], str, list[str]]] = {
    "an empty file": ("dpo", [], {}, "train.jsonl", []),
    "no rejected": ("dpo", [PAIR, CHAT, WITHOUT_REJECTED, PAIR], {}, "train.jsonl:3", ["rejected"]),
    "no label": ("kto", [ANSWER, BAD_ANSWER, PAIR, ANSWER], {}, "train.jsonl:3", ["label"]),
    "equal once cut": ("dpo", [PAIR, EQUAL_ONCE_CUT], {"allow_cut_answers": True}, "train.jsonl:2", []),
    "good answers alone": ("kto", [ANSWER] * 3, {}, "train.jsonl", ["3"]),
    "bad answers alone": ("kto", [BAD_ANSWER] * 3, {}, "train.jsonl", ["3"]),
    "all too long": ("dpo", [PAIR | {"prompt": LONG}] * 3, {"too_long": "drop"}, "train.jsonl", ["3"]),
    "one too long": ("dpo", [PAIR, PAIR | {"chosen": LONG}], {"too_long": "error"}, "train.jsonl", []),
    "cut": ("dpo", [PAIR | {"chosen": LONG, "rejected": LONG + "x"}] * 3, {}, "train.jsonl", []),
    "no such column": ("dpo", [PAIR] * 3, {"columns": {"chosen": "better"}}, "train.jsonl", ["better"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_and_nothing_is_written(name: str, tiny: Path, tmp_path: Path) -> None:
    method, rows, keys, where, names = FILES[name]
    source: dict[str, Any] = {"source": str(write_lines(tmp_path / "train.jsonl", rows))}
    source["format"] = "feedback" if method == "kto" else "preference"
    if "columns" in keys:
        source["columns"] = keys["columns"]
    limits = {key: value for key, value in keys.items() if key != "columns"}
    data = {"train": source, "seq_len": 96, **limits}
    run = make_run(tiny, tmp_path, held=False, method=method, data=data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TunesmithError) as caught:
        tunesmith.train(run)
    assert sorted(tmp_path.rglob("*")) == before
    assert where in caught.value.where
    assert holds(f"{caught.value.what}\n{caught.value.why}", *names), str(caught.value)
    assert caught.value.fix


def test_bad_rows_of_an_eval_are_named_too(tiny: Path, tmp_path: Path) -> None:
    train(tiny, tmp_path, "dpo", train={"duration": "1 steps"})
    before = sorted(tmp_path.rglob("*"))
    file = write_lines(tmp_path.parent / f"{tmp_path.name}-bad.jsonl", [PAIR, WITHOUT_REJECTED])
    with refuses(DataError, where=f"{file.name}:2"):
        tunesmith.evaluate(tmp_path / "run", file)
    # Rows that were held out, and are others now.
    write_lines(tmp_path / "held.jsonl", [PAIR] * 4)
    with refuses(UsageError, where="--data"):
        tunesmith.evaluate(tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
