"""Each scorer against a table made by hand (cases.jsonl): scorer, answer, reference, score, schema."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.answers.scoring.own_scorers import load_own_scorer
from tunesmith.answers.scoring.scorers import (
    SCORERS,
    RewardedAnswer,
    ScoredRow,
    find_scorer,
    score_answer,
)
from tunesmith.answers.scoring.tool_calls import CALL_PROBE, CallReader, learn_call_form
from tunesmith.errors import DataError, RunError, UsageError

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


def test_a_template_without_a_form_that_is_known_is_refused() -> None:
    assert learn_call_form("assistant calls nothing") is None
    assert learn_call_form(f"call {CALL_PROBE.name} with {_TOWN[1]} and {_RIVER[1]}") is None
    with refuses(UsageError, where="--score tool-call"):
        find_scorer("tool-call", None)


BAD_ROWS = [
    ("regex", row("(a"), "missing )"),
    ("regex", row(""), "every answer"),
    ("contains", row(" \n"), "every answer"),
    ("json", row("Oslo"), "--score json"),
    ("json", row('{"a": NaN}'), "NaN"),
    ("json", row("[" * 100_000), "nested"),
    ("json", row("1", row={"schema": {"type": "nothing"}}), "nothing"),
    ("json", row("1", row={"schema": "{"}), "line 1"),
    ("json", row("1", row={"schema": "3"}), "not an object"),
    ("json", row("1", row={"schema": {"$ref": "https://example.com/s.json"}}), "example.com"),
    ("json", row("1", row={"schema": {"$ref": "#"}}), "recursion"),
    ("json", row("1", row={"schema": {"type": "string"}}), "'string'"),
    ("json", row('"a"', row={"schema": {"$ref": "#/x", "x": {"pattern": "("}}}), "missing )"),
    ("json", row('"a"', row={"schema": {"pattern": "a{99999999999}"}}), "repetition number"),
    ("tool-call", row("dry", has_tools=False), "--score tool-call"),
    ("tool-call", row("dry", calls=1), "the row has 1"),
]


@pytest.mark.parametrize(("name", "bad", "why"), BAD_ROWS)
def test_a_row_that_cannot_be_scored_is_named(name: str, bad: ScoredRow, why: str) -> None:
    with pytest.raises(DataError) as refused:
        find_scorer(name, reader("hermes")).check(bad)
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


OWN = """
from __future__ import annotations
from pydantic import BaseModel

class Reply(BaseModel):  # looks its module up when it is first made
    parts: list[Part]

class Part(BaseModel):
    text: str

def modelled(answer, row): return float(len(Reply(parts=[{"text": answer}]).parts))

def length(answer, row):
    row["changed"] = True
    return len(answer) / len(row["reference"])

def nothing(answer, row): return None
def not_a_number(answer, row): return float("nan")
def fails(answer, row): return row["missing"]
def leaves(answer, row): raise SystemExit(0)
number = 3
"""


def own_score(name: str, answer: str, scored: ScoredRow) -> float:
    [scores] = load_own_scorer(name).scores([RewardedAnswer(answer, answer, scored)], {}, 1)
    return scores[name.rpartition(":")[2]]


def test_a_scorer_of_ones_own_gets_answer_and_row_and_its_faults_name_the_row(
    tmp_path: Path,
) -> None:
    file, scored = tmp_path / "mine.py", row("abcd")
    file.write_text(OWN)
    for function, score in (("length", 0.5), ("modelled", 1)):
        assert own_score(f"{file}:{function}", "ab", scored) == score
        assert scored.row == {}
    faults = {"nothing": "None", "not_a_number": "nan", "leaves": "SystemExit: 0"}
    for function, why in (faults | {"fails": "KeyError: 'missing' (mine.py:"}).items():
        with refuses(RunError, where="held.jsonl:3") as failed:
            own_score(f"{file}:{function}", "ab", scored)
        assert why in failed.value.why
        assert failed.value.fix


def test_the_last_number_of_an_answer_is_rewarded() -> None:
    scorer = f"{Path(__file__).parents[2] / 'recipes' / 'rewards.py'}:last_number"
    reference = row("She has 3 * 4 = <<3*4=12>>12 and 1,200 more.\n#### 1,212")
    for answer, score in (
        ("1212", 1), ("so 5, no: 1,212.0.", 1), ("1212 is 7", 0), ("none", 0), ("-1212", 0), ("", 0)
    ):  # fmt: skip
        assert own_score(scorer, answer, reference) == score
    assert own_score(scorer, "3", row("no number")) == 0
