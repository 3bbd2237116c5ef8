"""A tiny twin of a model: its class and its config, each kind of layer once, small in every width.

What a family of models needs is measured on the twin in a second or two. Windows and chunks are
shorter than the documents that are measured, and nothing is dropped out, so that what the layers do
shows. The sizes go by the names of the config's keys; a type whose keys mean something else has its
own in HINTS.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.decoder import vision_parameters
from tunesmith.model.gpu_kernels import keep_kernels_to_gpus
from tunesmith.model.load import auto_class_of, one_line
from tunesmith.model.safetensors_files import Config
from tunesmith.model.spec import DECODER_DEPTHS, EXPERTS_PER_TOKEN
from tunesmith.model.vision import text_key

VOCAB = 64
HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
KV_HEADS = 2
WINDOW = 8  # of attention, in tokens; also of chunks, and of what an indexer selects
STATE_CHANNELS = 8  # of a recurrent layer
MAX_TWIN_POSITIONS = 512  # `measured_spec` runs a twin too, on up to so many tokens
FEWEST_LAYERS = 2
MOST_KINDS = 10
# A twin that is larger has a size that no key below names.
MOST_PARAMETERS = 50_000_000
# Spread of the weights: 0.02, as most are drawn with, would hide what a layer does behind the
# residual.
SPREAD = 0.1

# Keys by what they become. Those of a group have one value in every model.
_KEYS_BY_SIZE = (
    (
        VOCAB,
        (
            "vocab_size",
            "vocab_size_per_layer_input",
            "decoder_vocab_size",
            "unpadded_vocab_size",
            "ngram_vocab_size_base",
            "encoder_hash_byte_group_vocab",
        ),
    ),
    (
        HIDDEN,
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "embed_dim",
            "dim_model",
            "lru_width",
            "input_embedding_size",
            "output_embedding_size",
        ),
    ),
    (
        48,
        (
            "intermediate_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "ffn_dim",
            "ffn_hidden_size",
            "dim_ff",
            "dff",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "feed_forward_size",
            "d_inner",
        ),
    ),
    (
        24,
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "qk_head_dim",
        ),
    ),
    (
        MAX_TWIN_POSITIONS,
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "model_max_length",
            "context_length",
            "original_max_position_embeddings",
        ),
    ),
    (2 * HIDDEN, ("mamba_d_ssm", "attention_hidden_size")),
    (
        HEADS,
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "swa_num_attention_heads",
            "linear_num_heads",
            "linear_num_value_heads",
            "index_n_heads",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ),
    ),
    (
        HEAD_DIM,
        (
            "head_dim",
            "dim_head",
            "d_head",
            "kv_channels",
            "swa_head_dim",
            "global_head_dim",
            "linear_head_dim",
            "mamba_d_head",
            "mamba_head_dim",
            "mamba_headdim",
            "qk_nope_head_dim",
            "index_head_dim",
            "attention_head_size",
            "query_pre_attn_scalar",
            "kv_lora_rank",
            "q_lora_rank",
            "o_lora_rank",
            "gated_norm_rank",
            "laurel_rank",
            "adapter_rank",
            "hc_lowrank",
            "d_rel",
            "router_hidden_size",
        ),
    ),
    (
        STATE_CHANNELS,
        (
            "mamba_n_heads",
            "mamba_num_heads",
            "n_mamba_heads",
            "mamba_d_state",
            "ssm_state_size",
            "state_size",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "qk_rope_head_dim",
            "rotary_dim",
            "hidden_size_per_layer_input",
            "ple_embed_dim",
        ),
    ),
    (12, ("v_head_dim",)),
    (32, ("attention_head_dim",)),
    (
        WINDOW,
        (
            "sliding_window",
            "sliding_window_size",
            "window_size",
            "attention_window_size",
            "local_attention",
            "attention_chunk_size",
            "keep_window_size",
            "mamba_chunk_size",
            "chunk_size",
            "block_size",
            "index_topk",
            "index_block_size",
            "rel_extent",
            "prompt_length",
            "log_scaling_n_floor",
        ),
    ),
    (4, ("floor_scale", "mamba_dt_rank", "time_step_rank")),
    (
        2,
        (
            "attn_layer_period",
            "expert_layer_period",
            "index_topk_blocks",
            "index_kpool",
            "num_blocks",
            "num_layers_per_stack",
            "block_multiple_of",
        ),
    ),
    (
        1,
        (
            "attn_layer_offset",
            "expert_layer_offset",
            "n_group",
            "topk_group",
            "num_expert_group",
            "num_nextn_predict_layers",
            "zero_expert_num",
            "split_ngram_parts",
        ),
    ),
)
SIZE_OF_KEY = {key: size for size, keys in _KEYS_BY_SIZE for key in keys}
# Keys that count layers.
DEPTHS = (*DECODER_DEPTHS, "encoder_layers", "num_encoder_layers", "layers")
# As many as heads, one, or fewer.
KV_HEADS_OF = {
    "num_key_value_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
    "kv_n_heads": "n_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
    "num_query_groups": "num_attention_heads",
}
GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups", "o_groups")
# Lists of the layers that are of one kind, by their number.
LISTS_OF_LAYERS = (
    "attn_layer_indices",
    "full_attn_idxs",
    "mlp_only_layers",
    "moe_layers",
    "hybrid_layer_ids",
    "global_attn_layers",
)
LAST_INDEX = "moe_layer_end_index"  # the last layer of a kind, by its number
# Keys whose number says which layers are of another kind: of the layer `index` among `depth`.
COUNTS_OF_LAYERS: dict[str, Callable[[int, int, int], bool]] = {
    "first_k_dense_replace": lambda index, first, depth: index < first,
    "num_dense_layers": lambda index, first, depth: index < first,
    "moe_layer_start_index": lambda index, first, depth: index < first,
    "num_kv_shared_layers": lambda index, last, depth: index >= depth - last,
    LAST_INDEX: lambda index, last, depth: index <= last,
}
# Types whose layers of one kind share weights: two of each.
SHARING = ("zamba", "zamba2")
# Keys that give by a period what `layer_types` gives by layer.
PERIODS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
    "layer_group_size",
    "interleave_moe_layer_step",
    "global_attn_every_n_layers",
)
# Of a config: ids of tokens, which the small vocabulary does not have.
TOKEN_IDS = ("_token_id", "_index")
# Keys for how a checkpoint was written or what a forward returns, not for what the model computes.
# DBRX's nested configs of Transformers 5.17 refuse those that they write themselves.
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

# The placeholders of pictures in a twin; other special tokens of a whole model come before it.
PICTURE_ID = VOCAB - 1
FIRST_SPECIAL_ID = VOCAB - 16
TEXT_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Keys of the parts that see and hear, by the size that they get.
PART_DEPTHS = (*DEPTHS, "depth")
_PART_KEYS_BY_SIZE = (
    (
        32,
        (
            "hidden_size",
            "embed_dim",
            "d_model",
            "hidden_dim",
            "audio_hidden_size",
            "adapter_in_dim",
            "adapter_input_size",
        ),
    ),
    (
        48,
        (
            "intermediate_size",
            "projection_intermediate_size",
            "projector_hidden_size",
            "encoder_ffn_dim",
            "ffn_dim",
        ),
    ),
    (HIDDEN, ("out_hidden_size", "text_hidden_size")),
    (2, ("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads")),
    (HEAD_DIM, ("head_dim", "global_head_dim", "dim_head")),
)
PART_SIZES = {key: size for size, keys in _PART_KEYS_BY_SIZE for key in keys}

# What the names of the keys do not tell, of a model or of a part of one, by its type.
HINTS: dict[str, dict[str, object]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "dots3_note_text": {"head_dim": 24},  # the sliding layers' parts together
    # Ids of pictures and sound are behind those of texts.
    "apertus1p5": {"image_token_offset": 32, "audio_token_offset": 40},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8, "base_channels": 32},
    "wavtokenizer_encoder": {"codebook_size": 8, "codebook_dim": 32},
    "chameleon": {"vocabulary_map": {"<image>": PICTURE_ID, "IMGIMGBZ": FIRST_SPECIAL_ID}},
    "emu3": {"vocabulary_map": {"<image>": PICTURE_ID, "<|extra_200|>": FIRST_SPECIAL_ID}},
    "chameleon_vqgan": {"base_channels": 32},
    "emu3_vqgan": {"base_channels": 32},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": HIDDEN, "intermediate_size": HIDDEN // 4}},
    "granite4_vision": {"vision_config": {"hidden_size": 64}},  # heads of 64
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 64},
    "mimi": {"upsample_groups": HIDDEN},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 16, 16]},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 1, "depths": [1] * 7},
}


def build_twin(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The twin of a model of this config: fp32, on the CPU, its text model with eager attention.

    It is in eval mode: some experts are drawn at random in training (PhiMoE). Of the config of a
    vision-language model it is the twin of the whole, with all but the text model frozen.

    ModelError where Transformers cannot build it, or a size of it does not shrink.
    """

    is_whole_model = config.get_text_config() is not config
    factory = auto_class_of(config)
    attention: str | dict[str, str] = "eager"
    if is_whole_model:
        attention = {text_key(config): "eager"}

    def build() -> PreTrainedModel:
        try:
            with _without_warnings():
                model: PreTrainedModel = factory.from_config(
                    shrink_whole(config) if is_whole_model else shrink(config),
                    dtype=torch.float32,
                    attn_implementation=attention,
                    trust_remote_code=trust_remote_code,
                )
        # Code of 190 model types, on a config that may be absurd.
        except Exception as error:
            raise _no_twin(config, one_line(error)) from error
        return model

    # On meta first: a size that did not shrink would take all memory.
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    if parameters > MOST_PARAMETERS:
        raise _no_twin(config, f"it would have {parameters:,} parameters")
    # Seeded and restored: the caller's random numbers do not change.
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
    """Hide what Transformers says of a twin's rotary embedding, which is scaled from its length."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _no_twin(config: PretrainedConfig, why: str) -> ModelError:
    return ModelError(
        f"cannot build a small test model of this {config.model_type}",
        why=f"{why}; on one it is measured how the model trains",
        fix="take config.json from the model's page again: tunesmith fetch MODEL; "
        "a newer type needs a newer Transformers",
    )


@torch.no_grad()
def _spread_weights(model: PreTrainedModel) -> None:
    """Draw what a constructor leaves so small that it would not show: matrices, zeros, biases."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * SPREAD
        if parameter.ndim == 1:
            parameter.add_(noise)
        elif parameter.std() < SPREAD / 2:
            parameter.copy_(noise)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the twin of a model of this one."""
    values = config.to_dict()
    model_type = values.pop("model_type")
    for key in NOT_COPIED:
        values.pop(key, None)
    each = 2 if model_type in SHARING else 1
    layers = choose_layers(values, config.num_hidden_layers, each=each)
    small = _shrink_values(values, layers, config.num_hidden_layers)
    twin: PretrainedConfig = type(config)(**_with_hints(small, model_type))
    # Of a repository's own code, which is looked up by them.
    twin.name_or_path = config.name_or_path
    if "auto_map" in vars(config):
        twin.auto_map = config.auto_map
    return twin


def shrink_whole(whole: PretrainedConfig) -> PretrainedConfig:
    """The config of the twin of a vision-language or audio model, which takes the same inputs.

    Its text part is that of `shrink`; of the rest widths and depths alone shrink, as all others
    decide the shapes of what the model's own processor makes.
    """
    text = whole.get_text_config()
    values = whole.to_dict()
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
    small[text_key(whole)] = small_text
    return type(whole)(**_with_hints(small, model_type))


def _with_hints(small: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The values with those that HINTS has for their type, which may be of a section."""
    for key, hint in HINTS.get(model_type, {}).items():
        small[key] = {**small[key], **hint} if isinstance(hint, dict) else hint
    return small


