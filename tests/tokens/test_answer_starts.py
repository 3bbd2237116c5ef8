"""Spans on tokens: a prompt has the tokens that generation gives it, and the rest is supervised."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chat_tokenizers import train, wordpiece
from errors import holds, refuses
from recipes import make_run
from tunesmith.batches.training_data import TrainingData
from tunesmith.errors import ModelError
from tunesmith.presentation.data import data_warnings
from tunesmith.rows.samples import Completion
from tunesmith.start.prepare import prepare_data
from tunesmith.tokens.text.align import Aligner, CharSpan
from tunesmith.tokens.text.row_warnings import ROW_WARNINGS
from tunesmith.tokens.text.template import Template

START, END = "<|im_start|>", "<|im_end|>"
KINDS = ("bytes", "trimmed", "pieces", "prefixed", "llama2")
TEXTS = [
    f"{START}assistant\n  user The answer: So{END}\n",
    f'e\u0301 What is it? {{"name": "weather"}}    return 1 : "so" it is.{END}',
    f"🎉 yes 👍 The answer: 好 e\u0301\n\n\n  What ה so {END}{END} I see.",
    " ",
    "",
]


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


def test_a_tokenizer_that_cannot_write_the_rest_supervises_the_merged_token() -> None:
    """WordPiece writes the rest of a word in another way behind the word's beginning."""
    tokenizer = wordpiece("so", "no", "soon", "##on")
    (found,) = Aligner(tokenizer).encode(["no soon no"], [[CharSpan(5, 10)]], set())
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["no", "soon", "no"]
    assert found.trained.tolist() == [False, True, True]
    assert (found.merged_tokens, found.cuts) == (1, ())
    # The dot begins where the span ends, so it is not a part of the answer.
    tokenizer = wordpiece("so", "no", "soon", "##on", ".")
    (found,) = Aligner(tokenizer).encode(["no soon."], [[CharSpan(5, 7)]], set())
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["no", "soon", "."]
    assert (found.trained.tolist(), found.merged_tokens) == ([False, True, False], 1)


def test_a_tokenizer_that_cannot_tell_is_refused() -> None:
    class Slow:
        is_fast = False

    with refuses(ModelError, where="model.tokenizer", names=["Slow", "tokenizer.json"]):
        Aligner(Slow())


# --- prompts and completions


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
def test_any_prompt_and_any_completion(kind: str, prompt: str, completion: str) -> None:
    tokenizer = train(kind, (END,), kind in ("prefixed", "llama2"))
    template = raw(tokenizer)
    sample = Completion(prompt, completion)
    found, everything = (template.encode(sample, on, where="r") for on in ("response", "all"))
    assert everything.ids.tolist() == found.ids.tolist()
    assert everything.trained.tolist() == [False] + [True] * (len(found.ids) - 1)
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


@pytest.mark.slow
def test_where_nothing_merges_trl_labels_the_same_tokens(smollm2: Path) -> None:
    from transformers import AutoTokenizer
    from trl.data_utils import common_prefix_length

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    template = raw(tokenizer)
    for prompt, completion, merges in (
        ("Sentiment:", " good", False),
        ("### Response:\n", "\n- one", False),
        ("A: ", "The answer is 4", True),
        ("### Response:\n\n", "One", True),
    ):
        sample = Completion(prompt, completion)
        found = template.encode(sample, "response", where="r")
        assert decoded(tokenizer, found.ids[found.trained]) == completion + END
        assert found.ids[~found.trained].tolist() == template.prompt(sample)
        whole = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        of_prompt = tokenizer(prompt)["input_ids"]
        first = common_prefix_length(of_prompt, whole)
        # Where a token lies across the edge TRL takes it in, with the end of the prompt.
        assert merges == (first < len(of_prompt))
        if not merges:
            assert found.ids.tolist() == whole
            assert found.trained.tolist() == [i >= first for i in range(len(whole))]


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
def test_blanks_before_answers_and_merged_tokens_are_told(tiny: Path, tmp_path: Path) -> None:
    rows = [("So ", "it is")] * 4 + [("So", " it is"), ("So\n", "it is")]
    for _ in range(2):  # the second time from the cache
        data = prepared(tiny, tmp_path, rows, train("bytes", (), False))
        (told,) = [line for line in data_warnings(data) if ROW_WARNINGS["blank"].what in line]
        assert holds(told, "4 of 6", f"{tmp_path}/rows.jsonl:1")
    tokenizer = wordpiece("no", "so", "soon", "##on")
    data = prepared(tiny, tmp_path, [("no so", "on")], tokenizer)
    assert data.train.parts[0].counts.flaws["merged"] == [1, 0]
    assert any(ROW_WARNINGS["merged"].what in line for line in data_warnings(data))
    assert data.train[0].trained.tolist() == [False, True, True]
