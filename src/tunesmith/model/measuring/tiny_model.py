"""A tiny version of a model: the same class and config, but with few layers and small widths.

The tiny model is used to measure in a second or two how a model can be trained. It has one layer of
each kind. Windows and chunks are shorter than the measured documents and dropout is off, so that
the effect of the layers is visible. Sizes are recognized by the names of the config keys. Types
that use these names differently have their own values in HINTS.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.arch.load import auto_class_of
from tunesmith.model.arch.spec import DECODER_DEPTHS, EXPERTS_PER_TOKEN, one_line
from tunesmith.model.known.decoder import vision_parameters
from tunesmith.model.layers.gpu_kernels import keep_kernels_to_gpus
from tunesmith.model.layers.vision import text_key
from tunesmith.model.weights.safetensors_files import Config

VOCAB = 64
HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
KV_HEADS = 2
WINDOW = 8  # number of tokens in windows, chunks and indexer selections
STATE_CHANNELS = 8  # number of state channels of a recurrent layer
MAX_TINY_POSITIONS = 512  # `run_on_meta` runs at most this number of tokens
MIN_LAYERS = 2
MAX_LAYER_KINDS = 10
# Maximum number of parameters of a tiny model. A larger model means that its config has a key for a
# size that the tables below do not list, so that this size was not reduced.
MAX_TINY_PARAMETERS = 50_000_000
# Standard deviation of the weights. With the usual 0.02, the residual stream would hide the effect
# of a layer.
SPREAD = 0.1

# Tiny model size -> config keys that get this size. Keys of one group have equal values in every
# model.
_KEYS_BY_SIZE = (
    (
        VOCAB,
        """
        vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
        ngram_vocab_size_base encoder_hash_byte_group_vocab
        """,
    ),
    (
        HIDDEN,
        """
        hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim
        embed_dim dim_model lru_width input_embedding_size output_embedding_size
        """,
    ),
    (
        48,
        """
        intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim
        ffn_hidden_size dim_ff dff n_inner decoder_ffn_dim encoder_ffn_dim feed_forward_size
        d_inner
        """,
    ),
    (
        24,
        """
        moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size qk_head_dim
        """,
    ),
    (
        MAX_TINY_POSITIONS,
        """
        max_position_embeddings n_positions n_ctx max_seq_len model_max_length
        context_length original_max_position_embeddings
        """,
    ),
    (2 * HIDDEN, "mamba_d_ssm attention_hidden_size"),
    (
        HEADS,
        """
        num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads
        num_experts num_local_experts n_routed_experts moe_num_experts
        """,
    ),
    (
        HEAD_DIM,
        """
        head_dim dim_head d_head kv_channels swa_head_dim global_head_dim linear_head_dim
        mamba_d_head mamba_head_dim mamba_headdim qk_nope_head_dim index_head_dim
        attention_head_size query_pre_attn_scalar kv_lora_rank q_lora_rank o_lora_rank
        gated_norm_rank laurel_rank adapter_rank hc_lowrank d_rel router_hidden_size
        """,
    ),
    (
        STATE_CHANNELS,
        """
        mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_state ssm_state_size state_size
        linear_key_head_dim linear_value_head_dim qk_rope_head_dim rotary_dim
        hidden_size_per_layer_input ple_embed_dim
        """,
    ),
    (12, "v_head_dim"),
    (32, "attention_head_dim"),
    (
        WINDOW,
        """
        sliding_window sliding_window_size window_size attention_window_size local_attention
        attention_chunk_size keep_window_size mamba_chunk_size chunk_size block_size
        index_topk index_block_size rel_extent prompt_length log_scaling_n_floor
        """,
    ),
    (4, "floor_scale mamba_dt_rank time_step_rank"),
    (
        2,
        """
        attn_layer_period expert_layer_period index_topk_blocks index_kpool num_blocks
        num_layers_per_stack block_multiple_of
        """,
    ),
    (
        1,
        """
        attn_layer_offset expert_layer_offset n_group topk_group num_expert_group
        num_nextn_predict_layers zero_expert_num split_ngram_parts
        """,
    ),
)
SIZE_OF_KEY = {key: size for size, keys in _KEYS_BY_SIZE for key in keys.split()}
# Config keys for the number of layers.
DEPTHS = (*DECODER_DEPTHS, "encoder_layers", "num_encoder_layers", "layers")
# Config keys for the number of key-value heads -> key for the number of query heads.
QUERY_HEADS_KEYS = {
    "num_key_value_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
    "kv_n_heads": "n_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
    "num_query_groups": "num_attention_heads",
}
GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups", "o_groups")
# Config keys with a list of the indices of layers of one kind.
LISTS_OF_LAYERS = (
    "attn_layer_indices",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
    "hybrid_layer_ids",
    "global_attn_layers",
)
LAST_INDEX = "moe_layer_end_index"  # config key for the index of the last layer of a kind
# Config keys with a number that separates two kinds of layers. The function of a key gets (layer
# index, value of the key, number of layers) and returns whether the layer is of the first kind.
COUNTS_OF_LAYERS: dict[str, Callable[[int, int, int], bool]] = {
    "first_k_dense_replace": lambda index, first, depth: index < first,
    "num_dense_layers": lambda index, first, depth: index < first,
    "moe_layer_start_index": lambda index, first, depth: index < first,
    "num_kv_shared_layers": lambda index, last, depth: index >= depth - last,
    LAST_INDEX: lambda index, last, depth: index <= last,
}
# Types in which layers of one kind share weights. Their tiny models need two layers of each kind.
SHARING = ("zamba", "zamba2")
# Config keys for the number of layers after which the kinds of layers repeat. Models without
# `layer_types` have them.
PERIODS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
    "layer_group_size",
    "interleave_moe_layer_step",
    "global_attn_every_n_layers",
)
# Suffixes of keys for token ids. The tiny model's small vocabulary does not have these ids.
TOKEN_IDS = ("_token_id", "_index")
# Keys that describe how a checkpoint was written or what a forward returns. They do not change the
# computation. DBRX's nested configs in Transformers 5.17 reject keys that they wrote themselves.
NOT_COPIED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)

# Placeholder id of pictures in a tiny model. Other special tokens of a vision-language model have
# lower ids, down to FIRST_SPECIAL_ID.
PICTURE_ID = VOCAB - 1
FIRST_SPECIAL_ID = VOCAB - 16
TEXT_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Config keys of vision and audio parts, by the size that they get in the tiny model.
PART_DEPTHS = (*DEPTHS, "depth")
_PART_KEYS_BY_SIZE = (
    (
        32,
        """
        hidden_size embed_dim d_model hidden_dim audio_hidden_size adapter_in_dim
        adapter_input_size
        """,
    ),
    (
        48,
        """
        intermediate_size projection_intermediate_size projector_hidden_size encoder_ffn_dim
        ffn_dim
        """,
    ),
    (HIDDEN, "out_hidden_size text_hidden_size"),
    (2, "num_heads num_attention_heads num_key_value_heads encoder_attention_heads"),
    (HEAD_DIM, "head_dim global_head_dim dim_head"),
)
PART_SIZES = {key: size for size, keys in _PART_KEYS_BY_SIZE for key in keys.split()}

# Values that cannot be derived from the names of the keys. The key is the model type of a model or
# of one of its parts.
HINTS: dict[str, dict[str, object]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "dots3_note_text": {"head_dim": 24},  # total width of a head's two parts in sliding layers
    # Ids of pictures and sound follow the ids of text.
    "apertus1p5": {"image_token_offset": 32, "audio_token_offset": 40},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8, "base_channels": 32},
    "wavtokenizer_encoder": {"codebook_size": 8, "codebook_dim": 32},
    "chameleon": {"vocabulary_map": {"<image>": PICTURE_ID, "IMGIMGBZ": FIRST_SPECIAL_ID}},
    "emu3": {"vocabulary_map": {"<image>": PICTURE_ID, "<|extra_200|>": FIRST_SPECIAL_ID}},
    "chameleon_vqgan": {"base_channels": 32},
    "emu3_vqgan": {"base_channels": 32},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": HIDDEN, "intermediate_size": HIDDEN // 4}},
    "granite4_vision": {"vision_config": {"hidden_size": 64}},  # its heads have a width of 64
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 64},
    "mimi": {"upsample_groups": HIDDEN},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 16, 16]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 1, "depths": [1] * 7},
}


def build_tiny_model(
    config: PretrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a tiny model with this config: fp32, on the CPU, with eager attention for text.

    The tiny model is in eval mode, because some models select experts randomly in training
    (PhiMoE). For the config of a vision-language model, build a tiny version of the entire model
    and freeze all parts except the text model.

    Raise ModelError if Transformers cannot build the tiny model, or if it is too large because one
    of its sizes could not be reduced.
    """

    factory = auto_class_of(config)
    attention: str | dict[str, str] = "eager"
    shrink_config: Callable[[PretrainedConfig], PretrainedConfig] = shrink
    if config.get_text_config() is not config:
        attention = {text_key(config): "eager"}
        shrink_config = shrink_multimodal

    def build() -> PreTrainedModel:
        try:
            with _without_warnings():
                model: PreTrainedModel = factory.from_config(
                    shrink_config(config),
                    dtype=torch.float32,
                    attn_implementation=attention,
                    trust_remote_code=trust_remote_code,
                )
        # The code of 190 model types can raise any exception for unusual configs.
        except Exception as error:
            raise _no_tiny(config, one_line(error)) from error
        return model

    # Build on meta first, because a tiny model with a size that was not reduced could need all
    # memory.
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    if parameters > MAX_TINY_PARAMETERS:
        raise _no_tiny(config, f"it would have {parameters:,} parameters")
    # fork_rng restores the caller's random state after the seeded construction.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        _spread_weights(model)
    keep_kernels_to_gpus(model)
    for _, parameter in vision_parameters(model):
        parameter.requires_grad_(False)
    return model.eval()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide Transformers' warnings about the scaled rotary embedding of a tiny model."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _no_tiny(config: PretrainedConfig, why: str) -> ModelError:
    return ModelError(
        f"cannot build a small test model of this {config.model_type}",
        why=f"{why}; this small model is used to measure how the model trains",
        fix="fetch config.json again: tunesmith fetch MODEL; "
        "a newer type needs a newer Transformers",
    )


