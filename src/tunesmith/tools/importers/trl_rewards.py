"""Import of TRL's GRPO: the names of its reward functions, which tunesmith calls as they are."""

import os
from pathlib import Path

from tunesmith.tools.importers.translation import Translation

# Reward functions of TRL that have short names, and the lines that import them.
_TRL_REWARDS = {
    "accuracy_reward": "from trl.rewards import accuracy_reward",
    "reasoning_accuracy_reward": "from trl.rewards import reasoning_accuracy_reward",
    "think_format_reward": "from trl.rewards import think_format_reward",
    "get_soft_overlong_punishment": "import trl.rewards\n\nget_soft_overlong_punishment = "
    "trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)",
}
# Length of a prompt in tokens if the file has no limit.
_USUAL_PROMPT_TOKENS = 1024


def set_rewards(recipe: Translation, imported: Path) -> None:
    """Set the scorers, and the length of a row.

    Raise UsageError if a reward function has no module.

    Args:
        imported: a file that imports the reward functions of TRL's own package. Its text is added
            to `recipe.files` if the recipe needs it.
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
    rewards = recipe.listed("method.reward")
    of_trl = [reward for reward in rewards if reward in _TRL_REWARDS]
    if of_trl:
        recipe.files[imported] = "".join(f"{_TRL_REWARDS[reward]}\n" for reward in of_trl)
    scorers = []
    for reward in rewards:
        module, _, function = reward.rpartition(".")
        file = f"{module.replace('.', '/')}.py"
        if reward in of_trl:
            # Paths in the recipe are relative to the folder of the imported file.
            file = os.path.relpath(imported, recipe.source.base)
            function = reward
        elif not module or not reward.replace(".", "_").isidentifier():
            raise recipe.error(
                "method.reward",
                f"{reward} is neither {', '.join(_TRL_REWARDS)} nor module.function",
                "add method.reward=rewards.py:FUNCTION, which can also be a function for TRL",
            )
        scorers.append(f"{file}:{function}")
    if not scorers:
        fix = "add method.reward=exact, or method.reward=rewards.py:FUNCTION for your own scorer"
        raise recipe.error("reward_funcs", "a recipe needs a reward", fix)
    recipe.set_key("method.reward", scorers, "method.reward")
