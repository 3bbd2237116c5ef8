"""Prompts as turns, from the texts that templates leave."""

from __future__ import annotations

import pytest

from tunesmith.metrics.conversations import Turn, conversations_of, turns_of, whole_characters


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        # ChatML and Gemma
        (
            "system\nBe kind.\nuser\nHi 🚲\n\nthere\nassistant\nHello\n",
            [("system", "Be kind."), ("user", "Hi 🚲\n\nthere"), ("assistant", "Hello")],
        ),
        ("user\nSay 0\nmodel\n", [("user", "Say 0")]),
        # Qwen 3 without thinking
        ("user\nSay 0\nassistant\n<think>\n\n</think>\n\n", [("user", "Say 0")]),
        # Llama 3: the role stands right behind the turn before
        (
            "system\n\nBe kind.user\n\nWho is a user\n\nhere?assistant\n\n",
            [("system", "Be kind."), ("user", "Who is a user\n\nhere?")],
        ),
        # A role of rows that no template writes is what somebody says
        ("user\nCall the\nfunction\nnow\nassistant\n", [("user", "Call the\nfunction\nnow")]),
        # No roles, as of Mistral
        ("Say user 0", [("user", "Say user 0")]),
    ],
)
def test_the_turns_of_a_prompt(prompt: str, turns: list[tuple[str, str]]) -> None:
    assert turns_of(prompt) == [Turn(*turn) for turn in turns]


def test_a_system_prompt_of_all_is_taken_out_and_one_of_some_is_not() -> None:
    same = [f"system\nBe kind.\nuser\n{number}\nassistant\n" for number in range(2)]
    conversations, system = conversations_of(same)
    assert system == "Be kind."
    assert [*conversations.values()] == [[Turn("user", "0")], [Turn("user", "1")]]
    conversations, system = conversations_of([*same, "user\n2\nassistant\n"])
    assert system == ""
    assert conversations[same[0]][0] == Turn("system", "Be kind.")
    assert conversations_of([]) == ({}, "")


def test_half_an_emoji_at_the_end_is_not_shown() -> None:
    assert whole_characters("bike 🚲\ufffd") == "bike 🚲"
