"""The reward of an answer is the weighted sum of its scores, also those of tool calls."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import refuses
from tunesmith.answers.load_run import load_run
from tunesmith.answers.scoring.process import ScorerProcess
from tunesmith.answers.scoring.reward import Reward
from tunesmith.answers.scoring.rows import make_scored_row
from tunesmith.answers.scoring.scorers import RewardedAnswer, ScoredRow
from tunesmith.config.schema import MethodConfig
from tunesmith.errors import DataError
from tunesmith.rows.samples import Conversation
from tunesmith.start.rewards import reward_digest

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.slow
def test_scores_are_weighted_and_tool_calls_are_read(tiny: Path) -> None:
    template = load_run(tiny).template
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Call"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    row = make_scored_row(template, Conversation(messages, [TOOL]), {}, "rows.jsonl:1")  # type: ignore[arg-type]
    assert row is not None
    other = row.raw_reference.replace("1", "2")
    answers = [
        RewardedAnswer(row.reference, row.raw_reference, row),
        RewardedAnswer(other, other, row),
        RewardedAnswer(row.reference, "no call", row),  # `exact` reads the text
    ]
    method = MethodConfig(name="grpo", reward=("tool-call", "exact"), reward_weights=(1.0, 0.5))
    with Reward(method, template) as reward:
        rewards, scores = reward.of(answers)
    assert rewards.tolist() == [1.5, 0.0, 0.5]
    assert scores[2] == {"tool-call": 0.0, "exact": 1.0}


FUNCTIONS = """
from beside import tenfold

async def graded(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, truth, **columns):
    log_metric("step", trainer_state.global_step)
    log_extra("ids", [len(ids) for ids in completion_ids])
    log_extra("text", completions)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if text == "?" else tenfold(text == t) for text, t in zip(texts, truth, strict=True)]

def short(answer, row): return row["finished"] - row["answer_tokens"]
def best(completions): return [max(map(len, completions)) == len(c) for c in completions]
"""


@pytest.mark.parametrize("prompt", ["Say a", [{"role": "user", "content": "Say a"}]])
def test_functions_get_the_group_and_their_rewards_are_added(
    prompt: object, tmp_path: Path
) -> None:
    (tmp_path / "beside.py").write_text("def tenfold(x): return 10 * x\n")
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    names = [f"{tmp_path / 'mine.py'}:{name}" for name in ("graded", "short", "best")]
    first, second = (ScoredRow("", "", {"truth": "a"}, "rows:1", prompt=prompt) for _ in range(2))
    answers = [
        RewardedAnswer("a", "a", first, [5], True),
        RewardedAnswer("bb", "bb", first, [5, 6], False),
        RewardedAnswer("?", "?", second, [5], True),
    ]
    method = MethodConfig(name="grpo", reward=tuple(names), reward_weights=(1.0, 0.5, 0.0))
    with Reward(method, None) as reward:  # type: ignore[arg-type]
        values, scores = reward.of(answers, state={"global_step": 7})
    assert values.tolist() == [10.0, -1.0, 0.0]
    # Completions of a chat are lists with one message.
    best = 0.0 if isinstance(prompt, str) else 1.0
    assert scores == [
        {"step": 7, "ids": 1, "graded": 10, "short": 0, "best": best},
        {"step": 7, "ids": 2, "graded": 0, "short": -2, "best": 1},
        {"step": 7, "ids": 1, "short": 0, "best": 1},
    ]
    # An answer that no function rewards gets the mean of the other answers to its row.
    answers[2] = answers[2]._replace(row=first)
    with Reward(replace(method, reward=names[0], reward_weights=()), None) as reward:  # type: ignore[arg-type]
        assert reward.of(answers)[0].tolist() == [10.0, 0.0, 5.0]


def test_a_resumed_run_notices_a_changed_import_of_its_scorer(tmp_path: Path) -> None:
    run = SimpleNamespace(method=MethodConfig(reward=f"{tmp_path / 'mine.py'}:do"))
    (tmp_path / "mine.py").write_text("def do(answer, row):\n from beside import x\n return x\n")
    (tmp_path / "beside.py").write_text("import json, numpy\nimport deeper.one\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "__init__.py").touch()
    (tmp_path / "unused.py").touch()
    digests = []
    for changed in ("deeper/one.py", "deeper/__init__.py", "beside.py", "mine.py", "unused.py"):
        (tmp_path / changed).write_text(
            (tmp_path / changed).read_text() + "x = 1\n" if (tmp_path / changed).exists() else ""
        )
        digests.append(reward_digest(run))  # type: ignore[arg-type]
    assert digests[3] == digests[4]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("columns", "is_refused"),
    [({"reference": "b"}, True), ({"reference": "a"}, False), ({"finished": "never"}, False)],
)
def test_a_column_of_the_row_is_not_replaced(
    columns: dict[str, object], is_refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def do(answer, row): return row['finished'] == 'never'\n")
    row = ScoredRow("a", "a", columns, "rows:1")
    with ScorerProcess([f"{tmp_path / 'mine.py'}:do"]) as process:
        with (
            refuses(DataError, where="rows:1", names=["reference"]) if is_refused else nullcontext()
        ):
            process.check(process.names[0], row)
        found = process.score(process.names[0], [RewardedAnswer("a", "a", row)])
    assert found == [{"do": float("finished" in columns)}]
