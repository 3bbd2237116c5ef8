"""Tiny folders of vision-language models: config, picture processor and tokenizer of a family."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
}  # fmt: skip
_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
               "out_hidden_size": 64, "patch_size": 14}  # fmt: skip
_QWEN3_TOWER = {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Pictures of 1 to 16 placeholders, each of 28 x 28 pixels.
_QWEN_PIXELS = {"size": {"shortest_edge": 784, "longest_edge": 12544}, "patch_size": 14}
_QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@dataclass(frozen=True)
class _Family:
    """What a family's files say."""

    text: dict[str, Any]  # settings of the config's parts, and of all of it
    tower: dict[str, Any]
    processor: tuple[str, dict[str, Any]]  # class -> what processor_config.json has beside that
    pixels: dict[str, Any]  # preprocessor_config.json
    image: str = field(kw_only=True)  # what its template writes for a picture
    ids: dict[str, str] = field(kw_only=True)  # name in the config -> the token whose id it has
    whole: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)  # attribute of the tokenizer -> its token
    tokens: list[str] = field(default_factory=list)  # other special tokens
    model_type: str = ""  # where it is not the family's name

    def but(self, **changes: Any) -> _Family:
        """A family that differs in some of it."""
        return replace(self, **changes)


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
FAMILIES: dict[str, _Family] = {
    "qwen2_5_vl": _Family(
        _MROPE, {**_QWEN_TOWER, "window_size": 56, "fullatt_block_indexes": [1]},
        ("Qwen2_5_VLProcessor", {}),
        {"image_processor_type": "Qwen2VLImageProcessor", **_QWEN_PIXELS}, image=_QWEN_IMAGE,
        ids=_QWEN_IDS, tokens=_QWEN_TOKENS,
    ),
    "qwen3_vl": _Family(
        _MROPE, _QWEN3_TOWER, ("Qwen3VLProcessor", {}),
        {"image_processor_type": "Qwen2VLImageProcessorFast", **_QWEN_PIXELS}, image=_QWEN_IMAGE,
        ids=_QWEN_IDS, tokens=_QWEN_TOKENS,
    ),
    "qwen3_5": _Family(
        {**_DELTA, **_MROPE}, {**_QWEN_TOWER, "num_position_embeddings": 16},
        ("Qwen3VLProcessor", {}),
        {"image_processor_type": "Qwen2VLImageProcessorFast", **_QWEN_PIXELS}, image=_QWEN_IMAGE,
        ids=_QWEN_IDS, tokens=_QWEN_TOKENS,
    ),
    "glm4v": _Family(
        _MROPE, {**_QWEN_TOWER, "out_hidden_size": 64, "image_size": 56}, ("Glm4vProcessor", {}),
        {"image_processor_type": "Glm4vImageProcessor", **_QWEN_PIXELS},
        image="<|begin_of_image|><|image|><|end_of_image|>",
        ids={
            "image_token_id": "<|image|>", "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>",
        },
        tokens=[
            "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>",
            "<|begin_of_video|>", "<|end_of_video|>",
        ],
    ),
    "gemma3": _Family(
        {**_WINDOWS, "query_pre_attn_scalar": 16}, _TOWER,
        ("Gemma3Processor", {"image_seq_length": 4}),
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}},
        image="<start_of_image>",
        ids={
            "image_token_id": "<image_soft_token>", "boi_token_id": "<start_of_image>",
            "eoi_token_id": "<end_of_image>",
        },
        whole={"mm_tokens_per_image": 4},
        named={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    "gemma4": _Family(
        {
            **_WINDOWS, "num_kv_shared_layers": 0, "global_head_dim": 32,
            "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 30.0,
        },
        {**_TOWER, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 3},
        ("Gemma4Processor", {"image_seq_length": 70}),
        {
            "image_processor_type": "Gemma4ImageProcessor", "patch_size": 14, "max_soft_tokens": 70,
            "pooling_kernel_size": 3,
        },
        image="\n\n<|image|>\n\n",
        ids={
            "image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
            "video_token_id": "<|video|>",
        },
        whole={"audio_config": None},
        named={
            "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
            "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
        },
        tokens=["<|video|>"],
    ),
    "internvl": _Family(
        {"model_type": "qwen2"}, {**_TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
        ("InternVLProcessor", {"image_seq_length": 4}),
        {
            "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 56, "width": 56},
            "max_patches": 4,
        },
        image="<IMG_CONTEXT>\n", ids={"image_token_id": "<IMG_CONTEXT>"},
        whole={"downsample_ratio": 0.5},
        named={
            "start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
        },
    ),
    "llava_onevision": _Family(
        {"model_type": "qwen2"},
        {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        (
            "LlavaOnevisionProcessor",
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ),
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
        },
        image="<image>\n", ids={"image_token_id": "<image>", "video_token_id": "<video>"},
        whole={
            "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
            "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
        },
        tokens=["<image>", "<video>"],
    ),
    "idefics3": _Family(
        {"model_type": "llama"}, _TOWER, ("Idefics3Processor", {"image_seq_len": 4}),
        {
            "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
        },
        image="<image>", ids={"image_token_id": "<image>"}, whole={"scale_factor": 2},
        tokens=[
            "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
            *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
        ],
    ),
    "mistral3": _Family(
        {"model_type": "mistral"}, {**_TOWER, "model_type": "pixtral", "head_dim": 16},
        ("PixtralProcessor", {"patch_size": 14, "spatial_merge_size": 2}),
        {
            "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 112},
            "patch_size": {"height": 14, "width": 14},
        },
        image="[IMG]", ids={"image_token_id": "[IMG]"},
        whole={"spatial_merge_size": 2, "vision_feature_layer": -1},
        tokens=["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    ),
}  # fmt: skip

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_QWEN2 = FAMILIES["qwen2_5_vl"]
_IDEFICS = FAMILIES["idefics3"]
# Near relatives of these, and other text models in them.
MORE_FAMILIES: dict[str, _Family] = {
    "qwen2_vl": _QWEN2.but(
        tower={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
        processor=("Qwen2VLProcessor", {}),
    ),
    "qwen3_vl_moe": FAMILIES["qwen3_vl"].but(text={**_MROPE, **_EXPERTS}),
    "qwen3_5_moe": FAMILIES["qwen3_5"].but(
        text={**_DELTA, **_MROPE, **_EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "gemma4_both_ways": FAMILIES["gemma4"].but(
        text={**FAMILIES["gemma4"].text, "use_bidirectional_attention": "vision"},
        model_type="gemma4",
    ),
    "ministral3": FAMILIES["mistral3"].but(
        text={"model_type": "ministral3"}, model_type="mistral3"
    ),
    "smolvlm": _IDEFICS.but(
        processor=("SmolVLMProcessor", {"image_seq_len": 4}),
        pixels={**_IDEFICS.pixels, "image_processor_type": "SmolVLMImageProcessor"},
    ),
}

# ChatML as Qwen2.5-VL's: contents are texts, or lists of parts.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ IMAGE }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def takes_pictures() -> bool:
    """Return whether this Transformers takes the features of pictures: 5.17 does not."""
    return Version(transformers.__version__) >= Version("5.18")


def write_processor(folder: Path, family: str, **config: Any) -> Path:
    """Write all files of a tiny model but its weights; skip the test if Transformers is too old."""
    if not takes_pictures():
        pytest.skip("pictures need Transformers 5.18")
    from transformers import AutoConfig

    from conftest import byte_tokenizer

    of = (FAMILIES | MORE_FAMILIES)[family]
    tokenizer = byte_tokenizer(bos_token="<|bos|>", **of.named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": of.tokens}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", json.dumps(of.image))
    tokenizer.save_pretrained(folder)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {**_TEXT, "vocab_size": max(320, len(tokenizer)), **special, **of.text}
    if "vocab_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in of.ids.items()}
    whole = {**ids, "tie_word_embeddings": False, **of.whole, **config}
    # Configs write into the mappings that they are given.
    parts = copy.deepcopy({"text_config": text, "vision_config": of.tower})
    AutoConfig.for_model(of.model_type or family, **whole, **parts).save_pretrained(folder)
    name, settings = of.processor
    for file, content in (
        ("processor_config.json", {"processor_class": name, **settings}),
        ("preprocessor_config.json", {"processor_class": name, **of.pixels}),
    ):
        (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
