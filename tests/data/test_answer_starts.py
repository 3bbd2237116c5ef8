"""Spans on tokens: a prompt has the tokens that generation gives it, and the rest is supervised."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from chat_table import answer, user
from chat_tokenizers import train, wordpiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from errors import holds, refuses
from recipes import make_run
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.rows.samples import Completion, Conversation
from tunesmith.data.text.align import Aligner, CharSpan
from tunesmith.data.text.row_warnings import ROW_WARNINGS
from tunesmith.data.text.template import Template
from tunesmith.errors import ModelError
from tunesmith.presentation.data import data_warnings

START, END = "<|im_start|>", "<|im_end|>"
KINDS = ("bytes", "trimmed", "pieces", "prefixed", "llama2")
TEXTS = [
    f"{START}assistant\n  user The answer: So{END}\n",
    f'e\u0301 What is it? {{"name": "weather"}}    return 1 : "so" it is.{END}',
    f"🎉 yes 👍 The answer: 好 e\u0301\n\n\n  What ה so {END}{END} I see.",
    " ",
    "",
]


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@cache
def raw(tokenizer: Any) -> Template:
    return Template(tokenizer, {tokenizer.eos_token_id}, jinja=None, name="raw")


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- spans


@pytest.mark.parametrize(
    "kind", [*KINDS[:1], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_every_cut_of_a_text(kind: str) -> None:
    """The prompt has the tokens that it has alone, all others are supervised, and are the rest."""
    tokenizer = train(kind, (START, END), False)
    aligner = Aligner(tokenizer)
    texts, spans, found = [], [], []
    for marked in TEXTS:
        # Llama 2's has a blank more behind each of them.
        text = marked.replace(START, "").replace(END, "") if kind == "llama2" else marked
        for cut in range(len(text) + 1):
            texts.append(text)
            spans.append([CharSpan(cut, len(text))])
            found += aligner.encode([text], spans[-1:], set())
            prompt, ids = plain_ids(tokenizer, text[:cut]), found[-1].ids
            assert ids[: len(prompt)].tolist() == prompt
            assert found[-1].trained.tolist() == [i >= len(prompt) for i in range(len(ids))]
            assert found[-1].merged_tokens == 0
            shown = decoded(tokenizer, ids)
            if kind == "trimmed":
                assert normalize("NFC", shown) == normalize("NFC", text)
            elif text != " ":  # a blank alone is the one that the tokenizer puts before a text
                assert shown == text
    for alone, one in zip(found, aligner.encode(texts, spans, set()), strict=True):
        assert one.ids.tolist() == alone.ids.tolist()
        assert one.trained.tolist() == alone.trained.tolist()
        assert one.cuts == alone.cuts


@pytest.mark.parametrize("kind", ["bytes", "pieces", "prefixed", "llama2"])
def test_a_text_is_cut_only_where_a_token_would_lie_across(kind: str) -> None:
    tokenizer = train(kind, (END,), False)
    text = f"So it is. The answer: So it is.{END}"
    aligner, cut_places = Aligner(tokenizer), []
    for cut in range(1, len(text)):
        (found,) = aligner.encode([text], [[CharSpan(cut, len(text))]], set())
        if found.cuts:
            assert found.cuts == (cut,)
            cut_places.append(cut)
        else:
            assert found.ids.tolist() == plain_ids(tokenizer, text)
    assert 0 < len(cut_places) < len(text) - 1


def test_both_edges_of_several_spans_are_cut() -> None:
    """A span without an end token of its own ends where its last character does."""
    tokenizer = train("bytes", (END,), False)
    text = "user\n\nThe answer: \n\n" * 2
    spans = [CharSpan(5, 19), CharSpan(25, 39)]
    (found,) = Aligner(tokenizer).encode([text], [spans], set())
    assert set(found.cuts) <= {5, 19, 25, 39}
    assert len(found.cuts) >= 3
    assert decoded(tokenizer, found.ids) == text
    shown = decoded(tokenizer, found.ids[found.trained])
    assert shown == "".join(text[span.start : span.end] for span in spans)


def test_a_tokenizer_that_cannot_write_the_rest_supervises_the_merged_token() -> None:
    """WordPiece writes the rest of a word in another way behind the word's beginning."""
    tokenizer = wordpiece("so", "no", "soon", "##on")
    (found,) = Aligner(tokenizer).encode(["no soon no"], [[CharSpan(5, 10)]], set())
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["no", "soon", "no"]
    assert found.trained.tolist() == [False, True, True]
    assert (found.merged_tokens, found.cuts) == (1, ())
    # Between two words nothing merges.
    (found,) = Aligner(tokenizer).encode(["no soon no"], [[CharSpan(2, 10)]], set())
    assert (found.trained.tolist(), found.merged_tokens) == ([False, True, True], 0)


