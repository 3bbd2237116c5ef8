"""Tokens that a recipe adds: rows of embedding and head are made for them alone, and others load
what is written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import lines_with, refuses, warnings_with
from logged import logged_lines
from recipes import make_run
from tunesmith.errors import ModelError
from tunesmith.inference.load_run import load_run
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

NEW = [f"<tool-{i}>" for i in range(20)]  # the tokenizer has 259 tokens, the embedding 272 rows
IDS = torch.tensor([[*range(60, 80), 259, 278]])
SHORT = {"train": {"duration": "3 steps"}, "model": {"added_tokens": NEW}, "held": False}


def ours(folder: Path) -> torch.Tensor:
    model = load_run(folder, device="cpu").model
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "to_save",
    [["embed_tokens", "lm_head"], pytest.param(["embed_tokens"], marks=pytest.mark.nightly)],
    ids=["both", "embedding"],
)
def test_an_adapter_opens_in_peft(to_save: list[str], tiny: Path, tmp_path: Path) -> None:
    """AutoPeftModel resizes the base to the tokenizer beside the adapter, `len(tokenizer)` rows."""
    from peft import AutoPeftModelForCausalLM

    with logged_lines() as lines:
        train(make_run(tiny, tmp_path, adapter={"modules_to_save": to_save}, **SHORT))
    assert lines_with("\n".join(lines), "279 tokens", "272 rows")
    final = tmp_path / "run" / "final"
    theirs = AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert expected.shape[-1] == 279
    # PEFT draws new rows of a frozen head; ours are the mean
    columns = 279 if "lm_head" in to_save else 272
    assert torch.allclose(ours(final)[..., :columns], expected[..., :columns], atol=1e-5)
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


def shortened(tiny: Path, tmp_path: Path) -> Path:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tensors = {
        n: t[:265] if "embed" in n else t for n, t in load_file(base / "model.safetensors").items()
    }
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize("added", [[], NEW], ids=["none added", "some added"])
def test_an_embedding_of_fewer_rows_than_the_config_says_is_refused(added, tiny, tmp_path):
    adapter = {"modules_to_save": ["embed_tokens", "lm_head"]} if added else {}
    run = make_run(
        shortened(tiny, tmp_path),
        tmp_path,
        held=False,
        adapter=adapter,
        model={"added_tokens": added},
    )
    rows = 279 if added else 272
    with refuses(ModelError, names=["[265, 64]", f"[{rows}, 64]"], fix=["config.json"]):
        train(run, quiet=True)


def test_a_tokenizer_larger_than_the_embedding_is_told_and_gets_no_rows(tiny, tmp_path):
    """Gemma 3's has one token more than its text model has rows, which no text needs."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(base)
    run = make_run(
        base, tmp_path, held=False, adapter={"kind": "none"}, train={"duration": "2 steps"}
    )
    with logged_lines() as lines:
        train(run)
    assert warnings_with("\n".join(lines), "279 tokens", "272 rows")
    assert (
        load_file(tmp_path / "run" / "final" / "model.safetensors")[
            "model.embed_tokens.weight"
        ].shape[0]
        == 272
    )
