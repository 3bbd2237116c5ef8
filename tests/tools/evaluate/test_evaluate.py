"""Scores against plain Transformers, row by row; nothing about them depends on how rows are
batched.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errors import holds, lines_with, refuses
from recipes import make_run as recipe_run
from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.data.batches.batch import collate
from tunesmith.data.batches.layout import Layout
from tunesmith.data.compare.splits import read_splits
from tunesmith.data.text.example import Example
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError, MachineError, UsageError
from tunesmith.inference.decoding import Decoding
from tunesmith.inference.load_run import LoadedModel, load_run
from tunesmith.metrics.record import read_records
from tunesmith.reader.run_files import RunFiles
from tunesmith.run_dir import read_env
from tunesmith.runtime import compilation
from tunesmith.tools.evaluate.evaluate import _batch_sums, evaluate, score
from tunesmith.tools.evaluate.evaluate_runs import evaluate_runs
from tunesmith.tools.evaluate.generate import generate
from tunesmith.training.run import train
from tunesmith.training.validation_loss import validation_loss

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


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
    """Sum of the losses, number of hits and of tokens, by Transformers' own forward on each row
    alone.
    """
    total, hits, count = 0.0, 0, 0
    for example in examples:
        ids = torch.tensor(np.asarray(example.ids, dtype=np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        supervised = torch.tensor(np.asarray(example.trained[1:]))
        total += F.cross_entropy(
            logits[supervised].double(), ids[1:][supervised], reduction="sum"
        ).item()
        hits += int((logits[supervised].argmax(-1) == ids[1:][supervised]).sum())
        count += int(supervised.sum())
    return total, hits, count


def test_score_is_that_of_transformers_and_peft(
    tiny: Path, opened: LoadedModel, tokens: TokenSet
) -> None:
    """Relative 1e-6: the same sums in fp32, in another order."""
    peft = peft_model(tiny)
    total, hits, count = reference(peft, list(tokens))
    with opened.training_attention() as train_model:
        found = score(train_model, tokens, pad_id=opened.pad_id)
    assert (found.rows, found.tokens) == (len(ROWS), count)
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.token_accuracy == hits / count
    # Row by row, in the order of the rows, whatever the order of the batches.
    for i, example in enumerate(tokens):
        loss, _, row_count = reference(peft, [example])
        assert found.row_losses[i] == pytest.approx(loss, rel=1e-5)
        assert found.row_tokens[i] == row_count


@pytest.mark.parametrize("micro_tokens", [1, 300, 700, 100_000])
def test_loss_does_not_depend_on_the_rows_of_a_batch(
    opened: LoadedModel, tokens: TokenSet, micro_tokens: int
) -> None:
    with opened.training_attention() as train_model:
        whole = score(train_model, tokens, pad_id=opened.pad_id)
        found = validation_loss(
            train_model, tokens, micro_tokens=micro_tokens, pad_id=opened.pad_id, device=CPU
        )
    assert found is not None
    assert found[0] == pytest.approx(whole.loss, rel=1e-6)
    assert found[1] == whole.tokens


def test_dropout_is_off_and_training_mode_comes_back(opened: LoadedModel, tokens: TokenSet) -> None:
    options = {"micro_tokens": 512, "pad_id": opened.pad_id, "device": CPU}
    with opened.training_attention() as train_model:
        train_model.train()
        first, again = (validation_loss(train_model, tokens, **options) for _ in range(2))
        assert train_model.training
        train_model.eval()
    assert first == again


def test_an_answer_that_is_not_scored_adds_nothing_however_unlikely_it_is() -> None:
    trained = np.array([0, 0, 1, 1, 0, 1, 1], bool)
    pair = Example(np.arange(7, dtype=np.int32), trained, (4, 3))
    batch = collate([[pair]], length=7, pad_id=0)
    losses = torch.ones(1, 7)
    losses[0, 4:] = torch.inf  # of the rejected one
    correct = torch.zeros(1, 7, dtype=torch.bool)
    stand_in: Any = SimpleNamespace(
        model=SimpleNamespace(device=CPU), token_scores=lambda _: (losses, correct)
    )
    sums, pairs = _batch_sums(stand_in, batch, [4])
    assert (sums.tolist(), pairs) == ([[2], [2], [0]], [1])


def test_a_cancelled_validation_has_no_result(opened: LoadedModel, tokens: TokenSet) -> None:
    with opened.training_attention() as train_model:
        found = validation_loss(
            train_model,
            tokens,
            micro_tokens=64,
            pad_id=opened.pad_id,
            device=CPU,
            cancelled=lambda: True,
        )
    assert found is None


def test_every_example_is_packed_once_without_padding(
    opened: LoadedModel, tokens: TokenSet
) -> None:
    layout = Layout(opened.pad_id, packed=True)
    batches = [batch for _, batch in layout.batches(tokens, 300)]
    assert sum(b.examples for b in batches) == len(tokens)
    assert (
        sum(b.tokens for b in batches)
        == int(tokens.lengths.sum())
        == sum(b.input_ids.numel() for b in batches)
    )
    assert len(batches) < len(tokens)


def test_attention_of_generation_comes_back_after_a_loss(opened: LoadedModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = opened.model(input_ids=ids).logits
        with opened.training_attention():
            pass
        assert torch.equal(opened.model(input_ids=ids).logits, before)


def test_exact_match_without_any_answer_is_refused(tiny: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "held.jsonl", [{"prompt": "a", "completion": ""}])
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    with pytest.raises(UsageError) as refused:
        evaluate(tmp_path / "run", str(rows), scorers="exact", max_new_tokens=4, device="cpu")
    assert rows.name in refused.value.where


def test_empty_answers_are_counted(tiny: Path, tmp_path: Path) -> None:
    listed = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "c"}]
    rows = write_rows(tmp_path / "held.jsonl", listed)
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    assert evaluate(tmp_path / "run", str(rows), base=False, device="cpu").empty == 1


def test_exact_match_reads_rows_by_the_columns_that_were_trained(
    tiny: Path, tmp_path: Path
) -> None:
    rows = write_rows(
        tmp_path / "held.jsonl",
        [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}],
    )
    columns = {"prompt": "question", "completion": "answer"}
    source = {"source": str(rows), "format": "prompt-completion", "columns": columns}
    make_run(tmp_path / "run", tiny, peft_model(tiny), data={"train": source})
    found = evaluate(tmp_path / "run", str(rows), scorers="exact", max_new_tokens=4, device="cpu")
    assert [score.rows for score in (*found.scores.values(), *found.by_scorer)] == [2, 2, 2]
    # So are rows of a program.
    listed = [json.loads(line) for line in rows.read_text().splitlines()]
    again = evaluate(tmp_path / "run", datasets.Dataset.from_list(listed), device="cpu")
    assert again.scores["tuned"].loss == found.scores["tuned"].loss
    for data, options, name in (
        (3, {}, "int"),
        (["Hello"], {}, "rows[0] is str"),
        ([], {}, "no rows"),
        (listed, {"split": "train[:50%]"}, "split"),
    ):
        with refuses(DataError, where="evaluate(data=...)", names=[name]):
            evaluate(tmp_path / "run", data, device="cpu", **options)


def test_what_separates_the_values_of_a_table_is_logged_once(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tmp_path / "held.csv"
    rows.write_text("prompt;completion\na;b\nc;d\n")
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    with caplog.at_level(logging.INFO, logger="tunesmith"):
        evaluate(tmp_path / "run", str(rows), base=False, device="cpu")
    assert len(lines_with(caplog.text, rows, "semicolons")) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"data": {"validation": None, "hold_out": "30 %"}}], ids=["slice", "hold_out"]
)
def test_without_data_the_score_is_the_run_s_own_validation_loss(
    tiny: Path, tmp_path: Path, changes: Any
) -> None:
    """To the last bits that packing moves."""
    shape = {"train": {"duration": "2 steps"}, "validate": {"every": None, "max_examples": 3}}
    train(recipe_run(tiny, tmp_path, **{**shape, **changes}))
    measured = read_records(tmp_path / "run" / "metrics.jsonl")[-1].val_loss
    found = evaluate(tmp_path / "run", scorers="exact", max_new_tokens=2, device="cpu")
    assert found.scores["tuned"].loss == pytest.approx(measured, rel=1e-6)
    assert found.scores["base"].loss != pytest.approx(measured, rel=1e-6)
    assert (found.scores["tuned"].rows, found.by_scorer[0].rows) == (3, 3)
    assert ("30 %" in found.data) == bool(changes)
    # A file is shown by its name, in tables and in what is saved.
    assert holds(found.data, "train.jsonl" if changes else "held.jsonl")
    assert "/" not in found.data
    drawn = tmp_path / "run" / "held-out.txt"
    if changes:
        places, texts = zip(
            *(line.split("  ") for line in drawn.read_text().splitlines()), strict=True
        )
        assert all(texts)
        files, numbers = zip(*(place.rsplit(":", 1) for place in places), strict=True)
        assert set(files) == {str(tmp_path / "train.jsonl")}
        assert [int(number) for number in numbers] == sorted(set(map(int, numbers)))
        assert read_env(tmp_path / "run").value["validation_examples"] == len(places)
    else:
        assert not drawn.exists()
    assert (
        evaluate(tmp_path / "run", max_examples=2, base=False, device="cpu").scores["tuned"].rows
        == 2
    )


@pytest.mark.parametrize("name", ["held.jsonl", "train.jsonl"])
def test_held_out_rows_that_changed_are_refused(tiny: Path, tmp_path: Path, name: str) -> None:
    """With more rows others are drawn, and some of those were trained on."""
    changes = {} if name == "held.jsonl" else {"data": {"validation": None, "hold_out": "30 %"}}
    train(recipe_run(tiny, tmp_path, train={"duration": "2 steps"}, **changes))
    with (tmp_path / name).open("a") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n' * 9)
    with refuses(UsageError, where="--data", names=["data.hold_out"]):
        evaluate(tmp_path / "run", device="cpu")


def test_without_data_a_run_without_held_out_rows_is_refused_before_loading(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    monkeypatch.setattr(
        "tunesmith.tools.evaluate.evaluate.load_run", lambda *a, **k: pytest.fail("loaded")
    )
    for path, why in (
        (tmp_path / "run", "neither data.validation nor data.hold_out"),
        (tiny, "not a run"),
    ):
        with refuses(UsageError, where="--data", names=[path]) as refused:
            evaluate(path)
        assert why in refused.value.why


QUESTIONS = [
    {"question": "a", "answer": "b", "extra": 1},
    {"question": "c", "answer": "d", "extra": 2},
]


def as_csv(rows: list[dict[str, Any]], path: Path) -> None:
    path.write_text(
        "\n".join(",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows)))
    )


def as_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        ("jsonl", lambda rows, path: write_rows(path, rows)),
        ("json", lambda rows, path: path.write_text(json.dumps(rows))),
        ("csv", as_csv),
        ("parquet", as_parquet),
    ],
)
def test_columns_are_those_of_the_run_or_as_told(
    tiny: Path, tmp_path: Path, ending: str, write: Any
) -> None:
    """The same score of the same rows in any file, with the format's own names, the run's mapping,
    a mapping given, or the one that `train` finds.
    """
    plain = [{"prompt": row["question"], "completion": row["answer"]} for row in QUESTIONS]
    rows = write_rows(tmp_path / "plain.jsonl", plain)
    columns = {"prompt": "question", "completion": "answer"}
    shape = {"source": str(rows), "format": "prompt-completion"}
    make_run(
        tmp_path / "mapped", tiny, peft_model(tiny), data={"train": {**shape, "columns": columns}}
    )
    make_run(tmp_path / "unmapped", tiny, peft_model(tiny), data={"train": shape})
    file = tmp_path / f"held.{ending}"
    write(QUESTIONS, file)
    options: dict[str, Any] = {"scorers": "exact", "max_new_tokens": 2, "device": "cpu"}
    expected = evaluate(tmp_path / "unmapped", rows, **options).scores
    assert evaluate(tmp_path / "mapped", file, **options).scores == expected
    assert (
        evaluate(tmp_path / "mapped", file, format_name="prompt-completion", **options).scores
        == expected
    )
    assert evaluate(tmp_path / "unmapped", file, columns=columns, **options).scores == expected
    assert evaluate(tmp_path / "unmapped", file, **options).scores == expected


def test_asking_a_model_neither_compiles_nor_tries_the_compiler(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was trained compiled: on a GPU the trial alone takes longer than an answer."""

    def tried(*args: object, **options: object) -> None:
        raise AssertionError("something is compiled")

    make_run(tmp_path / "run", tiny, peft_model(tiny), train={"compile": "on"})
    monkeypatch.setattr(torch, "compile", tried)
    monkeypatch.setattr(compilation, "probe_compiler", tried)
    monkeypatch.setattr(compilation, "compiler_fault", tried)
    loaded = load_run(tmp_path / "run", device="cpu")
    assert len(list(generate(loaded, ROWS[:1], Decoding(2)))) == 1
    rows = write_rows(tmp_path / "held.jsonl", ROWS[:2])
    found = evaluate(tmp_path / "run", str(rows), scorers="exact", max_new_tokens=2, device="cpu")
    assert found.by_scorer[0].rows == 2


