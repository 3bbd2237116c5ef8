"""SFT, then DPO on its adapter: what is written answers in PEFT and in Transformers as the run does.

fp32: logits within 1e-5 of the largest, which is the order of sums, and the same greedy answers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tunesmith
from recipes import make_run, write_pairs
from tunesmith.data.rows.samples import Completion
from tunesmith.inference.load_run import LoadedModel

TOLERANCE = 1e-5
NEW_TOKENS = 12
PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


class Runs(NamedTuple):
    base: Path
    sft: Path
    dpo: Path
    pairs: Path


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    log = {"samples": 0}
    rate = {"learning_rate": 1e-2, "warmup": "0 steps", "duration": "4 steps"}
    tunesmith.train(
        make_run(tiny, folder, train=rate, output_dir=str(folder / "sft"), held=False, log=log)
    )
    pairs = write_pairs(folder / "pairs.jsonl", 32)
    settings: dict[str, Any] = {
        "method": "dpo",
        "adapter": {"from": str(folder / "sft" / "final")},
        "data": {"train": {"source": str(pairs), "format": "preference"}},
    }
    tunesmith.train(
        make_run(
            tiny,
            folder,
            train=rate,
            output_dir=str(folder / "dpo"),
            held=False,
            log=log,
            **settings,
        )
    )
    return Runs(tiny, folder / "sft", folder / "dpo", pairs)


def prompts(loaded: LoadedModel) -> list[list[int]]:
    encode = loaded.tokenizer.encode
    return [encode(f"Say {word} {i}: ") for i, word in enumerate(["amber", "fjord", "inlet"])]


def plain_base(runs: Runs) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(runs.base, dtype=torch.float32).eval()


def in_peft(runs: Runs, run: Path) -> Any:
    return PeftModel.from_pretrained(plain_base(runs), run / "final").eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    result: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return result


def greedy(model: Any, ids: list[int]) -> list[int]:
    """The tokens that Transformers' own generation adds."""
    asked = torch.tensor([ids])
    tokens = model.generate(
        input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    added: list[int] = tokens[0, len(ids) :].tolist()
    return added


@pytest.mark.slow
def test_the_adapter_in_peft_and_the_merge_in_transformers_are_the_run(
    runs: Runs, tmp_path: Path
) -> None:
    loaded = tunesmith.load_run(runs.dpo)
    tunesmith.merge(runs.dpo, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    others = {"PEFT": in_peft(runs, runs.dpo), "merged": merged}
    after_sft = in_peft(runs, runs.sft)
    for ids in prompts(loaded):
        ours = logits(loaded.model, ids)
        largest = float(ours.abs().max())
        # What DPO changed is far above the tolerance.
        assert (ours - logits(after_sft, ids)).abs().max() > 1e3 * TOLERANCE * largest
        for name, model in others.items():
            difference = (logits(model, ids) - ours).abs().max()
            assert difference < TOLERANCE * largest, name
            assert greedy(model, ids) == greedy(loaded.model, ids), name


def test_answers_of_the_run_are_those_of_peft(runs: Runs) -> None:
    loaded = tunesmith.load_run(runs.dpo)
    model = in_peft(runs, runs.dpo)
    for row in [{"prompt": f"Say {word}: "} for word in ("cedar", "grove")]:
        (answer,) = tunesmith.generate(loaded, [row], tunesmith.Decoding(NEW_TOKENS))
        prompt = list(loaded.template.prompt(Completion(row["prompt"], "?")))
        tokens = greedy(model, prompt)
        ends = [tokens.index(end) for end in loaded.template.end_ids if end in tokens]
        text = loaded.tokenizer.decode(tokens[: min(ends, default=len(tokens))], **PLAIN)
        assert answer["output"] == text


def mean_logprob(loaded: LoadedModel, model: Any, sample: Completion) -> float:
    example = loaded.template.encode(sample, "response", where="a pair")
    ids = example.ids.tolist()
    logprobs = logits(model, ids)[0].double().log_softmax(-1)
    of_answer = [logprobs[at - 1, ids[at]].item() for at in example.trained.nonzero()[0]]
    return sum(of_answer) / len(of_answer)


@pytest.mark.slow
def test_eval_orders_pairs_as_peft_does(runs: Runs) -> None:
    """By the mean log-probability of an answer's tokens, its end token with them."""
    result = tunesmith.evaluate(runs.dpo, runs.pairs)
    loaded = tunesmith.load_run(runs.dpo)
    orders = {
        "tuned": in_peft(runs, runs.dpo),
        "base": plain_base(runs),
    }
    for name, model in orders.items():
        in_order = 0
        for row in map(json.loads, runs.pairs.read_text().splitlines()):
            chosen, rejected = (
                mean_logprob(loaded, model, Completion(row["prompt"], row[column]))
                for column in ("chosen", "rejected")
            )
            in_order += chosen > rejected
        assert sum(result.scores[name].pairs) == in_order
    assert result.by_scorer[0].models["tuned"].mean > result.by_scorer[0].models["base"].mean
