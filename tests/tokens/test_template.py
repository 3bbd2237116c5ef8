"""Loss masks, token by token: rows x roles x templates x tokenizers against plain Python; and which
templates and rows are refused.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from chat_table import (
    CONVERSATIONS,
    FORMS,
    TOOLS,
    Message,
    answer,
    call,
    conversations,
    result,
    system,
    turns,
    user,
)
from chat_tokenizers import train
from errors import refuses
from pairwise import name_of, pairwise
from tunesmith.answers.answers import cut_answer
from tunesmith.config.schema import Source
from tunesmith.errors import DataError, ModelError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.samples import Conversation, Sample
from tunesmith.tokens.text import rendering
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.text.template import Template

TEMPLATES = Path(__file__).parent / "templates"
CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
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
    assert compared >= 12


def test_what_is_supervised_by_train_on() -> None:
    template = template_for("chatml", train("bytes", IM, False))
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


def test_an_answer_in_two_generation_blocks_is_supervised_in_both() -> None:
    blocks = "{% generation %}{{ m.content }}{% endgeneration %} | {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' %}" + blocks
    )
    jinja += "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    tokenizer = train("bytes", IM, False)
    template = Template(
        tokenizer, {tokenizer.convert_tokens_to_ids("<|im_end|>")}, jinja=jinja, name="own.jinja"
    )
    example = template.encode(Conversation(turns("a", "b", "c", "d")), "response", where="r")
    assert tokenizer.decode(example.ids[example.trained]) == "bb<|im_end|>dd<|im_end|>"


@pytest.mark.parametrize(
    ("form", "train_on", "renders"),
    [("chatml", "response", 2 + 3), ("chatml", "last", 2 + 1), ("tagged", "response", 2)],
)
def test_a_conversation_is_rendered_as_often_as_its_mask_needs(
    form: str, train_on: Any, renders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, with sentinels, and up to each supervised answer, which tags make unnecessary."""
    template = template_for(form, train("bytes", IM, False))
    calls = []

    def counted(render: Any) -> Any:
        return lambda *args, **keys: calls.append(1) or render(*args, **keys)

    for name in ("render", "generate"):
        monkeypatch.setattr(jinja2.Template, name, counted(getattr(jinja2.Template, name)))
    for _ in range(2):
        calls.clear()
        template.encode(Conversation(turns("a", "aa", "b", "bb", "c", "cc")), train_on, where="r")
        assert len(calls) == renders


# --- templates and rows whose answers cannot be told for certain

AB = [user("a"), answer("b")]


PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + PROMPT
BLOCK = (
    "{% generation %}{% for m in messages %}" + TURN + "{% endfor %}{% endgeneration %}" + PROMPT
)
NO_END = "~ ('<|im_end|>' if message.role == 'user' or loop.last else '') ~ '\\n'"
REFUSED: list[tuple[str, list[Any], str]] = [
    (CHATML, [answer("a")], "at the start of a conversation"),
    (CHATML, [user("a"), answer("b", reasoning_content="c")], "drops the reasoning_content"),
    (NO_SYSTEM, [system("s"), *AB], "drops message 1 (system)"),
    (CHATML.replace("<|im_end|>", ""), AB, "writes no end token"),
    (CHATML.replace("~ '<|im_end|>\\n'", NO_END), [*AB, user("<|im_end|>"), answer("d")], "writes no end token after message 2"),
    (CHATML.replace("assistant\\n' }}", "assistant\\n<think>' }}"), AB, "does not write its generation prompt"),
    (CHATML.replace("~ message.content", "~ message.content ~ '|' ~ messages[-1].content"), AB, ""),
    (BLOCK, AB, "covers message 1"),
]  # fmt: skip


@pytest.mark.parametrize(("jinja", "messages", "what"), REFUSED)
def test_what_cannot_be_masked_is_refused(jinja: str, messages: list[Any], what: str) -> None:
    tokenizer = train("bytes", IM, False)
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    template = Template(tokenizer, ends, jinja=jinja, name="own.jinja")
    with pytest.raises(DataError) as caught:
        template.encode(Conversation(messages), "response", where="rows.jsonl:7")
    assert what in caught.value.what
    assert caught.value.where == "rows.jsonl:7"
    assert caught.value.fix


def test_a_template_without_its_parts_is_refused() -> None:
    no_prompt = CHATML.split("{%- if add_generation_prompt")[0]
    with refuses(DataError, where="data.template", names=["own.jinja"]):
        Template(train("bytes", IM, False), {2}, jinja=no_prompt, name="own.jinja")
    # A base model's tokenizer does not know ChatML's tokens: they are plain text to it.
    tokenizer = train("bytes", (), False)
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=CHATML, name="own.jinja")
    with refuses(DataError, where="rows.jsonl:7", fix=["model.added_tokens"]):
        template.encode(Conversation(AB), "response", where="rows.jsonl:7")


# --- public templates

# Of generation_config.json, where a template's answers end with several.
STOPS = {
    "glm4moe": ("<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
}


@pytest.mark.slow
def test_masks_are_those_of_trls_training_templates() -> None:
    """TRL ships public templates, and twins of them with {% generation %} set by hand. Where a twin
    renders the same text, the masks must be the same.
    """
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    called = answer("", tool_calls=[call("weather", place="Oslo")])
    rows: list[tuple[list[Any], Any]] = [
        ([user("hi"), answer("yo"), user("hi"), answer(" yo\n")], None),
        ([system("Be."), user("a"), answer("")], None),
        ([user("hi"), answer("yo", reasoning_content="hm")], None),
        ([user("hi"), called, result("wet"), answer("Yes.")], TOOLS),
    ]
    compared, names = 0, set()
    for twin in sorted((Path(spec.origin).parent / "chat_templates").glob("*_training.jinja")):
        pair = [twin.with_name(twin.name.replace("_training", "")), twin]
        jinjas = [path.read_text(encoding="utf-8") for path in pair]
        special = r"<[|｜][^<>\n]*?[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>"
        words = sorted(set(re.findall(special, "".join(jinjas))))
        tokenizer = train("bytes", tuple(words), False)
        stops = {tokenizer.eos_token_id}
        for family, ends in STOPS.items():
            if twin.name.startswith(family):
                stops |= {tokenizer.convert_tokens_to_ids(end) for end in ends}
        for messages, tools in rows:
            found = []
            for jinja in jinjas:
                with suppress(DataError):
                    template = Template(tokenizer, stops, jinja=jinja, name="it")
                    sample = Conversation(messages, tools)
                    found.append(template.encode(sample, "response", where="r"))
            if len(found) == 2 and found[0].ids.tolist() == found[1].ids.tolist():
                assert np.array_equal(found[0].trained, found[1].trained), (twin.name, messages)
                compared += 1
                names.add(twin.name)
    assert compared >= 20
    assert len(names) >= 8


def test_a_template_that_loops_on_one_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trial with other rows has shown nothing."""
    loops = "{% if 'knot' in messages[0].content %}" + "{% for i in range(9999) %}" * 3
    jinja = f"{loops}{'{% endfor %}' * 3}{{% endif %}}{CHATML}"
    tokenizer = train("bytes", IM, False)
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=jinja, name="own.jinja")
    monkeypatch.setattr(rendering, "MAX_RENDER_SECONDS", 0.2)
    turns = [user("a knot"), answer("tied")]
    with refuses(ModelError, names=["own.jinja"]):
        template.encode(Conversation(turns), "all", where="rows.jsonl:7")
