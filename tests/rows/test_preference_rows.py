"""Rows of pairs and of labeled answers: what they become, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_table import answer, user
from conftest import byte_tokenizer
from errors import refuses
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.samples import Completion, Conversation
from tunesmith.rows.source.open_source import read_rows
from tunesmith.tokens.contract import Contract, check_tokens
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize

Row = dict[str, Any]
U, GOOD, BAD = user("1 + 2?"), answer("3"), answer("It is three.")
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
PROMPT = "Add 1 and 2."
TEXTS = {"prompt": PROMPT, "chosen": "3", "rejected": "three"}
CHAT = {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]}
LABELED = {"prompt": PROMPT, "completion": "3", "label": True}
HUMAN = {"from": "human", "value": "1 + 2?"}


def without(row: Row, column: str) -> Row:
    return {name: value for name, value in row.items() if name != column}


def convert(row: Row, form: Any = "preference") -> Any:
    return convert_row(row, Source(source="x", format=form), where="x row 7")


def messages(sample: Any) -> list[tuple[str, str]]:
    assert isinstance(sample, Conversation)
    return [(message["role"], message["content"]) for message in sample.messages]


CHATS: dict[str, Row] = {
    "messages": CHAT,
    "answers as text": {**CHAT, "chosen": "3", "rejected": "It is three."},
    "a shared beginning": {"chosen": [U, GOOD], "rejected": [U, BAD]},
    "the prompt again": {"prompt": "1 + 2?", "chosen": [U, GOOD], "rejected": [U, BAD]},
    "LLaMA-Factory's": {
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": "3"},
        "rejected": {"from": "gpt", "value": "It is three."},
    },
    "tools as text": {**CHAT, "tools": json.dumps([TOOL])},
}


@pytest.mark.parametrize("name", CHATS)
def test_pairs_of_chats_become_two_conversations_with_one_prompt(name: str) -> None:
    chosen, rejected = convert(CHATS[name]).samples
    assert messages(chosen) == [("user", "1 + 2?"), ("assistant", "3")]
    assert messages(rejected) == [("user", "1 + 2?"), ("assistant", "It is three.")]
    for sample in (chosen, rejected):
        assert sample.prompt_messages == 1
        assert bool(sample.tools) == ("tools" in CHATS[name])


def test_pairs_of_texts_stay_texts() -> None:
    system = {"system": "Be brief."}
    for row, prompt, more in (
        ({**TEXTS, **system}, PROMPT, ["Be brief."]),
        ({"chosen": "Q: 1 + 2? A: 3", "rejected": "Q: 1 + 2? A: three"}, "Q: 1 + 2? A: ", []),
    ):
        expected = (Completion(prompt, "3", *more), Completion(prompt, "three", *more))
        assert convert(row).samples == expected
    # Earlier answers belong to the prompt.
    before = [U, GOOD, user("and 3?")]
    sample = convert({"chosen": [*before, GOOD], "rejected": [*before, BAD]}).samples[0]
    assert (sample.prompt_messages, sample.supervised()) == (3, [GOOD])


def test_feedback_is_an_answer_and_whether_it_is_good() -> None:
    for row in (
        {"prompt": [U], "completion": [GOOD]},
        {"prompt": [U], "completion": "3"},
        {"messages": [U, GOOD]},
        {"messages": [HUMAN, {"from": "gpt", "value": "3"}]},
    ):
        for label in (True, False, 1, 0):
            sample = convert({**row, "label": label}, "feedback")
            assert sample.is_good == bool(label)
            assert messages(sample.samples[0]) == [("user", "1 + 2?"), ("assistant", "3")]
            assert sample.samples[0].prompt_messages == 1
    assert convert(LABELED, "feedback").samples[0] == Completion(PROMPT, "3")


ANSWERED = "prompt ends with an answer"
BEGINS = "begins with a message of the user"
# A row, and a word that tells what is wrong with it.
BROKEN: list[tuple[str, Row, str]] = [
    ("preference", without(TEXTS, "rejected"), "rejected"),
    ("preference", {**TEXTS, "chosen": " "}, "chosen"),
    ("preference", {**TEXTS, "chosen": 3}, "chosen is a number"),
    ("preference", without(CHAT, "prompt"), "prompt"),
    ("preference", {"chosen": [U, GOOD], "rejected": [user("?"), BAD]}, "prompt"),
    ("preference", {"prompt": "?", "chosen": [U, GOOD], "rejected": [U, BAD]}, "prompt"),
    ("preference", {**CHAT, "prompt": [U, GOOD]}, ANSWERED),
    ("preference", {**CHAT, "rejected": [U, BAD]}, f"rejected {BEGINS}"),
    ("preference", {**CHAT, "chosen": [GOOD, U], "rejected": [BAD, U]}, "chosen"),
    ("feedback", {**LABELED, "completion": [U, GOOD]}, f"completion {BEGINS}"),
    ("feedback", {**LABELED, "label": "positive"}, '"positive"'),
    ("feedback", without(LABELED, "label"), "label"),
    ("feedback", without(LABELED, "prompt"), "prompt"),
    ("feedback", {**LABELED, "completion": "\n"}, "completion"),
    ("feedback", {"messages": [GOOD, U], "label": True}, ""),
]


@pytest.mark.parametrize(("form", "row", "word"), BROKEN)
def test_a_broken_row_is_named_with_its_place(form: str, row: Row, word: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(row, form)
    assert caught.value.where.startswith("x row 7")
    assert word in caught.value.what
    assert caught.value.fix


# --- tokens


def tokens_of(path: Path, rows: list[Row], **options: Any) -> tuple[TokenSet, Contract]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(source=str(path), format=options.pop("format", "preference"))
    data = Data(train=(source,), **options)
    tokenizer = byte_tokenizer()
    template = select_template(data, tokenizer, {tokenizer.eos_token_id})
    tokens = tokenize([(source, read_rows(source))], data, template, cache=None, what="train")
    return tokens, check_tokens(tokens, template, vocab_size=300, split="train")


def test_a_pair_is_one_example_of_two_sequences(tmp_path: Path) -> None:
    tokens, contract = tokens_of(tmp_path / "rows.jsonl", [CHAT] * 2)
    assert not contract.broken
    example = tokens[0]
    chosen, rejected = example.sequences
    assert chosen + rejected == len(example.ids) == tokens.lengths[0]
    assert tokens.longest_sequences[0] == max(chosen, rejected)
    prompt = int(example.trained.argmax())
    assert example.ids[:prompt].tolist() == example.ids[chosen : chosen + prompt].tolist()
    assert not example.trained[chosen : chosen + prompt].any()
    assert example.chosen_tokens == int(example.trained[:chosen].sum())


def test_a_long_pair_is_cut_or_left_out_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": [U], "chosen": "3", "rejected": "3 " * 200}]
    tokens, _ = tokens_of(path, rows, seq_len=100, allow_cut_answers=True)
    chosen, rejected = tokens[0].sequences
    assert chosen < 100 == rejected
    assert tokens.counts.cut == 1
    # Of the second row only the rejected answer has no room, or none for a supervised token.
    rows = [CHAT, {**CHAT, "prompt": [user("1 + 2? " * 40)]}]
    for too_long, dropped, emptied in (("drop", 1, 0), ("truncate", 0, 1)):
        tokens, _ = tokens_of(path, rows, seq_len=100, too_long=too_long)
        counts = tokens.counts
        assert (len(tokens), counts.dropped, counts.emptied) == (1, dropped, emptied)


def test_pairs_of_equal_answers_are_bad_rows(tmp_path: Path) -> None:
    rows = [CHAT, {**CHAT, "rejected": [GOOD]}]
    with refuses(DataError, where="rows.jsonl:2", fix=["data.bad_rows=skip"]):
        tokens_of(tmp_path / "rows.jsonl", rows)
    tokens, contract = tokens_of(tmp_path / "rows.jsonl", rows, bad_rows="skip")
    assert (len(tokens), tokens.counts.bad) == (1, 1)
    assert not contract.broken


def test_labels_are_kept_and_are_part_of_the_digest(tmp_path: Path) -> None:
    digests = set()
    for label in (True, False):
        rows = [{"prompt": [U], "completion": [GOOD], "label": label}] * 2
        tokens, contract = tokens_of(tmp_path / "rows.jsonl", rows, format="feedback")
        assert not contract.broken
        assert tokens[1].label is label
        digests.add(tokens.counts.digest)
    assert len(digests) == 2