@torch.no_grad()
def _spread_weights(model: PreTrainedModel) -> None:
    """Make the parameters large enough to affect the output.

    Add noise to vectors, and replace matrices with small values by noise.
    """
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * SPREAD
        if parameter.ndim == 1:
            parameter.add_(noise)
        elif parameter.std() < SPREAD / 2:
            parameter.copy_(noise)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config with the same structure and small sizes."""
    values = config.to_dict()
    model_type = values.pop("model_type")
    for key in NOT_COPIED:
        values.pop(key, None)
    each = 2 if model_type in SHARING else 1
    layers = choose_layers(values, config.num_hidden_layers, each=each)
    small = _shrink_values(values, layers, config.num_hidden_layers)
    tiny: PretrainedConfig = type(config)(**_with_hints(small, model_type))
    # Transformers finds the code in a repository by name_or_path and auto_map.
    tiny.name_or_path = config.name_or_path
    if "auto_map" in vars(config):
        tiny.auto_map = config.auto_map
    return tiny


def shrink_multimodal(full_config: PretrainedConfig) -> PretrainedConfig:
    """Return a config with small sizes for a vision-language or audio model.

    The tiny model takes the same inputs as the model.

    The text part is shrunk by `shrink`. In the other parts only widths and depths are shrunk,
    because all other values determine the shapes of the processor's output.
    """
    text = full_config.get_text_config()
    values = full_config.to_dict()
    model_type = values.pop("model_type")
    small_text = shrink(text)
    small_text.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    small = _shrink_part(values, text.hidden_size)
    ids: dict[int, int] = {}
    for key, value in values.items():
        if key in ("image_token_id", "image_token_index"):
            small[key] = PICTURE_ID
        elif key.endswith(TOKEN_IDS) and isinstance(value, int) and key not in TEXT_IDS:
            small[key] = ids.setdefault(value, PICTURE_ID - 1 - len(ids))
        elif value == text.hidden_size and "size" in key:
            small[key] = HIDDEN
    small[text_key(full_config)] = small_text
    return type(full_config)(**_with_hints(small, model_type))


def _with_hints(small: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Apply the HINTS of the model type to the values. A hint can be a mapping for a section."""
    for key, hint in HINTS.get(model_type, {}).items():
        if isinstance(hint, dict):
            small[key] = small[key] | hint
        else:
            small[key] = hint
    return small


