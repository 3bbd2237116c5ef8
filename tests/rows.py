"""Fixtures for rows and tokens: ChatML, byte tokens, the mask written down by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tunesmith.batches.schedule import BatchSchedule
from tunesmith.config.schema import Data, Source, Train
from tunesmith.rows.compare.splits import read_splits
from tunesmith.rows.samples import Completion, Conversation, Sample
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.text.template import tokenizer_hash
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize


class Simple:
    """ChatML, with the assistant's content and end token supervised."""

    name = "simple"
    raw = False
    jinja = None
    pictures = None
    samples_answers = False

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset({tokenizer.eos_token_id})
        self.earlier_end_ids: frozenset[int] = frozenset()
        self.encoded = 0

    @cached_property
    def tokenizer_hash(self) -> str:
        return tokenizer_hash(self.tokenizer)

    def describe(self) -> str:
        return "simple: a template of the tests"

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def pieces(self, sample: Sample) -> list[tuple[str, bool]]:
        if isinstance(sample, Conversation):
            out = []
            for n, m in enumerate(sample.messages):
                answer = m["role"] == "assistant" and n >= sample.prompt_messages
                out += [
                    (f"<|im_start|>{m['role']}\n", False),
                    (f"{m['content']}<|im_end|>", answer),
                    ("\n", False),
                ]
            return out
        if isinstance(sample, Completion):
            return [(sample.prompt, False), (f"{sample.completion}<|im_end|>", True)]
        return [(f"{sample.text}<|im_end|>", True)]

    def encode_many(
        self, samples: Sequence[Sample], train_on: str, *, where: Sequence[str]
    ) -> list[Example]:
        self.encoded += len(samples)
        return [self.encode(s, train_on) for s in samples]

    def encode(self, sample: Sample, train_on: str) -> Example:
        ids: list[int] = []
        trained: list[bool] = []
        for text, supervised in self.pieces(sample):
            new = self._ids(text)
            ids += new
            trained += [supervised or train_on == "all"] * len(new)
        trained[0] = False
        return Example(np.asarray(ids, np.int32), np.asarray(trained, np.bool_))

    def prompt(self, sample: Sample) -> list[int]:
        if isinstance(sample, Conversation):
            head = "".join(text for text, _ in self.pieces(Conversation(sample.messages[:-1])))
            return self._ids(head + "<|im_start|>assistant\n")
        return self._ids(sample.prompt) if isinstance(sample, Completion) else []


@pytest.fixture
def simple() -> Simple:
    from conftest import byte_tokenizer

    return Simple(byte_tokenizer())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Write a file into the test's folder and give its path."""

    def put(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return put


def alpaca(n: int, *, letters: Callable[[int], int] = lambda i: 5 + i % 7) -> str:
    """n alpaca rows as JSON lines; row i answers with `letters(i)` letters."""
    import json

    rows = ({"instruction": f"say {i}", "input": "", "output": "x" * letters(i)} for i in range(n))
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def make(simple: Simple, write: Callable[[str, str | bytes], str]) -> Callable[..., TokenSet]:
    """Rows -> TokenSet by the simple template, without a cache."""

    def build(
        *contents: str, weights: Sequence[float] = (), cache: Path | None = None, **keys: Any
    ) -> TokenSet:
        sources = tuple(
            Source(
                source=write(f"rows{k}.jsonl", text),
                format="alpaca",
                weight=weights[k] if weights else 1.0,
            )
            for k, text in enumerate(contents)
        )
        data = Data(train=sources, **keys)
        return tokenize(read_splits(data, 0)[0], data, simple, cache=cache, what="train")

    return build


def schedule_of(
    lengths: Any,
    data: Data,
    train: Train,
    *,
    repeats: Any = None,
    row_length: int | None = None,
    sequences: int = 1,
    sequence_lengths: Any = None,
    row_lengths: Any = None,
) -> BatchSchedule:
    """The schedule of examples of these lengths; nothing else of the recipe and the tokens."""
    lengths = np.asarray(lengths, np.int64)
    run: Any = SimpleNamespace(data=data, train=train, row_tokens=row_length or data.seq_len)
    tokens: Any = SimpleNamespace(
        lengths=lengths,
        row_lengths=lengths if row_lengths is None else row_lengths,
        longest_sequences=lengths if sequence_lengths is None else sequence_lengths,
        has_pairs=sequences == 2,
        repeats=np.ones(len(lengths)) if repeats is None else np.asarray(repeats, np.float64),
    )
    return BatchSchedule(run, tokens)
