"""Tokens that a recipe adds: rows of embedding and head are made for them alone, and others load
what is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tunesmith
from errors import refuses, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.answers.load_run import load_run
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.start.run import train

pytestmark = pytest.mark.slow

NEW = [f"<tool-{i}>" for i in range(20)]  # the tokenizer has 259 tokens, the embedding 272 rows
IDS = torch.tensor([[*range(60, 80), 259, 278]])
SHORT = {"train": {"duration": "3 steps"}, "model": {"added_tokens": NEW}, "held": False}


def ours(folder: Path) -> torch.Tensor:
    model = load_run(folder, device="cpu").model
    with torch.no_grad():
        return model(IDS).logits


def test_an_adapter_opens_in_peft(tiny: Path, tmp_path: Path) -> None:
    """AutoPeftModel resizes the base to the tokenizer beside the adapter, `len(tokenizer)` rows."""
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    train(make_run(tiny, tmp_path, adapter=both, **SHORT), quiet=True)
    final = tmp_path / "run" / "final"
    theirs = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert expected.shape[-1] == 279
    assert torch.allclose(ours(final), expected, atol=1e-5)
    alone = Path(shutil.copytree(final, tmp_path / "elsewhere"))  # without the recipe beside it
    assert torch.equal(ours(alone), ours(final))


def test_a_whole_model_opens_in_transformers(tiny: Path, tmp_path: Path) -> None:
    train(make_run(tiny, tmp_path, adapter={"kind": "none"}, **SHORT), quiet=True)
    final = tmp_path / "run" / "final"
    theirs, told = AutoModelForCausalLM.from_pretrained(
        final, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.vocab_size == 320, "a multiple of 64"
    assert AutoTokenizer.from_pretrained(final).convert_tokens_to_ids("<tool-19>") == 278
    with torch.no_grad():
        assert torch.allclose(ours(final), theirs(IDS).logits, atol=1e-5)


def test_an_embedding_of_fewer_rows_than_the_config_says_is_refused(tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:265]
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with refuses(ModelError, names=["[265, 64]", "[272, 64]"], fix=["config.json"]):
        train(make_run(base, tmp_path, held=False), quiet=True)


def test_a_tokenizer_larger_than_the_embedding_is_told_and_gets_no_rows(tiny, tmp_path):
    """Gemma 3's has one token more than its text model has rows, which no text needs."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(base)
    full = {"adapter": {"kind": "none"}, "train": {"duration": "2 steps"}}
    with logged_lines() as lines:
        train(make_run(base, tmp_path, held=False, **full))
    assert warnings_with("\n".join(lines), "279 tokens", "272 rows")
    written = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert len(written["model.embed_tokens.weight"]) == 272


@pytest.mark.nightly
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
    train(make_run(mixture, tmp_path, **changes), quiet=True)
    tunesmith.merge(tmp_path / "run", tmp_path / "merged")
    tuned = tunesmith.load_run(tmp_path / "run")
    new = len(tuned.tokenizer) - 1
    assert tuned.tokenizer.convert_ids_to_tokens(new) == "<new>"
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for place in (mixture, tmp_path / "merged")
    )
    plain.resize_token_embeddings(len(tuned.tokenizer))
    models = tuned.model, merged, PeftModel.from_pretrained(plain, tmp_path / "run/final")
    ids = torch.tensor([[5, 6, new, 9, 11]])
    with torch.no_grad():
        ours, *others = (model.eval()(input_ids=ids).logits for model in models)
    for other in others:
        assert (ours - other).abs().max() < 1e-4 * ours.abs().max()
    with pytest.raises(TunesmithError, match="fully trained modules: embed_tokens, lm_head"):
        export_peft(tmp_path / "run", tmp_path / "lora")