def _shrink_part(values: Config, width: int) -> dict[str, Any]:
    """Return the small values of a vision or audio part.

    `width` is the text model's hidden size.
    """
    depth = 0
    for key in PART_DEPTHS:
        if isinstance(values.get(key), int):
            depth = values[key]
            break
    layers = choose_layers(values, depth)
    small: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key == "per_layer_config":
            small[key] = _cut_by_layer(value, layers)
        elif isinstance(value, dict) and key.endswith("_config"):
            small[key] = _shrink_part(value, width)
        elif isinstance(value, list) and len(value) == depth:
            small[key] = [value[index] for index in layers]
        elif key in PART_DEPTHS and value:
            small[key] = len(layers)
        elif key not in NOT_COPIED:
            small[key] = _shrink_part_value(key, value, values, width)
    return _with_hints(small, values.get("model_type", ""))


def _shrink_part_value(key: str, value: object, values: Config, width: int) -> object:
    """Return the small value of one key. `values` are all values of the same part."""
    if "drop" in key and isinstance(value, float):
        return 0.0
    if isinstance(value, list) and key.endswith(("indexes", "indices", "feature_layer")):
        return list(range(min(len(value), MIN_LAYERS)))
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    # For the vision part of Qwen2-VL, `hidden_size` is the width of its output, and `embed_dim` is
    # the width of its layers.
    is_output = key == "hidden_size" and "embed_dim" in values
    if key in PART_SIZES and not is_output:
        if value > 0:
            return PART_SIZES[key]
        return value
    is_width = "hidden" in key or "dim" in key or "size" in key
    if is_width and value == width:
        return HIDDEN
    if key.endswith(TOKEN_IDS):
        return min(value, VOCAB - 1)
    if key == "vocab_size":
        return VOCAB
    return value


