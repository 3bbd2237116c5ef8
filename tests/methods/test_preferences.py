"""The methods that learn from preferences against their formulas, in float64.

The plain side has no batch: each answer goes through Transformers' forward by itself, and the loss
is written as its paper has it. 1e-9 of the largest value is rounding of float64 alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch, collate
from tunesmith.batches.layout import Layout
from tunesmith.batches.mismatched import mismatched_examples
from tunesmith.config.schema import MethodConfig
from tunesmith.methods import make_method
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import StepTotals, TrainModel

TOLERANCE = 1e-9

PAIR_METHODS = {
    "dpo": MethodConfig(name="dpo", beta=0.3),
    "ipo": MethodConfig(name="dpo", beta=0.3, loss_type="ipo"),
    "hinge": MethodConfig(name="dpo", beta=0.3, loss_type="hinge"),
    "robust": MethodConfig(name="dpo", beta=0.3, loss_type="robust", label_smoothing=0.2),
    "dpo and sft": MethodConfig(name="dpo", beta=0.3, sft_weight=0.5),
    "orpo": MethodConfig(name="orpo", beta=0.7),
    "simpo": MethodConfig(name="simpo", beta=2.0, simpo_gamma=0.4),
}


def packed(examples: list[Example]) -> list[Batch]:
    length = sum(len(example.ids) for example in examples) + 7
    return [collate([examples], length=length, pad_id=0)]


def one_a_row(examples: list[Example]) -> list[Batch]:
    length = max(example.longest_sequence for example in examples)
    batch = collate([examples], length=length, pad_id=0, sequence_rows=1)
    assert len(batch.input_ids) == sum(example.sequence_count for example in examples)
    return [batch]


def micro_batches(examples: list[Example]) -> list[Batch]:
    """One an example, and one of padding alone, as a rank has it that gets too few."""
    batches = [collate([[x]], length=len(x.ids), pad_id=0) for x in examples]
    return [*batches, collate([[]], length=4, pad_id=0)]


def prompts_once(examples: list[Example]) -> list[Batch]:
    examples = [example._replace(shared=example.count_shared()) for example in examples]
    length = sum(len(example.ids) - example.shared for example in examples) + 7
    batch = collate([examples], length=length, pad_id=0)
    assert batch.whole is not None
    return [batch]


LAYOUTS = [packed, one_a_row, micro_batches, prompts_once]


def pairs(count: int) -> list[Example]:
    random = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        prompt = random.integers(0, 256, random.integers(3, 9))
        answers = [random.integers(0, 256, random.integers(2, 12)) for _ in range(2)]
        ids = [part for answer in answers for part in (prompt, answer)]
        masks = [np.repeat([False, True], [len(prompt), len(answer)]) for answer in answers]
        lengths = tuple(len(prompt) + len(answer) for answer in answers)
        ids, trained = np.concatenate(ids).astype(np.int32), np.concatenate(masks)
        examples.append(Example(ids, trained, lengths))
    return examples


def feedback(count: int) -> list[Example]:
    examples = []
    for number, pair in enumerate(pairs(count)):
        first = pair.sequences[0]
        part = slice(0, first) if number % 3 else slice(first, None)
        examples.append(Example(pair.ids[part], pair.trained[part], label=bool(number % 3)))
    return examples


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainModel:
    """A tiny Llama with an adapter that changes its answers, in float64."""
    run = make_run(tiny, tmp_path_factory.mktemp("run"))
    model = built_model(run, tiny).double().train()
    torch.manual_seed(1)
    for _, layer in lora.loras(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model


def use(model: TrainModel, config: MethodConfig) -> None:
    model.method = make_method(config)
    model.reference = lambda: lora.disabled(model.model)
    model.zero_grad()


def plain_logprobs(model: TrainModel, example: Example) -> list[tuple[Tensor, int]]:
    model.use_attention("generate")  # sdpa: eager attention rounds its softmax to fp32
    answers = []
    start = 0
    for n in example.sequences or (len(example.ids),):
        ids = torch.from_numpy(example.ids[start : start + n].astype(np.int64))
        trained = torch.from_numpy(example.trained[start : start + n])[1:]
        logprobs = model.model(ids[None]).logits[0, :-1].log_softmax(-1)
        of_answer = logprobs.gather(1, ids[1:, None])[:, 0][trained]
        answers.append((of_answer.sum(), len(of_answer)))
        start += n
    model.use_attention("training")
    return answers


def plain_pair_loss(
    config: MethodConfig, policy: list[tuple[Tensor, int]], base: list[tuple[Tensor, int]]
) -> Tensor:
    (chosen, chosen_length), (rejected, rejected_length) = policy
    chosen_ratio = chosen - base[0][0]
    rejected_ratio = rejected - base[1][0]
    beta = config.beta
    if config.name == "simpo":
        margin = chosen / chosen_length - rejected / rejected_length
        return -F.logsigmoid(beta * margin - config.simpo_gamma)
    if config.name == "orpo":
        p_chosen = (chosen / chosen_length).exp()
        p_rejected = (rejected / rejected_length).exp()
        odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
        return -beta * F.logsigmoid(odds_ratio.log())
    margin = chosen_ratio - rejected_ratio
    if config.loss_type == "ipo":
        margin = chosen_ratio / chosen_length - rejected_ratio / rejected_length
        return (margin - 1 / (2 * beta)) ** 2
    if config.loss_type == "hinge":
        return torch.clamp(1 - beta * margin, min=0)
    if config.loss_type == "robust":
        epsilon = config.label_smoothing
        right = -torch.sigmoid(beta * margin).log()
        wrong = -torch.sigmoid(-beta * margin).log()
        return ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)
    return -torch.sigmoid(beta * margin).log()


def plain_pairs(model: TrainModel, config: MethodConfig, examples: list[Example]) -> Tensor:
    losses = []
    cross_entropy: Any = 0.0
    tokens = 0
    for example in examples:
        policy = plain_logprobs(model, example)
        with torch.no_grad(), lora.disabled(model.model):
            base = plain_logprobs(model, example)
        losses.append(plain_pair_loss(config, policy, base))
        cross_entropy = cross_entropy - policy[0][0]
        tokens += policy[0][1]
    loss = torch.stack(losses).mean()
    weight = 1.0 if config.name == "orpo" else config.sft_weight
    return loss + weight * cross_entropy / tokens


def take_gradients(model: TrainModel) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.trained_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


def assert_close(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == plain.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    assert largest > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=TOLERANCE * largest, msg=name)


def train_on(
    model: TrainModel, batches: list[Batch], totals: StepTotals
) -> tuple[float, dict[str, float]]:
    loss = 0.0
    metrics = dict.fromkeys(model.method.metrics, 0.0)
    for batch in batches:
        output = model(batch, lambda model, batch: model.method(model, batch, totals))
        (output.loss / totals.examples).backward()
        loss += float(output.loss.detach()) / totals.examples
        for name, value in output.metrics.items():
            metrics[name] += float(value) / totals.examples
    return loss, metrics


# All layouts with DPO. A term of cross-entropy is weighted by the tokens of the whole step, which
# only several micro batches show.
COVERED_LAYOUTS = [
    *(("dpo", layout) for layout in LAYOUTS),
    ("ipo", one_a_row),
    ("hinge", packed),
    ("robust", prompts_once),
    ("dpo and sft", micro_batches),
    ("orpo", micro_batches),
    ("simpo", prompts_once),
]


@pytest.mark.parametrize(("name", "layout"), COVERED_LAYOUTS)
def test_pairs_have_the_loss_and_gradients_of_the_formula(model, name, layout):
    config = PAIR_METHODS[name]
    use(model, config)
    examples = pairs(3)
    plain = plain_pairs(model, config, examples)
    plain.backward()
    plain_gradients = take_gradients(model)
    totals = StepTotals(len(examples), sum(example.chosen_tokens for example in examples))
    loss, metrics = train_on(model, layout(examples), totals)
    assert loss == pytest.approx(float(plain.detach()), rel=TOLERANCE)
    assert_close(take_gradients(model), plain_gradients)
    margin = metrics["rewards_chosen"] - metrics["rewards_rejected"]
    assert metrics["reward_margin"] == pytest.approx(margin)
    assert 0 <= metrics["reward_accuracy"] <= 1.001


@pytest.mark.parametrize(
    ("parts", "is_packed", "is_kl_positive"),
    [pytest.param(2, False, False, marks=pytest.mark.slow), (3, True, True)],
)
def test_kto_has_the_loss_and_gradients_of_the_formula(
    model, parts, is_packed, is_kl_positive, request
):
    def turn() -> None:
        """Turn the adapter's changes around, and with them the sign of KL."""
        for _, layer in lora.loras(model):
            layer.lora_B.data.neg_()

    if is_kl_positive:
        turn()
        request.addfinalizer(turn)
    config = MethodConfig(name="kto", beta=0.2, desirable_weight=0.7, undesirable_weight=1.3)
    use(model, config)
    examples = feedback(6)
    swapped = mismatched_examples(examples, 100)

    def ratio(example: Example) -> Tensor:
        policy = plain_logprobs(model, example)[0][0]
        with torch.no_grad(), lora.disabled(model.model):
            base = plain_logprobs(model, example)[0][0]
        return policy - base

    with torch.no_grad():
        kl = torch.stack([ratio(example) for example in swapped]).mean().clamp(min=0)
    assert (kl > 0) == is_kl_positive
    terms = [
        0.7 * (1 - torch.sigmoid(0.2 * (ratio(example) - kl)))
        if example.label
        else 1.3 * (1 - torch.sigmoid(0.2 * (kl - ratio(example))))
        for example in examples
    ]
    plain = torch.stack(terms).mean()
    plain.backward()
    plain_gradients = take_gradients(model)

    # However the rows are laid out, KL is that of all of them.
    room = sum(len(example.ids) for example in swapped) // parts
    layout = Layout(pad_id=0, packed=is_packed)
    batches = [batch for _, batch in layout.batches(swapped, room)]
    totals = StepTotals(len(examples), mismatched=batches)
    totals = model.method.begin_step(model, totals, lambda total: None)
    assert totals.kl is not None
    assert float(totals.kl) == pytest.approx(float(kl), rel=TOLERANCE)
    size = len(examples) // parts
    batches = [
        collate([examples[first : first + size]], length=200, pad_id=0)
        for first in range(0, len(examples), size)
    ]
    loss, metrics = train_on(model, batches, totals)
    assert loss == pytest.approx(float(plain.detach()), rel=TOLERANCE)
    assert_close(take_gradients(model), plain_gradients)
    finished = model.method.finish(metrics)
    good = [float(ratio(example)) for example in examples if example.label]
    assert finished["rewards_chosen"] == pytest.approx(0.2 * sum(good) / len(good))
    assert finished["kl"] == pytest.approx(float(kl))


def test_mismatched_examples_have_each_answer_once_under_another_prompt() -> None:
    examples = feedback(4)
    for i, example in enumerate(mismatched_examples(examples, 100)):
        own_prompt = examples[i].ids[~examples[i].trained]
        other_answer = examples[i - 1].ids[examples[i - 1].trained]
        assert example.ids.tolist() == [*own_prompt, *other_answer]
        assert example.ids[example.trained].tolist() == other_answer.tolist()
    assert [len(example.ids) for example in mismatched_examples(examples, 4)] == [4] * 4
    # They supervise what their answers' rows do, and not the line break behind the end token.
    examples = []
    for answer in (3, 5):
        trained = np.repeat([False, True, False], [2, answer, 1])
        examples.append(Example(np.arange(answer + 3, dtype=np.int32), trained, label=True))
    for mixed, other in zip(mismatched_examples(examples, 100), examples[::-1], strict=True):
        assert mixed.trained[2:].tolist() == other.trained[2:].tolist()
