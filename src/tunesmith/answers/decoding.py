"""Settings that determine how the tokens of an answer are chosen."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from tunesmith.errors import UsageError


@dataclass(frozen=True)
class Decoding:
    """Settings that determine how the tokens of an answer are chosen.

    Attributes:
        max_new_tokens: maximum number of tokens of an answer.
        temperature: 0 means greedy decoding. Otherwise the logits are divided by the temperature,
            and a token is sampled.
        top_p: sample from the smallest set of tokens whose probabilities sum to this value. 1 means
            all tokens.
        top_k: sample from the k most likely tokens. 0 means all tokens.
        seed: seed of the sampling.

    Raise UsageError if a value is out of range, or if top_p or top_k is set without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or above"),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        )
        for name, is_allowed, allowed in ranges:
            if not is_allowed:
                raise UsageError(
                    f"{name} {getattr(self, name)} is out of range",
                    where=name,
                    fix=f"give {allowed}",
                )
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise UsageError(
                "top-p and top-k have no effect",
                where="temperature",
                why="temperature 0 always picks the most likely token",
                fix="set a temperature, such as 1.0, or remove top-p and top-k",
            )

    def describe(self) -> str:
        """Return a description for a log line, such as `greedy, up to 256 new tokens`."""
        method = "greedy"
        if self.temperature > 0:
            method = (
                f"sampled at temperature {self.temperature:g}, top-p {self.top_p:g}, "
                f"top-k {self.top_k or 'off'}, seed {self.seed}"
            )
        return f"{method}, up to {self.max_new_tokens} new tokens"

    def config(self, **tokens: Any) -> GenerationConfig:
        """Return a `GenerationConfig` of Transformers with only these settings.

        All other settings keep Transformers' defaults, whatever the model's files say.
        """
        if self.temperature > 0:
            tokens |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
            }
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **tokens)
