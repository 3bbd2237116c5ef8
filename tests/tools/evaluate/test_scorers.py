"""Each scorer against a table made by hand (cases.jsonl): scorer, answer, reference, score, schema."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from time_limit import time_limit
from tunesmith.errors import DataError, MachineError, RunError, UsageError
from tunesmith.tools.evaluate import json_fields, scorers
from tunesmith.tools.evaluate.scorers import (
    SCORERS,
    ScoredRow,
    check_scorer_names,
    find_scorer,
    score_answer,
)
from tunesmith.tools.evaluate.tool_calls import CALL_PROBE, CallReader, learn_call_form

CASES = [json.loads(line) for line in Path(__file__).with_name("cases.jsonl").open()]

# CALL_PROBE as the templates of these families write it
_TOWN, _RIVER = CALL_PROBE.arguments.items()
_JSON = json.dumps(CALL_PROBE.arguments)
RENDERINGS = {
    "hermes": f'<think>\n\n</think>\n\n<tool_call>\n{{"name": "{CALL_PROBE.name}", "arguments": {_JSON}}}\n</tool_call>',
    "llama3": f'{{"name": "{CALL_PROBE.name}", "parameters": {_JSON}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "{CALL_PROBE.name}", "arguments": {_JSON}, "id": "call00001"}}]',
    "qwen-coder": f"<tool_call>\n<function={CALL_PROBE.name}>\n<parameter={_TOWN[0]}>\n{_TOWN[1]}\n</parameter>\n"
    f"<parameter={_RIVER[0]}>\n{_RIVER[1]}\n</parameter>\n</function>\n</tool_call>",
    "glm": f"\n<think></think>\n<tool_call>{CALL_PROBE.name}\n<arg_key>{_TOWN[0]}</arg_key>\n<arg_value>{_TOWN[1]}</arg_value>\n"
    f"<arg_key>{_RIVER[0]}</arg_key>\n<arg_value>{_RIVER[1]}</arg_value>\n</tool_call>",
    "gpt-oss": f" to=functions.{CALL_PROBE.name}<|channel|>commentary json<|message|>{_JSON}<|call|>",
    "gemma": f'<|tool_call>call:{CALL_PROBE.name}{{{_RIVER[0]}:<|"|>{_RIVER[1]}<|"|>,{_TOWN[0]}:<|"|>{_TOWN[1]}<|"|>}}<tool_call|>',
    "python": f"<|tool_call_start|>[{CALL_PROBE.name}({_TOWN[0]}='{_TOWN[1]}', {_RIVER[0]}='{_RIVER[1]}')]<|tool_call_end|>",
}


def reader(family: str) -> CallReader:
    learned = learn_call_form(RENDERINGS[family])
    assert learned is not None, family
    return learned


def row(reference: str, raw: str | None = None, **more: Any) -> ScoredRow:
    fields = {"row": {}, "where": "held.jsonl:3", "has_tools": True, **more}
    return ScoredRow(reference, reference if raw is None else raw, **fields)


def test_the_table_has_cases_of_every_scorer() -> None:
    counts = Counter(name.partition(":")[0] for name, *_ in CASES)
    assert set(counts) == set(SCORERS)
    assert min(counts.values()) >= 25
    assert sum(counts.values()) >= 200
    assert len({json.dumps(case) for case in CASES}) == len(CASES)
    assert {name.partition(":")[2] for name, *_ in CASES} - {""} == set(RENDERINGS)


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES}))
def test_scores_are_those_of_the_table(name: str) -> None:
    """Equal to 1e-12: sums of few floats."""
    kind, _, family = name.partition(":")
    read = reader(family) if family else None
    scorer = find_scorer(kind, read)
    wrong = []
    for case, answer, reference, expected, *schema in CASES:
        if case != name:
            continue
        calls = len(read(reference)) if read else 0
        scored = row(reference, calls=calls, row={"schema": schema[0]} if schema else {})
        scorer.check(scored)
        score = score_answer(scorer, answer, scored)
        if score != pytest.approx(float(Fraction(expected)), abs=1e-12):
            wrong.append((answer, reference, expected, score))
    assert wrong == []


@pytest.mark.nightly
def test_templates_of_the_field_are_read_back() -> None:
    """TRL ships the templates of many families: what they write is read, several calls and nested
    arguments too.
    """
    trl = pytest.importorskip("trl")
    from transformers.utils.chat_template_utils import render_jinja_template

    from tunesmith.tools.evaluate.tool_calls import PROBE_TOOL, ToolCall

    nested = {"place": 'Oslo, "NO"', "days": 3, "deep": {"a": [1, True, None]}}
    calls = [ToolCall("weather.get", nested), ToolCall("time_now", {})]

    def render(jinja: str, called: list[ToolCall]) -> str:
        def text_of(messages: list[dict[str, Any]], generate: bool) -> str:
            options = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": generate}
            done, _ = render_jinja_template(
                [messages], chat_template=jinja, tools=[PROBE_TOOL], **options
            )
            return done[0]

        question = {"role": "user", "content": "Q"}
        functions = [{"name": call.name, "arguments": call.arguments} for call in called]
        turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "call00001", "function": f} for f in functions]}  # fmt: skip
        prompt, whole = text_of([question], True), text_of([question, turn], False)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
        return whole[len(list(same)) :]

    learned = []
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        jinja = path.read_text()
        try:
            rendering = render(jinja, [CALL_PROBE])
        except Exception:  # the template takes messages of another form
            continue
        if CALL_PROBE.name not in rendering:
            continue
        read = learn_call_form(rendering)
        assert read is not None, (path.name, rendering)
        for some in (calls[:1], calls[1:], calls):
            try:
                text_of_calls = render(jinja, some)
            except Exception:  # one call a turn
                assert len(some) == 2, path.name
                continue
            if all(call.name in text_of_calls for call in some):
                assert read(text_of_calls) == some, (path.name, text_of_calls)
        learned.append(path.name)
    assert len(learned) >= 20, learned


def test_a_template_without_a_form_that_is_known_is_refused() -> None:
    assert learn_call_form("assistant calls nothing") is None
    assert learn_call_form(f"call {CALL_PROBE.name} with {_TOWN[1]} and {_RIVER[1]}") is None
    with refuses(UsageError, where="--score tool-call"):
        find_scorer("tool-call", None)


BAD_ROWS = [
    ("regex", row("(a"), "not a regular expression", "missing )"),
    ("regex", row("*"), "not a regular expression", "nothing to repeat"),
    ("json", row("Oslo"), "the reference answer is not JSON", "--score json"),
    ("json", row('{"a": NaN}'), "the reference answer is not JSON", "NaN"),
    ("json", row("[" * 100_000), "the reference answer is not JSON", "nested"),
    ("json", row("1", row={"schema": {"type": "nothing"}}), "not a JSON schema", "nothing"),
    ("json", row("1", row={"schema": "{"}), "not a JSON schema", "line 1"),
    ("json", row("1", row={"schema": "3"}), "not a JSON schema", "not an object"),
    ("json", row("1", row={"schema": {"$ref": "#/$defs/a"}}), "not a JSON schema", "$defs"),
    ("json", row("1", row={"schema": {"$ref": "https://example.com/s.json"}}), "not a JSON schema", "example.com"),
    ("json", row("1", row={"schema": {"$ref": "#"}}), "not a JSON schema", "recursion"),
    ("json", row("1", row={"schema": {"type": "string"}}), "does not match the row's schema", "'string'"),
    ("json", row('"a"', row={"schema": {"pattern": "("}}), "not a JSON schema", "regex"),
    ("json", row('"a"', row={"schema": {"$ref": "#/x", "x": {"pattern": "("}}}), "not a JSON schema", "missing )"),
    ("json", row('{"a": 1}', row={"schema": {"$ref": "#/x", "x": {"patternProperties": {"(": {}}}}}), "not a JSON schema", "missing )"),
    ("json", row('"a"', row={"schema": {"$ref": "#/x", "x": {"pattern": "a{99999999999}"}}}), "not a JSON schema", "repetition number"),
    ("json", row('"a"', row={"schema": {"pattern": "a{99999999999}"}}), "not a JSON schema", "repetition number"),
    ("contains", row(" \n"), "the reference answer is blank", "every answer"),
    ("regex", row(""), "the reference answer is blank", "every answer"),
    ("tool-call", row("dry", has_tools=False), "the row has no tools", "--score tool-call"),
    ("tool-call", row("dry", calls=1), "cannot be parsed", "the row has 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "what", "why"), BAD_ROWS)
def test_a_row_that_cannot_be_scored_is_named(
    name: str, bad: ScoredRow, what: str, why: str
) -> None:
    scorer = find_scorer(name, reader("hermes"))
    with pytest.raises(DataError, match=what) as refused:
        scorer.check(bad)
    assert refused.value.where.startswith("held.jsonl:3")
    assert why in refused.value.why
    assert refused.value.fix


def test_what_an_answer_does_is_a_score_and_no_error() -> None:
    """Answers come from a model: they may be anything."""
    odd = [
        "", "\0", "{" * 100_000, "[" * 100_000, '{"a":' * 20_000, "9" * 5000, "\ud800", "<tool_call>" * 1000,
        "[TOOL_CALLS]", "f(" * 10_000, "-" * 10_000 + "1", "1" + "+1" * 30_000, "<|tool_call_start|>[" + "(" * 5000,
    ]  # fmt: skip
    scored = [find_scorer(name) for name in SCORERS if name not in ("regex", "tool-call")]
    for scorer in (*scored, *(find_scorer("tool-call", reader(family)) for family in RENDERINGS)):
        for answer in odd:
            assert 0 <= score_answer(scorer, answer, row("1")) <= 1


SLOW = r"^(a|aa)+$(?<!b)c|^(\w|\w\w)+\d$"
ENDLESS = """
import time
def spins(answer, row):
    while True: pass
