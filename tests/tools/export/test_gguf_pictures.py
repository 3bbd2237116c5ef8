"""The text model of a vision-language model as a GGUF file, which llama.cpp opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import conftest
from errors import holds, refuses
from export.tiny_gguf import chat_tokenizer
from picture_runs import picture_run, write_mixed, write_vision_model
from tunesmith.errors import ModelError
from tunesmith.inference.load_run import locate_run, read_run_files
from tunesmith.tools.export.gguf.check import check_file
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.tuned_weights import open_tuned_model
from tunesmith.training.run import train

pytestmark = pytest.mark.nightly


def small_bpe(**special: str) -> Any:
    """One that llama.cpp knows, with a family's own tokens."""
    core = chat_tokenizer()._tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", **special
    )


def write_model(folder: Path, family: str) -> Path:
    """A random model of a family, with a tokenizer that llama.cpp knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "byte_tokenizer", small_bpe)
        return write_vision_model(folder, family)


# Their text models are a Qwen2 and a Mistral; of the second the text model alone is trained.
@pytest.mark.parametrize(
    ("family", "vision", "projector", "note"),
    [
        ("internvl", True, True, "convert_hf_to_gguf.py --mmproj"),
        ("mistral3", False, False, "the mmproj file of the base"),
    ],
)
def test_the_text_model_answers_as_the_tuned_one(family, vision, projector, note, tmp_path):
    model = write_model(tmp_path / "model", family)
    rows = write_mixed(tmp_path, 6, "P" if vision else "T")
    run = picture_run(
        model,
        rows,
        model={"vision": vision, "train_projector": projector},
        data={"seq_len": 512},
        train={"duration": "2 steps"},
    )
    train(run, quiet=True)
    exported = export_gguf(run.output_dir, tmp_path / "text.gguf", quant="f16", device="cpu")
    assert holds(" ".join(exported.notes), note)
    assert exported.check is not None
    assert exported.check.base is not None
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < exported.check.base.mean_kl
    if projector:
        with refuses(ModelError, where="--adapter", fix=["without --adapter"]):
            export_adapter(run.output_dir, tmp_path / "lora.gguf")
        return
    export_adapter(run.output_dir, tmp_path / "lora.gguf")
    export_gguf(model, tmp_path / "base.gguf", quant="f16", check=False)
    tuned = open_tuned_model(read_run_files(locate_run(run.output_dir)))
    files = tmp_path / "lora.gguf", tmp_path / "base.gguf"
    check = check_file(
        files[0], tuned, tuned, base_file=files[1], device=torch.device("cpu"), threads=1
    )
    assert check.base is not None
    assert check.tuned.mean_kl < 1e-4 < check.base.mean_kl
