"""GRPO against its formulas in float64, and against TRL's loss on the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.answers.sampler import Prompt, SampledIds
from tunesmith.batches.layout import Layout
from tunesmith.config.schema import MethodConfig
from tunesmith.errors import RunError
from tunesmith.methods import make_method
from tunesmith.methods.grpo.groups import group_examples
from tunesmith.methods.grpo.loss import answer_weights
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import StepTotals, TrainModel

GROUP = 4
PROMPTS = [Prompt([9, 8, 7, 6, 5]), Prompt([30 + n for n in range(17)]), Prompt([3])]
LENGTHS = np.array([[6, 1, 9, 3], [2, 2, 14, 5], [4, 8, 1, 1]])
REWARDS = np.array([[1.0, 0.0, 0.0, 0.25], [0.5, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
VARIANTS = ("dapo", "grpo", "dr_grpo", "rloo")


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainModel:
    root = built_model(make_run(tiny, tmp_path_factory.mktemp("run")), tiny).double().train()
    torch.manual_seed(1)
    for _, layer in lora.loras(root.model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    root.reference = lambda: lora.disabled(root.model)
    return root


@pytest.fixture(scope="module")
def answers() -> list[list[SampledIds]]:
    random = np.random.default_rng(0)
    return [
        [SampledIds(random.integers(9, 250, n).tolist(), (-random.random(n)).tolist()) for n in row]
        for row in LENGTHS
    ]


def config(**changes: Any) -> MethodConfig:
    return MethodConfig(name="grpo", **{"beta": 0.0, "answer_tokens": 20, **changes})


def examples_of(
    answers: list[list[SampledIds]], weights: np.ndarray, max_tokens: int, *, packed: bool = True
) -> list[Example]:
    examples: list[Example] = []
    for prompt, group, row in zip(PROMPTS, answers, weights.tolist(), strict=True):
        examples += group_examples(prompt, group, row, max_tokens if packed else 0)
    return examples


def gradients(model: TrainModel) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in model.trained_parameters()])  # type: ignore[union-attr]


def run_batches(
    model: TrainModel, method: MethodConfig, examples: list[Example], *, packed: bool, size: int
) -> tuple[float, Tensor, dict[str, float]]:
    model.method = make_method(method)
    model.zero_grad()
    count = int(LENGTHS.sum())
    loss, metrics = 0.0, dict.fromkeys(model.method.metrics, 0.0)
    for _, batch in Layout(0, packed).batches(examples, size):
        with model.step_context(batch):
            output = model(batch, lambda m, b: m.method(m, b, StepTotals(len(PROMPTS))))
            (output.loss / count).backward()
        loss += float(output.loss) / count
        for name, value in output.metrics.items():
            metrics[name] += float(value) / count
    return loss, gradients(model), model.method.finish(metrics)


def written_out(
    model: TrainModel, method: MethodConfig, answers: list[list[SampledIds]]
) -> tuple[float, Tensor, dict[str, float]]:
    """Each answer by itself, through Transformers' forward, and the loss as its paper has it. The
    numbers are the KL divergences per token from the sampler and from the base.
    """
    model.zero_grad()
    per_answer = []
    divergences = {"kl_sampler": 0.0, "kl_base": 0.0}
    model.use_attention("generate")
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for answer in group:
            ids = torch.tensor([[*prompt.ids, *answer.ids]])
            start = len(prompt.ids)

            def logprobs(ids: Tensor = ids, start: int = start) -> Tensor:
                logits = model.model(ids).logits[0, start - 1 : -1] / method.temperature
                return logits.log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]

            logp = logprobs()
            with torch.no_grad(), lora.disabled(model.model):
                base = logprobs()
            # Schulman's k3, and the ratio of p to itself, which both terms have.
            ratio = (logp - logp.detach()).exp()
            kl = ratio * ((base - logp).exp() - (base - logp) - 1)
            per_answer.append((ratio, kl))
            apart = logp.detach() - torch.tensor(answer.logprobs, dtype=torch.float32)
            divergences["kl_sampler"] += float((apart.exp() - apart - 1).sum() / LENGTHS.sum())
            divergences["kl_base"] += float(kl.detach().sum() / LENGTHS.sum())
    model.use_attention("training")
    rewards = torch.tensor(REWARDS)
    means = rewards.mean(1, keepdim=True)
    flat = []
    tokens = float(LENGTHS.sum())
    total = torch.zeros((), dtype=torch.float64)
    advantages = rewards - means
    if method.variant == "rloo":
        advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / (GROUP - 1)
    if method.scale_rewards or (method.scale_rewards is None and method.variant == "grpo"):
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    flat = advantages.flatten().tolist()
    for advantage, (ratio, kl) in zip(flat, per_answer, strict=True):
        objective = (advantage * ratio).sum()
        share = {
            "dapo": 1 / tokens,
            "grpo": 1 / len(ratio) / len(flat),
            "dr_grpo": 1 / (len(flat) * method.answer_tokens),
            "rloo": 1 / len(flat),
        }[method.variant]
        total = total - objective * share + method.beta * kl.sum() / tokens
    total.backward()
    return float(total), gradients(model), divergences


@pytest.mark.parametrize(
    ("variant", "scales"),
    [*((variant, None) for variant in VARIANTS), ("dapo", True), ("grpo", False), ("rloo", True)],
)
def test_losses_and_gradients_are_those_of_the_formulas(
    variant: str, scales: bool | None, model: TrainModel, answers: list[list[SampledIds]]
) -> None:
    """Packed or not, prompts shared or apart, groups whole or cut: 1e-12 and 1e-10 in float64."""
    beta = 0.05 if variant == "dapo" else 0.0
    method = config(variant=variant, beta=beta, scale_rewards=scales)
    loss, gradient, divergences = written_out(model, method, answers)
    weights = answer_weights(REWARDS, LENGTHS, method)
    for packed, cut, size in ((True, 1000, 1000), (True, 20, 40), (True, 1, 30), (False, 0, 60)):
        examples = examples_of(answers, weights, cut, packed=packed)
        found, ours, metrics = run_batches(model, method, examples, packed=packed, size=size)
        assert found == pytest.approx(loss, abs=1e-12)
        assert float((ours - gradient).abs().max()) < 1e-10
        for name in ("kl_sampler", *(["kl_base"] if method.beta else [])):
            assert metrics[name] == pytest.approx(divergences[name], rel=1e-6)


def test_a_group_is_cut_where_it_does_not_fit(answers: list[list[SampledIds]]) -> None:
    weights = np.arange(12.0).reshape(3, 4)
    whole = examples_of(answers, weights, 1000)
    assert [example.sequence_count for example in whole] == [4, 4, 4]
    cut = examples_of(answers, weights, 24)
    assert all(x.row_length <= 24 or x.sequence_count == 1 for x in cut)
    assert [weight for x in cut for weight in x.weights] == list(range(12))
    for examples in (whole, cut):
        assert sum(x.supervised for x in examples) == LENGTHS.sum()
    # The tokens that are trained are the sampled ones.
    ids = np.concatenate([x.ids[x.trained] for x in cut])
    assert ids.tolist() == [token for group in answers for each in group for token in each.ids]


def test_a_sampler_that_differs_from_the_trainer_is_a_fault() -> None:
    method = make_method(config())
    assert method.find_fault({"kl_sampler": 0.009}) is None
    fault = method.find_fault({"kl_sampler": 0.011})
    assert isinstance(fault, RunError)
    assert fault.where == "kl_sampler"


def test_temperature_and_metrics(model: TrainModel, answers: list[list[SampledIds]]) -> None:
    method = config(temperature=0.7)
    weights = answer_weights(REWARDS, LENGTHS, method)
    _, gradient, _ = written_out(model, method, answers)
    # One of three groups is computed; metrics are means over its tokens.
    examples = examples_of(answers, weights, 1000)
    _, ours, metrics = run_batches(model, method, examples, packed=True, size=1000)
    assert float((ours - gradient).abs().max()) < 1e-10
    _, _, fewer = run_batches(model, method, examples[:1], packed=True, size=1000)
    sampled = [lp for each in answers[0] for lp in each.logprobs]
    assert fewer["entropy_sample"] == pytest.approx(-np.mean(sampled), rel=1e-6)
    assert set(metrics) == {"kl_sampler", "entropy_sample"}


def padded_logprobs(model: Any, ids: Tensor, mask: Tensor, kept: int, **_: Any) -> Any:
    """For TRL: the log-probabilities by Transformers' forward. Those of TRL are in fp32."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, -kept - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(2, ids[:, -kept:, None])[..., 0]
    return logprobs, torch.zeros_like(logprobs), None


