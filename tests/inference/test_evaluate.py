"""Scores against plain Transformers, row by row; nothing about them depends on how rows are batched."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.data.batch import Example
from tunesmith.data.hold_out import read_splits
from tunesmith.data.tokens import TokenSet, tokenise
from tunesmith.errors import UsageError
from tunesmith.inference.evaluate import evaluate, is_exact_match, packed, score, validation_loss
from tunesmith.inference.load_run import LoadedModel, load_run

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
    return tokenise(read_splits(data, 0)[0], data, opened.template, opened.tokenizer, cache=None, what="test")


def reference(model: torch.nn.Module, examples: list[Example]) -> tuple[float, int, int]:
    """Sum of the losses, number of hits and of tokens, by Transformers' own forward on each row alone."""
    total, hits, count = 0.0, 0, 0
    for example in examples:
        ids = torch.tensor(np.asarray(example.ids, dtype=np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        supervised = torch.tensor(np.asarray(example.trained[1:]))
        total += F.cross_entropy(logits[supervised].double(), ids[1:][supervised], reduction="sum").item()
        hits += int((logits[supervised].argmax(-1) == ids[1:][supervised]).sum())
        count += int(supervised.sum())
    return total, hits, count


def test_score_is_that_of_transformers_and_peft(tiny: Path, opened: LoadedModel, tokens: TokenSet) -> None:
    """Relative 1e-6: the same sums in fp32, in another order."""
    total, hits, count = reference(peft_model(tiny), list(tokens))
    with opened.training_attention() as train_model:
        found = score(train_model, tokens, pad_id=opened.pad_id)
    assert (found.rows, found.tokens) == (len(ROWS), count)
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.token_accuracy == hits / count
    assert found.exact_match is None


@pytest.mark.parametrize("micro_tokens", [1, 300, 700, 100_000])
def test_loss_does_not_depend_on_the_rows_of_a_batch(opened: LoadedModel, tokens: TokenSet, micro_tokens: int) -> None:
    with opened.training_attention() as train_model:
        whole = score(train_model, tokens, pad_id=opened.pad_id)
        found = validation_loss(train_model, tokens, micro_tokens=micro_tokens, pad_id=opened.pad_id, device=CPU)
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


def test_a_cancelled_validation_has_no_result(opened: LoadedModel, tokens: TokenSet) -> None:
    with opened.training_attention() as train_model:
        found = validation_loss(
            train_model, tokens, micro_tokens=64, pad_id=opened.pad_id, device=CPU, cancelled=lambda: True
        )
    assert found is None


def test_every_example_is_packed_once_without_padding(opened: LoadedModel, tokens: TokenSet) -> None:
    batches = list(packed(tokens, capacity=300, pad_id=opened.pad_id))
    assert sum(b.examples for b in batches) == len(tokens)
    assert sum(b.tokens for b in batches) == int(tokens.lengths.sum()) == sum(b.input_ids.numel() for b in batches)
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
        evaluate(tmp_path / "run", str(rows), exact_match=True, max_new_tokens=4, device="cpu")
    assert str(rows) in refused.value.where


def test_exact_match_reads_rows_by_the_columns_that_were_trained(tiny: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "held.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    columns = {"prompt": "question", "completion": "answer"}
    source = {"source": str(rows), "format": "prompt-completion", "columns": columns}
    make_run(tmp_path / "run", tiny, peft_model(tiny), data={"train": source})
    found = evaluate(tmp_path / "run", str(rows), exact_match=True, max_new_tokens=4, device="cpu")
    assert [(score.rows, score.asked) for score in found.scores.values()] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("a b", "a b", True),
        ("  a\n\tb ", "a b", True),
        ("a b", "a  b\n", True),
        ("", "  ", True),
        ("A b", "a b", False),
        ("a b.", "a b", False),
        ("ab", "a b", False),
    ],
)
def test_exact_match_forgives_whitespace_alone(answer: str, reference: str, same: bool) -> None:
    assert is_exact_match(answer, reference) is same
