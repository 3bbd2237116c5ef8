"""Spans on tokens, for every cut of a text, against the tokens of the text before it."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

import pytest
from chat_tokenizers import train, wordpiece

from errors import refuses
from tunesmith.data.text.align import Aligner, CharSpan
from tunesmith.errors import ModelError

TEXTS = [
    "<|im_start|>assistant\n  user The answer: So<|im_end|>\n",
    'e\u0301 What is it? {"name": "weather"}    return 1 : "so" it is.<|im_end|>',
    "🎉 yes 👍 The answer: 好 e\u0301\n\n\n  What ה so <|im_end|><|im_end|> I see.",
    " ",
    "",
]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "pieces", "prefixed", "llama2"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_cut_of_a_text(kind: str, text: str) -> None:
    """The prompt has the tokens that it has alone, all others are supervised, and are the rest."""
    tokenizer = train(kind, ("<|im_start|>", "<|im_end|>"), False)
    aligner = Aligner(tokenizer)
    if kind == "llama2":  # a blank more behind each of them
        text = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    for cut in range(len(text) + 1):
        (found,) = aligner.encode([text], [[CharSpan(cut, len(text))]], set())
        prompt = plain_ids(tokenizer, text[:cut])
        assert found.ids[: len(prompt)].tolist() == prompt
        assert found.trained.tolist() == [i >= len(prompt) for i in range(len(found.ids))]
        assert found.merged_tokens == 0
        shown = decoded(tokenizer, found.ids)
        if kind == "trimmed":
            shown = normalize("NFC", shown)
            assert shown == normalize("NFC", text)
        elif text != " ":  # a blank alone is the one that the tokenizer puts before a text
            assert shown == text


@pytest.mark.parametrize("kind", ["bytes", "pieces", "prefixed", "llama2"])
def test_a_text_is_cut_only_where_a_token_would_lie_across(kind: str) -> None:
    tokenizer = train(kind, ("<|im_end|>",), False)
    text = "So it is. The answer: So it is.<|im_end|>"
    whole = plain_ids(tokenizer, text)
    cut_places = []
    for cut in range(1, len(text)):
        (found,) = Aligner(tokenizer).encode([text], [[CharSpan(cut, len(text))]], set())
        if found.cuts:
            assert found.cuts == (cut,)
            cut_places.append(cut)
        else:
            assert found.ids.tolist() == whole
    assert 0 < len(cut_places) < len(text) - 1


def test_both_edges_of_several_spans_are_cut() -> None:
    """A span without an end token of its own ends where its last character does."""
    tokenizer = train("bytes", ("<|im_end|>",), False)
    text = "user\n\nThe answer: \n\nuser\n\nThe answer: \n\n"
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


@pytest.mark.parametrize("kind", ["bytes", "prefixed", "llama2"])
def test_a_batch_is_as_one_by_one(kind: str) -> None:
    tokenizer = train(kind, ("<|im_start|>", "<|im_end|>"), False)
    aligner = Aligner(tokenizer)
    texts = [text for text in TEXTS for _ in range(len(text) + 1)]
    spans = [[CharSpan(cut, len(text))] for text in TEXTS for cut in range(len(text) + 1)]
    together = aligner.encode(texts, spans, set())
    for text, of_text, found in zip(texts, spans, together, strict=True):
        (alone,) = aligner.encode([text], [of_text], set())
        assert found.ids.tolist() == alone.ids.tolist()
        assert found.trained.tolist() == alone.trained.tolist()
        assert found.cuts == alone.cuts


def test_the_end_token_must_stand_at_the_end() -> None:
    tokenizer = train("bytes", ("<|im_end|>",), False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = "So it is.<|im_end|>\n"
    span = CharSpan(3, len(text) - 1, text.index("<|im_end|>"))
    assert Aligner(tokenizer).encode([text], [[span]], {end})[0].ended
    assert not Aligner(tokenizer).encode([text], [[span]], {2})[0].ended
    assert not Aligner(tokenizer).encode([text], [[span._replace(stop=len(text))]], {end})[0].ended


def test_a_tokenizer_that_cannot_tell_is_refused() -> None:
    class Slow:
        is_fast = False

    with refuses(ModelError, where="model.tokenizer", names=["Slow", "tokenizer.json"]):
        Aligner(Slow())
