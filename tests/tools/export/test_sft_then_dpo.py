"""SFT, then DPO on its adapter: what is written answers in PEFT and in Transformers as the run does.

fp32: logits within 1e-5 of the largest, which is the order of sums, and the same greedy answers.
"""

from __future__ import annotations

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

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
NEW_TOKENS = 12


class Runs(NamedTuple):
    base: Path
    sft: Path
    dpo: Path
    pairs: Path


@pytest.fixture(scope="module")
def runs(trained: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    pairs = write_pairs(folder / "pairs.jsonl", 16)
    run = make_run(
        tiny,
        folder,
        held=False,
        method="dpo",
        adapter={"from": str(trained / "final")},
        data={"train": {"source": str(pairs), "format": "preference"}},
        train={"learning_rate": 1e-2, "warmup": "0 steps", "duration": "4 steps"},
    )
    tunesmith.train(run)
    return Runs(tiny, trained, folder / "run", pairs)


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


def test_the_adapter_in_peft_and_the_merge_in_transformers_are_the_run(runs, tmp_path):
    loaded = tunesmith.load_run(runs.dpo)
    tunesmith.merge(runs.dpo, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    others = {"PEFT": in_peft(runs, runs.dpo), "merged": merged}
    after_sft = in_peft(runs, runs.sft)
    for word in ("amber", "fjord"):
        row = {"prompt": f"Say {word}: "}
        ids = list(loaded.template.prompt(Completion(row["prompt"], "?")))
        ours = logits(loaded.model, ids)
        largest = float(ours.abs().max())
        # What DPO changed is far above the tolerance.
        assert (ours - logits(after_sft, ids)).abs().max() > 1e3 * TOLERANCE * largest
        tokens = greedy(loaded.model, ids)
        for name, model in others.items():
            assert (logits(model, ids) - ours).abs().max() < TOLERANCE * largest, name
            assert greedy(model, ids) == tokens, name
        (answer,) = tunesmith.generate(loaded, [row], tunesmith.Decoding(NEW_TOKENS))
        ends = [tokens.index(end) for end in loaded.template.end_ids if end in tokens]
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = loaded.tokenizer.decode(tokens[: min(ends, default=len(tokens))], **plain)
        assert answer["output"] == text
