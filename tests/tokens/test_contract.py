"""The token contract: each rule is named where it is broken, and says how much was checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from errors import holds
from rows import Simple, alpaca
from tunesmith.errors import DataError
from tunesmith.rows.samples import Sample
from tunesmith.rows.source.open_source import from_list
from tunesmith.tokens.cache import TokenWriter
from tunesmith.tokens.contract import Contract, check_tokens
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.token_set import SourceTokens, TokenCounts, TokenSet

VOCAB = 272
# The checks of a contract in their order; of an empty split there is the first alone.
RULES = (
    "not empty",
    "whole",
    "supervised",
    "besides its end",
    "end token",
    "BOS",
    "prompt",
    "vocabulary",
    "cut off",
)
END_RULE = RULES.index("end token")
# Stands for the end token.
E = -1
Given = tuple[list[int], list[int]]
WHOLE: Given = ([70, 71, E], [0, 1, 1])


def check(simple: Simple, tokens: TokenSet, vocab: int = VOCAB) -> Contract:
    return check_tokens(tokens, simple, vocab_size=vocab, split="train")


def assert_holds(simple: Simple, tokens: TokenSet) -> Contract:
    contract = check(simple, tokens)
    contract.raise_if_broken()
    return contract


def given(simple: Simple, *examples: Given, cut: bool = False) -> TokenSet:
    """A token set of hand-made (ids, trained) pairs."""
    store = TokenWriter(None)
    for i, (written, trained) in enumerate(examples):
        ids = [simple.tokenizer.eos_token_id if id_ == E else id_ for id_ in written]
        store.add(Example(np.asarray(ids, np.int32), np.asarray(trained, bool)), i, cut)
    arrays = store.arrays()
    rows = from_list([{"text": ""}] * max(1, len(examples)), "made")
    counts = TokenCounts("made", len(examples), len(examples), len(arrays.ids), 0, 0, 0, 0, 0, "")
    return TokenSet([SourceTokens(arrays, counts, rows)])


def assert_broken(
    simple: Simple, tokens: TokenSet, rule: str, count: str = "", vocab: int = VOCAB
) -> DataError:
    contract = check(simple, tokens, vocab)
    assert [RULES[n] for n, rule in enumerate(contract.checks) if rule.broken] == [rule]
    with pytest.raises(DataError) as caught:
        contract.raise_if_broken()
    error = caught.value
    assert count in error.what
    assert error.why
    assert error.fix
    return error


def test_a_good_set_holds_and_says_how_much_was_checked(make, simple: Simple) -> None:
    tokens = make(alpaca(50), alpaca(30), seq_len=256)
    contract = assert_holds(simple, tokens)
    checked = [80] * 5 + [0, 80, int(tokens.lengths.sum()), 80]
    assert [c.checked for c in contract.checks] == checked
    assert_holds(simple, given(simple, ([0, 71, E], [0, 1, 1])))  # the first token id
    # The line break that the template writes after the end token is supervised too.
    assert_holds(simple, make(alpaca(9), seq_len=256, train_on="all"))


# Rows that hold, and one rule that the last of them breaks.
BROKEN: list[tuple[str, str, list[Given]]] = [
    ("supervised", "for 1 of 2 rows:", [WHOLE, ([72, 73, E], [0, 0, 0])]),
    ("besides its end", "for 1 of 2 answers:", [WHOLE, ([70, 71, E], [0, 0, 1])]),
    ("end token", "for 1 of 3 answers:", [WHOLE, ([70, 71, E, 72, 73, 74], [0, 1, 1, 0, 1, 0])]),
    # A stretch of one example does not borrow the end token that begins the next.
    ("end token", "", [([70, 71], [0, 1]), ([E, 71, E], [0, 1, 1])]),
    ("prompt", "", [([70, E], [1, 1])]),
]


@pytest.mark.parametrize(("rule", "count", "rows"), BROKEN)
def test_a_row_that_breaks_a_rule(simple: Simple, rule: str, count: str, rows: list[Given]) -> None:
    error = assert_broken(simple, given(simple, *rows), rule, count)
    if rows[0] == WHOLE:
        assert error.where.endswith("row 2")


def test_an_end_of_earlier_answers_stands_behind_them(simple: Simple) -> None:
    simple.earlier_end_ids = frozenset({75})
    assert_holds(simple, given(simple, ([70, 71, 75, 72, E], [0, 1, 0, 1, 1])))
    for rows in (
        [([70, 71, 75, 72, 73], [0, 1, 0, 1, 1])],
        [([70, 71], [0, 1]), ([75, 71, E], [0, 1, 1])],
    ):
        assert_broken(simple, given(simple, *rows), "end token")


def test_a_cut_answer_need_not_end(simple: Simple) -> None:
    """It is counted by a rule of its own; an earlier answer of the same row must end."""
    one = given(simple, ([70, 71, 72], [0, 1, 1]), cut=True)
    assert "data.seq_len" in assert_broken(simple, one, "cut off", "for 1 of 1 row:").what
    two = given(simple, ([70, 71, 72, 73, E], [0, 1, 0, 0, 0]), cut=True)
    assert_broken(simple, two, "end token")


def test_few_cut_answers_are_warned_of_and_many_refused(make, simple: Simple) -> None:
    """One row in ten is the most; what ends is what the rule of end tokens counts."""
    rows = alpaca(20, letters=lambda i: 200 if i < 2 else 5)
    longest = make(rows, seq_len=999).counts.longest
    contract = check(simple, make(rows, seq_len=100))
    assert not contract.broken
    assert contract.checks[END_RULE].checked == 18
    (warning,) = contract.warnings
    assert holds(warning, "2 of 20", "10.0%", "data.seq_len", f"data.seq_len={longest}")

    tokens = make(alpaca(20, letters=lambda i: 200 if i < 3 else 5), seq_len=100)
    error = assert_broken(simple, tokens, "cut off", "for 3 of 20 rows:")
    assert error.where.endswith("rows0.jsonl:1")
    for way in (f"data.seq_len={longest} (", "data.too_long=drop", "data.allow_cut_answers=true"):
        assert way in error.fix
    assert not check(simple, make(rows, seq_len=longest)).warnings


def test_ways_on_from_cut_answers(make, simple: Simple) -> None:
    tokens = make(alpaca(9, letters=lambda i: 200), seq_len=100)

    def judge(**keys: Any) -> Contract:
        return check_tokens(tokens, simple, vocab_size=VOCAB, split="train", **keys)

    (broken,) = judge(position_limit=128).broken
    assert holds(broken.fix, "data.seq_len=128", "data.allow_cut_answers=true")
    assert "data.too_long" not in broken.fix, "dropping all rows is no way on"
    accepted, warned = judge(cut_answers="accept"), judge(cut_answers="warn")
    assert (accepted.broken, accepted.warnings, warned.broken) == ((), (), ())
    assert holds(warned.warnings[0], "9 of 9", "100.0%")
    # Texts have no answers to cut.
    texts = TokenSet([replace(tokens.parts[0], has_answers=False)])
    assert not check(simple, texts).broken


def test_a_doubled_bos(simple: Simple) -> None:
    simple.tokenizer.bos_token = "<|im_start|>"
    bos = simple.tokenizer.bos_token_id
    one: Given = ([bos, 70, E], [0, 1, 1])
    assert_holds(simple, given(simple, one))
    two = given(simple, one, ([bos, bos, 70, E], [0, 0, 1, 1]))
    assert assert_broken(simple, two, "BOS", "for 1 of 2 rows:").where.endswith("row 2")


def test_a_mask_that_reaches_the_prompt(
    make, simple: Simple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token too many, in one row: found by rendering the prompt apart."""
    honest = Simple.encode

    def greedy(self: Simple, sample: Sample, train_on: str) -> Example:
        example = honest(self, sample, train_on)
        if "say 3" in str(sample):
            example.trained[np.flatnonzero(example.trained)[0] - 1] = True
        return example

    monkeypatch.setattr(Simple, "encode", greedy)
    error = assert_broken(simple, make(alpaca(5), seq_len=256), "prompt", "for 1 of 5 rows:")
    assert error.where.endswith("rows0.jsonl:4")
    assert "assistant⟦\\n⟧" in error.why


def test_an_empty_split_and_a_label_outside_the_vocabulary(make, simple: Simple) -> None:
    error = assert_broken(simple, make(alpaca(4), seq_len=8), "not empty")
    assert error.why.count("4") == 2, "all that were read"
    end = simple.tokenizer.eos_token_id
    error = assert_broken(simple, make(alpaca(4), seq_len=256), "vocabulary", vocab=end)
    assert holds(error.why, f"{end:,}")
    assert "model.added_tokens" in error.fix
