"""Which keys of a recipe a sweep varies, over which values; importable without torch.

`key=a,b,c` lists values, `key=1e-5..1e-3` is a range that is drawn from, `key=a` sets the recipe
for all candidates. One base is loaded, and the rows are prepared once: only what training makes
anew may vary.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.config.names import keys, members, other_tools, suggest_key
from tunesmith.config.tree import Scalar, scalar
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_word

if TYPE_CHECKING:
    from numpy.random import RandomState

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
# Why the others may not: by the longest beginning of the key.
FIXED_KEY_REASONS = {
    "": "it does not affect training",
    "method": "the loss would differ, and val_loss could not be compared",
    "model": "it would change the base, which all candidates share",
    "data": "all candidates use the same rows, so that val_loss can be compared",
    "adapter": "it changes which layers of the one loaded model are adapted",
    "train.duration": "candidates are compared after equal numbers of steps",
    "train.global_batch": "candidates are compared after equal numbers of steps of one size",
    "train.master_weights": "an adapter is fp32",
    "validate": "candidates are compared by the same validation",
}
# Candidates of one sweep.
LIMIT = 1000
# A range whose ends are so many times apart is drawn from on a logarithmic scale.
LOG_FROM = 10.0
_BOUND_PATTERN = r"([-+]?\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_RANGE = re.compile(rf"{_BOUND_PATTERN}\s*\.\.\s*{_BOUND_PATTERN}")


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    whole: bool

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= LOG_FROM

    def draw(self, generator: "RandomState") -> str:
        """A number of the range, as a recipe writes it; on a logarithmic scale if `log` is true."""
        # The ends of whole numbers are drawn as often as the others.
        margin = 0.5 if self.whole else 0.0
        low, high = self.low - margin, self.high + margin
        if self.log:
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = generator.uniform(low, high)
        if self.whole:
            return str(min(max(round(value), self.low), self.high))
        return f"{min(value, self.high):.4g}"

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Space:
    """The candidates that a sweep tries.

    Attributes:
        fixed: words that hold for all candidates.
        choices, ranges: by key.
    """

    fixed: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, Range]

    def grid(self) -> list[dict[str, str]]:
        """Every combination of the listed values, the last key changing fastest."""
        return [
            dict(zip(self.choices, values, strict=True))
            for values in itertools.product(*self.choices.values())
        ]

    def draw(self, count: int, seed: int) -> list[dict[str, str]]:
        """So many candidates at random, each listed value as likely as the others."""
        from numpy.random import RandomState

        generator = RandomState(seed)
        candidates = []
        for _ in range(count):
            values = {}
            for key, listed in self.choices.items():
                values[key] = listed[generator.uniform(size=len(listed)).argmax()]
            for key, span in self.ranges.items():
                values[key] = span.draw(generator)
            candidates.append(values)
        return candidates

    def plain(self) -> dict[str, list[str] | str]:
        """By key the listed values, or the range, as text."""
        plain: dict[str, list[str] | str] = {}
        for key, values in self.choices.items():
            plain[key] = list(values)
        for key, span in self.ranges.items():
            plain[key] = str(span)
        return plain

    def widest(self, key: str) -> list[str]:
        """The word that gives `key` the largest of its values; none where it does not vary."""
        if key in self.ranges:
            return [f"{key}={self.ranges[key].high}"]
        if key in self.choices:
            return [f"{key}={max(self.choices[key], key=_size)}"]
        return []


def _size(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # The recipe's own check names the word.
        return 0.0


def read_space(words: Sequence[str]) -> Space:
    """The words after the recipe.

    RecipeError for a key that may not vary, with the reason, and for a range that is none.
    """
    fixed: list[str] = []
    choices: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, Range] = {}
    for word in words:
        key, _, text = map(str.strip, word.partition("="))
        values = split_values(text)
        match = _RANGE.fullmatch(text)
        if len(values) < 2 and not match:
            fixed.append(word)
            continue
        check_varied(key, text)
        if key in choices or key in ranges:
            fix = shell_word(f"{key}={text}")
            raise RecipeError(f"{key} is set twice", where="command line", fix=fix)
        if match:
            ranges[key] = _read_range(key, *match.groups())
        else:
            _check_each_once(key, values)
            choices[key] = tuple(values)
    if not choices and not ranges:
        fix = "such as train.learning_rate=1e-4,3e-4,1e-3 adapter.rank=8,32"
        raise RecipeError("no key varies", where="command line", fix=fix)
    return Space(tuple(fixed), choices, ranges)


def _check_each_once(key: str, values: Sequence[str]) -> None:
    """RecipeError where a value is listed twice, also as another form of it: 1e-4 and 0.0001."""
    different: dict[Scalar, str] = {}
    for value in values:
        different.setdefault(scalar("".join(value.split())), value)
    if len(different) < len(values):
        what = f"{key} has a value twice"
        fix = shell_word(f"{key}={','.join(different.values())}")
        why = "two candidates would be identical"
        raise RecipeError(what, where=f"command line: {key}", why=why, fix=fix)


def check_count(space: Space, candidates: int) -> None:
    """RecipeError for more candidates than anybody trains.

    candidates: how many are drawn if there is a range.
    """
    combinations = math.prod(len(values) for values in space.choices.values())
    count = combinations
    why = f"{combinations:,} combinations of the listed values"
    if space.ranges and candidates > combinations:
        count = candidates
        why = "use --candidates for a random sample"
    if count > LIMIT:
        what = f"a sweep of {count:,} candidates; the maximum is {LIMIT:,}"
        example = "train.learning_rate=1e-5..1e-3 --candidates 16"
        fix = f"list fewer values, or sample from a range: {example}"
        raise RecipeError(what, where="command line", why=why, fix=fix)


def split_values(text: str) -> list[str]:
    """The values between commas, but for commas within brackets or quotes.

    `[0.9, 0.99], [0.9, 0.95]` are two values.
    """
    parts = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,\[{"'])+""", text)
    return [part.strip() for part in parts if part.strip()]


def check_varied(key: str, values: str) -> None:
    """RecipeError where a recipe has no such key, or a sweep cannot vary it."""
    if key in VARIED:
        return
    if key not in keys():
        section, _, name = key.rpartition(".")
        fix = suggest_key(section, name)
        here = other_tools("keys").get(name, "").partition(": ")[0]
        if here in VARIED:
            fix = f"here it is {shell_word(f'{here}={values}')}"
        raise RecipeError(f"unknown key {key}", where="command line", fix=fix)
    beginnings = [
        start for start in FIXED_KEY_REASONS if not start or f"{key}.".startswith(f"{start}.")
    ]
    why = FIXED_KEY_REASONS[max(beginnings, key=len)]
    fix = f"a sweep may vary {', '.join(VARIED)}; for {key} run `tunesmith train` once per value"
    raise RecipeError(f"a sweep cannot vary {key}", where="command line", why=why, fix=fix)


def _read_range(key: str, low: str, high: str) -> Range:
    """The lower and the higher number, of a key that takes one."""
    types = members(keys()[key][1])
    whole = int in types and float not in types
    fix = f"{key}=LOW..HIGH, {'whole numbers' if whole else 'numbers'}, the lower one first"
    if not whole and float not in types:
        fix = f"{key}=a,b"
    else:
        with contextlib.suppress(ValueError):
            number = int if whole else float
            span = Range(number(low), number(high), whole)
            if span.low < span.high:
                return span
    raise RecipeError(
        f"{low}..{high} is not a valid range for {key}", where=f"command line: {key}", fix=fix
    )