def test_the_end_token_must_stand_at_the_end() -> None:
    tokenizer = train("bytes", (END,), False)
    end = tokenizer.convert_tokens_to_ids(END)
    text = f"So it is.{END}\n"
    span = CharSpan(3, len(text) - 1, text.index(END))
    longer = span._replace(stop=len(text))
    for one, ends, is_ended in ((span, {end}, True), (span, {2}, False), (longer, {end}, False)):
        assert Aligner(tokenizer).encode([text], [[one]], ends)[0].ended == is_ended


def test_a_tokenizer_that_cannot_tell_is_refused() -> None:
    class Slow:
        is_fast = False

    with refuses(ModelError, where="model.tokenizer", names=["Slow", "tokenizer.json"]):
        Aligner(Slow())


# --- prompts and completions


def check_completion(tokenizer: Any, prompt: str, completion: str) -> None:
    template = raw(tokenizer)
    sample = Completion(prompt, completion)
    found, everything = (template.encode(sample, on, where="r") for on in ("response", "all"))
    assert everything.ids.tolist() == found.ids.tolist()
    assert everything.trained.tolist() == [False] + [True] * (len(found.ids) - 1)
    assert everything.flaws == found.flaws
    prompt_ids = template.prompt(sample)
    assert found.ids[: len(prompt_ids)].tolist() == prompt_ids
    assert not found.trained[: len(prompt_ids)].any()
    assert found.trained[max(1, len(prompt_ids)) :].all()
    assert "merged" not in found.flaws
    # Behind its own prompt; a tokenizer may drop the blank at the beginning of a text.
    whole = decoded(tokenizer, found.ids)
    end = tokenizer.eos_token
    expected = decoded(tokenizer, prompt_ids) + completion.removesuffix(end) + end
    if not prompt:
        whole, expected = (text.removeprefix("<s>").lstrip(" ") for text in (whole, expected))
    assert normalize("NFC", whole) == normalize("NFC", expected)


WORDS = ("a", "So", " ", "  ", "\n", "\t", ":", "é", "\u0301", "🎉", "ה", "好", "The", "user")
WORD = st.sampled_from((*WORDS, "0", "12", "'s")) | st.text(max_size=3)
TEXT = st.lists(WORD, max_size=6).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(prompt=TEXT, completion=TEXT.filter(bool))
@example(prompt="The answer: ", completion="So")
@example(prompt="e", completion="\u0301")
@example(prompt="", completion=" So")
@example(prompt="So ", completion=" So")
@example(prompt="a ", completion=" ")
def test_any_prompt_and_any_completion(kind: str, prompt: str, completion: str) -> None:
    check_completion(train(kind, (END,), kind in ("prefixed", "llama2")), prompt, completion)


@pytest.mark.slow
def test_where_nothing_merges_trl_labels_the_same_tokens(smollm2_tokenizer: Any) -> None:
    """Where a token lies across the edge TRL takes it in, with the end of the prompt."""
    from trl.data_utils import common_prefix_length

    tokenizer = smollm2_tokenizer
    template = raw(tokenizer)
    merged = 0
    for prompt, completion, tokens in (
        ("Sentiment:", " good", ["Ġgood", END]),
        ("Review 0: fine. Sentiment: ", "good", ["good", END]),
        ("A: ", "The answer is 4", ["The", "Ġanswer", "Ġis", "Ġ", "4", END]),
        ("### Response:\n", "\n- one", ["Ċ", "-", "Ġone", END]),
        ("### Response:\n\n", "One", ["One", END]),
    ):
        sample = Completion(prompt, completion)
        found = template.encode(sample, "response", where="r")
        assert tokenizer.convert_ids_to_tokens(found.ids[found.trained]) == tokens
        assert found.ids[~found.trained].tolist() == template.prompt(sample)
        assert found.flaws == (("blank",) if prompt.endswith(" ") else ())
        whole = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        of_prompt = tokenizer(prompt)["input_ids"]
        first = common_prefix_length(of_prompt, whole)
        if first == len(of_prompt):
            assert found.ids.tolist() == whole
            assert found.trained.tolist() == [i >= first for i in range(len(whole))]
        else:
            merged += 1
            assert decoded(tokenizer, whole[first:]).endswith(completion + END)
    assert merged == 3


