"""Where each stored template writes a thought, what it writes without one, and what its prompt holds.

A cell is a template, a setting of its argument for thoughts, and a form of the row's thought. The
texts of some templates are in thoughts.json; the others are compared with Transformers' rendering.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pytest
from test_supervised_text import LOST, WITHOUT_PROMPT

from chat_table import answer, thinks, user
from stored_templates import (
    LLAMA_CPP,
    Message,
    all_template_names,
    encode,
    encoder_of,
    supervised_texts,
    tokenizer_of,
)
from tunesmith.answers.scoring.rows import make_scored_row
from tunesmith.errors import DataError
from tunesmith.rows.samples import Completion, Conversation
from tunesmith.tokens.text.template_args import names_of_arguments

WRITTEN = json.loads((Path(__file__).parent / "thoughts.json").read_text(encoding="utf-8"))
ANSWERS = json.loads((Path(__file__).parent / "thought_answers.json").read_text(encoding="utf-8"))
ASKED = "Tell of bread."
THOUGHT, TEXT = "I think about bread.", "Bread is good."
ROWS: dict[str, Message] = {
    "none": answer(TEXT),
    "field": thinks(THOUGHT, TEXT),
    "text": answer(f"<think>\n{THOUGHT}\n</think>\n\n{TEXT}"),
    "empty": answer(f"<think>\n\n</think>\n\n{TEXT}"),
}
# The argument that switches thoughts, and its values for on and off.
SWITCHES = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning": (True, False),
    "thinking_mode": ("enabled", "disabled"),
}
# Arguments without which a template writes no end after the last answer.
FOR_TRAINING = {
    "llama.cpp/tencent-Hy3": {"is_training": True},
    "llama.cpp/Apriel-1.6-15b-Thinker-fixed": {"training_prompt": True},
}
# Its prompt has words that no row can write; an answer has no end; or today's date is in the prompt.
NOT_COMPARED = {
    "llama.cpp/Apriel-1.6-15b-Thinker-fixed",
    "llama.cpp/llama-cpp-rwkv-world",
    "llama.cpp/upstage-Solar-Open-100B",
}
CLOSING = re.compile(
    r"</[a-z:]*think[a-z:]*>|</thinking>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>"
)
WITHOUT = re.compile(
    r"<[a-z:]*think[a-z:]*>|<thinking>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought"
    r"|\s+|Here are my reasoning steps:"
)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial takes a process of its own for each template."""
    monkeypatch.setattr("tunesmith.tokens.text.select_template.try_template", lambda *_: None)