def sleeps(answer, row): time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("name", "answer", "endless"),
    [
        ("regex", "a" * 60 + "b", row(SLOW)),
        ("json", '{"' + "a" * 60 + 'b": 1}', row("{}", row={"schema": {"patternProperties": {"^(a+)+$": {}}}})),
        ("json", None, row('"' + "a" * 60 + 'b"', row={"schema": {"pattern": "^(a+)+$"}})),
        ("endless.py:spins", "a", row("a")),
        ("endless.py:sleeps", "a", row("a")),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_scorer_without_end_is_killed(
    name: str,
    answer: str | None,
    endless: ScoredRow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("endless.py").write_text(ENDLESS)
    for limit in ("SCORER_SECONDS", "OWN_SCORER_SECONDS"):
        monkeypatch.setattr(scorers, limit, 0.2)
    kind = DataError if answer is None else RunError
    with (
        time_limit(30),
        scorers.scorer_process([name], None) as run_scorer,
        refuses(kind, where="held.jsonl:3", names=[name, "0.2 seconds"]),
    ):
        run_scorer(name, answer, endless)


def test_a_scorer_in_its_process_scores_as_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = f"{tmp_path / 'mine.py'}:loud"
    Path(tmp_path / "mine.py").write_text(
        "def loud(answer, row):\n    print('loud')\n    return answer == row['reference']\n"
    )
    called = row('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', calls=1)
    names = ["exact", own, "tool-call"]
    with scorers.scorer_process(names, reader("hermes")) as run_scorer:
        for name in names:
            run_scorer(name, None, called)
        assert [run_scorer(name, called.reference, called) for name in names] == [1, 1, 1]
        assert [run_scorer(name, "", called) for name in names] == [0, 0, 0]
    assert capfd.readouterr() == ("", "loud\n" * 2), "stdout is for results"


def test_a_schema_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MachineError, match="jsonschema") as refused:
        json_fields.schema_validator({"type": "object"})
    assert "pip install 'jsonschema>=" in refused.value.fix


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from pydantic import BaseModel

@dataclass
class Rule:  # looks its module up
    word: str

class Reply(BaseModel):  # looks its module up when it is first made
    parts: list[Part]

class Part(BaseModel):
    text: str

def modelled(answer, row): return float(len(Reply(parts=[{"text": answer}]).parts))

def length(answer, row):
    row["changed"] = True
    return len(answer) / len(row["reference"])

def nothing(answer, row): return None
def too_much(answer, row): return 1.5
def not_a_number(answer, row): return float("nan")
def fails(answer, row): return row["missing"]
def leaves(answer, row): raise SystemExit(0)
number = 3
"""


def test_a_scorer_of_ones_own_gets_answer_and_row(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    scored = row("abcd")
    for function, score in (("length", 0.5), ("modelled", 1)):
        assert score_answer(find_scorer(f"{file}:{function}"), "ab", scored) == score
        assert scored.row == {}


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("nothing", "None"),
        ("too_much", "1.5"),
        ("not_a_number", "nan"),
        ("fails", "KeyError: 'missing' (mine.py:"),
        ("leaves", "SystemExit: 0"),
    ],
)
def test_what_a_scorer_of_ones_own_does_wrong_names_the_row(
    tmp_path: Path, function: str, why: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    scorer = find_scorer(f"{file}:{function}")
    with refuses(RunError, where="held.jsonl:3") as failed:
        score_answer(scorer, "ab", row("abcd"))
    assert why in failed.value.why
    assert failed.value.fix


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("accuracy", None, "there is no scorer accuracy"),
        ("mine.py:", "", "there is no scorer"),
        ("mine.py:a b", "", "there is no scorer"),
        ("other.py:length", None, "there is no file"),
        ("mine.py:missing", OWN, "no function missing"),
        ("mine.py:number", OWN, "no function number"),
        ("mine.py:length", "def length(", "cannot be loaded"),
        ("mine.py:length", "raise SystemExit(3)", "cannot be loaded"),
        ("mine.py:length", "import no_such_package", "cannot be loaded"),
    ],
)
def test_a_scorer_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("mine.py").write_text(content)
    with pytest.raises(UsageError, match=what) as refused:
        find_scorer(name)
    assert name in f"{refused.value.where} {refused.value.what}"
    assert refused.value.fix
    if "loaded" not in what and "function" not in what:
        with pytest.raises(UsageError, match=what):
            check_scorer_names([name])
