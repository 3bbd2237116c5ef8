"""Which keys of a recipe a sweep varies, over which values; importable without torch.

`key=a,b,c` lists values, `key=a` sets the recipe for all candidates. The base is loaded and the
rows are prepared once: only what training creates again for each candidate may vary.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.config.names import keys, suggest_key
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_word

VARIED = (
    "adapter.rank",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.rslora",
    "train.learning_rate",
    "train.min_learning_rate",
    "train.schedule",
    "train.warmup",
    "train.optimizer",
    "train.betas",
    "train.eps",
    "train.weight_decay",
    "train.clip_norm",
    "train.seed",
)
# Beginning of a key -> why a sweep cannot vary it; the first that matches counts.
FIXED_KEY_REASONS = {
    "method": "the loss would differ, and val_loss could not be compared",
    "model": "it would change the base, which all candidates share",
    "data": "all candidates use the same rows, so that val_loss can be compared",
    "adapter": "it changes which layers of the one loaded model are adapted",
    "train.duration": "candidates are compared after equal numbers of steps",
    "train.global_batch": "candidates are compared after equal numbers of steps of one size",
    "train.master_weights": "an adapter is fp32",
    "validate": "candidates are compared by the same validation",
    "": "it does not affect training",
}


@dataclass(frozen=True)
class Space:
    """The candidates that a sweep tries.

    Attributes:
        fixed: words that apply to all candidates.
        choices: the values of each key that varies.
    """

    fixed: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]

    def grid(self) -> list[dict[str, str]]:
        """Return every combination of the listed values; the last key changes fastest."""
        return [
            dict(zip(self.choices, values, strict=True))
            for values in itertools.product(*self.choices.values())
        ]


def read_space(words: Sequence[str]) -> Space:
    """Read the words after the recipe.

    Raise RecipeError for a key that may not vary or is set twice, and for a range.
    """
    fixed: list[str] = []
    choices: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, _, text = map(str.strip, word.partition("="))
        values = split_values(text)
        is_range = key in VARIED and ".." in text
        if len(values) < 2 and not is_range:
            fixed.append(word)
            continue
        check_varied(key)
        where = f"command line: {key}"
        if key in choices:
            fix = shell_word(f"{key}={text}")
            raise RecipeError(f"{key} is set twice", where=where, fix=fix)
        if is_range:
            what = f"{text} is a range, but a sweep tries the values of a list"
            fix = shell_word(f"{key}={','.join(map(str.strip, text.split('..')))}")
            raise RecipeError(what, where=where, fix=fix)
        choices[key] = tuple(values)
    if not choices:
        fix = "such as train.learning_rate=1e-4,3e-4,1e-3 adapter.rank=8,32"
        raise RecipeError("no key varies", where="command line", fix=fix)
    return Space(tuple(fixed), choices)


def split_values(text: str) -> list[str]:
    """The values between commas, but for commas within brackets or quotes.

    `[0.9, 0.99], [0.9, 0.95]` are two values.
    """
    parts = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,\[{"'])+""", text)
    return [part.strip() for part in parts if part.strip()]


def check_varied(key: str) -> None:
    """RecipeError where a recipe has no such key, or a sweep cannot vary it."""
    if key in VARIED:
        return
    if key not in keys():
        section, _, name = key.rpartition(".")
        fix = suggest_key(section, name)
        raise RecipeError(f"unknown key {key}", where="command line", fix=fix)
    why = next(why for start, why in FIXED_KEY_REASONS.items() if key.startswith(start))
    fix = f"a sweep may vary {', '.join(VARIED)}; for {key} run `tunesmith train` once per value"
    raise RecipeError(f"a sweep cannot vary {key}", where="command line", why=why, fix=fix)
