"""Tiny folders of vision-language models: config, picture processor and tokenizer of a family.

Of each the model can be built with random weights; `tests/vision_models.py` has those whose text
part alone is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
               "out_hidden_size": 64, "patch_size": 14}  # fmt: skip
_QWEN3_TOWER = {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# Pictures of 1 to 16 placeholders, each of 28 x 28 pixels.
_QWEN_PIXELS = {"size": {"shortest_edge": 784, "longest_edge": 12544}, "patch_size": 14}
_QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class _Family:
    """What a family's files say.

    Attributes:
        text, tower, whole: settings of the config's parts, and of all of it.
        processor: class of its processor -> what processor_config.json has beside that.
        pixels: preprocessor_config.json.
        named: attribute of the tokenizer -> its special token.
        tokens: other special tokens.
        image: what its template writes for a picture.
        ids: name in the config -> the token whose id it has.
    """

    def __init__(
        self,
        text: dict[str, Any],
        tower: dict[str, Any],
        processor: tuple[str, dict[str, Any]],
        pixels: dict[str, Any],
        *,
        image: str,
        ids: dict[str, str],
        whole: dict[str, Any] | None = None,
        named: dict[str, str] | None = None,
        tokens: list[str] | None = None,
    ) -> None:
        self.text = text
        self.tower = tower
        self.whole = whole or {}
        self.processor = processor
        self.pixels = pixels
        self.named = named or {}
        self.tokens = tokens or []
        self.image = image
        self.ids = ids


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
FAMILIES: dict[str, _Family] = {
    "qwen2_5_vl": _Family(
        _MROPE,
        {**_QWEN_TOWER, "window_size": 56, "fullatt_block_indexes": [1]},
        ("Qwen2_5_VLProcessor", {}),
        {"image_processor_type": "Qwen2VLImageProcessor", **_QWEN_PIXELS},
        image=_QWEN_IMAGE,
        ids=_QWEN_IDS,
        tokens=_QWEN_TOKENS,
    ),
    "qwen3_vl": _Family(
        _MROPE,
        _QWEN3_TOWER,
        ("Qwen3VLProcessor", {}),
        {"image_processor_type": "Qwen2VLImageProcessorFast", **_QWEN_PIXELS},
        image=_QWEN_IMAGE,
        ids=_QWEN_IDS,
        tokens=_QWEN_TOKENS,
    ),
}

# ChatML as Qwen2.5-VL's: contents are texts, or lists of parts.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_processor(folder: Path, family: str, **config: Any) -> Path:
    """Write all files of a tiny model of a family but its weights: `config` are further settings of
    the whole.
    """
    from conftest import byte_tokenizer
    from transformers import AutoConfig

    of = FAMILIES[family]
    tokenizer = byte_tokenizer(bos_token="<|bos|>", **of.named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": of.tokens}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", of.image)
    tokenizer.save_pretrained(folder)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {**_TEXT, "vocab_size": len(tokenizer), **special, **of.text}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in of.ids.items()}
    whole = {**ids, "tie_word_embeddings": False, **of.whole, **config}
    AutoConfig.for_model(family, text_config=text, vision_config=of.tower, **whole).save_pretrained(
        folder
    )
    name, settings = of.processor
    for file, content in (
        ("processor_config.json", {"processor_class": name, **settings}),
        ("preprocessor_config.json", {"processor_class": name, **of.pixels}),
    ):
        (folder / file).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
