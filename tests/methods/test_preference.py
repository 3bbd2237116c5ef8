"""A preference method fits the engine as it is: pairs as examples, two sequences a row, packed or
not.

The method lives here, in a test: it proves that a method owns its loss, its denominator and its
metrics, and that the loop, the loader and the packing need not know it. Reference: Transformers'
logits, one sequence at a time.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from recipes import built_model, make_run
from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.checkpoint.resume import Start
from tunesmith.data.batch import Batch, Example, collate
from tunesmith.data.loader import GlobalBatch
from tunesmith.data.schedule import BatchSchedule
from tunesmith.host.signals import StopRequest
from tunesmith.methods.base import MethodOutput, TrainModel, supervised_positions
from tunesmith.metrics.sink import Sinks
from tunesmith.training.build import build
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

BETA = 0.3


def sum_by_sequence(values: Tensor, index: Tensor, batch: Batch, count: int) -> Tensor:
    """Sum values of supervised positions over each sequence that has any, in the batch's order.

    Args:
        values: [n], one for each of `supervised_positions`.
        index: these positions, int64 [n].
        batch: gives the sequences' edges.
        count: sequences with a supervised position; known on the host.

    Returns:
        [count], the dtype of `values`.
    """
    document = torch.bucketize(index, batch.cu_seqlens[1:], right=True)
    first = document.new_zeros(document.shape, dtype=torch.int64)
    first[1:] = document[1:] != document[:-1]
    return values.new_zeros(count).index_add(0, first.cumsum(0), values)


class SigmoidPreference:
    """-log sigmoid(beta * (log p(chosen) - log p(rejected))), the mean over pairs (DPO's loss
    without a reference model: Rafailov et al. 2023, arXiv:2305.18290, equation 7). An example is a
    pair: the chosen sequence, then the rejected.
    """

    metrics = ("preference_accuracy", "preference_margin")

    def denominator(self, batch: Batch | GlobalBatch) -> int:
        return batch.examples

    def __call__(self, model: TrainModel, batch: Batch) -> MethodOutput:
        index, targets = supervised_positions(batch)
        logprobs = model.logprobs(model.hidden(batch).index_select(0, index), targets)
        chosen, rejected = (
            sum_by_sequence(logprobs, index, batch, 2 * batch.examples).view(-1, 2).unbind(1)
        )
        margin = BETA * (chosen - rejected)
        metrics = {
            "preference_accuracy": (margin > 0).sum(),
            "preference_margin": margin.detach().sum(),
        }
        return MethodOutput(-F.logsigmoid(margin).sum(), self.denominator(batch), metrics)


def pairs(count: int) -> list[Example]:
    """Pairs of random tokens: a shared prompt without loss, and two answers of their own lengths."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt = random.integers(0, 256, random.integers(3, 9))
        answers = [random.integers(0, 256, random.integers(2, 12)) for _ in range(2)]
        ids = np.concatenate([part for answer in answers for part in (prompt, answer)]).astype(
            np.int32
        )
        trained = np.concatenate([np.repeat([False, True], [len(prompt), len(a)]) for a in answers])
        made.append(Example(ids, trained, tuple(len(prompt) + len(a) for a in answers)))
    return made


def reference(model: Any, examples: list[Example]) -> tuple[torch.Tensor, float, float]:
    """Mean loss with its graph, accuracy and mean margin, by plain logits of each sequence alone."""
    margins = []
    for example in examples:
        totals, at = [], 0
        for n in example.sequences:
            ids = torch.from_numpy(example.ids[at : at + n].astype(np.int64))
            trained = torch.from_numpy(example.trained[at : at + n])[1:]
            logprobs = (
                model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            )
            totals.append(logprobs[trained].sum())
            at += n
        margins.append(BETA * (totals[0] - totals[1]))
    margin = torch.stack(margins)
    return -F.logsigmoid(margin).mean(), float((margin > 0).double().mean()), float(margin.mean())


LAYOUTS = {
    "packed": lambda e: [collate([e], length=sum(len(x.ids) for x in e) + 7, pad_id=0)],
    "one a row": lambda e: [collate([[x] for x in e], length=max(len(x.ids) for x in e), pad_id=0)],
    "micro batches": lambda e: [collate([[x]], length=len(x.ids), pad_id=0) for x in e],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_learn_the_same_in_any_layout(tiny, tmp_path, layout):
    """fp32, sums of some hundred terms in another order: 1e-5 of the loss and of the largest
    gradient.
    """
    run = make_run(tiny, tmp_path, adapter={"kind": "none"})
    model = built_model(run, tiny)
    model.method = SigmoidPreference()
    examples = pairs(6)
    batches = LAYOUTS[layout](examples)
    total = sum(model.method.denominator(batch) for batch in batches)
    outputs = [model(batch) for batch in batches]
    assert total == sum(made.denominator for made in outputs) == 6
    loss = sum(made.loss for made in outputs) / total
    loss.backward()

    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected, accuracy, margin = reference(plain, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    got = {
        name: sum(float(made.metrics[name]) for made in outputs) / total
        for name in model.method.metrics
    }
    assert got == pytest.approx(
        {"preference_accuracy": accuracy, "preference_margin": margin}, rel=1e-4
    )
    ours = dict(model.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            ours[name].grad,
            parameter.grad,
            rtol=0,
            atol=1e-5 * float(parameter.grad.abs().max()),
            msg=name,
        )


class Pairs:
    """What the loader asks of tokens, over pairs."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples
        self.lengths = np.array([len(e.ids) for e in examples])
        self.counts = SimpleNamespace(digest="pairs")

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]

    def where(self, i: int) -> str:
        return f"pair {i}"


@pytest.mark.parametrize("pack", [True, False])
def test_the_loop_trains_on_pairs_and_records_the_methods_metrics(tiny, tmp_path, pack):
    """Four steps of the ordinary Trainer, by a reference that takes plain AdamW steps on
    Transformers' model; 1e-4: fp32 sums in another order, through four updates.
    """
    run = make_run(
        tiny,
        tmp_path,
        held=False,
        adapter={"kind": "none"},
        data={"pack": pack},
        train={
            "duration": "4 steps",
            "micro_batch": "128 tokens",
            "schedule": "constant",
            "warmup": "0 steps",
        },
    )
    session, tokens = build(run, Start()), Pairs(pairs(24))
    session.model.method = SigmoidPreference()
    session.data = replace(
        session.data, train=tokens, schedule=BatchSchedule(tokens.lengths, run.data, run.train)
    )
    assert len(session.loader(0).batch(0).micro) > 1
    with claim_run_dir(tmp_path / "run"), StopRequest() as stop:
        result = Trainer(session, Start(), Sinks([]), StopControl(stop, tmp_path / "run")).fit()

    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for record in result.records:
        members = session.data.schedule.examples(record.step - 1)
        loss, accuracy, margin = reference(plain, [tokens[i] for i in members])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert record.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        assert dict(record.extra) == pytest.approx(
            {"preference_accuracy": accuracy, "preference_margin": margin}, rel=1e-3, abs=1e-5
        )


def test_a_sequence_of_a_pair_does_not_see_the_other():
    """Positions start anew, and no label crosses the edge."""
    example = Example(np.arange(7, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1, 1], bool), (4, 3))
    batch = collate([[example]], length=9, pad_id=0)
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9]
    assert batch.position_ids[0, :7].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.targets[0].tolist() == [-100, 2, 3, -100, 5, 6, -100, -100, -100]
    assert (batch.examples, batch.tokens, batch.supervised, batch.max_seqlen) == (1, 7, 4, 4)