def choose_layers(values: Config, depth: int, *, each: int = 1) -> list[int]:
    """Return the indices of the first `each` layers of each kind, in order, and at least two.

    Two layers are of the same kind if all per-layer values of the config are equal.
    """
    kinds: dict[str, list[int]] = {}
    for index in range(depth):
        # Use a string, because lists cannot be keys of a dict.
        kinds.setdefault(str(_layer_kind(values, index, depth)), []).append(index)
    chosen: list[int] = []
    for layers in kinds.values():
        chosen += layers[:each]
    chosen = sorted(chosen)[:MAX_LAYER_KINDS]
    others = [index for index in range(depth) if index not in chosen]
    return sorted(chosen + others[: max(0, MIN_LAYERS - len(chosen))])


def _layer_kind(values: Config, index: int, depth: int) -> list[object]:
    kind: list[object] = []
    for key, value in values.items():
        if isinstance(value, list):
            if key in LISTS_OF_LAYERS:
                kind.append(index in value)
            elif len(value) == depth:
                kind.append(value[index])
        elif key == "per_layer_config" and isinstance(value, dict):
            kind.append(_layer_entry(value, index))
        elif key in COUNTS_OF_LAYERS and isinstance(value, int):
            kind.append(COUNTS_OF_LAYERS[key](index, value, depth))
    return kind


def _layer_entry(by_layer: Config, index: int) -> Any:
    """Return the entry of a mapping whose keys are layer indices with leading zeros, as text."""
    return {int(key): value for key, value in by_layer.items()}.get(index)


def _shrink_values(values: Config, layers: list[int], depth: int) -> dict[str, Any]:
    """Return the small values of a config whose `depth` layers are reduced to `layers`."""
    return {key: _shrink_entry(key, value, values, layers, depth) for key, value in values.items()}


def _shrink_entry(key: str, value: object, values: Config, layers: list[int], depth: int) -> object:
    """Return the small value of one key, which may be a list of per-layer values."""
    if isinstance(value, list):
        # Convert indices of the model's layers to indices of the chosen layers.
        if key in LISTS_OF_LAYERS:
            return [place for place, index in enumerate(layers) if index in value]
        # Keep the entries of the chosen layers in a list of per-layer values.
        if len(value) == depth and depth > 1:
            return [_shrink_value(key, value[index], values) for index in layers]
    elif isinstance(value, dict):
        if key == "per_layer_config":
            return _cut_by_layer(value, layers)
        if key in ("rope_parameters", "rope_scaling"):
            return _shrink_rotary(value, values)
    elif isinstance(value, int):
        if key in DEPTHS:
            return len(layers)
        # The value is a number of layers or a layer index. Convert it to the tiny model's layers.
        if key in COUNTS_OF_LAYERS:
            is_counted = COUNTS_OF_LAYERS[key]
            count = sum(is_counted(index, value, depth) for index in layers)
            if key == LAST_INDEX:
                return count - 1
            return count
    return _shrink_value(key, value, values)


