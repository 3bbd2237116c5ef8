"""Loss, accuracy and comparison of runs on held-out rows, against plain Transformers, row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errors import holds, refuses
from recipes import make_run as recipe_run
from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.answers.load_run import LoadedModel, load_run
from tunesmith.batches.batch import collate
from tunesmith.config.schema import MethodConfig
from tunesmith.errors import DataError, UsageError
from tunesmith.methods import make_method
from tunesmith.metrics.record import read_records
from tunesmith.rows.compare.splits import read_splits
from tunesmith.run_dir import read_env
from tunesmith.start.run import train
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize
from tunesmith.tools.evaluate.evaluate import _batch_sums, evaluate, score
from tunesmith.tools.evaluate.evaluate_runs import evaluate_runs
from tunesmith.tools.report.run_files import RunFiles
from tunesmith.training.validation_loss import validation_loss

CPU = torch.device("cpu")
LOAD_RUN = "tunesmith.tools.evaluate.evaluate.load_run"
SHORT: dict[str, Any] = {"scorers": "exact", "max_new_tokens": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def opened(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, tiny, peft_model(tiny), adapter={"dropout": 0.5})
    return load_run(folder, device="cpu")


@pytest.fixture(scope="module")
def tokens(opened: LoadedModel) -> TokenSet:
    assert opened.run is not None
    data = opened.run.data
    return tokenize(read_splits(data, 0)[0], data, opened.template, cache=None, what="test")


def reference(model: torch.nn.Module, examples: list[Example]) -> tuple[float, int, int]:
    """Sum of the losses, number of hits and of tokens, by Transformers' own forward on each row."""
    total, hits, count = 0.0, 0, 0
    for example in examples:
        ids = torch.tensor(np.asarray(example.ids, dtype=np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        supervised = torch.tensor(np.asarray(example.trained[1:]))
        kept, labels = logits[supervised], ids[1:][supervised]
        total += F.cross_entropy(kept.double(), labels, reduction="sum").item()
        hits += int((kept.argmax(-1) == labels).sum())
        count += int(supervised.sum())
    return total, hits, count


def test_score_is_that_of_transformers_and_peft(
    tiny: Path, opened: LoadedModel, tokens: TokenSet
) -> None:
    """Relative 1e-6: the same sums in fp32, in another order."""
    peft = peft_model(tiny)
    total, hits, count = reference(peft, list(tokens))
    train_model = opened.train_model
    train_model.method = make_method(MethodConfig())
    with train_model.attention_for("training"):
        found = score(train_model, tokens, pad_id=opened.pad_id)
        for micro_tokens in (1, 300, 100_000):
            options = {"micro_tokens": micro_tokens, "pad_id": opened.pad_id, "device": CPU}
            loss = validation_loss(train_model, tokens, **options)
            assert loss is not None
            assert loss[:2] == (pytest.approx(found.loss, rel=1e-6), found.tokens)
    assert (found.rows, found.tokens) == (len(ROWS), count)
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.token_accuracy == hits / count
    # Row by row, in the order of the rows, whatever the order of the batches.
    for i, example in enumerate(tokens):
        loss, _, row_count = reference(peft, [example])
        assert found.row_losses[i] == pytest.approx(loss, rel=1e-5)
        assert found.row_tokens[i] == row_count


def test_dropout_is_off_and_training_mode_and_attention_come_back(
    opened: LoadedModel, tokens: TokenSet
) -> None:
    options = {"micro_tokens": 512, "pad_id": opened.pad_id, "device": CPU}
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = opened.model(input_ids=ids).logits
        train_model = opened.train_model
        train_model.method = make_method(MethodConfig())
        with train_model.attention_for("training"):
            train_model.train()
            first, again = (validation_loss(train_model, tokens, **options) for _ in range(2))
            assert train_model.training
            train_model.eval()
            assert validation_loss(train_model, tokens, **options, cancelled=lambda: True) is None
        assert first == again
        assert torch.equal(opened.model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("trained", "rejected", "tokens"),
    [([0, 0, 1, 1, 0, 1, 1], torch.inf, 2), ([0, 1, 1, 1, 0, 0, 1], 2.0, 3)],
    ids=["unlikely", "shorter"],
)
def test_an_answer_that_is_not_scored_adds_nothing_and_pairs_are_compared_by_means(
    trained: list[int], rejected: float, tokens: int
) -> None:
    pair = Example(np.arange(7, dtype=np.int32), np.array(trained, bool), (4, 3))
    batch = collate([[pair]], length=7, pad_id=0)
    losses = torch.ones(1, 7)
    losses[0, 4:] = rejected
    correct = torch.zeros(1, 7, dtype=torch.bool)
    stand_in: Any = SimpleNamespace(
        model=SimpleNamespace(device=CPU), token_scores=lambda _: (losses, correct)
    )
    sums, pairs = _batch_sums(stand_in, batch, [4])
    assert (sums.tolist(), pairs) == ([[tokens], [tokens], [0]], [1])


@pytest.mark.slow
def test_columns_are_those_of_the_run_or_as_told(tiny: Path, tmp_path: Path) -> None:
    """Or those that `train` finds; of a file and of rows of a program."""
    asked = [{"question": q, "answer": a, "extra": 1} for q, a in ("ab", "cd")]
    plain = [{"prompt": row["question"], "completion": row["answer"]} for row in asked]
    rows = write_rows(tmp_path / "plain.jsonl", plain)
    columns = {"prompt": "question", "completion": "answer"}
    shape = {"source": str(rows), "format": "prompt-completion"}
    mapped, unmapped = tmp_path / "mapped", tmp_path / "unmapped"
    make_run(mapped, tiny, peft_model(tiny), data={"train": {**shape, "columns": columns}})
    make_run(unmapped, tiny, peft_model(tiny), data={"train": shape})
    file = tmp_path / "held.csv"
    file.write_text("question,answer,extra\na,b,1\nc,d,1\n")
    expected = evaluate(unmapped, rows, **SHORT)
    assert [score.rows for score in (*expected.scores.values(), *expected.by_scorer)] == [2, 2, 2]
    for run, more in ((mapped, {}), (unmapped, {"columns": columns}), (unmapped, {})):
        assert evaluate(run, file, device="cpu", **more).scores == expected.scores
    again = evaluate(mapped, datasets.Dataset.from_list(asked), device="cpu")
    assert again.scores == expected.scores
    for data, name in ((3, "int"), (["Hello"], "str"), ([], "rows")):
        with refuses(DataError, where="evaluate(data=...)", names=[name]):
            evaluate(mapped, data, device="cpu")


@pytest.mark.slow
def test_without_data_the_score_is_the_run_s_own_validation_loss(
    trained_copy: Callable[[], Path],
) -> None:
    """To the last bits that packing moves."""
    run = trained_copy()
    measured = read_records(run / "metrics.jsonl")[-1].val_loss
    found = evaluate(run, scorers="exact", max_new_tokens=2, device="cpu")
    assert found.scores["tuned"].loss == pytest.approx(measured, rel=1e-6)
    assert found.scores["base"].loss != pytest.approx(measured, rel=1e-6)
    assert (found.scores["tuned"].rows, found.by_scorer[0].rows) == (8, 8)
    with (run.parent / "held.jsonl").open("a") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n')
    with refuses(UsageError, where="--data", names=["data.hold_out"]):
        evaluate(run, device="cpu")


@pytest.mark.slow
def test_rows_that_were_held_out_are_drawn_again_while_the_file_is_the_same(
    tiny: Path, tmp_path: Path
) -> None:
    """With more rows others are drawn, and some of those were trained on."""
    drawn = {"validation": None, "hold_out": "30 %"}
    shape = {"train": {"duration": "2 steps"}, "validate": {"every": None, "max_examples": 3}}
    train(recipe_run(tiny, tmp_path, data=drawn, **shape))
    run, rows = tmp_path / "run", tmp_path / "train.jsonl"
    found = evaluate(run, device="cpu")
    measured = read_records(run / "metrics.jsonl")[-1].val_loss
    assert found.scores["tuned"].loss == pytest.approx(measured, rel=1e-6)
    assert found.scores["tuned"].rows == 3
    lines = [line.split("  ") for line in (run / "held-out.txt").read_text().splitlines()]
    numbers = [int(place.removeprefix(f"{rows}:")) for place, text in lines if text]
    assert numbers == sorted(set(numbers))
    assert read_env(run).value["validation_examples"] == len(numbers) == len(lines)
    with rows.open("a") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n' * 9)
    with refuses(UsageError, where="--data", names=["data.hold_out"]):
        evaluate(run, device="cpu")


@pytest.mark.slow
def test_runs_are_compared_row_by_row(tiny: Path, tmp_path: Path) -> None:
    """By sums of each row alone; `report` then says the same from what is kept."""
    near, far = tmp_path / "near", tmp_path / "far"
    make_run(near, tiny, peft_model(tiny, std=0.01))
    make_run(far, tiny, peft_model(tiny, std=0.3))
    rows = write_rows(tmp_path / "held.jsonl", [*ROWS[:11], {**ROWS[11], "output": "twelve"}])
    found = evaluate_runs([near, far], rows, base=True, device="cpu")
    (comparison,) = found.comparisons
    assert (comparison.name, comparison.paired.is_apart) == ("loss", True)
    means = {name: found.runs[name].scores["tuned"].loss for name in ("near", "far")}
    assert comparison.best == min(means, key=means.__getitem__)
    assert comparison.paired.difference.mean == pytest.approx(
        means[comparison.best] - means[comparison.other]
    )
    assert found.table().columns == ["base", "near", "far"]
    assert "base" not in found.runs["far"].scores
    # Rows that were trained on are named before the verdict.
    notes = list(found.table().notes)
    assert notes.index(comparison.verdict) == 2
    assert all(note.startswith("warning: ") and holds(note, "11 of 12 rows") for note in notes[:2])
    for run in (near, far):
        (kept,) = RunFiles(run).evals
        row_losses = found.runs[run.name].scores["tuned"].row_losses
        assert kept["row_losses"]["tuned"] == list(row_losses)
    # One run is a list of one: the base is compared with it in the same way.
    alone = evaluate_runs([near], rows, base=True, device="cpu")
    (against_base,) = alone.comparisons
    assert (against_base.best, against_base.other) == ("tuned", "base")
    assert alone.scores == found.runs["near"].scores
    output = tmp_path / "answers"
    found = evaluate_runs([near, far], rows, output=output, max_examples=1, **SHORT)
    answers = [evaluation.answers for evaluation in found.runs.values()]
    assert answers == [output / "near.jsonl", output / "far.jsonl"]


@pytest.mark.slow
def test_runs_that_cannot_be_compared_are_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bases differ in a key, or their held-out rows differ: that is known before loading."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, attention in zip(runs, ("auto", "eager"), strict=True):
        more = {"model": {"attention": attention}, "data": {"hold_out": "5 %"}}
        make_run(run, tiny, peft_model(tiny), **more)
        (run / "env.json").write_text(json.dumps({"validation_hash": run.name * 64}))
    rows = write_rows(tmp_path / "held.jsonl", ROWS[:2])
    with refuses(UsageError, names=["model.attention is auto and eager"]):
        evaluate_runs(runs, rows, base=True, device="cpu")
    monkeypatch.setattr(LOAD_RUN, lambda *a, **k: pytest.fail("loaded"))
    with refuses(UsageError, where="--data", names=[tiny]):
        evaluate(tiny)
    where = f"{runs[0]} and {runs[1]}"
    with refuses(UsageError, where=where, names=["validation_hash"], fix=["--data FILE"]):
        evaluate_runs(runs)
