"""Prompts with the answers of other rows, from which a method learns how far a model has moved."""

from collections.abc import Sequence

import numpy as np

from tunesmith.data.text.example import Example
from tunesmith.data.tokens.token_set import TokenSet


def mismatched_examples(
    examples: Sequence[Example], most: int, reference: np.ndarray | None = None
) -> list[Example]:
    """Each prompt with the answer of the example before it, the first with that of the last.

    Args:
        most: tokens that an example may have; the end of a longer one is left out.
        reference: fp64 [n, 1], `Example.reference` of each; None where unknown.
    """
    mismatched = []
    for i, example in enumerate(examples):
        other = examples[i - 1]
        prompt = example.ids[: int(example.trained.argmax())]
        first = int(other.trained.argmax())
        ids = np.concatenate([prompt, other.ids[first:]])[:most]
        # As in its own row: what a template writes behind the end token is not supervised.
        trained = np.concatenate([np.zeros(len(prompt), bool), other.trained[first:]])[:most]
        of_base = () if reference is None else tuple(reference[i].tolist())
        mismatched.append(Example(ids, trained, label=other.label, reference=of_base))
    return mismatched


def mismatched_of_all(tokens: TokenSet) -> list[Example]:
    """Pair the prompts of held-out rows with other answers; all are measured as one batch."""
    reference = None
    if tokens.mismatched_reference:
        [reference] = tokens.mismatched_reference
    return mismatched_examples(list(tokens), int(tokens.longest_sequences.max()), reference)
