"""Pairs in packed rows that hold once what both sequences begin with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import make_run, merge
from rows import schedule_of
from tunesmith.config.schema import Data, Source, Train
from tunesmith.data.batches.batch import IGNORE, collate
from tunesmith.data.batches.micro_batches import MicroBatches
from tunesmith.data.text.example import Example
from tunesmith.planning.run_plan import shares_prompts
from tunesmith.units import Size


def pair(first: str, second: str) -> Example:
    """A letter is a token, a capital one supervised."""
    ids = np.frombuffer((first + second).lower().encode(), np.uint8).astype(np.int32)
    trained = np.array([letter.isupper() for letter in first + second])
    return Example(ids, trained, (len(first), len(second)))


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        # The last token of the prompt predicts another answer in each.
        ("abcXY", "abcZ", 2),
        # The beginning of the answers too has targets, though it is the same.
        ("abcXY", "abcXZ", 2),
        # Tokens that differ before any answer.
        ("abdXY", "acdZ", 1),
        ("bcX", "acX", 0),
        # An answer in the prompt that one row trains on.
        ("aBcXY", "abcZ", 0),
        ("abBcXY", "abBcZ", 1),
        # A sequence that is the beginning of the other keeps a token.
        ("abc", "abcdX", 2),
        ("aX", "aY", 0),
    ],
)
def test_what_is_shared_has_no_target(first: str, second: str, shared: int) -> None:
    assert pair(first, second).count_shared() == shared


def test_the_second_sequence_goes_on_behind_what_it_shares() -> None:
    example = pair("abcXY", "abcZ")._replace(shared=2)
    batch = collate([[example]], length=9, pad_id=0)
    a, b, c, x, y, z = b"abcxyz"
    assert batch.input_ids.tolist() == [[a, b, c, x, y, c, z, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1]]
    nothing = IGNORE
    assert batch.targets.tolist() == [[nothing, nothing, x, y, nothing, z] + [nothing] * 3]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 11]
    assert batch.whole is not None
    assert batch.whole.places.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8]
    assert batch.whole.firsts.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10]
    assert batch.whole.seconds.tolist() == [5, 6]
    assert (batch.tokens, batch.max_seqlen) == (9, 5)
    assert (batch.supervised, batch.chosen_tokens) == (3, 2)


LETTERS = st.text("abX", min_size=0, max_size=6)
PAIRS = st.lists(st.tuples(LETTERS, LETTERS, LETTERS), min_size=1, max_size=5)


@given(PAIRS, st.integers(0, 5))
@settings(max_examples=30)
def test_documents_are_the_sequences(texts: list[tuple[str, str, str]], padding: int) -> None:
    examples = []
    for prompt, first, second in texts:
        example = pair(f"a{prompt}{first}X", f"a{prompt}{second}X")
        examples.append(example._replace(shared=example.count_shared()))
    length = sum(len(example.ids) - example.shared for example in examples) + padding
    batch = collate([examples], length=length, pad_id=0)
    places = np.arange(length) if batch.whole is None else batch.whole.places.numpy()
    ids, positions, targets = (
        tensor.flatten().numpy() for tensor in (batch.input_ids, batch.position_ids, batch.targets)
    )
    documents = [places[start:end] for start, end in pairwise(batch.cu_seqlens.tolist())]
    sequences = [part for example in examples for part in example.parts()]
    for document, sequence in zip(documents, sequences, strict=False):
        assert ids[document].tolist() == sequence.ids.tolist()
        assert positions[document].tolist() == list(range(len(sequence.ids)))
    # In the order of the row, as `Sequences.sequence_indices` takes them.
    expected = [token for part in sequences for token in part.ids[1:][part.trained[1:]].tolist()]
    assert targets[targets != IGNORE].tolist() == expected
    if batch.whole is not None:
        assert np.array_equal(places[batch.whole.firsts.numpy()], np.arange(length))
        rest = places[batch.whole.seconds.numpy()]
        assert len(rest) + length == len(places)
        assert len(np.unique(rest)) == len(rest)


def test_micro_batches_have_room_for_more_pairs() -> None:
    """The same examples in each step, in fewer micro batches."""
    lengths = np.full(8, 100)
    data = Data(train=(Source(source="x"),), seq_len=64)
    train = Train(global_batch=Size(8, "examples"))
    counts = []
    for row_lengths in (lengths, lengths - 40):
        schedule = schedule_of(lengths, data, train, row_length=128, row_lengths=row_lengths)
        micro = MicroBatches(schedule, Size(240, "tokens"), None, 1, 1, 0.0)
        groups = [group for micro_step in micro.micro_steps(0) for group in micro_step]
        assert sorted(i for group in groups for i in group) == list(range(8))
        assert all(micro.shape(group)[1] <= 240 for group in groups)
        counts.append(len(groups))
    assert counts == [4, 2]


@pytest.mark.parametrize(
    ("changes", "recurrent", "shares"),
    [
        ({"method": "dpo"}, (), True),
        ({"method": "orpo"}, (), True),
        # A state would run from the chosen answer into the rejected one.
        ({"method": "dpo"}, ("Lfm2ShortConv",), False),
        ({"method": "dpo", "data": {"pack": False}}, (), False),
        ({"method": "kto"}, (), False),
        ({"method": "sft"}, (), False),
    ],
)
def test_which_runs_hold_a_prompt_once(
    tmp_path: Path, changes: dict[str, Any], recurrent: tuple[str, ...], shares: bool
) -> None:
    form = {"sft": "prompt-completion", "kto": "feedback"}.get(changes["method"], "preference")
    rows = {"train": {"source": str(tmp_path / "rows.jsonl"), "format": form}}
    run = make_run(tmp_path, tmp_path, held=False, **merge({"data": rows}, changes))
    assert shares_prompts(run, recurrent) == shares
