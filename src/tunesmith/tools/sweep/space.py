"""The keys that a sweep varies and their values. This module can be imported without torch.

`key=a,b,c` lists the values of a key. `key=a` sets a key for all candidates. The base model is
loaded and the rows are prepared only once. Therefore a key may vary only if it affects nothing but
the objects that are created again for each candidate.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.config.names import keys, suggest_key
from tunesmith.errors import RecipeError

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
# Prefix of recipe keys -> reason why a sweep cannot vary these keys. The first match is used.
FIXED_KEY_REASONS = {
    "method": "the loss function would differ, and val_loss could not be compared",
    "model": "the key would change the base, which all candidates share",
    "data": "all candidates use the same rows, so that val_loss can be compared",
    "adapter": "the key would change which layers of the shared model have an adapter",
    "train.duration": "candidates are compared after the same number of steps",
    "train.global_batch": "candidates are compared after the same number of steps of the same size",
    "train.master_weights": "adapters are always trained in fp32",
    "validate": "all candidates are compared by the same validation",
    "": "the key does not affect training",
}


@dataclass(frozen=True)
class Space:
    """The candidates of a sweep.

    Attributes:
        fixed: recipe overrides `key=value` that apply to all candidates.
        choices: the values of each key that varies.
    """

    fixed: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]

    def grid(self) -> list[dict[str, str]]:
        """Return all combinations of the values. The value of the last key changes fastest."""
        return [
            dict(zip(self.choices, values, strict=True))
            for values in itertools.product(*self.choices.values())
        ]


def read_space(words: Sequence[str]) -> Space:
    """Parse the words `key=values` of the command line.

    Raise RecipeError if a key may not vary or if it is set twice.
    """
    fixed = []
    choices: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, _, text = map(str.strip, word.partition("="))
        values = split_values(text)
        if len(values) < 2:
            fixed.append(word)
            continue
        check_varied(key)
        if key in choices:
            fix = "list all values of the key in one word: key=a,b,c"
            raise RecipeError(f"{key} is set twice", where="command line", fix=fix)
        choices[key] = tuple(values)
    if not choices:
        raise RecipeError(
            "a sweep needs at least one key with several values",
            where="command line",
            fix="list values of a key, such as train.learning_rate=1e-4,3e-4,1e-3 "
            "adapter.rank=8,32",
        )
    return Space(tuple(fixed), choices)


def split_values(text: str) -> list[str]:
    """Split a text at commas, except at commas within brackets or quotes.

    For example, `[0.9, 0.99], [0.9, 0.95]` gives two values.
    """
    parts = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,\[{"'])+""", text)
    return [part.strip() for part in parts if part.strip()]


def check_varied(key: str) -> None:
    """Raise RecipeError if the key does not exist or a sweep cannot vary it."""
    if key in VARIED:
        return
    if key not in keys():
        fix = suggest_key(key, on_command_line=True)
        raise RecipeError(f"unknown key {key}", where="command line", fix=fix)
    why = next(why for start, why in FIXED_KEY_REASONS.items() if key.startswith(start))
    fix = f"vary only {', '.join(VARIED)}; for {key}, run `tunesmith train` once per value"
    raise RecipeError(f"a sweep cannot vary {key}", where="command line", why=why, fix=fix)
