"""Loss masks, token by token: rows x roles x templates x tokenizers against plain Python."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_table import CONVERSATIONS, FORMS, Message, conversations, turns, user
from chat_tokenizers import train

from conftest import byte_tokenizer
from errors import refuses
from pairwise import name_of, pairwise
from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Conversation, Sample
from tunesmith.data.text.example import Example
from tunesmith.data.text.template import Template
from tunesmith.errors import DataError
from tunesmith.inference.decoding import cut_answer

TEMPLATES = Path(__file__).parent / "templates"
COVERED_FORMATS = pairwise(
    {
        "template": list(FORMS),
        "roles": list(CONVERSATIONS),
        "format": ["messages", "sharegpt", "prompt-completion"],
        "tokenizer": ["bytes", "trimmed", "pieces"],
    },
    tier_1={
        "template": ["chatml", "llama3", "mistral", "gemma", "qwen3"],
        "roles": list(CONVERSATIONS),
        "format": ["messages"],
        "tokenizer": ["bytes"],
    },
)
CLEAN = {"template": "chatml", "roles": "turns", "format": "messages", "tokenizer": "bytes"}
assert CLEAN in COVERED_FORMATS
IM = ("<|im_start|>", "<|im_end|>")


@cache
def template_for(name: str, tokenizer: Any) -> Template:
    jinja = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return Template(tokenizer, {tokenizer.eos_token_id}, jinja=jinja, name=f"{name}.jinja")


def tokenizer_for(name: str, kind: str) -> Any:
    return train(kind, FORMS[name].special, FORMS[name].adds_bos)


def chatml() -> Template:
    return template_for("chatml", train("bytes", IM, False))


@cache
def exact(tokenizer: Any) -> Any:
    """The tokenizer's core with offsets that nothing cuts."""
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def expected(
    core: Any, segments: list[tuple[str, bool]], end: str
) -> tuple[list[int], list[bool], bool]:
    """ids and mask of the segments, and whether no token lies across an edge of two segments.

    The text is cut where a token would lie across the start of an answer.
    """
    text = "".join(text for text, _ in segments)
    whole = core.encode(text, add_special_tokens=False)
    pieces = [core.encode(text, add_special_tokens=False).ids for text, _ in segments]
    spans, at = [], 0
    for segment, learnt in segments:
        spans += [(at, at + len(segment))] * learnt
        at += len(segment)
    end_id = core.token_to_id(end)
    cuts = sorted({a for a, _ in spans if any(s < a < e for s, e in whole.offsets)})
    ids: list[int] = []
    mask: list[bool] = []
    for first, stop in itertools.pairwise([0, *cuts, len(text)]):
        piece = core.encode(text[first:stop], add_special_tokens=False)
        ids += piece.ids
        for id_, (s, e) in zip(piece.ids, piece.offsets, strict=True):
            inside = any(a <= first + s < b and first + e <= b for a, b in spans)
            # It may swallow blanks after it.
            ends_here = id_ == end_id and any(first + s == b - len(end) for _, b in spans)
            mask.append(inside or ends_here)
    is_clean = [id_ for piece in pieces for id_ in piece] == whole.ids
    if is_clean:  # then the segments' own tokens are the truth, without any offsets
        pairs = zip(pieces, segments, strict=True)
        assert mask == [learnt for piece, (_, learnt) in pairs for _ in piece]
    return ids, mask, is_clean


def assert_same(example: Example, ids: list[int], mask: list[bool], core: Any, label: str) -> None:
    assert example.ids.tolist() == ids, label
    wrong = np.flatnonzero(example.trained != np.array(mask))
    shown = [(int(i), core.id_to_token(ids[i]), mask[i]) for i in wrong]
    assert not shown, f"{label}: {shown}"


def read(format_name: str, messages: list[Message], tools: Any) -> Sample:
    """The conversation by way of a row in that format."""
    row: dict[str, Any] = {"messages": messages}
    if format_name == "sharegpt":
        names = {"role": "from", "content": "value"}
        row = {"conversations": [{names.get(k, k): v for k, v in m.items()} for m in messages]}
    elif format_name == "prompt-completion":
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    source = Source(source="x", format=format_name)  # type: ignore[arg-type]
    return convert_row({**row, "tools": tools}, source, where="row 1").samples[0]


def check_masks(
    name: str, tokenizer: Any, roles: Sequence[str], format_name: str = "messages"
) -> int:
    """Return of how many conversations no token lies across an edge."""
    form, template, core = FORMS[name], template_for(name, tokenizer), exact(tokenizer)
    clean = 0
    for label, messages, tools in itertools.chain(*(conversations(form, group) for group in roles)):
        segments = form.write(messages, tools)
        sample = read(format_name, messages, tools)
        if segments is None:
            with pytest.raises(DataError):
                template.encode(sample, "response", where="row 1")
            continue
        if format_name == "prompt-completion":
            last = max(n for n, (_, learnt) in enumerate(segments) if learnt)
            segments = [(text, n == last) for n, (text, _) in enumerate(segments)]
        example = template.encode(sample, "response", where="row 1")
        ids, mask, is_clean = expected(core, segments, form.end)
        assert_same(example, ids, mask, core, f"{name}, {label}")
        theirs = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template.jinja)
        assert example.ids.tolist() == theirs["input_ids"] or not is_clean
        assert not example.trained[0]
        assert example.trained.any()
        clean += is_clean
    return clean


