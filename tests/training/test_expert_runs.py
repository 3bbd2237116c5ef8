"""Runs of a mixture with an adapter on its experts: merged, and asked. Resumed: `test_resume.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tunesmith
from recipes import make_run
from tunesmith.errors import TunesmithError
from tunesmith.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def numbers(model: Path, folder: Path, changes: dict[str, Any]) -> list[tuple[float, float]]:
    result = train(make_run(model, folder, **changes), quiet=True)
    return [(record.loss, record.grad_norm) for record in result.records]


def test_merge_and_answers(mixture: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    losses = numbers(mixture, tmp_path, {"train": {"learning_rate": 5e-2, "duration": "8 steps"}})
    assert losses[-1][0] < losses[0][0] - 0.1
    tunesmith.merge(run, tmp_path / "merged")
    loaded = tunesmith.load_run(run)
    ids = torch.arange(5, 35).view(2, 15)
    with torch.no_grad():
        ours = loaded.model(input_ids=ids).logits
        merged, base = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(input_ids=ids).logits
            for place in (tmp_path / "merged", mixture)
        )
    assert (ours - merged).abs().max() < 1e-4 * ours.abs().max()
    assert (ours - base).abs().max() > 1e-2 * ours.abs().max()
    answers = []
    for place in (run, tmp_path / "merged"):
        [answer] = tunesmith.generate(tunesmith.load_run(place), [{"prompt": "a b"}])
        answers.append(answer["output"])
    assert answers[0] == answers[1]
    tunesmith.evaluate(run, tmp_path / "held.jsonl")


def test_added_tokens_and_rslora_beside_experts(mixture: Path, tmp_path: Path) -> None:
    export_peft = pytest.importorskip("tunesmith.tools.export.vllm_adapter").export_peft
    changes = {
        "model": {"added_tokens": ["<new>"]},
        "adapter": {
            "rslora": True,
            "rank": 4,
            "target": ["q_proj", "experts"],
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
        "train": {"learning_rate": 5e-2, "duration": "2 steps", "schedule": "constant"},
    }
    numbers(mixture, tmp_path, changes)
    tunesmith.merge(tmp_path / "run", tmp_path / "merged")
    tuned = tunesmith.load_run(tmp_path / "run")
    new = len(tuned.tokenizer) - 1
    assert tuned.tokenizer.convert_ids_to_tokens(new) == "<new>"
    plain = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    plain.resize_token_embeddings(len(tuned.tokenizer))
    models = (
        tuned.model,
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32),
        PeftModel.from_pretrained(plain, tmp_path / "run/final"),
    )
    ids = torch.tensor([[5, 6, new, 9, 11]])
    with torch.no_grad():
        ours, *others = (model.eval()(input_ids=ids).logits for model in models)
    for other in others:
        assert (ours - other).abs().max() < 1e-4 * ours.abs().max()
    with pytest.raises(TunesmithError, match="fully trained modules: embed_tokens, lm_head"):
        export_peft(tmp_path / "run", tmp_path / "lora")
