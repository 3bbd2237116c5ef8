"""Groups of sampled answers as training examples, and the largest batch that they can form."""

from collections.abc import Iterator, Sequence

import numpy as np

from tunesmith.answers.sampler import Prompt, SampledIds
from tunesmith.batches.batch import Batch
from tunesmith.batches.loader import Loader
from tunesmith.config.schema import Run
from tunesmith.tokens.text.example import Example


def prompt_of(example: Example, row: int) -> Prompt:
    """Return the part of an example before its last answer, as a prompt for the sampler."""
    return Prompt(example.ids[: example.prompt_length].tolist(), row)


def _max_row_tokens(run: Run, loader: Loader) -> int:
    """Return the maximum number of tokens of a micro batch of answers."""
    size = loader.micro_batch
    tokens = size.amount
    if size.unit == "examples":
        tokens *= run.row_tokens
    return min(tokens, loader.row_length or tokens)


def max_group_tokens(run: Run, loader: Loader) -> int:
    """Return the maximum number of tokens of a part of a group. 0 means one answer per part."""
    return _max_row_tokens(run, loader) if loader.layout.packed else 0


def group_examples(
    prompt: Prompt, answers: Sequence[SampledIds], weights: Sequence[float], limit: int
) -> Iterator[Example]:
    """Yield a group as examples of at most `limit` tokens. Each has the prompt once.

    An answer that does not fit has an example of its own.

    Args:
        weights: the weight of each answer in the loss.
    """
    pieces: list[list[int]] = []
    size = 0
    for n, answer in enumerate(answers):
        # A later sequence stores the last token of the prompt again, because the target of this
        # token is the first token of the answer.
        added = len(answer.ids) + 1
        if not pieces or size + added > limit:
            pieces.append([])
            size = len(prompt.ids) - 1
        size += added
        pieces[-1].append(n)
    for piece in pieces:
        ids = [np.array([*prompt.ids, *answers[n].ids], np.int32) for n in piece]
        yield Example(
            np.concatenate(ids),
            np.concatenate([np.arange(len(each)) >= len(prompt.ids) for each in ids]),
            sequences=tuple(map(len, ids)),
            shared=len(prompt.ids) - 1,
            weights=tuple(weights[n] for n in piece),
            sampled=np.concatenate([np.array(answers[n].logprobs, np.float32) for n in piece]),
        )


def answer_batches(run: Run, loader: Loader, examples: Sequence[Example]) -> list[Batch]:
    """Return this rank's micro batches of the examples of a step."""
    return [batch for _, batch in loader.layout.batches(examples, _max_row_tokens(run, loader))]


def largest_answer_batch(run: Run, loader: Loader) -> Batch:
    """Return a micro batch of the longest prompts with the longest answers, for a memory trial."""
    longest = max(loader.tokens, key=lambda example: example.prompt_length)
    count = run.method.answer_tokens
    answer = SampledIds([loader.layout.pad_id] * count, [0.0] * count)
    answers = [answer] * run.method.group
    limit = max_group_tokens(run, loader)
    group = list(group_examples(prompt_of(longest, 0), answers, [1.0] * len(answers), limit))
    batches = answer_batches(run, loader, group * len(loader.schedule.examples(0)))
    return max(batches, key=lambda batch: batch.input_ids.numel())
