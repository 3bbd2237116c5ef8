"""The sampler computes what the trainer computes, whatever else is in its batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import built_model, make_run
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.sampler import (
    Prompt,
    SampledIds,
    choose_tokens,
    evaluating,
    sample,
    uniforms,
)
from tunesmith.batches.layout import Layout
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import TrainModel, supervised_positions

PROMPTS = [
    Prompt([9 + (7 * i + n) % 200 for n in range(length)], row=i)
    for i, length in enumerate((5, 31, 12, 1, 70, 12, 3, 24))
]
SAMPLED = Decoding(64, temperature=1.0, seed=3)
STOPS = {11, 12, 13, 14}


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainModel:
    folder = tmp_path_factory.mktemp("sampler")
    root = built_model(make_run(tiny, folder), tiny)
    torch.manual_seed(0)
    for name, parameter in root.model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    return root


def trainer_logprobs(model: TrainModel, prompt: Prompt, answer: SampledIds) -> list[float]:
    ids = np.array([*prompt.ids, *answer.ids], np.int32)
    example = Example(ids, np.arange(len(ids)) >= len(prompt.ids))
    batch = Layout(0, packed=True).batch([example])
    with evaluating(model), model.step_context(batch):
        index, targets = supervised_positions(batch)
        return model.logprobs(model.hidden(batch)[index], targets).tolist()


def test_logprobs_are_those_of_the_trainer(model: TrainModel) -> None:
    """fp32 on a CPU, 64 tokens a row: the largest difference is below 5e-5."""
    found = sample(model, PROMPTS, SAMPLED, stops=STOPS)
    assert {each.finished for each in found} == {True, False}
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.finished == (answer.ids[-1] in STOPS)
        assert STOPS.isdisjoint(answer.ids[:-1])
        expected = trainer_logprobs(model, prompt, answer)
        assert answer.logprobs == pytest.approx(expected, abs=5e-5)


def test_neither_the_batch_nor_shared_prompts_change_an_answer(model: TrainModel) -> None:
    together = sample(model, PROMPTS, SAMPLED, stops=STOPS, answers=3)
    backwards = sample(model, PROMPTS[::-1], SAMPLED, stops=STOPS, answers=3)
    for i, prompt in enumerate(PROMPTS):
        mine = together[3 * i : 3 * i + 3]
        assert len({tuple(each.ids) for each in mine}) == 3
        at = 3 * (len(PROMPTS) - 1 - i)
        alone = sample(model, [prompt], SAMPLED, stops=STOPS, answers=3)
        (first,) = sample(model, [prompt], SAMPLED, stops=STOPS)
        for others in (alone, backwards[at : at + 3], [first]):
            for one, other in zip(mine, others, strict=False):
                assert one.ids == other.ids
                assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_draws_depend_on_seed_step_row_and_number_of_the_answer() -> None:
    keys = [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)]
    drawn = {key: uniforms(*key, 5).tolist() for key in keys}
    assert len({tuple(values) for values in drawn.values()}) == len(keys)
    assert uniforms(1, 0, 0, 0, 9)[:5].tolist() == drawn[1, 0, 0, 0]
    again = [uniforms(1, 0, 0, answer, 5, 1).tolist() for answer in (0, 1)]
    assert len({tuple(values) for values in (*drawn.values(), *again)}) == len(keys) + 2
    # A resumed run and a newer numpy draw the same numbers.
    assert drawn[1, 0, 0, 0] == pytest.approx(FIRST_DRAWS, abs=1e-10)


FIRST_DRAWS = [0.06680200934, 0.07901298235, 0.00577711803, 0.80655669413, 0.24510580242]
LOGITS = torch.tensor([[2.0, 1.0, 0.0, 0.5, -1.0]])


@pytest.mark.parametrize(
    ("decoding", "kept"),
    [
        (Decoding(temperature=1.0), [0, 1, 2, 3, 4]),
        (Decoding(temperature=0.5), [0, 1, 2, 3, 4]),
        (Decoding(temperature=1.0, top_k=2), [0, 1]),
        (Decoding(temperature=1.0, top_p=0.75), [0, 1]),
        (Decoding(temperature=1.0, top_p=0.85), [0, 1, 3]),
        (Decoding(temperature=1.0, top_k=3, top_p=0.75), [0, 1]),
        (Decoding(temperature=1.0, top_p=0.01), [0]),
        (Decoding(), [0]),
    ],
)
def test_tokens_are_drawn_in_proportion_to_their_probabilities(
    decoding: Decoding, kept: list[int]
) -> None:
    count = 2000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    uniform = None if decoding.temperature == 0 else numbers
    tokens, logprobs = choose_tokens(LOGITS.expand(count, -1), decoding, uniform)
    all_logprobs = (LOGITS[0] / (decoding.temperature or 1)).log_softmax(0)
    weights = torch.zeros(5).index_put((torch.tensor(kept),), all_logprobs[kept].exp())
    shares = torch.bincount(tokens, minlength=5) / count
    assert shares.tolist() == pytest.approx((weights / weights.sum()).tolist(), abs=2 / count)
    assert logprobs.tolist() == pytest.approx(all_logprobs[tokens].tolist(), abs=1e-6)


def test_slots_grow_beyond_their_first_room(model: TrainModel) -> None:
    long = replace(SAMPLED, max_new_tokens=160, temperature=0.0)
    (answer,) = sample(model, PROMPTS[:1], long, stops=())
    assert len(answer.ids) == 160
    assert answer.logprobs == pytest.approx(trainer_logprobs(model, PROMPTS[0], answer), abs=5e-5)
