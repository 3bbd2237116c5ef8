"""Where an answer begins: the prompt has the tokens that generation gives it, and all of the answer
is supervised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from chat_tokenizers import train, wordpiece
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from errors import holds
from recipes import make_run
from tunesmith.config.schema import Data, Source
from tunesmith.data.prepare import prepare_data
from tunesmith.data.rows.samples import Completion, Conversation
from tunesmith.data.source.open_source import from_list
from tunesmith.data.text.row_warnings import ROW_WARNINGS
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.contract import check_tokens
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.presentation.data import data_warnings

END = "<|im_end|>"
KINDS = ("bytes", "trimmed", "pieces", "prefixed", "llama2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def raw(tokenizer: Any) -> Template:
    return Template(tokenizer, {tokenizer.eos_token_id}, jinja=None, name="raw")


def decoded(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_a_prompt_that_ends_in_a_blank(smollm2_tokenizer: Any) -> None:
    """ "good" alone, and "The" of the second, were in a token of the prompt."""
    template = raw(smollm2_tokenizer)
    for prompt, completion, tokens in (
        ("Review 0: fine. Sentiment: ", "good", ["good", END]),
        ("A: ", "The answer is 4", ["The", "Ġanswer", "Ġis", "Ġ", "4", END]),
        ("### Response:\n", "\n- one", ["Ċ", "-", "Ġone", END]),
        ("### Response:\n\n", "One", ["One", END]),
        ("Sentiment:", " good", ["Ġgood", END]),
    ):
        sample = Completion(prompt, completion)
        found = template.encode(sample, "response", where="r")
        supervised = found.ids[found.trained]
        assert smollm2_tokenizer.convert_ids_to_tokens(supervised) == tokens
        assert found.ids[~found.trained].tolist() == template.prompt(sample)
        assert found.flaws == (("blank",) if prompt.endswith(" ") else ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_is_trained_too_has_the_same_tokens(kind: str) -> None:
    template = raw(train(kind, (END,), False))
    sample = Completion("So ", "it is")
    answer, whole = (template.encode(sample, on, where="r") for on in ("response", "all"))
    assert whole.ids.tolist() == answer.ids.tolist()
    assert whole.trained.tolist() == [False] + [True] * (len(whole.ids) - 1)
    assert whole.flaws == answer.flaws


def check_completion(tokenizer: Any, prompt: str, completion: str) -> None:
    template = raw(tokenizer)
    sample = Completion(prompt, completion)
    found = template.encode(sample, "response", where="r")
    prompt_ids = template.prompt(sample)
    assert found.ids[: len(prompt_ids)].tolist() == prompt_ids
    assert not found.trained[: len(prompt_ids)].any()
    assert found.trained[max(1, len(prompt_ids)) :].all()
    assert "merged" not in found.flaws
    # Behind its own prompt; a tokenizer may drop the blank at the beginning of a text.
    whole = decoded(tokenizer, found.ids)
    expected = decoded(tokenizer, prompt_ids) + completion
    if not completion.endswith("</s>"):
        expected += "</s>"
    if not prompt:
        whole, expected = (text.removeprefix("<s>").lstrip(" ") for text in (whole, expected))
    assert normalize("NFC", whole) == normalize("NFC", expected)


WORDS = st.sampled_from(
    [
        "a",
        "So",
        " ",
        "  ",
        "\n",
        "\t",
        ":",
        "é",
        "\u0301",
        "🎉",
        "ה",
        "好",
        "The",
        "user",
        "0",
        "12",
        "'s",
    ]
)
TEXT = st.lists(WORDS | st.text(max_size=3), max_size=6).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(prompt=TEXT, completion=TEXT.filter(bool))
@example(prompt="The answer: ", completion="So")
@example(prompt="e", completion="\u0301")
@example(prompt="", completion=" So")
@example(prompt="So ", completion=" So")
@example(prompt="a ", completion=" ")
def test_any_prompt_and_any_completion(kind: str, prompt: str, completion: str) -> None:
    check_completion(train(kind, (END,), kind in ("prefixed", "llama2")), prompt, completion)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(prompt=TEXT, completion=TEXT.filter(bool))
def test_any_prompt_and_any_completion_in_a_real_vocabulary(
    smollm2_tokenizer: Any, prompt: str, completion: str
) -> None:
    tokenizer = smollm2_tokenizer
    # It lacks some bytes.
    assume(decoded(tokenizer, tokenizer(prompt + completion)["input_ids"]) == prompt + completion)
    template = raw(tokenizer)
    sample = Completion(prompt, completion)
    found = template.encode(sample, "response", where="r")
    prompt_ids = template.prompt(sample)
    assert found.ids[: len(prompt_ids)].tolist() == prompt_ids
    assert found.trained.tolist()[max(1, len(prompt_ids)) :] == [True] * (
        len(found.ids) - max(1, len(prompt_ids))
    )
    assert decoded(tokenizer, found.ids) == f"{prompt}{completion}{END}"


@pytest.mark.slow
def test_where_nothing_merges_trl_labels_the_same_tokens(smollm2_tokenizer: Any) -> None:
    """Where a token lies across the edge TRL takes it in, with the end of the prompt: its prompt is
    shorter than the one that generation gives.
    """
    from trl.data_utils import common_prefix_length

    tokenizer = smollm2_tokenizer
    template = raw(tokenizer)
    merged = 0
    for prompt, completion in (
        ("Sentiment:", " good"),
        ("Sentiment:\n", "good"),
        ("Sentiment: ", "good"),
        ("2 + 2 =", " 4"),
        ("2 + 2 = ", "4"),
        ("Wo", "rd"),
        ("x\n", "\ny"),
        ("x\n\n", "y"),
    ):
        whole = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        of_prompt = tokenizer(prompt)["input_ids"]
        first = common_prefix_length(of_prompt, whole)
        found = template.encode(Completion(prompt, completion), "response", where="r")
        if first == len(of_prompt):
            assert found.ids.tolist() == whole
            assert found.trained.tolist() == [i >= first for i in range(len(whole))]
            continue
        merged += 1
        theirs = decoded(tokenizer, whole[first:])
        ours = decoded(tokenizer, found.ids[found.trained])
        assert ours == completion + END
        assert theirs.endswith(ours)
        assert len(theirs) > len(ours)
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
    turns = []
    for question, answer in (
        ("So", "So it is"),
        ("The", "\n\n  user"),
        ("user", " yes"),
        ("a", ":\n"),
    ):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        sample = Conversation(list(turns))
        found = template.encode(sample, "last", where="r")
        prompt = template.prompt(sample)
        assert found.ids[: len(prompt)].tolist() == prompt
        assert found.trained.tolist() == [i >= len(prompt) for i in range(len(found.ids))]
        expected = decoded(tokenizer, prompt) + answer + "</s>"
        assert decoded(tokenizer, found.ids) == expected
    every = template.encode(sample, "response", where="r")
    starts = np.flatnonzero(every.trained & ~np.append(False, every.trained[:-1]))
    assert len(starts) == 4
    if kind == "bytes":
        supervised = decoded(tokenizer, every.ids[every.trained])
        answers = turns[1::2]
        assert supervised == "".join(f"{turn['content']}</s>" for turn in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_have_one_prompt_and_labeled_answers_the_same(kind: str, tmp_path: Path) -> None:
    """Of a merged token each answer would have another prompt."""
    tokenizer = train(kind, (), False)
    tokens = {}
    for form, row in (
        ("preference", {"prompt": "The answer: ", "chosen": "The", "rejected": "So it is"}),
        ("feedback", {"prompt": "The answer: ", "completion": "So", "label": False}),
    ):
        source = Source(source="rows", format=form)  # type: ignore[arg-type]
        data = Data(train=(source,), template="raw")
        template = raw(tokenizer)
        rows = from_list([row] * 3, "rows")
        tokens[form] = tokenize([(source, rows)], data, template, cache=None, what="t")
        contract = check_tokens(tokens[form], template, vocab_size=len(tokenizer), split="train")
        contract.raise_if_broken()
    prompt = raw(tokenizer).prompt(Completion("The answer: ", ""))
    chosen, rejected = tokens["preference"][0].parts()
    for part in (chosen, rejected, tokens["feedback"][0]):
        assert part.ids[: len(prompt)].tolist() == prompt


def test_an_end_token_of_the_prompt_ends_no_answer() -> None:
    tokenizer = train("bytes", (), False)
    found = raw(tokenizer).encode(Completion("So.</s>", ""), "response", where="r")
    assert decoded(tokenizer, found.ids) == "So.</s></s>"
    assert found.trained.tolist() == [False] * (len(found.ids) - 1) + [True]


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
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows]
    path.write_text("\n".join(lines) + "\n")
    source = {"source": str(path), "format": "prompt-completion"}
    run = make_run(tiny, tmp_path, held=False, data={"train": source, "template": "raw"})
    tokenizer = train("bytes", (), False)
    for _ in range(2):  # the second time from the cache
        data = prepare_data(run, tokenizer, {2}, len(tokenizer), cache=tmp_path / "cache")
        flaws = data.train.parts[0].counts.flaws
        assert flaws.get("blank", [0])[0] == count
        told = [line for line in data_warnings(data) if ROW_WARNINGS["blank"].what in line]
        assert len(told) == bool(count)
        if told:
            assert holds(told[0], "4 of 6", f"{path}:1")


def test_merged_tokens_are_counted_and_told(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "no so", "completion": "on"}) + "\n")
    source = {"source": str(path), "format": "prompt-completion"}
    run = make_run(tiny, tmp_path, held=False, data={"train": source, "template": "raw"})
    tokenizer = wordpiece("no", "so", "soon", "##on")
    data = prepare_data(run, tokenizer, {1}, len(tokenizer), cache=None)
    assert data.train.parts[0].counts.flaws["merged"] == [1, 0]
    assert any(ROW_WARNINGS["merged"].what in line for line in data_warnings(data))
    assert data.train[0].trained.tolist() == [False, True, True]