@pytest.mark.slow
def test_the_loss_is_that_of_trl(
    tiny: Path, model: TrainModel, answers: list[list[SampledIds]], tmp_path: Path
) -> None:
    """TRL's own loss on the log-probabilities of Transformers' forward, in float64.

    The gradient of cispo is that of dapo, because a batch is used for one update.
    """
    import datasets
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = datasets.Dataset.from_list([{"prompt": "a"}] * 12)
    for variant, beta in (("dapo", 0.0), ("cispo", 0.0), ("grpo", 0.0), ("dapo", 0.05)):
        arguments = GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], beta=beta, loss_type=variant,
            per_device_train_batch_size=12, num_generations=4, max_completion_length=20, bf16=False,
            # cispo clips the ratio, which is 1, to at most `epsilon_high`: 5 in its paper.
            epsilon_high=5.0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model.model, args=arguments, reward_funcs=lambda **_: [0.0],
            train_dataset=rows, processing_class=tokenizer,
        )  # fmt: skip
        model.use_attention("generate")
        method = config(variant="dapo" if variant == "cispo" else variant, beta=beta)
        rewards = torch.tensor(REWARDS)
        advantages = rewards - rewards.mean(1, keepdim=True)
        if variant == "grpo":
            advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
        flat = [answer.ids for group in answers for answer in group]
        prompts = [list(p.ids) for p in PROMPTS for _ in range(GROUP)]
        left, width = max(map(len, prompts)), max(map(len, flat))
        inputs = {
            "prompt_ids": torch.tensor([[0] * (left - len(p)) + p for p in prompts]),
            "prompt_mask": torch.tensor([[0] * (left - len(p)) + [1] * len(p) for p in prompts]),
            "completion_ids": torch.tensor([a + [0] * (width - len(a)) for a in flat]),
            "completion_mask": torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in flat]),
            "advantages": advantages.flatten(),
            "num_items_in_batch": torch.tensor(float(LENGTHS.sum())),
        }
        ids, mask = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        with torch.no_grad(), lora.disabled(model.model):
            inputs["ref_per_token_logps"] = padded_logprobs(model.model, ids, mask, width)[0]
        trainer._get_per_token_logps_and_entropies = padded_logprobs
        trainer.current_gradient_accumulation_steps = 1
        model.zero_grad()
        theirs = trainer._compute_loss(model.model, inputs)
        theirs.backward()
        gradient = gradients(model)
        model.use_attention("training")
        weights = answer_weights(REWARDS, LENGTHS, method)
        examples = examples_of(answers, weights, 1000)
        loss, ours, _ = run_batches(model, method, examples, packed=True, size=1000)
        assert variant == "cispo" or loss == pytest.approx(float(theirs), abs=1e-12)
        assert float((ours - gradient).abs().max()) < 1e-10
