"""Answers of a model to prompts, in batches.

The answers are sampled on the modules of training (`sampler.py`). Models whose layers need more
than the keys and values of earlier tokens use Transformers' `generate`. Batches start at fixed
rows, so a resumed job gives the same answers as an uninterrupted job, and several ranks give the
same answers as one process.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from tunesmith.answers.decoding import Decoding
from tunesmith.answers.sampler import Prompt, sample
from tunesmith.batches.batch import join_pixels
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import UsageError
from tunesmith.model.layers.vision import mark_pictures
from tunesmith.train_model import TrainModel, evaluating


class Answer(NamedTuple):
    """Answer of a model.

    Attributes:
        text: the text without special tokens.
        ids: the token ids without the stop token.
        finished: True if the answer ended with a stop token. False if the answer was cut off at
            `max_new_tokens` or cancelled.
    """

    text: str
    ids: list[int]
    finished: bool


class _Streamer(TextStreamer):
    """Streamer that passes the text of an answer to `write`, one complete word after the other."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
        *,
        skips_prompt: bool = False,
    ) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=skips_prompt,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def answer_batch(
    model: TrainModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    stops: Collection[int],
    answers: int = 1,
    write: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    synced: bool = False,
) -> list[Answer]:
    """Generate answers to a few prompts in one batch. The answers to the first prompt come first.

    Models with a recurrent state, chunked attention or Transformers' attention use Transformers'
    `generate`. Generation settings in the model's files are ignored.

    Args:
        prompts: at least one prompt.
        stops: token ids that end an answer.
        answers: number of answers to each prompt.
        write: function that is called with the generated text; only for a single answer.
        cancelled: function that is called after each token. If it returns True, generation stops
            and the partial answers are returned.
        synced: whether all ranks must generate the same number of tokens, because they gather
            weights from each other.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    _check_embedded(model.model, tokenizer, max(max(prompt.ids) for prompt in prompts))
    options: dict[str, Any] = {
        "stops": stops,
        "answers": answers,
        "pad_id": pad_id,
        "cancelled": cancelled,
        "synced": synced,
    }
    if model.takes_slots:
        streamer = _Streamer(tokenizer, write) if write else None

        def put(token: int) -> None:
            if streamer is not None:
                streamer.put(torch.tensor([token]))

        sampled = sample(model, prompts, decoding, chosen=put, **options)
        if streamer:
            streamer.end()
        return [cut_answer(tokenizer, each.ids, stops) for each in sampled]
    streamer = _Streamer(tokenizer, write, skips_prompt=True) if write else None
    written = _generate(model, prompts, decoding, streamer=streamer, **options)
    return [cut_answer(tokenizer, ids, stops) for ids in written]


def _generate(
    model: TrainModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    stops: Collection[int],
    answers: int,
    pad_id: int,
    cancelled: Callable[[], bool],
    streamer: _Streamer | None,
    synced: bool,
) -> list[list[int]]:
    """Generate the token ids of `answer_batch` with Transformers' `generate`."""

    def ended(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        # Wait until the GPU has computed the token, because `cancelled` may check a time limit.
        # This costs nothing: `generate` waits for the token as well.
        input_ids[:, -1].cpu()
        return torch.full(
            (input_ids.shape[0],), cancelled(), device=input_ids.device, dtype=torch.bool
        )

    def generate(batch: Sequence[Prompt]) -> list[list[int]]:
        """Generate the answers to prompts of equal length."""
        ids = torch.tensor([list(prompt.ids) for prompt in batch], device=model.model.device)
        picture_inputs: dict[str, torch.Tensor] = {}
        pixels = [prompt.pictures.pixels() for prompt in batch if prompt.pictures is not None]
        if pixels:
            picture_inputs = mark_pictures(model.model, ids)
            for name, tensor in join_pixels(pixels).items():
                picture_inputs[name] = tensor.to(ids.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=decoding.config(
                eos_token_id=sorted(stops) or None, pad_token_id=pad_id
            ),
            stopping_criteria=StoppingCriteriaList([ended]),
            streamer=streamer,
            synced_gpus=synced,
            **picture_inputs,
        )
        return out[:, ids.shape[1] :].tolist()

    written: dict[tuple[int, int], list[int]] = {}
    # Replace the generation settings of the checkpoint by defaults. They are restored below.
    settings = model.model.generation_config
    model.model.generation_config = GenerationConfig()
    devices = [model.model.device] if model.model.device.type == "cuda" else []
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            for places in _batches_without_padding(prompts, answers, decoding):
                number, answer = places[0]
                key = [decoding.seed, prompts[number].row, answer]
                torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
                batch = generate([prompts[number] for number, _ in places])
                written.update(zip(places, batch, strict=True))
    finally:
        model.model.generation_config = settings
    return [written[place] for place in sorted(written)]


def _batches_without_padding(
    prompts: Sequence[Prompt], answers: int, decoding: Decoding
) -> list[list[tuple[int, int]]]:
    """Return the batches for `generate`, as lists of (index of the prompt, number of the answer).

    The prompts of a batch have the same length, because padding changes the outputs of some models,
    such as RWKV. A sampled answer has a batch of its own, so that its tokens do not depend on other
    answers.
    """
    places = [(number, answer) for number in range(len(prompts)) for answer in range(answers)]
    if decoding.temperature > 0:
        return [[place] for place in places]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for place in places:
        by_length.setdefault(len(prompts[place[0]].ids), []).append(place)
    return list(by_length.values())


def _check_embedded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Raise UsageError if the model has no embedding for the token id `token`."""
    embedding_rows = model.get_input_embeddings().weight.shape[0]
    if token < embedding_rows:
        return
    name = tokenizer.convert_ids_to_tokens(token)
    raise UsageError(
        f"a prompt contains {name}, a token without an embedding in the model",
        why=f"the id of the token is {token:,}, and the embedding has {embedding_rows:,} rows",
        fix="remove this token from the text, or use the model's own tokenizer",
    )


def cut_answer(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Collection[int]
) -> Answer:
    """Cut generated token ids at the first stop token, and decode them to an `Answer`."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Answer(decode(tokenizer, ids[:end]), ids[:end], end is not None)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, with_special: bool = False
) -> str:
    """Decode token ids to text without cleaning up spaces.

    Special tokens are removed unless `with_special` is True.
    """
    return str(
        tokenizer.decode(
            list(ids), skip_special_tokens=not with_special, clean_up_tokenization_spaces=False
        )
    )