def test_runs_are_compared_row_by_row(tiny: Path, tmp_path: Path) -> None:
    """By sums of each row alone; `report` then says the same from what is kept."""
    near, far = tmp_path / "near", tmp_path / "far"
    make_run(near, tiny, peft_model(tiny, std=0.01))
    make_run(far, tiny, peft_model(tiny, std=0.3))
    rows = write_rows(tmp_path / "held.jsonl", [*ROWS[:11], {**ROWS[11], "output": "twelve"}])
    found = evaluate_runs([near, far], rows, base=True, device="cpu")
    (comparison,) = found.comparisons
    assert (comparison.name, comparison.is_better) == ("loss", True)
    means = {name: found.evaluations[name].scores["tuned"].loss for name in ("near", "far")}
    assert comparison.best == min(means, key=means.__getitem__)
    assert comparison.mean == pytest.approx(means[comparison.best] - means[comparison.other])
    assert found.table().columns == ["base", "near", "far"]
    assert "base" not in found.evaluations["far"].scores
    # Rows that were trained on are named before the verdict.
    notes = list(found.table().notes)
    assert notes.index(comparison.verdict) == 2
    for note in notes[:2]:
        assert note.startswith("warning: ")
        assert holds(note, "11 of 12 rows")
    for run in (near, far):
        (kept,) = RunFiles(run).evals
        assert kept["row_losses"]["tuned"] == list(
            found.evaluations[run.name].scores["tuned"].row_losses
        )