def _cut_by_layer(by_layer: Config, layers: list[int]) -> dict[str, dict[str, object]]:
    """Return the per-layer values of the chosen layers, under their new indices."""
    small = {}
    for place, index in enumerate(layers):
        entry = _layer_entry(by_layer, index)
        if entry is not None:
            values = _shrink_values(entry, [], 0)
            if "head_dim" in entry:
                values["head_dim"] = 2 * HEAD_DIM  # wider than in other layers (Gemma 4)
            small[str(place)] = values
    return small


def _shrink_value(key: str, value: object, values: Config) -> object:
    """Return the small value of one key. `values` are the values of the same config."""
    if isinstance(value, dict) and ("hidden_size" in value or key.endswith("_config")):
        left_out = ("model_type", *NOT_COPIED)
        inner = {name: part for name, part in value.items() if name not in left_out}
        # Nested configs (vision tower, sub-model) are shrunk by the same rules.
        shrunk = _shrink_values(inner, list(range(MIN_LAYERS)), 0)
        return _with_hints(shrunk, value.get("model_type", ""))
    if key.endswith(TOKEN_IDS) and value is not None:
        # Ids that exist in the small vocabulary: 0 for padding, 1 for begin, 2 for end.
        return {"bos_token_id": 1, "eos_token_id": 2}.get(key, 0)
    if "drop" in key and isinstance(value, float):
        return 0.0
    # Floats, strings, lists and booleans decide what is computed. Keep them.
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key in QUERY_HEADS_KEYS:
        heads = values.get(QUERY_HEADS_KEYS[key], values.get("num_attention_heads"))
        # If the model has equally many query heads and key-value heads, so does the tiny model.
        # Otherwise the tiny model has fewer key-value heads.
        if value == heads:
            return HEADS
        return min(value, KV_HEADS)
    if key in (*EXPERTS_PER_TOKEN, *GROUPS, *PERIODS):
        return min(value, 2)
    if key in ("head_dim", "v_head_dim") and value:
        return _head_width(value, values)
    if key in SIZE_OF_KEY and value > 0:
        return SIZE_OF_KEY[key]
    return value


def _head_width(value: int, values: Config) -> int:
    """Return the small width of a head.

    In latent attention, a head has two parts, whose widths have separate config keys.
    """
    nope = values.get("qk_nope_head_dim")
    rope = values.get("qk_rope_head_dim")
    if not nope or not rope:
        return HEAD_DIM
    if value == rope:
        return SIZE_OF_KEY["qk_rope_head_dim"]
    if value == nope + rope:
        return SIZE_OF_KEY["qk_nope_head_dim"] + SIZE_OF_KEY["qk_rope_head_dim"]
    return HEAD_DIM


def _shrink_rotary(rotary: Config, values: Config) -> dict[str, object]:
    """Return the small rotary parameters. They can be nested by layer type."""
    small: dict[str, object] = {}
    head_dim = SIZE_OF_KEY["qk_rope_head_dim"] if values.get("qk_rope_head_dim") else HEAD_DIM
    part = rotary.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    # There are half as many frequencies as rotated channels, because each angle rotates two
    # channels.
    frequencies = int(head_dim * part) // 2
    for key, value in rotary.items():
        if isinstance(value, dict):
            small[key] = _shrink_rotary(value, values)
        elif key in ("long_factor", "short_factor"):
            # The lists have one factor per frequency.
            small[key] = value[:frequencies]
        elif key == "mrope_section":
            # The sections of a multi-axis embedding add up to the number of frequencies. A section
            # that differs from the others gets the remainder of the division, because in ERNIE the
            # other two sections must be equal.
            size, rest = divmod(frequencies, len(value))
            odd = [place for place, section in enumerate(value) if value.count(section) == 1]
            with_rest = odd[0] if odd else 0
            sections = [size] * len(value)
            sections[with_rest] += rest
            small[key] = sections
        elif key == "partial_rotary_factor" and values.get("qk_nope_head_dim"):
            # Latent attention rotates only one of the two parts of a head.
            whole = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
            small_config = SIZE_OF_KEY["qk_nope_head_dim"] + head_dim
            small[key] = value
            if value == values["qk_rope_head_dim"] / whole:
                small[key] = head_dim / small_config
        elif key == "original_max_position_embeddings":
            small[key] = MAX_TINY_POSITIONS
        else:
            small[key] = value
    return small
