"""Documents: none of their tokens is lost, and each is predicted once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import byte_tokenizer
from errors import holds, refuses, warnings_with
from recipes import make_run
from rows import Simple, alpaca
from tunesmith.config.schema import Data, Source
from tunesmith.data.contract import check_tokens
from tunesmith.data.prepare import prepare_data
from tunesmith.data.splits import read_splits
from tunesmith.data.tokens import TokenSet, tokenize
from tunesmith.errors import DataError


def write_texts(folder: Path, texts: Sequence[str]) -> Path:
    """Texts as JSON lines."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def text_tokens(simple: Simple, tmp_path: Path) -> Callable[..., TokenSet]:
    """Texts as JSON lines, or a path -> TokenSet."""

    def build(texts: Sequence[str] | Path, **keys: Any) -> TokenSet:
        path = texts if isinstance(texts, Path) else write_texts(tmp_path, texts)
        data = Data(train=(Source(source=str(path), format="text"),), **{"seq_len": 8, **keys})
        rows, _ = read_splits(data, 0)
        return tokenize(rows, data, simple, simple.tokenizer, cache=None, what="train")

    return build


def predicted(tokens: TokenSet, row: int) -> list[tuple[int, int]]:
    """(the token before it, token) of every supervised token of a row, in order."""
    pairs = []
    for i in range(len(tokens)):
        if int(tokens.parts[0].arrays.rows[i]) == row:
            ids = tokens[i].ids.tolist()
            for at in np.flatnonzero(tokens[i].trained).tolist():
                pairs.append((ids[at - 1], ids[at]))
    return pairs


@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 14, 15, 20, 21, 22, 100])
def test_each_token_of_a_document_but_the_first_is_supervised_once(
    text_tokens, simple: Simple, length: int
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    tokens = text_tokens([text, "ab", text])
    document = [
        *simple.tokenizer.encode(text, add_special_tokens=False),
        simple.tokenizer.eos_token_id,
    ]
    for row in (0, 2):
        assert predicted(tokens, row) == list(itertools.pairwise(document))
    assert tokens.lengths.max() <= 8
    ends = [int(example.ids[-1]) == simple.tokenizer.eos_token_id for example in tokens]
    assert sum(ends) == 3
    assert not any(simple.tokenizer.eos_token_id in example.ids[:-1] for example in tokens)
    counts = tokens.counts
    assert (counts.kept_rows, counts.cut, counts.dropped, counts.lost_share) == (3, 0, 0, 0)
    assert counts.supervised == 2 * length + 2
    assert counts.split == (2 if length > 7 else 0)
    contract = check_tokens(
        tokens, simple, simple.tokenizer, vocab_size=len(simple.tokenizer), split="train"
    )
    assert not contract.broken


def test_each_part_begins_with_a_bos_where_the_tokenizer_writes_one(
    text_tokens, simple: Simple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma predicts nothing useful without; its context token is not supervised either."""
    simple.tokenizer.bos_token = "<|im_start|>"
    bos = simple.tokenizer.bos_token_id
    pieces = simple.pieces
    monkeypatch.setattr(simple, "pieces", lambda sample: [("<|im_start|>", False), *pieces(sample)])
    text = "".join(chr(97 + i % 26) for i in range(30))
    tokens = text_tokens([text])
    assert [int(example.ids[0]) for example in tokens] == [bos] * len(tokens)
    document = [bos, *simple.tokenizer.encode(text), simple.tokenizer.eos_token_id]
    assert predicted(tokens, 0) == list(itertools.pairwise(document))
    assert tokens.counts.supervised == len(document) - 1
    contract = check_tokens(
        tokens, simple, simple.tokenizer, vocab_size=len(simple.tokenizer), split="train"
    )
    assert not contract.broken


def test_what_is_not_split_is_counted_in_tokens(text_tokens) -> None:
    texts = ["a" * 99, *["b" * 7] * 10]
    for too_long, (cut, dropped) in {"truncate": (92, 0), "drop": (0, 100)}.items():
        counts = text_tokens(texts, too_long=too_long).counts
        assert (counts.cut_tokens, counts.dropped_tokens) == (cut, dropped)
        assert counts.lost_share == (cut + dropped) / 180
    with refuses(DataError, names=["100 tokens", 8], fix=["data.seq_len=100"]):
        text_tokens(texts, too_long="error")


def test_answers_are_not_split(make) -> None:
    counts = make(alpaca(20, letters=lambda i: 4 if i else 200), seq_len=100).counts
    assert (counts.split, counts.cut, counts.kept) == (0, 1, 20)
    whole = make(alpaca(20, letters=lambda i: 4 if i else 200), seq_len=100, train_on="all").counts
    assert (whole.split, whole.cut, whole.kept) == (0, 1, 20)


def test_a_warning_says_how_many_tokens_are_lost(tiny: Path, tmp_path: Path) -> None:
    texts = ["x" * (80 if i else 2000) for i in range(10)]

    def warnings(**keys: Any) -> list[str]:
        source = {"source": str(write_texts(tmp_path, texts)), "format": "text"}
        run = make_run(tiny, tmp_path, held=False, data={"train": source, **keys})
        tokenizer = byte_tokenizer()
        ends = {tokenizer.eos_token_id}
        described = prepare_data(run, tokenizer, ends, 272, cache=tmp_path / "c").describe()
        return warnings_with(described, "texts.jsonl", 128)

    assert warnings() == []
    [line] = warnings(too_long="drop")
    assert holds(line, "73.3%", "1 row", "data.too_long=auto")
    [line] = warnings(too_long="truncate")
    assert holds(line, "68.6%", "1 row", "data.seq_len=2001")
