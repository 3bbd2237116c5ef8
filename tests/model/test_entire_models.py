"""The text model of classes with other parts: an adapter and a full fine-tune, read by the entire
class of Transformers and by PEFT.

`families.py` measures every such class; those here have their own ways to name and to store.
"""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from families import default_config
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.adapter.peft_files import find_misread
from tunesmith.checkpoint.contents import write_model_files
from tunesmith.model.load import auto_class_of
from tunesmith.model.tiny_model import FIRST_SPECIAL_ID, build_tiny_model

pytestmark = pytest.mark.slow

# Model type -> whether its text model has a class of its own in Transformers.
TYPES = {
    "aria": True,  # experts in stacks
    "exaone4_5": True,
    "gemma4_unified": True,
    "glm4v": False,
    "internvl": True,
    "kimi_k25": True,  # experts are stored one by one
    "mistral4": False,  # a text model that is among the classes with other parts
    "mllama": False,  # layers that attend to pictures are not run
    "molmo2": False,  # q, k and v are stored in one tensor
    "muse_glimmer": False,
    "nemotron_h_omni": True,  # the head is in a causal LM inside; counters in the tower
    "qwen2_5_vl": False,
    "voxtral": True,  # sound
}
IDS = torch.randint(3, FIRST_SPECIAL_ID, (1, 24), generator=torch.Generator().manual_seed(1))
# Sums in another order, in fp32 over at most ten layers: at most 6e-7 over all types.
TOLERANCE = 2e-6


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS).logits


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def entire(folder: Path) -> PreTrainedModel:
    auto_class = auto_class_of(AutoConfig.from_pretrained(folder))
    return auto_class.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def write_letters(folder: Path) -> None:
    """Write a tokenizer that the small vocabulary of a twin has room for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<eos>", " ", *string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    ).save_pretrained(folder)


@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_and_peft_open_what_is_trained(model_type: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tmp_path / "base"
    build_tiny_model(default_config(model_type)).save_pretrained(base)
    write_letters(base)
    expected = logits(entire(base))

    run = make_run(base, tmp_path)
    model = built_model(run, base).eval()
    model.use_inference_attention()
    is_entire = type(model.model) is type(entire(base))
    assert is_entire != TYPES[model_type]
    assert difference(logits(model.model), expected) <= TOLERANCE
    with torch.no_grad():
        for _, layer in lora.loras(model.model):
            nn.init.normal_(layer.lora_B, std=0.1)
    adapted = logits(model.model)
    assert difference(adapted, expected) > 1e-3
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_model_files(adapter, run, model, {})
    theirs = PeftModel.from_pretrained(entire(base), adapter)
    assert difference(logits(theirs), adapted) <= TOLERANCE
    assert find_misread(model.model) is None

    run = make_run(base, tmp_path, adapter={"kind": "none"})
    model = built_model(run, base).eval()
    model.use_inference_attention()
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.01)
    written = tmp_path / "written"
    written.mkdir()
    write_model_files(written, run, model, {})
    assert difference(logits(entire(written)), logits(model.model)) <= TOLERANCE
    before, after = stored(base), stored(written)
    assert after.keys() == before.keys()
    untouched = [name for name, tensor in before.items() if torch.equal(after[name], tensor)]
    assert bool(untouched) == (model_type != "mistral4"), "towers are copied"
