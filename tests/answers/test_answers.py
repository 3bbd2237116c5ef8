"""Answers in batches against plain Transformers and PEFT, one prompt at a time; seeds and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from errors import refuses
from recipes import make_run
from runs import peft_model
from tunesmith.answers.answers import answer_all, answer_batch, decode
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import LoadedModel, load_run
from tunesmith.answers.sampler import Prompt
from tunesmith.errors import UsageError
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.train_model import evaluating
from tunesmith.training.answer_sampler import SAMPLE_TOKENS, sample_answers

TEXTS = ["a", "hello there", "Count to 7", "x" * 40, "end", "b?", "1 2 3", "zz", "q", "long " * 9]


@pytest.fixture(scope="module")
def opened(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("adapter")
    peft_model(tiny).save_pretrained(folder)
    return load_run(folder, device="cpu")


@pytest.fixture(params=["slots", "generate"])
def path(opened: LoadedModel, request: pytest.FixtureRequest) -> Iterator[str]:
    """The sampler, and Transformers' `generate`, which models with a recurrent state use."""
    opened.train_model.is_recurrent = request.param == "generate"
    yield request.param
    opened.train_model.is_recurrent = False


@pytest.fixture(scope="module")
def prompts(opened: LoadedModel) -> list[Prompt]:
    return [Prompt(opened.tokenizer(text)["input_ids"], row) for row, text in enumerate(TEXTS)]


@pytest.mark.parametrize("trains", [True, False])
def test_evaluating_turns_dropout_and_gradients_off_and_restores_the_mode(trains: bool) -> None:
    model = torch.nn.Dropout(0.5).train(trains)
    with evaluating(model):
        assert (model.training, torch.is_grad_enabled()) == (False, False)
    assert (model.training, torch.is_grad_enabled()) == (trains, True)


@pytest.mark.slow
@pytest.mark.usefixtures("path")
def test_greedy_batches_answer_as_peft_does_one_by_one(
    tiny: Path, opened: LoadedModel, prompts: list[Prompt]
) -> None:
    peft = peft_model(tiny)
    decoding = Decoding(max_new_tokens=12)
    long = answer_batch(opened.train_model, opened.tokenizer, prompts[:1], decoding, stops=set())[
        0
    ].ids
    # A random model seldom ends by itself; this token ends some answers and not all
    stops = {long[5], 256}
    settings = GenerationConfig(
        max_new_tokens=12, do_sample=False, eos_token_id=sorted(stops), pad_token_id=257
    )
    options = {"stops": stops, "batch_size": 3}
    groups = answer_all(opened.train_model, opened.tokenizer, prompts, decoding, **options)
    found = {i: answer for i, (answer,) in groups}
    assert {answer.finished for answer in found.values()} == {True, False}
    assert list(found) == list(range(len(prompts)))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        options = {"attention_mask": torch.ones_like(ids), "generation_config": settings}
        expected = peft.generate(input_ids=ids, **options)[0, len(prompt.ids) :].tolist()
        cut = next((n for n, token in enumerate(expected) if token in stops), None)
        assert found[i].ids == expected[:cut]
        assert found[i].finished == (cut is not None)
        assert found[i].text == decode(opened.tokenizer, expected[:cut])


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoding", [Decoding(3), Decoding(3, temperature=1.0, top_p=0.9, top_k=50, seed=3)]
)
@pytest.mark.usefixtures("path")
def test_restart_gives_the_answers_of_an_unbroken_job(
    opened: LoadedModel, prompts: list[Prompt], decoding: Decoding
) -> None:
    """Batches of two rows: starts inside a batch and at its edge."""

    def answers(start: int) -> list[tuple[int, Any]]:
        options: dict[str, Any] = {"stops": set(), "batch_size": 2, "start": start}
        return list(answer_all(opened.train_model, opened.tokenizer, prompts, decoding, **options))

    whole = answers(0)
    for start in (1, 8, 9):
        assert answers(start) == whole[start:]


