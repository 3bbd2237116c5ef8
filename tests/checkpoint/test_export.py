"""What is written for others: a model trained in full, as Transformers and PEFT load it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes import built_model, make_run
from tunesmith.checkpoint.export import write_model_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def both(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


def head_only(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", [dict, both, head_only], ids=["embedding", "both", "head alone"])
def test_a_tied_model_is_written_under_the_name_of_its_embedding(stored, tiny: Path, tmp_path: Path) -> None:
    """Transformers 4.57 leaves the embedding of a tied model on meta when the files hold the head alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    original = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(stored(original), base / "model.safetensors", {"format": "pt"})
    run, written = make_run(base, tmp_path, adapter={"kind": "none"}), tmp_path / "written"
    written.mkdir()
    model = built_model(run, base)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.add_(1.0)
    write_model_files(written, run, model, {})

    found = load_file(written / "model.safetensors")
    assert found.keys() == original.keys(), "the names of save_pretrained, which wrote the base"
    assert torch.equal(found[EMBEDDING], original[EMBEDDING] + 1.0)
    loaded, told = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model.model.set_attn_implementation("sdpa")
        expected = model.model.eval()(ids).logits
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
        tuned = get_peft_model(loaded, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert torch.allclose(tuned.eval()(ids).logits, expected, atol=1e-5)
