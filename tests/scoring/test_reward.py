"""The reward of an answer is the weighted sum of its scores, also those of tool calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config.schema import MethodConfig
from tunesmith.data.rows.samples import Conversation
from tunesmith.inference.load_run import load_run
from tunesmith.scoring.reward import Reward
from tunesmith.scoring.rows import make_scored_row
from tunesmith.scoring.scorers import RewardedAnswer

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