def answer_all(
    model: TrainModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    stops: Collection[int],
    answers: int = 1,
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
    ranks: Ranks = ONE_PROCESS,
    answered: Callable[[Sequence[Answer]], object] = lambda _: None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Generate answers to many prompts. Yield (index, answers) in the order of the prompts.

    Args:
        stops: token ids that end an answer.
        answers: number of answers to each prompt.
        batch_size: number of prompts in a batch.
        start: index of the first prompt to answer. The batches do not depend on `start`, because
            in 16-bit dtypes the other answers of a batch can change an answer: the batch that
            contains this prompt is computed again.
        cancelled: function that is called after each token. If it returns True, the current batch
            is dropped and the iterator ends.
        ranks: the processes that share the work. Each rank has the entire model and answers some of
            the batches. All ranks yield all answers.
        answered: function that is called with the answers of each batch of this rank, as soon as
            the batch is complete.
    """

    def answer_from(first: int) -> dict[int, list[Answer]] | None:
        """Answer the batch that begins at `first`. Return None if it was cancelled."""
        batch = prompts[first : first + batch_size]
        if not batch:
            return {}
        written = answer_batch(
            model,
            tokenizer,
            batch,
            decoding,
            stops=stops,
            answers=answers,
            cancelled=cancelled,
        )
        if cancelled():
            return None
        groups = [written[i : i + answers] for i in range(0, len(written), answers)]
        answered([each for group in groups[max(0, start - first) :] for each in group])
        return dict(enumerate(groups, first))

    for turn in range(start // batch_size * batch_size, len(prompts), batch_size * ranks.world):
        answers_of_rank: dict[int, list[Answer]] | None = {}
        with ranks.raise_on_all_ranks():
            # The last turn can have no batch for this rank.
            answers_of_rank = answer_from(turn + ranks.rank * batch_size)
        for of_rank in ranks.all_gather_object(answers_of_rank):
            if of_rank is None:
                return
            yield from ((i, of_rank[i]) for i in of_rank if i >= start)