@pytest.mark.parametrize("covered", COVERED_FORMATS, ids=name_of)
def test_the_mask_is_exact_to_the_token(covered: dict[str, Any]) -> None:
    tokenizer = tokenizer_for(covered["template"], covered["tokenizer"])
    clean = check_masks(covered["template"], tokenizer, [covered["roles"]], covered["format"])
    if covered == CLEAN:
        assert clean >= 3, "most rows have tokens across edges, so that offsets alone were compared"


@pytest.mark.nightly
def test_the_mask_is_exact_in_a_real_vocabulary(smollm2: Path) -> None:
    """Ends by prompts and by tags, and marks that are text."""
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for name in ("chatml", "tagged", "llama2"):
        tokenizer = copy.deepcopy(real)
        special = {"additional_special_tokens": [*FORMS[name].special]}
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", **special})
        check_masks(name, tokenizer, [*CONVERSATIONS])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "qwen3" else pytest.mark.slow) for name in FORMS],
)
def test_a_prompt_is_what_stands_before_the_last_answer(name: str) -> None:
    form, tokenizer = FORMS[name], tokenizer_for(name, "bytes")
    template = template_for(name, tokenizer)
    compared = 0
    for _, messages, tools in conversations(form):
        if form.write(messages, tools) is None:
            continue
        sample = Conversation(messages, tools)
        example = template.encode(sample, "last", where="row 1")
        prompt = template.prompt(sample)
        assert template.prompt(Conversation(messages[:-1], tools)) == prompt
        first = int(np.flatnonzero(example.trained)[0])
        # Where answers are compared with it, the row's answer is the supervised text up to its end.
        answer_ids = cut_answer(tokenizer, example.ids[first:].tolist(), template.end_ids).ids
        raw = tokenizer.decode(answer_ids, clean_up_tokenization_spaces=False)
        assert template.answer(sample) == raw
        plain = tokenizer.decode(
            answer_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert template.without_special_tokens(raw) == plain
        assert tokenizer.decode(prompt).startswith(tokenizer.decode(example.ids[: first - 1]))
        if example.ids[: len(prompt)].tolist() == prompt:
            assert first == len(prompt)
            compared += 1
    assert compared >= (1 if name == "llama2" else 12)


def test_what_is_supervised_by_train_on() -> None:
    template = chatml()
    decode = template.tokenizer.decode
    sample = Conversation(turns("a", "b", "c", "d"))
    found = [template.encode(sample, on, where="r") for on in ("response", "last", "all")]
    assert found[0].ids.tolist() == found[1].ids.tolist() == found[2].ids.tolist()
    shown = [decode(e.ids[e.trained]) for e in found[:2]]
    assert shown == ["b<|im_end|>d<|im_end|>", "d<|im_end|>"]
    assert found[2].trained.tolist() == [False] + [True] * (len(found[2].ids) - 1)
    given = Conversation(turns("a", "b", "c", "d"), prompt_messages=3)
    example = template.encode(given, "all", where="r")
    assert decode(example.ids[example.trained]) == "d<|im_end|>\n"


def test_many_are_as_one_by_one() -> None:
    template = chatml()
    samples = [Conversation(turns(f"{n}?", "é🎉" * (n % 7) + str(n))) for n in range(60)]
    where = [f"row {n}" for n in range(60)]
    for n, example in enumerate(template.encode_many(samples, "response", where=where)):
        alone = template.encode(samples[n], "response", where=where[n])
        assert example.ids.tolist() == alone.ids.tolist()
        assert example.trained.tolist() == alone.trained.tolist()


@pytest.mark.slow
def test_a_text_that_the_tokenizer_fails_on_is_named_with_its_row() -> None:
    """A pattern that takes too many steps is a panic in Rust, which is no Exception."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_tokenizer()
    core = tokenizer.backend_tokenizer
    steps = [pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated"), core.pre_tokenizer]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    template = Template(tokenizer, {2}, jinja=tokenizer.chat_template, name="chat")
    endless = "a" * 100 + "b"
    samples = [Conversation(turns("x", text)) for text in ("a", endless, "b")]
    examples = template.encode_many(samples, "response", where=["r:1", "r:2", "r:3"])
    assert isinstance(examples[1], DataError)
    assert (examples[1].where, "retry-limit" in examples[1].why) == ("r:2", True)
    assert [isinstance(example, Example) for example in examples] == [True, False, True]
    with refuses(DataError, where="r:4"):
        template.prompt(Conversation([user(endless)]), where="r:4")


def test_masks_of_generation_blocks_are_those_of_transformers() -> None:
    jinja = (TEMPLATES / "tagged.jinja").read_text(encoding="utf-8")
    # The block holds the answer and its end token alone.
    jinja = jinja.replace(
        "{{ message.content ~ '<|im_end|>\\n' }}{%- endgeneration -%}",
        "{{ message.content ~ '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}",
    )
    tokenizer = train("bytes", IM, False)
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=jinja, name="tagged")
    compared = 0
    for _, messages, tools in conversations(FORMS["tagged"]):
        if FORMS["tagged"].write(messages, tools) is None:
            continue
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=jinja, return_assistant_tokens_mask=True
        )
        example = template.encode(Conversation(messages), "response", where="r")
        if example.ids.tolist() != theirs["input_ids"]:
            # A token lies across the start of an answer: theirs takes it in, ours are two.
            assert tokenizer.decode(example.ids) == tokenizer.decode(theirs["input_ids"])
            continue
        assert example.trained.tolist() == [bool(x) for x in theirs["assistant_masks"]]
        compared += 1
    assert compared >= 15
