"""The text model of classes with other parts, beside the entire class of Transformers and PEFT.

`make families` measures every such class; those here have their own ways to name and to store.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

import pytest
import torch
from families import default_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import vision_models
from errors import refuses
from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.adapter.peft_files import find_misread
from tunesmith.checkpoint.contents import weights_of, write_model_files
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model import load
from tunesmith.model.load import auto_class_of
from tunesmith.model.safetensors_files import Entry
from tunesmith.model.stored_form import in_stored_form, write_model_config
from tunesmith.model.tiny_model import FIRST_SPECIAL_ID, build_tiny_model
from tunesmith.model.weights import load_weights
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.tools.export.merge import merge
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

# Model type -> whether its text model has a class of its own in Transformers.
TYPES = {
    "aria": True,  # experts in stacks
    "exaone4_5": True,
    "gemma3": True,
    "gemma4": True,
    "gemma4_unified": True,
    "glm4v": False,
    "internvl": True,
    "kimi_k25": True,  # experts are stored one by one
    "llama4": True,
    "mistral3": True,
    "mistral4": False,  # a text model that is among the classes with other parts
    "mllama": False,  # layers that attend to pictures are not run
    "molmo2": False,  # q, k and v are stored in one tensor
    "muse_glimmer": False,
    "nemotron_h_omni": True,  # the head is in a causal LM inside; counters in the tower
    "qwen2_5_vl": False,
    "qwen3_5": True,
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


@pytest.mark.parametrize("model_type", LANES)
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
    if model_type in ("gemma3", "qwen3_5_moe"):
        others = [n for n in before if "language_model." not in n and not n.startswith("lm_head")]
        assert {*others} == {*untouched}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, written)]
    assert configs[0].get("vision_config") == configs[1].get("vision_config")


def read(folder: Path) -> PreTrainedModel:
    spec = Model(name=str(folder), dtype="fp32")
    config, entire = load.load_configs(folder, spec)
    model = load.build_on_meta(config, spec, full_config=entire)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    return model.eval()


def test_a_checkpoint_counts_what_is_copied_into_it(tiny: Path, tmp_path: Path) -> None:
    """As much as is written: of a model trained in full, and nothing of an adapter."""
    folder = vision_models.build("gemma3", tmp_path / "base", tiny)
    run = make_run(folder, tmp_path, adapter={"kind": "none"})
    model = built_model(run, folder).model
    written = in_stored_form(model, weights_of(model))
    copied = sum(source.size for source in written.values() if isinstance(source, Entry))
    assert copied > 0
    trained = sum(parameter.numel() for parameter in model.parameters())
    of_text, _ = checkpoint_bytes(run, trained, None)
    whole_model, _ = checkpoint_bytes(run, trained, folder)
    assert copied == whole_model - of_text
    lora_run = make_run(folder, tmp_path)
    assert checkpoint_bytes(lora_run, 10, folder) == checkpoint_bytes(lora_run, 10, None)


def test_a_head_that_is_not_tied_any_more_is_merged(tiny: Path, tmp_path: Path) -> None:
    base = vision_models.build("gemma3", tmp_path / "base", tiny)
    changes = {"train": {"duration": "2 steps"}, "adapter": {"modules_to_save": ["embed_tokens"]}}
    result = train(make_run(base, tmp_path, held=False, **changes), quiet=True)
    done = merge(result.output_dir, tmp_path / "merged", device="cpu")
    assert done.merge_check.passed
    before, after = stored(base), stored(tmp_path / "merged")
    assert after.keys() == before.keys() | {"language_model.lm_head.weight"}
    towers = [name for name in before if not name.startswith("language_model.")]
    assert towers
    assert all(torch.equal(after[name], before[name]) for name in towers)


def test_the_base_is_needed_to_write(tiny: Path, tmp_path: Path) -> None:
    base = vision_models.build("gemma3", tmp_path / "base", tiny)
    model = read(base)
    shutil.rmtree(base)
    with refuses(ModelError, where=str(base)):
        in_stored_form(model, weights_of(model))


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


def test_keys_of_layers_that_share_them_are_not_read(tiny: Path, tmp_path: Path) -> None:
    """Gemma 4's checkpoints hold them all the same; what is written does too."""
    types = ["sliding_attention", "full_attention"] * 2
    layers = {"num_hidden_layers": 4, "layer_types": types, "num_kv_shared_layers": 2}
    base = vision_models.build("gemma4", tmp_path, tiny, **layers)
    file = max(base.glob("model-*.safetensors"))
    name = "model.language_model.layers.3.self_attn.k_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert name not in index["weight_map"]
    unread = torch.ones(32, 64)
    tensors = load_file(file) | {name: unread}
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    model = read(base)
    assert torch.equal(logits(model), logits(entire(base)))
    entry = in_stored_form(model, weights_of(model))[name]
    assert isinstance(entry, Entry)


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