def chatty(tokenizer: Any, before_answer: str) -> Template:
    """A chat template that writes `before_answer` before each answer."""
    jinja = (
        "{% for m in messages %}{{ m.role ~ ':' ~ m.content if m.role == 'user' else"
        " BEFORE ~ m.content ~ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ BEFORE }}{% endif %}"
    ).replace("BEFORE", json.dumps(before_answer))
    return Template(tokenizer, {tokenizer.eos_token_id}, jinja=jinja, name="chatty.jinja")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before_answer", ["\n\nThe answer: ", "\n\n", " -- ", "```"])
def test_templates_that_end_prompts_in_white_space(kind: str, before_answer: str) -> None:
    tokenizer = train(kind, (), False)
    template = chatty(tokenizer, before_answer)
    messages: list[Any] = []
    said = {"So": "So it is", "The": "\n\n  user", "user": " yes", "a": ":\n"}
    for question, text in said.items():
        messages += [user(question), answer(text)]
        sample = Conversation(list(messages))
        found = template.encode(sample, "last", where="r")
        prompt = template.prompt(sample)
        assert found.ids[: len(prompt)].tolist() == prompt
        assert found.trained.tolist() == [i >= len(prompt) for i in range(len(found.ids))]
        assert decoded(tokenizer, found.ids) == decoded(tokenizer, prompt) + text + "</s>"
    every = template.encode(sample, "response", where="r")
    starts = np.flatnonzero(every.trained & ~np.append(False, every.trained[:-1]))
    assert len(starts) == 4
    if kind == "bytes":
        supervised = decoded(tokenizer, every.ids[every.trained])
        assert supervised == "".join(f"{text}</s>" for text in said.values())


def test_an_end_token_of_the_prompt_ends_no_answer() -> None:
    tokenizer = train("bytes", (), False)
    found = raw(tokenizer).encode(Completion("So.</s>", ""), "response", where="r")
    assert decoded(tokenizer, found.ids) == "So.</s></s>"
    assert found.trained.tolist() == [False] * (len(found.ids) - 1) + [True]


# --- counted over all rows


def prepared(tiny: Path, folder: Path, rows: list[tuple[str, str]], tokenizer: Any) -> TrainingData:
    path = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in rows]
    path.write_text("\n".join(lines) + "\n")
    source = {"source": str(path), "format": "prompt-completion"}
    run = make_run(tiny, folder, held=False, data={"train": source, "template": "raw"})
    ends = {tokenizer.eos_token_id}
    return prepare_data(run, tokenizer, ends, len(tokenizer), cache=folder / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([("So ", "it is")] * 4 + [("So", " it is")] * 2, 4),
        ([("So", " it is"), ("So\n", "it is")] * 3, 0),
    ],
)
def test_blanks_before_answers_are_counted_and_told(
    tiny: Path, tmp_path: Path, rows: list[tuple[str, str]], count: int
) -> None:
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, rows, train("bytes", (), False))
        assert data.train.parts[0].counts.flaws.get("blank", [0])[0] == count
        told = [line for line in data_warnings(data) if ROW_WARNINGS["blank"].what in line]
        assert len(told) == bool(count)
        assert all(holds(line, "4 of 6", f"{tmp_path}/rows.jsonl:1") for line in told)


@pytest.mark.slow
def test_merged_tokens_are_counted_and_told(tiny: Path, tmp_path: Path) -> None:
    tokenizer = wordpiece("no", "so", "soon", "##on")
    data = prepared(tiny, tmp_path, [("no so", "on")], tokenizer)
    assert data.train.parts[0].counts.flaws["merged"] == [1, 0]
    assert any(ROW_WARNINGS["merged"].what in line for line in data_warnings(data))
    assert data.train[0].trained.tolist() == [False, True, True]
