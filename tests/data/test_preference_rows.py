"""Rows of pairs and of labeled answers: what they become, and what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import byte_tokenizer
from errors import refuses
from tunesmith.config.schema import Data, Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Completion, Conversation
from tunesmith.data.source.open_source import read_rows
from tunesmith.data.text.select_template import select_template
from tunesmith.data.tokens.contract import Contract, check_tokens
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError

U = {"role": "user", "content": "1 + 2?"}
GOOD = {"role": "assistant", "content": "3"}
BAD = {"role": "assistant", "content": "It is three."}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
PROMPT = "Add 1 and 2."


def pair(**row: Any) -> Any:
    return convert_row(row, Source(source="x", format="preference"), where="x row 1")


def feedback(**row: Any) -> Any:
    return convert_row(row, Source(source="x", format="feedback"), where="x row 1")


def messages(sample: Any) -> list[tuple[str, str]]:
    assert isinstance(sample, Conversation)
    return [(message["role"], message["content"]) for message in sample.messages]


CHAT = [("user", "1 + 2?"), ("assistant", "3")]
OTHER_CHAT = [("user", "1 + 2?"), ("assistant", "It is three.")]
CHATS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": [U], "chosen": [GOOD], "rejected": [BAD]},
    "one message": {"prompt": U, "chosen": GOOD, "rejected": BAD},
    "a prompt of messages, answers as text": {
        "prompt": [U],
        "chosen": "3",
        "rejected": "It is three.",
    },
    "a prompt as text, answers as messages": {
        "prompt": "1 + 2?",
        "chosen": [GOOD],
        "rejected": [BAD],
    },
    "a shared beginning": {"chosen": [U, GOOD], "rejected": [U, BAD]},
    "a shared beginning, and the prompt again": {
        "prompt": "1 + 2?",
        "chosen": [U, GOOD],
        "rejected": [U, BAD],
    },
    "LLaMA-Factory's": {
        "conversations": [{"from": "human", "value": "1 + 2?"}],
        "chosen": {"from": "gpt", "value": "3"},
        "rejected": {"from": "gpt", "value": "It is three."},
    },
    "tools-as-text": {
        "prompt": [U],
        "chosen": [GOOD],
        "rejected": [BAD],
        "tools": json.dumps([TOOL]),
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_pairs_of_chats_become_two_conversations_with_one_prompt(name: str) -> None:
    sample = pair(**CHATS[name])
    chosen, rejected = sample.samples
    assert messages(chosen) == CHAT
    assert messages(rejected) == OTHER_CHAT
    for answer in (chosen, rejected):
        assert isinstance(answer, Conversation)
        assert answer.prompt_messages == 1
        assert bool(answer.tools) == (name == "tools-as-text")


def test_pairs_of_texts_stay_texts() -> None:
    sample = pair(prompt=PROMPT, chosen="3", rejected="three", system="Be brief.")
    assert sample.samples == (
        Completion(PROMPT, "3", "Be brief."),
        Completion(PROMPT, "three", "Be brief."),
    )
    shared = pair(chosen="Q: 1 + 2? A: 3", rejected="Q: 1 + 2? A: three")
    assert shared.samples == (
        Completion("Q: 1 + 2? A: ", "3"),
        Completion("Q: 1 + 2? A: ", "three"),
    )


def test_a_system_column_joins_the_prompt() -> None:
    sample = pair(prompt=[U], chosen=[GOOD], rejected=[BAD], system="Be brief.")
    assert messages(sample.samples[0])[0] == ("system", "Be brief.")
    assert sample.samples[0].prompt_messages == 2


def test_earlier_answers_belong_to_the_prompt() -> None:
    later = {"role": "user", "content": "and 3?"}
    sample = pair(chosen=[U, GOOD, later, GOOD], rejected=[U, GOOD, later, BAD])
    assert sample.samples[0].prompt_messages == 3
    assert sample.samples[0].supervised() == [GOOD]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 2?", "completion": "3"},
        {"prompt": [U], "completion": [GOOD]},
        {"prompt": [U], "completion": "3"},
        {"messages": [U, GOOD]},
        {"messages": [{"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "3"}]},
    ],
)
@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_feedback_is_an_answer_and_whether_it_is_good(row: dict[str, Any], label: Any) -> None:
    sample = feedback(**row, label=label)
    assert sample.is_good == bool(label)
    if isinstance(sample.samples[0], Completion):
        assert sample.samples[0] == Completion("1 + 2?", "3")
    else:
        assert messages(sample.samples[0]) == CHAT
        assert sample.samples[0].prompt_messages == 1


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {  # format, row, a word that tells it
    "no rejected": ("preference", {"prompt": PROMPT, "chosen": "3"}, "rejected"),
    "no chosen": ("preference", {"prompt": PROMPT, "rejected": "3"}, "chosen"),
    "chosen is null": ("preference", {"prompt": PROMPT, "chosen": None, "rejected": "3"}, "chosen"),
    "an empty chosen": ("preference", {"prompt": PROMPT, "chosen": " ", "rejected": "3"}, "chosen"),
    "an empty rejected": (
        "preference",
        {"prompt": PROMPT, "chosen": "3", "rejected": ""},
        "rejected",
    ),
    "an empty answer in a chat": (
        "preference",
        {"prompt": [U], "chosen": [GOOD], "rejected": [{**BAD, "content": ""}]},
        "rejected",
    ),
    "a number": (
        "preference",
        {"prompt": PROMPT, "chosen": 3, "rejected": "three"},
        "chosen is a number",
    ),
    "two numbers": ("preference", {"prompt": PROMPT, "chosen": 3, "rejected": 4}, "chosen"),
    "no prompt": ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "prompt"),
    "texts that share nothing": ("preference", {"chosen": "3", "rejected": "three"}, "prompt"),
    "chats that share nothing": (
        "preference",
        {"chosen": [U, GOOD], "rejected": [{**U, "content": "2 + 2?"}, BAD]},
        "prompt",
    ),
    "another prompt than that of the chats": (
        "preference",
        {"prompt": "2 + 2?", "chosen": [U, GOOD], "rejected": [U, BAD]},
        "prompt",
    ),
    "a prompt that is answered": (
        "preference",
        {"prompt": [U, GOOD], "chosen": [GOOD], "rejected": [BAD]},
        "prompt ends with an answer",
    ),
    "a chat that is answered, as the prompt": (
        "preference",
        {"conversations": [U, GOOD], "chosen": GOOD, "rejected": BAD},
        "prompt ends with an answer",
    ),
    "a prompt of feedback that is answered": (
        "feedback",
        {"prompt": [U, GOOD], "completion": "3", "label": True},
        "prompt ends with an answer",
    ),
    "a prompt with its completion in it": (
        "prompt-completion",
        {"prompt": [U, GOOD], "completion": [GOOD]},
        "prompt ends with an answer",
    ),
    "a completion with its prompt": (
        "prompt-completion",
        {"prompt": [U], "completion": [U, GOOD]},
        "completion begins with a message of the user",
    ),
    "a completion of feedback with its prompt": (
        "feedback",
        {"prompt": "1 + 2?", "completion": [U, GOOD], "label": True},
        "completion begins with a message of the user",
    ),
    "a rejected answer with its prompt": (
        "preference",
        {"prompt": [U], "chosen": [GOOD], "rejected": [U, BAD]},
        "rejected begins with a message of the user",
    ),
    "an answer of the user's": (
        "preference",
        {"prompt": [U], "chosen": [GOOD, U], "rejected": [BAD, U]},
        "chosen",
    ),
    "an empty chat": ("preference", {"prompt": [U], "chosen": [], "rejected": [BAD]}, "chosen"),
    "an unknown role": (
        "preference",
        {"prompt": [{"role": "narrator", "content": "x"}], "chosen": [GOOD], "rejected": [BAD]},
        "narrator",
    ),
    "a label of text": (
        "feedback",
        {"prompt": PROMPT, "completion": "3", "label": "positive"},
        '"positive"',
    ),
    "a label of 2": ("feedback", {"prompt": PROMPT, "completion": "3", "label": 2}, "2"),
    "a label of 0.5": ("feedback", {"prompt": PROMPT, "completion": "3", "label": 0.5}, "0.5"),
    "a label that is null": (
        "feedback",
        {"prompt": PROMPT, "completion": "3", "label": None},
        "label",
    ),
    "no label": ("feedback", {"prompt": PROMPT, "completion": "3"}, "label"),
    "no completion": ("feedback", {"prompt": PROMPT, "label": True}, "completion"),
    "no prompt of feedback": ("feedback", {"completion": "3", "label": True}, "prompt"),
    "an empty completion": (
        "feedback",
        {"prompt": PROMPT, "completion": "\n", "label": True},
        "completion",
    ),
    "messages that end with a question": ("feedback", {"messages": [GOOD, U], "label": True}, ""),
    "tools that are no list": (
        "preference",
        {"prompt": [U], "chosen": [GOOD], "rejected": [BAD], "tools": "{}"},
        "tools",
    ),
    "half a character": (
        "preference",
        {"prompt": PROMPT, "chosen": "\ud800", "rejected": "3"},
        "chosen",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rows_are_named_with_their_place(name: str) -> None:
    format_name, row, word = BROKEN[name]
    with pytest.raises(DataError) as caught:
        convert_row(row, Source(source="x", format=format_name), where="x row 7")  # type: ignore[arg-type]
    assert caught.value.where.startswith("x row 7")
    assert word in caught.value.what
    assert caught.value.fix


def test_a_column_that_the_format_reads_is_not_proposed_for_another() -> None:
    with pytest.raises(DataError) as caught:
        pair(prompt=PROMPT, chosen="3", worse="three")
    assert "columns: {chosen: chosen, rejected: worse}" in caught.value.fix
    with pytest.raises(DataError) as caught:
        pair(prompt=PROMPT, chosen="3")
    assert "prompt" not in caught.value.fix


def tokens_of(path: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[TokenSet, Contract]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(source=str(path), format=options.pop("format", "preference"))
    data = Data(train=(source,), **options)
    tokenizer = byte_tokenizer()
    template = select_template(data, tokenizer, {tokenizer.eos_token_id})
    tokens = tokenize([(source, read_rows(source))], data, template, cache=None, what="train")
    return tokens, check_tokens(tokens, template, vocab_size=300, split="train")


def test_a_pair_is_one_example_of_two_sequences(tmp_path: Path) -> None:
    tokens, contract = tokens_of(tmp_path / "rows.jsonl", [CHATS["messages"]] * 2)
    assert not contract.broken
    example = tokens[0]
    chosen, rejected = example.sequences
    assert chosen + rejected == len(example.ids) == tokens.lengths[0]
    assert tokens.longest_sequences[0] == max(chosen, rejected)
    prompt = int(example.trained.argmax())
    assert example.ids[:prompt].tolist() == example.ids[chosen : chosen + prompt].tolist()
    assert not example.trained[chosen : chosen + prompt].any()
    assert example.chosen_tokens == int(example.trained[:chosen].sum())


def test_supervised_tokens_are_counted_without_the_examples(tmp_path: Path) -> None:
    pairs, _ = tokens_of(tmp_path / "pairs.jsonl", [CHATS["messages"]] * 2)
    texts, _ = tokens_of(tmp_path / "texts.jsonl", [{"text": t} for t in "ab"], format="text")
    [part] = pairs.parts
    # The first token of each sequence is marked too, and has none before it.
    marked = part.arrays._replace(trained=np.ones_like(part.arrays.trained))
    parts = [part, *texts.parts, *pairs.first(0).parts, replace(part, arrays=marked)]
    tokens = TokenSet(parts)
    assert tokens.supervised.tolist() == [example.supervised for example in tokens]


def test_both_answers_are_cut_at_seq_len(tmp_path: Path) -> None:
    rows = [{"prompt": [U], "chosen": "3", "rejected": "3 " * 200}]
    tokens, _ = tokens_of(tmp_path / "rows.jsonl", rows, seq_len=100, allow_cut_answers=True)
    chosen, rejected = tokens[0].sequences
    assert chosen < 100 == rejected
    assert tokens.counts.cut == 1


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_pair_is_left_out_as_a_whole(tmp_path: Path, too_long: str) -> None:
    """Of the second row only the rejected answer has no room, or none for a supervised token."""
    long = {**U, "content": "1 + 2? " * 40}
    rows = [CHATS["messages"], {"prompt": [long], "chosen": [GOOD], "rejected": [BAD]}]
    tokens, _ = tokens_of(tmp_path / "rows.jsonl", rows, seq_len=100, too_long=too_long)
    assert len(tokens) == 1
    counts = tokens.counts
    assert (counts.dropped, counts.emptied) == ((1, 0) if too_long == "drop" else (0, 1))


def test_pairs_of_equal_answers_are_bad_rows(tmp_path: Path) -> None:
    equal = {"prompt": [U], "chosen": [GOOD], "rejected": [GOOD]}
    path = tmp_path / "rows.jsonl"
    with refuses(DataError, where="rows.jsonl:2", fix=["data.bad_rows=skip"]):
        tokens_of(path, [CHATS["messages"], equal])
    tokens, contract = tokens_of(path, [CHATS["messages"], equal], bad_rows="skip")
    assert (len(tokens), tokens.counts.bad) == (1, 1)
    assert not contract.broken


def test_labels_are_kept_and_are_part_of_the_digest(tmp_path: Path) -> None:
    row = {"prompt": [U], "completion": [GOOD]}
    digests = set()
    for label in (True, False):
        rows = [{**row, "label": label}] * 2
        tokens, contract = tokens_of(tmp_path / "rows.jsonl", rows, format="feedback")
        assert not contract.broken
        assert tokens[1].label is label
        digests.add(tokens.counts.digest)
    assert len(digests) == 2


def test_thinking_that_a_template_strips_from_history_stays_in_both_answers(
    tmp_path: Path,
) -> None:
    answers = {}
    for name, message in (("chosen", GOOD), ("rejected", BAD)):
        answers[name] = [{**message, "content": f"<think>hm</think>{message['content']}"}]
    tokens, _ = tokens_of(tmp_path / "rows.jsonl", [{"prompt": [U], **answers}])
    text = byte_tokenizer().decode(tokens[0].ids[tokens[0].trained])
    assert text.count("<think>hm</think>") == 2