def test_the_key_in_which_the_bases_of_two_runs_differ_is_named(tiny: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "other"]
    make_run(runs[0], tiny, peft_model(tiny))
    make_run(runs[1], tiny, peft_model(tiny), model={"attention": "eager"})
    rows = write_rows(tmp_path / "held.jsonl", ROWS[:2])
    with refuses(UsageError, names=["model.attention is auto and eager"]):
        evaluate_runs(runs, rows, base=True, device="cpu")


def test_runs_with_other_held_out_rows_are_refused_before_loading(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tunesmith.tools.evaluate.evaluate.load_run", lambda *a, **k: pytest.fail("loaded")
    )
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        make_run(run, tiny, peft_model(tiny), data={"hold_out": "5 %"})
        (run / "env.json").write_text(json.dumps({"validation_hash": run.name * 64}))
    where = f"{runs[0]} and {runs[1]}"
    with refuses(UsageError, where=where, names=["validation_hash"], fix=["--data FILE"]):
        evaluate_runs(runs)


def test_two_rows_show_nothing(tiny: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    rows = write_rows(tmp_path / "held.jsonl", ROWS[:2])
    found = evaluate(tmp_path / "run", rows, device="cpu")
    assert found.loss_difference is not None
    assert (found.loss_difference.rows, found.loss_difference.interval) == (2, None)
    (sentence,) = found.verdicts()
    assert holds(sentence, "2 rows", "6")


def test_answers_of_runs_that_cannot_be_written_to_go_to_a_folder(
    tiny: Path, tmp_path: Path
) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        make_run(run, tiny, peft_model(tiny))
        (run / "evals").touch()
    rows = write_rows(tmp_path / "held.jsonl", ROWS[:1])
    short: dict[str, Any] = {"scorers": "exact", "max_new_tokens": 2, "device": "cpu"}
    with refuses(MachineError, fix=["--output"]):
        evaluate_runs(runs, rows, **short)
    found = evaluate_runs(runs, rows, output=tmp_path / "answers", **short)
    files = [tmp_path / "answers" / f"{run.name}.jsonl" for run in runs]
    assert [evaluation.answers for evaluation in found.evaluations.values()] == files
    assert all(file.is_file() for file in files)
