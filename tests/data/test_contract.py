"""Each clause of the token contract: what breaks it is named, and what holds says how much was
checked.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from errors import holds
from rows import Simple, alpaca
from tunesmith.data.rows.samples import Sample
from tunesmith.data.source.open_source import from_list
from tunesmith.data.text.example import Example
from tunesmith.data.tokens.cache import NO_LABEL, TokenWriter
from tunesmith.data.tokens.contract import Contract, check_tokens
from tunesmith.data.tokens.token_set import SourceTokens, TokenCounts, TokenSet
from tunesmith.errors import DataError

VOCAB = 272
CHECKS = 9


def check(simple: Simple, tokens: TokenSet, vocab: int = VOCAB) -> Contract:
    return check_tokens(tokens, simple, vocab_size=vocab, split="train")


def assert_holds(simple: Simple, tokens: TokenSet) -> Contract:
    contract = check(simple, tokens)
    contract.raise_if_broken()
    return contract


def given(
    simple: Simple,
    *examples: tuple[list[int], list[int]],
    cut: bool = False,
    empties: tuple[int, ...] = (),
) -> TokenSet:
    """A token set of hand-made (ids, trained) pairs."""
    store = TokenWriter(None)
    for i, (ids, trained) in enumerate(examples):
        store.add(Example(np.asarray(ids, np.int32), np.asarray(trained, bool)), i, cut)
    arrays = store.arrays()
    rows = from_list([{"text": ""}] * max(1, len(examples)), "made")
    counts = TokenCounts("made", len(examples), len(examples), len(arrays.ids), 0, 0, 0, 0, 0, "")
    return TokenSet([SourceTokens(arrays, counts, rows, empties=empties)])


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
    assert [c.checked for c in contract.checks] == [
        80,
        80,
        80,
        80,
        80,
        0,
        80,
        int(tokens.lengths.sum()),
        80,
    ]
    assert holds(contract.checks[RULES.index("prompt")].note, 80)
    assert holds(contract.checks[RULES.index("BOS")].note, "BOS")


def test_train_on_all_holds(make, simple: Simple) -> None:
    """The line break that the template writes after the end token is supervised too."""
    assert_holds(simple, make(alpaca(9), seq_len=256, train_on="all"))


def test_an_empty_split(make, simple: Simple) -> None:
    error = assert_broken(simple, make(alpaca(4), seq_len=8), "not empty")
    assert error.why.count("4") == 2, "all that were read"
    assert "data.seq_len" in error.fix


def test_a_row_without_a_supervised_token(simple: Simple) -> None:
    end = simple.tokenizer.eos_token_id
    two = given(simple, ([70, 71, end], [0, 1, 1]), ([72, 73, end], [0, 0, 0]))
    error = assert_broken(simple, two, "supervised", "for 1 of 2 rows:")
    assert error.where == "train: made row 2"


def test_an_answer_of_which_the_end_token_alone_is_supervised(simple: Simple) -> None:
    end = simple.tokenizer.eos_token_id
    whole = ([70, 71, end], [0, 1, 1])
    lost = ([70, 71, end], [0, 0, 1])
    error = assert_broken(
        simple, given(simple, whole, lost), "besides its end", "for 1 of 2 answers:"
    )
    assert holds(error.where, 2)
    # Each answer of a row counts.
    twice = ([70, 71, end, 72, 73, end], [0, 1, 1, 0, 0, 1])
    assert_broken(simple, given(simple, twice), "besides its end", "for 1 of 2 answers:")
    # That of the row before does not lend its end.
    assert_broken(simple, given(simple, whole, ([end, end], [0, 1])), "besides its end")
    # What the template writes behind the end may be supervised too.
    assert_broken(simple, given(simple, ([70, end, 71], [0, 1, 1])), "besides its end")


def test_an_empty_answer_has_its_end_alone(make, simple: Simple) -> None:
    end = simple.tokenizer.eos_token_id
    empty = given(simple, ([70, end], [0, 1]), ([70, 71, end], [0, 1, 1]), empties=(0,))
    assert_holds(simple, empty)
    tokens = make(alpaca(9, letters=lambda i: i % 3), seq_len=256)
    assert tokens.parts[0].empties == (0, 3, 6)
    assert tokens.first(4).parts[0].empties == (0, 3)
    assert_holds(simple, tokens)


def test_a_missing_end_token(simple: Simple) -> None:
    end = simple.tokenizer.eos_token_id
    two = ([70, 71, end, 72, 73, 74], [0, 1, 1, 0, 1, 0])
    rows = given(simple, ([70, 71, end], [0, 1, 1]), two)
    error = assert_broken(simple, rows, "end token", "for 1 of 3 answers:")
    assert error.where == "train: made row 2"
    word = simple.tokenizer.decode([73])
    assert f"⟦{word}⟧" in error.why
    assert "<|im_end|>" in error.why
    assert_broken(simple, given(simple, ([70, 71, 72], [0, 1, 1])), "end token")
    # A stretch of one example does not borrow the end token that begins the next.
    assert_broken(
        simple, given(simple, ([70, 71], [0, 1]), ([end, 71, end], [0, 1, 1])), "end token"
    )


def test_an_end_of_earlier_answers_stands_behind_them(simple: Simple) -> None:
    """It is not supervised, belongs to the same row, and ends no last answer."""
    simple.earlier_end_ids = frozenset({75})
    end = simple.tokenizer.eos_token_id
    assert_holds(simple, given(simple, ([70, 71, 75, 72, end], [0, 1, 0, 1, 1])))
    assert_broken(simple, given(simple, ([70, 71, 75, 72, 73], [0, 1, 0, 1, 1])), "end token")
    assert_broken(
        simple, given(simple, ([70, 71], [0, 1]), ([75, 71, end], [0, 1, 1])), "end token"
    )


def test_a_cut_answer_need_not_end(simple: Simple) -> None:
    """It is counted by a rule of its own; an earlier answer of the same row must end."""
    one = given(simple, ([70, 71, 72], [0, 1, 1]), cut=True)
    error = assert_broken(simple, one, "cut off", "for 1 of 1 row:")
    assert "data.seq_len" in error.what
    end = simple.tokenizer.eos_token_id
    two = given(simple, ([70, 71, 72, 73, end], [0, 1, 0, 0, 0]), cut=True)
    assert_broken(simple, two, "end token")


def test_few_cut_answers_are_warned_of_and_many_refused(make, simple: Simple) -> None:
    """One row in ten is the most; what ends is what the rule of end tokens counts."""
    rows = alpaca(20, letters=lambda i: 200 if i < 2 else 5)
    longest = make(rows, seq_len=999).counts.longest
    contract = check(simple, make(rows, seq_len=100))
    assert not contract.broken
    assert contract.checks[END_RULE].checked == 18
    (warning,) = contract.warnings
    assert warning.startswith("2 of 20 rows (10.0%) ")
    assert holds(warning, "data.seq_len")
    assert f"fix: set data.seq_len={longest} (" in warning

    tokens = make(alpaca(20, letters=lambda i: 200 if i < 3 else 5), seq_len=100)
    error = assert_broken(simple, tokens, "cut off")
    assert error.exit_code == 2
    assert "for 3 of 20 rows:" in error.what
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
    assert [c.fix for c in judge(position_limit=100).broken] == ["set data.allow_cut_answers=true"]
    accepted, warned = judge(cut_answers="accept"), judge(cut_answers="warn")
    assert (accepted.broken, accepted.warnings, warned.broken) == ((), (), ())
    assert "9 of 9 rows (100.0%)" in accepted.checks[-1].note
    assert "9 of 9 rows (100.0%)" in warned.warnings[0]


def test_text_and_whole_rows_have_no_answers_to_cut(make, simple: Simple) -> None:
    contract = assert_holds(
        simple, make(alpaca(9, letters=lambda i: 200), seq_len=100, train_on="all")
    )
    answers = assert_holds(simple, make(alpaca(9), seq_len=100))
    assert len(contract.checks) == len(answers.checks) - 1, "a rule that has nothing to check"
    assert contract.warnings == ()
    part = make(alpaca(9, letters=lambda i: 200), seq_len=100).parts[0]
    assert not check(simple, TokenSet([replace(part, has_answers=False)])).broken


def test_a_doubled_bos(simple: Simple) -> None:
    end = simple.tokenizer.eos_token_id
    simple.tokenizer.bos_token = "<|im_start|>"
    bos = simple.tokenizer.bos_token_id
    assert_holds(simple, given(simple, ([bos, 70, end], [0, 1, 1])))
    two = given(simple, ([bos, 70, end], [0, 1, 1]), ([bos, bos, 70, end], [0, 0, 1, 1]))
    error = assert_broken(simple, two, "BOS", "for 1 of 2 rows:")
    assert error.where == "train: made row 2"


def test_a_mask_on_the_first_token(simple: Simple) -> None:
    end = simple.tokenizer.eos_token_id
    assert_broken(simple, given(simple, ([70, end], [1, 1])), "prompt")


def test_a_mask_that_reaches_into_the_prompt(
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


def test_a_label_outside_the_vocabulary(make, simple: Simple) -> None:
    tokens = make(alpaca(4), seq_len=256)
    end = simple.tokenizer.eos_token_id
    error = assert_broken(simple, tokens, "vocabulary", vocab=end)
    assert f"{end:,} entries" in error.why
    assert "model.added_tokens" in error.fix


def test_chunks_see_every_row(simple: Simple, make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.tokens.contract._CHUNK", 50)
    end = simple.tokenizer.eos_token_id
    good, bad = ([70, 71, end], [0, 1, 1]), ([70, 71, 72], [0, 1, 1])
    rows = given(simple, *[good] * 40, bad, *[good] * 40, bad)
    error = assert_broken(simple, rows, "end token", "for 2 of 82 answers:")
    assert error.where == "train: made row 41"
    assert_holds(simple, make(alpaca(50), alpaca(30), seq_len=256))


@pytest.mark.slow
def test_a_million_rows_take_seconds(simple: Simple) -> None:
    n, length = 1_000_000, 60
    ids = np.full(n * length, 70, np.int32)
    ids[length - 1 :: length] = simple.tokenizer.eos_token_id
    trained = np.zeros(n * length, bool)
    trained.reshape(n, length)[:, 20:] = True
    store = TokenWriter(None)
    arrays: Any = store.arrays().__class__(
        ids,
        trained,
        np.arange(0, n * length + 1, length),
        np.arange(n),
        np.zeros(n, bool),
        np.zeros(n, bool),
        np.zeros(n, np.int32),
        np.full(n, NO_LABEL, np.int8),
        np.zeros(0, np.int64),
        np.zeros(0, np.int64),
    )
    counts = TokenCounts("made", n, n, n * length, 0, 0, 0, 0, 0, "")
    tokens = TokenSet([SourceTokens(arrays, counts, from_list([{}]))])
    began = time.perf_counter()
    contract = assert_holds(simple, tokens)
    assert contract.checks[3].checked == n
    assert time.perf_counter() - began < 20  # 2 s when written
    assert len(contract.checks) == CHECKS
