"""The table of what a recipe, its data and a plan must know of each training method.

It imports no torch. The methods themselves are in the package `methods`.
"""

from dataclasses import dataclass
from typing import Literal

from tunesmith.config.row_formats import FormatName

MethodName = Literal["sft", "dpo", "orpo", "kto", "simpo", "grpo"]
DEFAULT_METHOD: MethodName = "sft"


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """Facts of a training method.

    Attributes:
        keys: keys in the recipe section `method` that the method reads, in addition to `name`. A
            recipe with a key that its method does not read is refused.
        row_format: the row format that the method needs. None if it reads several formats.
        own_format: a row format that no method reads that is before this one in the table.
        reason: why a new recipe uses the method if its rows have `own_format`.
        sequences: number of answers in an example.
        reference: whether the loss also uses log-probabilities of the model as it was at the start
            of training: never, always, or only if `method.beta` is above 0.
        passes: number of forward passes per step in addition to the pass of the loss, with an
            adapter and in full fine-tuning, if there is a reference.
        min_batch: minimum batch size, in examples, that a new recipe has.
        samples: whether the method samples the answers on which it trains.
    """

    keys: tuple[str, ...] = ()
    row_format: FormatName | None = None
    own_format: FormatName | None = None
    reason: str = ""
    sequences: int = 1
    reference: Literal["never", "always", "with beta"] = "never"
    passes: tuple[int, int] = (0, 0)
    min_batch: int = 1
    samples: bool = False


METHOD_FACTS: dict[str, MethodFacts] = {
    "sft": MethodFacts(),
    "dpo": MethodFacts(
        keys=("beta", "loss_type", "label_smoothing", "sft_weight"),
        row_format="preference",
        own_format="preference",
        reason="the rows are pairs of a chosen and a rejected answer",
        sequences=2,
        reference="always",
        passes=(1, 0),
    ),
    "orpo": MethodFacts(keys=("beta",), row_format="preference", sequences=2),
    # KTO also computes a reference point, which is a mean over the prompts of a batch, each paired
    # with the answer to another prompt. Therefore it needs several examples. The reference point
    # takes one more pass of the model, and one more of the reference if that runs in each step.
    "kto": MethodFacts(
        keys=("beta", "desirable_weight", "undesirable_weight"),
        row_format="feedback",
        own_format="feedback",
        reason="the rows are answers labeled good or bad",
        reference="always",
        passes=(3, 1),
        min_batch=4,
    ),
    "simpo": MethodFacts(keys=("beta", "simpo_gamma"), row_format="preference", sequences=2),
    "grpo": MethodFacts(
        keys=(
            *("reward", "reward_weights", "reward_seconds", "group", "answer_tokens"),
            *("temperature", "beta", "variant", "scale_rewards"),
        ),
        own_format="prompt",
        reference="with beta",
        passes=(1, 0),
        min_batch=8,
        samples=True,
    ),
}
# Row format -> the method that a new recipe uses for it. The other formats are for DEFAULT_METHOD.
METHOD_OF_FORMAT = {
    facts.own_format: name for name, facts in METHOD_FACTS.items() if facts.own_format
}
