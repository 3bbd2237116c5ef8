"""Pairing of prompts with the answers of other rows.

KTO uses these examples to estimate the KL divergence from the reference model.
"""

from collections.abc import Sequence

import numpy as np

from tunesmith.tokens.text.example import Example
from tunesmith.tokens.token_set import TokenSet


def mismatched_examples(
    examples: Sequence[Example], max_tokens: int, reference: np.ndarray | None = None
) -> list[Example]:
    """Return each prompt with the answer of the previous example.

    The first prompt gets the answer of the last example.

    Args:
        examples: the examples.
        max_tokens: maximum number of tokens of a new example. Longer examples are truncated at the
            end.
        reference: fp64 [n, 1], `Example.reference` of each new example. None if it was not
            computed.
    """
    mismatched = []
    for i, example in enumerate(examples):
        other = examples[i - 1]
        prompt_length = int(example.trained.argmax())
        answer_start = int(other.trained.argmax())
        ids = np.concatenate([example.ids[:prompt_length], other.ids[answer_start:]])
        # Copy the loss mask of the answer from its example. It excludes the text after the end
        # token of the answer.
        trained = np.zeros(len(ids), bool)
        trained[prompt_length:] = other.trained[answer_start:]
        values: tuple[float, ...] = ()
        if reference is not None:
            values = tuple(reference[i].tolist())
        mismatched.append(
            Example(ids[:max_tokens], trained[:max_tokens], label=other.label, reference=values)
        )
    return mismatched


def mismatched_of_all(tokens: TokenSet) -> list[Example]:
    """Return each prompt of a validation set with the answer of another row of the set."""
    reference = None
    if tokens.mismatched_reference:
        [reference] = tokens.mismatched_reference
    return mismatched_examples(list(tokens), int(tokens.longest_sequences.max()), reference)
