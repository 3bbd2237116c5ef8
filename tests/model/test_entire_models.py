"""The text model of classes with other parts, beside the entire class of Transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import default_config
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

import vision_models
from errors import refuses
from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.adapter.peft_files import find_misread
from tunesmith.checkpoint.contents import write_model_files
from tunesmith.config.schema import Model
from tunesmith.errors import RecipeError
from tunesmith.model.arch import load
from tunesmith.model.arch.load import auto_class_of
from tunesmith.model.measuring.tiny_model import FIRST_SPECIAL_ID, build_tiny_model
from tunesmith.model.weights.stored_form import write_model_config
from tunesmith.model.weights.weights import load_weights
from tunesmith.start.run import train
from tunesmith.tools.export.merge import merge

pytestmark = pytest.mark.slow

# Types with ways of their own to name and to store -> whether the text model has its own class.
TYPES = {
    "aria": True,  # experts in stacks
    "gemma3": True,
    "gemma4": True,
    "glm4v": False,
    "kimi_k25": True,  # experts are stored one by one
    "llama4": True,
    "mistral3": True,
    "mistral4": False,  # a text model that is among the classes with other parts
    "mllama": False,  # layers that attend to pictures are not run
    "molmo2": False,  # q, k and v are stored in one tensor
    "muse_glimmer": False,
    "nemotron_h_omni": True,  # the head is in a causal LM inside; counters in the tower
    "qwen3_5_moe": True,
    "voxtral": True,  # sound
}
TIER_1 = ("gemma3", "glm4v", "molmo2", "nemotron_h_omni", "qwen3_5_moe")
LANES = [
    pytest.param(model_type, marks=[] if model_type in TIER_1 else [pytest.mark.nightly])
    for model_type in TYPES
]
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


@pytest.mark.parametrize("model_type", LANES)
def test_transformers_and_peft_open_what_is_trained(model_type: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tmp_path / "base"
    build_tiny_model(default_config(model_type)).save_pretrained(base)
    vocabulary = {token: number for number, token in enumerate(("<pad>", "<eos>", *"abc"))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[])),
        pad_token="<pad>", eos_token="<eos>",
    ).save_pretrained(base)  # fmt: skip
    expected = logits(entire(base))

    run = make_run(base, tmp_path)
    model = built_model(run, base).eval()
    model.use_attention("generate")
    assert (type(model.model) is type(entire(base))) != TYPES[model_type]
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
    model.use_attention("generate")
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
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, written)]
    assert configs[0].get("vision_config") == configs[1].get("vision_config")


def read(folder: Path) -> PreTrainedModel:
    spec = Model(name=str(folder), dtype="fp32")
    config, whole = load.load_configs(folder, spec)
    model = load.build_on_meta(config, spec, full_config=whole)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    return model.eval()


def test_a_head_that_is_not_tied_any_more_is_merged(tiny: Path, tmp_path: Path) -> None:
    base = vision_models.build("gemma3", tmp_path / "base", tiny)
    changes = {"train": {"duration": "2 steps"}, "adapter": {"modules_to_save": ["embed_tokens"]}}
    result = train(make_run(base, tmp_path, held=False, **changes), quiet=True)
    done = merge(result.output_dir, tmp_path / "merged", device="cpu")
    assert done.merge_check.passed
    before, after = stored(base), stored(tmp_path / "merged")
    assert after.keys() == before.keys() | {"language_model.lm_head.weight"}
    towers = [name for name in before if not name.startswith("language_model.")]
    assert all(torch.equal(after[name], before[name]) for name in towers)


def test_a_head_of_its_own_is_not_tied_by_default(tiny: Path, tmp_path: Path) -> None:
    """As in Mistral Small 3.1, whose config.json says nothing of it."""
    base = vision_models.build(
        "mistral3", tmp_path / "base", tiny, whole={"tie_word_embeddings": False}
    )
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    model = read(base)
    assert torch.equal(logits(model), logits(entire(base)))
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    write_model_config(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {**config, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("model_type", "text"),
    # Every fourth layer of Llama 4 scales its queries by the position in the row.
    [("qwen3_5", {}), ("llama4", {"num_hidden_layers": 4})],
)
def test_eager_attention_is_refused_where_documents_would_leak(
    model_type: str, text: dict, tiny: Path, tmp_path: Path
) -> None:
    base = vision_models.build(model_type, tmp_path / "base", tiny, **text)
    run = make_run(base, tmp_path, model={"attention": "eager"})
    with refuses(RecipeError, where="model.attention", names=[f"{model_type}_text"]):
        built_model(run, base)
