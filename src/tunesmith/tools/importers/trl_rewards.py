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
# Short names of open-r1's reward functions. Its `get_reward_funcs` builds them from the arguments
# of its script, whose names match the second expression.
_OPEN_R1_REWARDS = (
    "accuracy format reasoning_steps cosine repetition_penalty length code binary_code ioi_code"
    " cf_code code_format tag_count soft_overlong_punishment"
).split()
_OPEN_R1_ARGUMENTS = (
    "cosine_* repetition_n_grams repetition_max_penalty code_* parallel_code_exec_per_proc"
    " ioi_provider *_router_url max_completion_len soft_punish_cache"
).split()
_OPEN_R1_FILE = """\
from open_r1.configs import GRPOScriptArguments
from open_r1.rewards import get_reward_funcs

({names},) = get_reward_funcs(GRPOScriptArguments(**{arguments}))
"""
# Length of a prompt in tokens if the file has no limit.
_USUAL_PROMPT_TOKENS = 1024


def set_rewards(recipe: Translation, imported: Path) -> None:
    """Set the scorers, and the length of a row.

    Raise UsageError if a reward function has no module.

    Args:
        imported: a file that imports the reward functions of the packages of TRL and open-r1. Its
            text is added to `recipe.files` if the recipe needs it.
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
    text = "".join(f"{_TRL_REWARDS[reward]}\n" for reward in rewards if reward in _TRL_REWARDS)
    text += _text_for_open_r1(recipe, [name for name in rewards if name in _OPEN_R1_REWARDS])
    if text:
        recipe.files[imported] = text
    scorers = []
    for reward in rewards:
        module, _, function = reward.rpartition(".")
        file = f"{module.replace('.', '/')}.py"
        if reward in _TRL_REWARDS or reward in _OPEN_R1_REWARDS:
            # Paths in the recipe are relative to the folder of the imported file.
            file = os.path.relpath(imported, recipe.source.base)
        elif not module or not reward.replace(".", "_").isidentifier():
            raise recipe.error(
                "method.reward",
                f"{reward} is neither module.function nor a function of trl.rewards or open_r1",
                "add method.reward=rewards.py:FUNCTION, which can also be a function for TRL",
            )
        scorers.append(f"{file}:{function}")
    if not scorers:
        fix = "add method.reward=exact, or method.reward=rewards.py:FUNCTION for your own scorer"
        raise recipe.error("reward_funcs", "a recipe needs a reward", fix)
    recipe.set_key("method.reward", scorers, "method.reward")


def _text_for_open_r1(recipe: Translation, names: list[str]) -> str:
    """Return the text of a file that builds open-r1's reward functions from the file's values."""
    if not names:
        return ""
    arguments = {"dataset_name": recipe.get("dataset_name"), "reward_funcs": names}
    for pattern in _OPEN_R1_ARGUMENTS:
        for key in recipe.matching(pattern):
            arguments[key] = recipe.get(key)
            recipe.note(key, "The file of the reward functions has this value.", differs=False)
    return _OPEN_R1_FILE.format(names=", ".join(names), arguments=repr(arguments))