def cells(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Setting, its arguments, and the name of a row."""
    tokenizer = tokenizer_of(name)
    names = names_of_arguments(tokenizer.chat_template, tokenizer.special_tokens_map)
    settings = [("default", FOR_TRAINING.get(name, {}))]
    for switch in [switch for switch in SWITCHES if switch in names][:1]:
        for setting, value in zip(("on", "off"), SWITCHES[switch], strict=True):
            settings.append((setting, {**settings[0][1], switch: value}))
    for setting, arguments in settings:
        yield from ((setting, arguments, kind) for kind in ROWS)


def trained(name: str, arguments: dict[str, Any], row: Message) -> tuple[str, str]:
    """(the text between the question and the answer, all of the answer that is supervised)"""
    encoder = encoder_of(name, **arguments)
    encoded = encode(encoder, {"messages": [user(ASKED), row]})
    supervised = "".join(supervised_texts(encoder.template, encoded))
    whole = tokenizer_of(name).decode(encoded.example.ids)
    before, found, after = whole.rpartition(supervised)
    assert found
    assert not LOST.intersection(encoded.warnings)
    return before.rpartition(ASKED)[2], supervised + after


def applied(
    fix: str, arguments: dict[str, Any], kind: str
) -> Iterator[tuple[dict[str, Any], Message]]:
    """Arguments and row after each part of a fix."""
    row = ROWS[kind]
    for part in fix.split("; or "):
        if found := re.fullmatch(r"set data\.template_args\.(\w+)=(.*)", part):
            yield {**arguments, found[1]: json.loads(found[2])}, row
        elif found := re.fullmatch(r"(?:begin the answer|write the thought).*?: (\".*\")", part):
            start = json.loads(found[1]).replace("\n...\n", f"\n{THOUGHT}\n")
            yield arguments, answer(start.removesuffix("...") + TEXT)
        elif part == "remove the thought from the answer":
            yield arguments, ROWS["none"]


def bare(text: str) -> str:
    """A text without the thought, its tags and white space."""
    return WITHOUT.sub("", CLOSING.sub("", text.replace(THOUGHT, "")))


def check(name: str, setting: str, arguments: dict[str, Any], kind: str) -> str:
    """Compare a cell with Transformers' rendering. Return what became of it."""
    apply = partial(tokenizer_of(name).apply_chat_template, tokenize=False, **arguments)
    try:
        asked = apply([user(ASKED)], add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError):
        return "rejected by Transformers"
    own = []
    for row in (ROWS[kind], ROWS["none"], {**ROWS["field"], "thinking": THOUGHT}):
        with suppress(jinja2.TemplateError, TypeError):
            own.append(apply([user(ASKED), row]))
    is_closed = bool(CLOSING.search(asked.rpartition(ASKED)[2]))
    opens = asked.rstrip().endswith(("<think>", "<mm:think>", "<|START_THINKING|>"))
    can_write = not is_closed and (opens or THOUGHT in own[-1])
    counted = "can write" if can_write else "cannot write"
    try:
        before, text = trained(name, arguments, ROWS[kind])
    except DataError as error:
        fix = error.fix
    else:
        has_thought = kind in ("field", "text")
        assert before == asked.rpartition(ASKED)[2]
        assert (before + text).count(THOUGHT) == has_thought
        assert len(CLOSING.findall(before + text.partition(TEXT)[0])) <= 1, (before, text)
        assert not (has_thought and is_closed), (before, text)
        assert any(bare(asked + text).startswith(bare(each)) for each in own), (text, own)
        return f"equal, {counted}"
    fixes = list(applied(fix, arguments, kind))
    for fixed_arguments, row in fixes:
        trained(name, fixed_arguments, row)
    assert not can_write or (fixes and opens), fix
    return f"refused, {counted}, {'with a fix' if fixes else 'no fix'}"


@pytest.mark.parametrize(
    "name", [n for n in WRITTEN if LLAMA_CPP.is_file() or "llama.cpp" not in n]
)
def test_the_texts_of_a_template_are_those_written_down(name: str) -> None:
    written = WRITTEN[name]
    for setting, arguments, kind in cells(name):
        (forms,) = [written[key] for key in written if setting in key.split()]
        (expected,) = [forms[key] for key in forms if kind in key.split()]
        if isinstance(expected, str):
            with pytest.raises(DataError) as caught:
                trained(name, arguments, ROWS[kind])
            assert expected in caught.value.fix, (setting, kind)
            for fixed_arguments, row in applied(caught.value.fix, arguments, kind):
                trained(name, fixed_arguments, row)
            continue
        prompt, text = (part.replace("THOUGHT", THOUGHT).replace("TEXT", TEXT) for part in expected)
        found = trained(name, arguments, ROWS[kind])
        assert found[0] == written["head"] + prompt, (setting, kind)
        assert found[1].startswith(text + written["end"]), (setting, kind, found)


@pytest.mark.parametrize(
    "name", [n for n in ANSWERS if LLAMA_CPP.is_file() or "llama.cpp" not in n]
)
def test_scorers_compare_what_follows_the_thought(name: str) -> None:
    """And a row that is a prompt needs only the generation prompt, though its own answer is refused."""
    template = copy.copy(encoder_of(name).template)
    template.samples_answers = True
    for found, compared in ANSWERS[name].items():
        assert template.final_answer(found)[0] == compared
    for row in (answer("14"), thinks("7 + 7", "14"), answer("<think>\n7 + 7\n</think>\n\n14")):
        sample = Conversation([user(ASKED), row])  # type: ignore[list-item]
        assert make_scored_row(template, sample, {}, "rows.jsonl:1").reference == "14"
    asked = Completion(ASKED, "")
    example = template.encode(asked, "last", where="rows.jsonl:1")
    assert example.ids[: example.prompt_length].tolist() == template.prompt(asked)


@pytest.mark.skipif(not LLAMA_CPP.is_file(), reason="needs the templates of llama.cpp")
@pytest.mark.parametrize("system", ["/no_think", "You are kind. /no_think"])
def test_an_empty_thought_is_written_once_where_only_a_system_message_closes_it(system) -> None:
    encoder = encoder_of("llama.cpp/HuggingFaceTB-SmolLM3-3B")
    row = [{"role": "system", "content": system}, user(ASKED), ROWS["empty"]]
    encoded = encode(encoder, {"messages": row})
    assert "".join(supervised_texts(encoder.template, encoded)) == f"{TEXT}<|im_end|>"


@pytest.mark.nightly
def test_all_templates_render_thoughts_as_transformers_does() -> None:
    counts: Counter[str] = Counter()
    for name in sorted(set(all_template_names()) - WITHOUT_PROMPT - NOT_COMPARED):
        for setting, arguments, kind in cells(name):
            counts[check(name, setting, arguments, kind)] += 1
    can_write = {key: n for key, n in counts.items() if "can write" in key}
    refused = sum(n for key, n in can_write.items() if key.startswith("refused"))
    assert sum(counts.values()) > 1000
    assert refused <= 0.1 * sum(can_write.values())
