"""Facts from a config alone, against the models that Transformers builds from it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from errors import refuses
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model import spec

from . import families

REFUSED = {
    "an encoder": {"model_type": "bert"},
    "encoder": {"model_type": "xlm-roberta"},
    "encoder or": {"model_type": "modernbert"},
    "encoder-decoder": {"model_type": "t5", "is_encoder_decoder": True},
    "an encoder or": {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    "cannot be read from its config": {"model_type": "brand_new"},
    "no model_type": {"architectures": ["LlamaForCausalLM"]},
    "quantized with gptq": {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quantized with awq": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
    "bitsandbytes 8-bit": {
        "model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    },
    "bitsandbytes fp4": {
        "model_type": "llama",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    },
    "gemma3 are quantized with gptq": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "quantization_config": {"quant_method": "gptq"}},
    "hidden_size is '64'": {"model_type": "llama", "hidden_size": "64"},
    "num_hidden_layers is 0": {"model_type": "llama", "num_hidden_layers": 0},
    "vocab_size is None": {"model_type": "llama", "vocab_size": None},
    "cannot share": {"model_type": "llama", "num_key_value_heads": 3},
}  # fmt: skip


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_what_is_not_trained_is_refused_by_name(words: str) -> None:
    with pytest.raises(ModelError) as caught:
        spec.read_spec({**families.SMALL, **REFUSED[words]}, where="some/config.json")
    error = caught.value
    assert words in error.text()
    assert error.exit_code == 2
    assert error.where == "some/config.json"
    assert error.fix


@pytest.mark.parametrize("model_type", ["gemma3", "glm4v", "muse_glimmer"])
def test_a_config_without_its_text_model_is_refused(model_type: str) -> None:
    stated = {"model_type": model_type, "vision_config": {"hidden_size": 64}}
    with refuses(
        ModelError, where="config.json", names=["no text_config"], fix=["tunesmith fetch"]
    ):
        spec.check_supported(stated, "config.json")
    # Qwen2-VL's files on the Hub have the sizes at the top, DeepSeek-OCR 2's in another section.
    spec.check_supported({"model_type": "qwen2_vl", "vocab_size": 64, "vision_config": {}}, "x")
    spec.check_supported(
        {"model_type": "deepseek_ocr2", "language_config": {"vocab_size": 64}}, "x"
    )


@pytest.fixture(scope="module", params=sorted(families.VARIANTS))
def built(request):
    import torch
    from transformers import AutoModelForCausalLM

    config = families.tiny_config(request.param)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_counts_are_those_of_the_built_model(built) -> None:
    from torch import nn

    raw = json.loads(built.config.to_json_string(use_diff=True))
    for config in (raw, built.config.to_dict()):
        found = spec.read_spec(config, where="config.json")
        assert found.parameters == sum(p.numel() for p in built.parameters())
        layers = built.model.layers
        matrices = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
        assert found.layers[0].matmul == sum(m.weight.numel() for m in matrices)
        assert found.head_matmul == built.lm_head.weight.numel()
        assert found.tied == (built.lm_head.weight is built.model.embed_tokens.weight)
        assert found.head_dim == layers[0].self_attn.head_dim
        assert (found.depth, found.vocab) == (len(layers), 128)
        kinds = config.get("layer_types") or getattr(built.config, "layer_types", None)
        if kinds:
            assert [layer.window is not None for layer in found.layers] == [
                k == "sliding_attention" for k in kinds
            ]


def test_windows_without_layer_types_are_the_config_classes() -> None:
    from transformers import AutoConfig

    cases = [
        ("gemma2", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 14}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    ]
    for kind, extra in cases:
        raw = {**families.SMALL, "model_type": kind, **extra}
        theirs = AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k != "model_type"})
        expected = tuple(8 if t == "sliding_attention" else None for t in theirs.layer_types)
        found = spec.read_spec(raw, where="config.json")
        assert tuple(layer.window for layer in found.layers) == expected, kind


@pytest.mark.parametrize(
    ("name", "config", "billions"),
    [
        ("Llama-3.1-8B", {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                          "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}, 8.030261248),
        ("Llama-3.3-70B", {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                           "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}, 70.553706496),
        ("Qwen3-8B", {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}, 8.190735360),
        ("gemma-2-2b", {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000}, 2.614341888),
    ],
)  # fmt: skip
def test_published_parameter_counts(name: str, config: dict, billions: float) -> None:
    assert spec.read_spec(config, where=name).parameters == round(billions * 1e9)


def test_flops_agree_with_a_counter_that_watches_the_products() -> None:
    """torch's own counter sees 2 operations a product and all pairs of attention; we count the
    causal half.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**families.SMALL, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))
    found = spec.read_spec({"model_type": "llama", **shape}, where="")
    length, batch = 64, 2
    ids = torch.randint(0, 128, (batch, length))
    counter = FlopCounterMode(display=False)
    with counter:
        model(ids).logits.float().sum().backward()
    everything = 12 * batch * length * length * 3 * 64
    causal = spec.flops(found, [length] * batch, batch * length, trained="full")
    attention = 12 * batch * (length * (length + 1) // 2) * 3 * 64
    # the counter also sees the rotary table's outer product (forward only): below a thousandth here
    assert counter.get_total_flops() == pytest.approx(causal - attention + everything, rel=1e-3)


def test_flops_of_parts() -> None:
    found = spec.read_spec({"model_type": "llama", **families.SMALL}, where="")
    matmul = found.layer_matrices
    one = spec.flops(found, [1], 0, trained="full")
    assert one == 6 * matmul + 12 * 1 * 3 * 64
    assert spec.flops(found, [1], 1, trained="full") - one == 6 * found.head_matmul
    assert spec.flops(found, [1], 0, trained="lora") == 4 * matmul + 12 * 3 * 64
    assert (
        spec.flops(found, [1], 0, trained="lora", adapter_parameters=10)
        == 4 * matmul + 12 * 3 * 64 + 60
    )
    assert spec.flops(found, [10, 10], 0, trained="full") < spec.flops(
        found, [20], 0, trained="full"
    )
    windowed = spec.read_spec(
        {"model_type": "mistral", "sliding_window": 4, **families.SMALL}, where=""
    )
    pairs = sum(min(i, 4) for i in range(1, 11))
    assert spec.flops(windowed, [10], 0, trained="full") == 6 * matmul * 10 + 12 * pairs * 3 * 64


def test_facts_need_nothing_heavy() -> None:
    script = (
        "import sys, tunesmith.model.spec, tunesmith.model.safetensors_files, tunesmith.cli.fetch\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


LIMITS: list[tuple[dict[str, Any], int | None]] = [
    ({}, 512),
    ({"max_position_embeddings": None}, None),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
    (
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
        2048,
    ),
    (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
        512,
    ),
    # Llama 3.2: what it was trained to is below the factor's reach.
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "original_max_position_embeddings": 128,
            }
        },
        512,
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 512,
            }
        },
        4096,
    ),
    ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 128}, 512),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 512),
    (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {},
            }
        },
        4096,
    ),
    ({"model_type": "mistral", "sliding_window": 64}, None),
    ({"model_type": "mistral", "sliding_window": 4096}, 512),
    ({"model_type": "mistral", "sliding_window": None}, 512),
]


@pytest.mark.parametrize(("changes", "limit"), LIMITS)
def test_the_positions_of_a_config_with_its_scaling(
    changes: dict[str, Any], limit: int | None
) -> None:
    found = spec.read_spec(
        {"model_type": "llama", **families.SMALL, **changes}, where="config.json"
    )
    assert found.position_limit == limit
    if limit is None:
        spec.check_seq_len(found, 1 << 40, where="config.json")
        return
    spec.check_seq_len(found, limit, where="config.json")
    with refuses(RecipeError, names=[f"{limit:,}"]) as caught:
        spec.check_seq_len(found, limit + 1, where="config.json")
    assert (caught.value.where, caught.value.fix) == ("data.seq_len", f"set data.seq_len={limit}")
