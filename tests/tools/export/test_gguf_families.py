"""Every family's weights come back through Transformers' own reader; what cannot is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from errors import refuses
from export.tiny_gguf import (
    LINEAR,
    LLAMA3,
    LONGROPE,
    VARIANTS,
    YARN,
    byte_level,
    header_of,
    plan_of,
    random_model,
    rows_of,
    structure_of,
    tensor_rows,
    write_model,
)
from tunesmith.errors import ModelError, RecipeError
from tunesmith.tools.export.gguf.families import (
    pair_neighbors,
    read_family,
    rope_tensors,
)
from tunesmith.tools.export.gguf.plan import plan_gguf


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(structure_of("gpt-2"))


def readable(variant: str) -> bool:
    """Whether Transformers reads this family, and all weights of this variant."""
    arch = read_family(random_model(variant).config.to_dict()).arch
    # It leaves out biases of families whose config decides on them.
    return arch in GGUF_SUPPORTED_ARCHITECTURES and "attention_bias" not in VARIANTS[variant]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if readable(name)])
def test_transformers_reads_the_weights_back(variant: str, tokenizer, tmp_path: Path) -> None:
    model = random_model(variant)
    file = write_model(tmp_path / "tiny.gguf", model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    expected = model.state_dict()
    actual = theirs.state_dict()
    for name, tensor in expected.items():
        # Gemma's norms: 1 is added for the file and taken away again.
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=2e-7, msg=name)
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        assert getattr(theirs.config, key) == getattr(model.config, key), key


def test_scores_are_the_same_when_neighbors_are_rotated() -> None:
    """llama.cpp's rotation of rows that changed places, against Transformers' of halves."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, head_dim, hidden, positions = 3, 8, 16, 5
    torch.manual_seed(0)
    x = torch.randn(positions, hidden, dtype=torch.float64)
    weights = torch.randn(2, heads * head_dim, hidden, dtype=torch.float64)
    frequencies = 1e4 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions)[:, None] * frequencies

    def halves(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).view(positions, heads, head_dim).transpose(0, 1)[None]

    cos, sin = (f(torch.cat([angles, angles], 1))[None] for f in (torch.cos, torch.sin))
    q, k = apply_rotary_pos_emb(halves(weights[0]), halves(weights[1]), cos, sin)
    expected = q @ k.transpose(-1, -2)

    def neighbors(weight: torch.Tensor) -> torch.Tensor:
        y = halves(pair_neighbors(weight, head_dim))
        rotated = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
        rotated = rotated * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(rotated).flatten(-2)

    actual = neighbors(weights[0]) @ neighbors(weights[1]).transpose(-1, -2)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rope", [LLAMA3, LONGROPE], ids=["llama3", "longrope"])
def test_factors_are_those_of_transformers(rope: dict) -> None:
    """Frequencies divided by the factors are those that Transformers computes."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = "phi3" if rope is LONGROPE else "llama"
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 256}
    context = rope["original_max_position_embeddings"]
    config = AutoConfig.for_model(
        name, **sizes, rope_parameters=rope, original_max_position_embeddings=context
    )
    factors = rope_tensors(config.to_dict())
    plain = rope["rope_theta"] ** (-torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    # A sequence beyond the original context has the long factors.
    expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=256)
    actual = plain / factors.get("rope_factors_long.weight", factors.get("rope_freqs.weight"))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_the_header_has_the_config_of_gemma3(tokenizer, tmp_path: Path) -> None:
    header = header_of(plan_of(random_model("gemma3_text"), tokenizer), tmp_path)
    assert header["general.architecture"] == "gemma3"
    assert header["gemma3.rope.freq_base"] == 1e6
    assert header["gemma3.rope.freq_base_swa"] == 1e4
    assert header["gemma3.attention.sliding_window"] == 16
    assert header["gemma3.attention.key_length"] == 16


def test_the_header_has_the_config_of_granite(tokenizer, tmp_path: Path) -> None:
    header = header_of(plan_of(random_model("granite"), tokenizer), tmp_path)
    names = ("logit_scale", "embedding_scale", "residual_scale", "attention.scale")
    values = [header[f"granite.{name}"] for name in names]
    assert values == pytest.approx([4.0, 3.0, 0.5, 0.2])
    assert "granite.attention.key_length" not in header


def test_a_window_that_llama_cpp_lacks_is_noted(tokenizer) -> None:
    assert plan_of(random_model("mistral"), tokenizer).notes == ()
    (note,) = plan_of(random_model("mistral", sliding_window=16), tokenizer).notes
    assert "after 16 tokens" in note


def test_long_factors_for_short_texts_are_noted(tokenizer) -> None:
    (note,) = plan_of(random_model("phi3-long"), tokenizer).notes
    assert "-c 64" in note


REFUSED = {
    "another family": ("llama", {"model_type": "qwen3_moe"}, "does not support the model type qwen3_moe"),
    "dynamic rope": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "rope_type = dynamic"),
    "llama3 rope of qwen2": ("qwen2", {"rope_parameters": LLAMA3}, "rope_type = llama3"),
    "llama3 rope of smollm3": ("smollm3", {"rope_parameters": LLAMA3}, "rope_type = llama3"),
    "yarn of gemma": ("gemma2", {"rope_parameters": YARN}, "rope_type = yarn"),
    "a factor of yarn": ("llama", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor = 2.0"),
    "mscale of yarn": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0}}, "mscale = 1.0"),
    "a part of the head rotated": ("llama", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "other activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu"),
    "other layers without rope": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers"),
    "other windows": ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    "other scale": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
    "no soft cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None"),
    "no cap of logits": ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping = None"),
    "a soft cap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "change", "what"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(variant, change, what: str) -> None:
    config = random_model(variant).config.to_dict()
    read_family(config)
    with pytest.raises(ModelError, match=what) as error:
        read_family({**config, **change})
    assert error.value.fix


def test_the_first_gemma_is_taken_as_it_was_meant() -> None:
    config = random_model("gemma").config.to_dict()
    assert read_family({**config, "hidden_act": "gelu"}).arch == "gemma"


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("olmo2", "model.layers.0.self_attn.q_proj.bias"),
        ("gemma2", "lm_head.weight"),
        ("llama", "model.layers.0.extra.weight"),
    ],
)
def test_a_weight_without_a_place_is_refused(variant: str, name: str, tokenizer) -> None:
    model = random_model(variant)
    weights = {**rows_of(model), name: tensor_rows(torch.zeros(128))}
    with refuses(ModelError, names=[name], fix=["tunesmith merge RUN"]):
        plan_gguf(model.config.to_dict(), weights, tokenizer, quant="f16", name="tiny")


def test_an_unknown_quantization_is_refused(tokenizer) -> None:
    with pytest.raises(RecipeError, match="'q3_k'"):
        plan_of(random_model("llama"), tokenizer, "q3_k")