def _shrink_part(values: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return the small values of a part that sees or hears; `width` is the text model's."""
    depth = next((values[key] for key in PART_DEPTHS if isinstance(values.get(key), int)), 0)
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
    """Return the small value of a key; `values` are all values of its part."""
    if "drop" in key and isinstance(value, float):
        return 0.0
    if isinstance(value, list) and key.endswith(("indexes", "indices", "feature_layer")):
        return list(range(min(len(value), FEWEST_LAYERS)))
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    # Qwen2-VL's `hidden_size` is what comes out, beside its own width.
    is_output = key == "hidden_size" and "embed_dim" in values
    if key in PART_SIZES and not is_output:
        return PART_SIZES[key] if value > 0 else value
    if value == width and ("hidden" in key or "dim" in key or "size" in key):
        return HIDDEN
    if key.endswith(TOKEN_IDS):
        return min(value, VOCAB - 1)
    return SIZE_OF_KEY[key] if key == "vocab_size" else value


def choose_layers(values: Config, depth: int, *, each: int = 1) -> list[int]:
    """The first layers of each kind, in their order: `each` of every kind, and two at least.

    Layers are of one kind where everything that the config says by layer is the same.
    """
    kinds: dict[str, list[int]] = {}
    for index in range(depth):
        # As text: a kind may hold lists, which are no keys of a dict.
        kinds.setdefault(str(_layer_kind(values, index, depth)), []).append(index)
    chosen = sorted(index for layers in kinds.values() for index in layers[:each])[:MOST_KINDS]
    others = [index for index in range(depth) if index not in chosen]
    missing = max(0, FEWEST_LAYERS - len(chosen))
    return sorted([*chosen, *others[:missing]])


def _layer_kind(values: Config, index: int, depth: int) -> list[object]:
    kind: list[object] = []
    for key, value in values.items():
        if isinstance(value, list) and key in LISTS_OF_LAYERS:
            kind.append(index in value)
        elif isinstance(value, list) and len(value) == depth:
            kind.append(value[index])
        elif key == "per_layer_config" and isinstance(value, dict):
            kind.append(_of_layer(value, index))
        elif key in COUNTS_OF_LAYERS and isinstance(value, int):
            kind.append(COUNTS_OF_LAYERS[key](index, value, depth))
    return kind


def _of_layer(by_layer: Mapping[str, Any], index: int) -> Any:
    """The entry of a mapping whose keys are numbers of layers, as text with leading zeros."""
    return {int(key): value for key, value in by_layer.items()}.get(index)


def _shrink_values(values: Config, layers: list[int], depth: int) -> dict[str, Any]:
    """A config's values, with its `depth` layers cut to those of the indices `layers`."""
    return {key: _shrink_entry(key, value, values, layers, depth) for key, value in values.items()}


def _shrink_entry(key: str, value: object, values: Config, layers: list[int], depth: int) -> object:
    """The value of one key, which may be one of layers; `values` are those beside it."""
    if isinstance(value, list):
        # The same layers by their new numbers.
        if key in LISTS_OF_LAYERS:
            return [place for place, index in enumerate(layers) if index in value]
        # A list by layer keeps the entries of the chosen layers, in their order.
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
        # A number of layers, or the index of one, among the chosen ones.
        if key in COUNTS_OF_LAYERS:
            count = sum(COUNTS_OF_LAYERS[key](index, value, depth) for index in layers)
            return count - 1 if key == LAST_INDEX else count
    return _shrink_value(key, value, values)


def _cut_by_layer(by_layer: Mapping[str, Any], layers: list[int]) -> dict[str, dict[str, object]]:
    """Cut what a config says of single layers to the chosen ones, under their new numbers."""
    small = {}
    for place, index in enumerate(layers):
        of_layer = _of_layer(by_layer, index)
        if of_layer is not None:
            small[str(place)] = _shrink_values(of_layer, [], 0)
            if "head_dim" in of_layer:
                small[str(place)]["head_dim"] = 2 * HEAD_DIM  # wider than others (Gemma 4)
    return small


def _shrink_value(key: str, value: object, values: Config) -> object:
    """The value of one key; `values` are those beside it."""
    if isinstance(value, dict) and ("hidden_size" in value or key.endswith("_config")):
        left_out = ("model_type", *NOT_COPIED)
        inner = {name: part for name, part in value.items() if name not in left_out}
        # A nested config (a vision tower, a sub-model) is shrunk by the same rules.
        shrunk = _shrink_values(inner, list(range(FEWEST_LAYERS)), 0)
        return _with_hints(shrunk, value.get("model_type", ""))
    if key.endswith(TOKEN_IDS) and value is not None:
        # Ids that the small vocabulary has: padding 0, begin 1, end 2.
        return {"bos_token_id": 1, "eos_token_id": 2}.get(key, 0)
    if "drop" in key and isinstance(value, float):
        return 0.0
    # Floats, texts, lists and switches decide what is computed, and stay.
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key in KV_HEADS_OF:
        heads = values.get(KV_HEADS_OF[key], values.get("num_attention_heads"))
        # Multi-head attention stays that, and grouped or multi-query stays fewer.
        return HEADS if value == heads else min(value, KV_HEADS)
    if key in (*EXPERTS_PER_TOKEN, *GROUPS, *PERIODS):
        return min(value, 2)
    if key in ("head_dim", "v_head_dim") and value:
        return _head_width(value, values)
    if key in SIZE_OF_KEY and value > 0:
        return SIZE_OF_KEY[key]
    return value


def _head_width(value: int, values: Mapping[str, Any]) -> int:
    """A head's channels; latent attention names them in parts, and some of them twice."""
    nope = values.get("qk_nope_head_dim")
    rope = values.get("qk_rope_head_dim")
    if not nope or not rope:
        return HEAD_DIM
    if value == rope:
        return SIZE_OF_KEY["qk_rope_head_dim"]
    if value == nope + rope:
        return SIZE_OF_KEY["qk_nope_head_dim"] + SIZE_OF_KEY["qk_rope_head_dim"]
    return HEAD_DIM


def _shrink_rotary(rotary: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, object]:
    """Parameters of the rotary embedding; a mapping by kind of layer has them inside."""
    small: dict[str, object] = {}
    head_dim = HEAD_DIM
    if values.get("qk_rope_head_dim"):
        head_dim = SIZE_OF_KEY["qk_rope_head_dim"]
    part = rotary.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    # Two channels an angle.
    frequencies = int(head_dim * part) // 2
    for key, value in rotary.items():
        if isinstance(value, dict):
            small[key] = _shrink_rotary(value, values)
        elif key in ("long_factor", "short_factor"):
            # One factor a frequency.
            small[key] = value[:frequencies]
        elif key == "mrope_section":
            # The sections of a multi-axis embedding add up to the frequencies. If only one section
            # differs from the others, it gets the rest, because ERNIE's other two must be equal.
            odd = [place for place, size in enumerate(value) if value.count(size) == 1]
            rest = odd[0] if odd else 0
            sections = [frequencies // len(value)] * len(value)
            sections[rest] += frequencies % len(value)
            small[key] = sections
        elif key == "partial_rotary_factor" and values.get("qk_nope_head_dim"):
            # Latent attention rotates one of a head's two parts.
            whole = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
            small_whole = SIZE_OF_KEY["qk_nope_head_dim"] + head_dim
            is_part = value == values["qk_rope_head_dim"] / whole
            small[key] = head_dim / small_whole if is_part else value
        elif key == "original_max_position_embeddings":
            small[key] = MAX_TWIN_POSITIONS
        else:
            small[key] = value
    return small