@pytest.mark.slow
@pytest.mark.usefixtures("path")
def test_sampling_follows_its_seed_and_leaves_the_callers_random_state(
    opened: LoadedModel, prompts: list[Prompt]
) -> None:
    def draw(seed: int) -> list[Any]:
        sampled = Decoding(8, temperature=1.0, seed=seed)
        return answer_batch(opened.train_model, opened.tokenizer, prompts, sampled, stops=set())

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = draw(1), draw(1), draw(2**62)
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("path")
def test_settings_that_ship_with_a_model_are_set_aside_and_put_back(
    opened: LoadedModel, prompts: list[Prompt]
) -> None:
    """The training mode too."""
    plain = answer_batch(opened.train_model, opened.tokenizer, prompts, Decoding(4), stops=set())
    sampled = {"temperature": 0.7, "do_sample": True, "top_k": 3, "num_beams": 2}
    shipped = GenerationConfig(repetition_penalty=9.0, **sampled)
    kept, opened.model.generation_config = opened.model.generation_config, shipped
    opened.train_model.train()
    try:
        again = answer_batch(
            opened.train_model, opened.tokenizer, prompts, Decoding(4), stops=set()
        )
        assert again == plain
        assert opened.model.generation_config is shipped
        assert opened.train_model.training
    finally:
        opened.model.generation_config = kept
        opened.train_model.eval()


@pytest.mark.slow
@pytest.mark.usefixtures("path")
def test_a_cancelled_job_gives_up_its_batch_and_an_answer_ends_after_its_present_token(
    opened: LoadedModel, prompts: list[Prompt]
) -> None:
    found: list[int] = []
    options = {"stops": set(), "batch_size": 4, "cancelled": lambda: len(found) == 4}
    for index, _ in answer_all(
        opened.train_model, opened.tokenizer, prompts, Decoding(4), **options
    ):
        found.append(index)
    assert found == [0, 1, 2, 3]
    options = {"stops": set(), "cancelled": lambda: True}
    (answer,) = answer_batch(
        opened.train_model, opened.tokenizer, prompts[:1], Decoding(50), **options
    )
    assert (len(answer.ids), answer.finished) == (1, False)


@pytest.mark.slow
def test_sample_answers_take_one_forward_a_token_and_are_those_of_one_prompt_at_a_time(
    tiny: Path, tmp_path: Path
) -> None:
    session = build(Request(make_run(tiny, tmp_path)))
    assert session.data.validation is not None
    examples, calls = list(session.data.validation.first(4)), []
    hook = session.model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = sample_answers(session.model, session.files.tokenizer, examples, [])
    hook.remove()
    assert len(calls) == SAMPLE_TOKENS
    assert len({len(example.ids) for example in examples}) > 1
    tokenizer = session.files.tokenizer
    alone = [sample_answers(session.model, tokenizer, [one], [])[0] for one in examples]
    assert together == alone


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"top_p": 0.9}, "temperature"),
    ],
)
def test_wrong_decoding_is_refused(options: dict[str, float], word: str) -> None:
    with refuses(UsageError, where=word) as caught:
        Decoding(**options)  # type: ignore[arg-type]
    assert caught.value.fix
    assert "--" not in caught.value.text(), "a program has no options"


def test_special_tokens_are_not_text_and_a_token_without_a_row_is_refused(
    opened: LoadedModel,
) -> None:
    end = opened.tokenizer.eos_token_id
    ids = opened.tokenizer("two  words .")["input_ids"]
    assert decode(opened.tokenizer, [*ids, end]) == "two  words ."
    opened.tokenizer.add_tokens([f"<image-{i}>" for i in range(20)])
    prompt = opened.tokenizer("look: <image-19>")["input_ids"]
    with refuses(UsageError, names=[272]):  # of 272 rows the last is 271
        answer_batch(
            opened.train_model, opened.tokenizer, [Prompt([1, 272])], Decoding(2), stops=set()
        )
    with refuses(UsageError, names=["<image-19>", 278, 272]):
        answer_batch(
            opened.train_model,
            opened.tokenizer,
            [Prompt([1, 2]), Prompt(prompt)],
            Decoding(2),
            stops=set(),
        )
