"""Masks, token by token: conversations x templates x tokenizers against forms written down in plain
Python.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from chat_table import CONVERSATIONS, FORMS, answer, conversations, user
from chat_tokenizers import train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import byte_tokenizer
from errors import refuses
from tunesmith.config.schema import Source
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.samples import Conversation
from tunesmith.data.text.example import Example
from tunesmith.data.text.template import Template
from tunesmith.errors import DataError
from tunesmith.inference.decoding import cut_answer

TEMPLATES = Path(__file__).parent / "templates"
KINDS = ("bytes", "trimmed", "pieces")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def tokenizer_for(form: str, kind: str, real: Any) -> Any:
    _, _, _, special, adds_bos = FORMS[form]
    if kind != "smollm2":
        return train(kind, tuple(special), adds_bos, form == "phi")
    tokenizer = copy.deepcopy(real)
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": special}
    )
    return tokenizer


def template_for(form: str, tokenizer: Any) -> Template:
    jinja = (TEMPLATES / f"{form}.jinja").read_text(encoding="utf-8")
    return Template(tokenizer, {tokenizer.eos_token_id}, jinja=jinja, name=f"{form}.jinja")


def exact(tokenizer: Any) -> Any:
    """The tokenizer's core with offsets that nothing cuts."""
    from tokenizers import Tokenizer, processors

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def expected(
    core: Any, segments: list[tuple[str, bool]], end: str
) -> tuple[list[int], list[bool], bool]:
    """ids and mask of the segments; the last says whether no token lies across an edge of two
    segments.

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
    starts = {start for start, _ in spans}
    cuts = sorted({a for a in starts if any(s < a < e for s, e in whole.offsets)})
    ids: list[int] = []
    mask: list[bool] = []
    for first, stop in itertools.pairwise([0, *cuts, len(text)]):
        piece = core.encode(text[first:stop], add_special_tokens=False)
        ids += piece.ids
        for id_, (s, e) in zip(piece.ids, piece.offsets, strict=True):
            inside = any(a <= first + s < b and first + e <= b for a, b in spans)
            # It may swallow blanks after it
            ends_here = id_ == end_id and any(first + s == b - len(end) for _, b in spans)
            mask.append(inside or ends_here)
    clean = [id_ for piece in pieces for id_ in piece] == whole.ids
    if clean:  # then the segments' own tokens are the truth, without any offsets
        assert mask == [
            learnt for piece, (_, learnt) in zip(pieces, segments, strict=True) for _ in piece
        ]
    return ids, mask, clean


def assert_same(example: Example, ids: list[int], mask: list[bool], core: Any, label: str) -> None:
    assert example.ids.tolist() == ids, label
    wrong = np.flatnonzero(example.trained != np.array(mask))
    assert not len(wrong), (
        f"{label}: {[(int(i), core.id_to_token(ids[i]), mask[i]) for i in wrong]}"
    )


# The real vocabulary, which is slow to read: beside tokens that end turns, found by prompts and by
# tags, and beside marks that are text.
OF_SMOLLM2 = ("chatml", "tagged", "llama2")
CELLS = [
    *((form, kind) for form in FORMS for kind in KINDS),
    *(pytest.param(form, "smollm2", marks=pytest.mark.slow) for form in OF_SMOLLM2),
]


@pytest.mark.parametrize(("form", "kind"), CELLS)
def test_mask_is_exact_to_the_token(form: str, kind: str, request: pytest.FixtureRequest) -> None:
    # It takes four seconds to read
    real = request.getfixturevalue("smollm2_tokenizer") if kind == "smollm2" else None
    tokenizer = tokenizer_for(form, kind, real)
    template, core = template_for(form, tokenizer), exact(tokenizer)
    write, end, head, _, _ = FORMS[form]
    checked = clean = refused = 0
    for name, messages, tools in conversations(end, head):
        segments = write(messages, tools)
        sample = Conversation(messages, tools)
        if segments is None:
            with pytest.raises(DataError):
                template.encode(sample, "response", where="row 1")
            refused += 1
            continue
        example = template.encode(sample, "response", where="row 1")
        ids, mask, cut = expected(core, segments, end)
        assert_same(example, ids, mask, core, f"{form}, {kind}, {name}")
        same = tokenizer.apply_chat_template(messages, tools=tools, chat_template=template.jinja)[
            "input_ids"
        ]
        assert example.ids.tolist() == same or not cut
        assert not example.trained[0]
        assert example.trained.any()
        checked, clean = checked + 1, clean + cut
    assert checked + refused == len(CONVERSATIONS)
    assert checked >= 30
    if kind == "bytes" and form in ("chatml", "tagged", "mistral", "gemma", "qwen3"):
        assert clean >= 10, (
            "most rows have tokens across edges: the segments' own tokens judged too few"
        )


def test_size_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        write(messages, tools)
        for write, end, head, _, _ in FORMS.values()
        for _, messages, tools in conversations(end, head)
    ]
    held = sum(cell is not None for cell in cells)
    with capsys.disabled():
        print(
            f"\nmasks: {len(CONVERSATIONS)} conversations x {len(FORMS)} templates x {len(KINDS)} tokenizers: "
            f"{held * len(KINDS)} compared token by token, {(len(cells) - held) * len(KINDS)} refused as they must be"
        )
    assert len(CONVERSATIONS) >= 40
    assert len(FORMS) >= 8


@pytest.mark.parametrize("form", FORMS)
def test_answers_after_an_end_token_are_learnt_from_the_prompt_in_use(form: str) -> None:
    """What `prompt` gives for a conversation is what stands before its last answer, and nothing of
    it is learnt.
    """
    tokenizer = tokenizer_for(form, "bytes", None)
    template = template_for(form, tokenizer)
    compared = 0
    for _, messages, tools in conversations():
        if FORMS[form][0](messages, tools) is None:
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
        given = tokenizer.decode(prompt)
        assert given.startswith(tokenizer.decode(example.ids[: first - 1]))
        if example.ids[: len(prompt)].tolist() == prompt:
            assert first == len(prompt)
            compared += 1
    # Llama 2's prompt ends with "]" and its answer begins with a blank: one token in this
    # vocabulary.
    assert compared >= (1 if form == "llama2" else 20)


@pytest.mark.slow
def test_last_and_all(smollm2_tokenizer: Any) -> None:
    template = Template(smollm2_tokenizer, {2}, jinja=smollm2_tokenizer.chat_template, name="chat")
    sample = Conversation([user("a"), answer("b"), user("c"), answer("d")])
    every, last, whole = (
        template.encode(sample, on, where="r") for on in ("response", "last", "all")
    )
    assert every.ids.tolist() == last.ids.tolist() == whole.ids.tolist()
    shown = [smollm2_tokenizer.decode(e.ids[e.trained]) for e in (every, last)]
    assert shown == ["b<|im_end|>d<|im_end|>", "d<|im_end|>"]
    assert whole.trained.tolist() == [False] + [True] * (len(whole.ids) - 1)


@pytest.mark.slow
def test_given_messages_are_not_supervised(smollm2_tokenizer: Any) -> None:
    template = Template(smollm2_tokenizer, {2}, jinja=smollm2_tokenizer.chat_template, name="chat")
    row = {"prompt": [user("a"), answer("b"), user("c")], "completion": [answer("d")]}
    source = Source(source="x", format="prompt-completion")
    [sample] = convert_row(row, source, where="r", system="Be.").samples
    example = template.encode(sample, "response", where="r")
    assert smollm2_tokenizer.decode(example.ids[example.trained]) == "d<|im_end|>"
    assert "system\nBe.<|im_end|>" in smollm2_tokenizer.decode(example.ids)


@pytest.mark.parametrize(
    ("form", "train_on", "renders"),
    [
        ("chatml", "response", 2 + 3),
        ("chatml", "last", 2 + 1),
        ("tagged", "response", 2),
        ("qwen3", "response", 2 + 3),
    ],
)
def test_a_conversation_is_rendered_as_often_as_its_mask_needs(
    form: str, train_on: Any, renders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once as it is, once with sentinels, and each prompt of a supervised answer; tags make prompts
    unnecessary.
    """
    template = template_for(form, tokenizer_for(form, "bytes", None))
    count = [0]

    def counted(run: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            count[0] += 1
            return run(*args, **keys)

        return call

    # Left out of all turns but the last
    thinking = {"reasoning_content": "hm"} if form == "qwen3" else {}
    messages = [message for n in "abc" for message in (user(n), answer(n * 3, **thinking))]
    for name in ("render", "generate"):
        monkeypatch.setattr(jinja2.Template, name, counted(getattr(jinja2.Template, name)))
    for _ in range(2):  # nothing is rendered again for the template's sake
        count[0] = 0
        template.encode(Conversation(messages), train_on, where="r")
        assert count == [renders]


@pytest.mark.slow
def test_many_are_as_one_by_one(smollm2_tokenizer: Any) -> None:
    template = Template(smollm2_tokenizer, {2}, jinja=smollm2_tokenizer.chat_template, name="chat")
    samples = [Conversation([user(f"{n}?"), answer("é🎉" * (n % 7) + str(n))]) for n in range(600)]
    where = [f"row {n}" for n in range(600)]
    for n, example in enumerate(template.encode_many(samples, "response", where=where)):
        alone = template.encode(samples[n], "response", where=where[n])
        assert example.ids.tolist() == alone.ids.tolist()
        assert example.trained.tolist() == alone.trained.tolist()


def test_a_text_that_the_tokenizer_fails_on_is_named_with_its_row() -> None:
    """A pattern that takes too many steps is a panic in Rust, which is no Exception."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_tokenizer()
    core = tokenizer.backend_tokenizer
    steps = [pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated"), core.pre_tokenizer]
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    template = Template(tokenizer, {2}, jinja=tokenizer.chat_template, name="chat")
    endless = "a" * 100 + "b"
    samples = [Conversation([user("x"), answer(text)]) for text in ("a", endless, "b")]
    examples = template.encode_many(samples, "response", where=["r:1", "r:2", "r:3"])
    assert isinstance(examples[1], DataError)
    assert (examples[1].where, "retry-limit" in examples[1].why) == ("r:2", True)
    assert [isinstance(example, Example) for example in examples] == [True, False, True]
    with refuses(DataError, where="r:4"):
        template.prompt(Conversation([user(endless)]), where="r:4")


def test_an_answer_that_begins_within_a_token_is_supervised_whole() -> None:
    tokenizer = train("bytes", ("<|im_start|>", "<|im_end|>"), False)
    template = template_for("chatml", tokenizer)
    sample = Conversation([user("x"), answer("  user"), user("y"), answer("\n\nuser")])
    example = template.encode(sample, "response", where="r")
    supervised = tokenizer.decode(example.ids[example.trained])
    assert supervised == "  user<|im_end|>\n\nuser<|im_end|>"
    # With the last answer alone, what stands before it is what generation is given.
    example = template.encode(sample, "last", where="r")
    prompt = template.prompt(sample)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.trained.tolist()[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_our_blocks_and_theirs_agree() -> None:
    """Where a {% generation %} block holds the answer and its end token alone, Transformers' own
    mask is the same.
    """
    jinja = (TEMPLATES / "tagged.jinja").read_text(encoding="utf-8")
    jinja = jinja.replace(
        "{{ message.content ~ '<|im_end|>\\n' }}{%- endgeneration -%}",
        "{{ message.content ~ '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}",
    )
    tokenizer = train("bytes", ("<|im_start|>", "<|im_end|>"), False)
    template = Template(tokenizer, {tokenizer.eos_token_id}, jinja=jinja, name="tagged")
    compared = 0
    for _, messages, tools in conversations():
        if FORMS["tagged"][0](messages, tools) is None:
            continue
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=jinja, return_assistant_tokens_mask=True
        )
        example = template.encode(Conversation(messages), "response", where="r")
        if example.ids.tolist() != theirs["input_ids"]:
            # A token lies across the start of an answer: theirs takes it in, ours are two.
            whole = tokenizer.decode(theirs["input_ids"])
            assert tokenizer.decode(example.ids) == whole
            continue
        assert example.trained.tolist() == [bool(x) for x in theirs["assistant_masks"]]
        compared += 1
    assert compared >= 20


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
        "🎉",
        "ה",
        "好",
        "<",
        "user",
        "assistant\n",
        "zq0W",
        "{{",
        "|>",
    ]
)
CONTENT = st.lists(WORDS | st.text(max_size=3), max_size=6).map("".join)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *((form, "bytes") for form in ("chatml", "phi", "tagged")),
        *((form, "pieces") for form in ("llama3", "gemma", "mistral", "qwen3")),
    ],
)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
def test_any_words_in_any_turn(form: str, kind: str, turns: list[tuple[str, str]]) -> None:
    tokenizer = tokenizer_for(form, kind, None)
    write, end, *_ = FORMS[form]
    messages = [message for asked, said in turns for message in (user(asked), answer(said))]
    segments = write(messages, None)
    assert segments is not None
    core = exact(tokenizer)
    ids, mask, _ = expected(core, segments, end)
    example = template_for(form, tokenizer).encode(
        Conversation(messages), "response", where="row 1"
    )
    assert_same(example, ids, mask, core, f"{form}: {messages}")


def test_a_date_in_the_template_stands_still() -> None:
    """Rendered on another day, the same row gives the same tokens, and the saved template writes
    the same date.
    """
    from tunesmith.data.text.builtin_templates import with_fixed_date

    llama = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}|{{ strftime_now ( \"%Y\" ) }}"
    fixed = with_fixed_date(llama)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = fixed
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        == "26 Jul 2024|2024"
    )
    with pytest.raises(DataError, match="today's date"):
        with_fixed_date("{{ strftime_now(format) }}")
