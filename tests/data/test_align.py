"""Spans on tokens, for every cut of a text, against the tokenizers' own uncut offsets."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import train

from errors import refuses
from tunesmith.data.align import Aligner, CharSpan
from tunesmith.errors import ModelError

TEXTS = [
    "<|im_start|>assistant\n  user The answer: So<|im_end|>\n",
    'e\u0301 What is it? {"name": "weather"}    return 1 : "so" it is.<|im_end|>',
    "🎉 yes 👍 The answer: 好 e\u0301\n\n\n  What ה so <|im_end|><|im_end|> I see.",
    " ",
    "",
]


def exact(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "pieces"])
@pytest.mark.parametrize("text", TEXTS)
def test_every_cut_of_a_text(kind: str, text: str) -> None:
    tokenizer = train(kind, ("<|im_start|>", "<|im_end|>"), False)
    aligner, whole = Aligner(tokenizer), exact(tokenizer).encode(text, add_special_tokens=False)
    for cut in range(len(text) + 1):
        (found,) = aligner.encode([text], [[CharSpan(cut, len(text))]], set())
        assert found.ids.tolist() == whole.ids
        assert found.trained.tolist() == [s >= cut for s, _ in whole.offsets]
        # Cut offsets do not show a token that goes over the edge by blanks alone
        if kind == "bytes":
            assert found.spanning_tokens == sum(s < cut < e for s, e in whole.offsets)


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
