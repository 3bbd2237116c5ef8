"""Import of TRL's GRPO. Its reward functions become scorers in a file next to the recipe."""

import os
from pathlib import Path

from tunesmith.tools.importers.translation import Translation

# Reward functions of TRL that have short names.
_TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
# Length of a prompt in tokens if the file has no limit.
_USUAL_PROMPT_TOKENS = 1024
_SCORER_FILE = '''"""Scorers that call reward functions for TRL. Written by `tunesmith import`.

A score is from 0 to 1. If a reward function returns other numbers, scale them in its scorer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def call(reward, answer, row):
    """Call a reward function with lists of one element, as TRL does for one answer."""
    prompt = row.get("prompt")
    is_text = isinstance(prompt, str)
    completion = answer if is_text else [{"role": "assistant", "content": answer}]
    columns = {name: [row[name]] for name in row if name not in ("prompt", "completion")}
    rewards = reward(prompts=[prompt], completions=[completion], **columns)
    return 0.0 if rewards[0] is None else float(rewards[0])
'''
_SCORER = """

from {module} import {function} as _{name}


def {name}(answer, row):
    return call(_{name}, answer, row)
"""


def set_rewards(recipe: Translation, wrapper: Path) -> None:
    """Set the scorers, and the length of a row.

    Raise UsageError if a reward function cannot be imported.

    Args:
        wrapper: file of the scorers, which calls TRL's functions. Its text is added to
            `recipe.files`.
    """
    limit = recipe.number("max_prompt_length")
    why = (
        ""
        if limit
        else f"The source does not limit prompts; {_USUAL_PROMPT_TOKENS} tokens are assumed."
    )
    length = recipe.count("method.answer_tokens") + (limit or _USUAL_PROMPT_TOKENS)
    recipe.set_key("data.seq_len", length, "max_completion_length", "max_prompt_length", why=why)
    if "method.reward" in recipe.overrides:
        return
    text = _SCORER_FILE
    scorers = []
    for reward in recipe.listed("method.reward"):
        path = f"trl.rewards.{reward}" if reward in _TRL_REWARDS else reward
        module, _, function = path.rpartition(".")
        if not module or not path.replace(".", "_").isidentifier():
            raise recipe.error(
                "method.reward",
                f"{reward} is neither {', '.join(_TRL_REWARDS)} nor module.function",
                "write a scorer, and add method.reward=rewards.py:FUNCTION",
            )
        name = reward.replace(".", "_")
        text += _SCORER.format(module=module, function=function, name=name)
        # Paths in the recipe are relative to the folder of the imported file.
        scorers.append(f"{os.path.relpath(wrapper, recipe.source.base)}:{name}")
    if not scorers:
        fix = "add method.reward=exact, or method.reward=rewards.py:FUNCTION for your own scorer"
        raise recipe.error("reward_funcs", "a recipe needs a reward", fix)
    recipe.files[wrapper] = text
    recipe.set_key("method.reward", scorers, "method.reward")
