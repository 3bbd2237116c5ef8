"""The spec of a model, derived only from its config.json: shape, parameters, and FLOPs of a step.

This module imports no heavy packages. A config of an encoder or of an unsupported quantization is
rejected before any weights are read. `support` measures whether the layers of other models can be
trained.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tunesmith.config.names import last_part
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError, errors_at
from tunesmith.model.known.architectures import ARCHITECTURES, Architecture, families_text
from tunesmith.model.known.model_types import read_model_types
from tunesmith.model.weights.safetensors_files import Config
from tunesmith.model.weights.shipped import (
    FETCH_CONFIG,
    shipped_form,
    stated_quantization,
    stored_quantization,
)
from tunesmith.units import ceil_div

# Model types that process pictures in an unsupported way, with the reason.
_OTHER_PICTURES = {
    "mllama": "its text model attends to pictures in separate cross-attention layers",
    "idefics": "its text model attends to pictures in separate cross-attention layers",
    "llama4": "its projector is not part of Transformers' `get_image_features`",
}
_ENCODERS = "bert roberta deberta electra albert t5 bart pegasus marian whisper clip".split()

# Config keys for the number of decoder layers.
DECODER_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)


# Patterns of config keys for sizes, and the maximum value of each key. These maximums are far above
# the values of real models.
SIZE_KEYS = {
    "num_(hidden_|encoder_|decoder_)?layers|(en|de)coder_layers|n_layers?|depth": 1_000,
    "num_(attention_|key_value_|kv_)?heads|n_heads?|head_dim|n(um)?_(local_|routed_)?experts": 1
    << 16,
    "([a-z_]+_)?(hidden|intermediate|vocab)_size|n_embd|n_inner|d_model|d_ff|ffn_dim": 1 << 24,
}


@dataclass(frozen=True)
class Layer:
    """Widths and parameter counts of one decoder layer.

    Attributes:
        mixing: "attention" if each token attends to earlier tokens, or "recurrent" if a state is
            passed from token to token. Layers without attention are "recurrent" with 0 heads, also
            layers that have only an MLP and no state.
        value_dim: width of a head's values. `head_dim` is the width of its queries and keys.
        intermediate: width of the widest activation of a token. In a mixture of experts, the widths
            of the selected experts are summed.
        window: number of tokens that a position attends to, including itself; None: all.
        chunk: number of tokens of a chunk, if attention is limited to chunks; else None.
        matmul: number of parameters of the matrices that are multiplied with every token.
        experts: number of parameters of the stacks of experts.
        expert_count: number of experts that Transformers calls through its experts interface.
        experts_per_token: number of these experts that a token is routed to.
        own_experts: the part of `experts` that is multiplied by the model's own code instead of the
            interface. These parameters cannot be quantized.
        active: number of parameters that a token is multiplied with: `matmul` and the selected
            experts.
        state: number of elements of the state that a token updates in a recurrent layer.
        largest: number of parameters of the largest matrix or stack of experts.
    """

    mixing: Literal["attention", "recurrent"]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    intermediate: int
    matmul: int
    active: int
    largest: int
    experts: int = 0
    expert_count: int = 0
    experts_per_token: int = 0
    own_experts: int = 0
    window: int | None = None
    chunk: int | None = None
    state: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder.

    Sums over the layers are cached, because the search for a fitting configuration reads them a
    million times.
    """

    model_type: str
    layers: tuple[Layer, ...]
    hidden: int
    vocab: int
    tied: bool
    context: int  # maximum sequence length in tokens
    # Maximum of data.seq_len: `context` including the scaling of rotary embeddings in config.json.
    # None if the config states no limit, or if layers have a sliding window, for which the absolute
    # position does not matter.
    position_limit: int | None
    parameters: int  # all parameters; a tied head is counted once
    # Number of parameters of the head. The head is computed only for positions with a label.
    head_matmul: int
    quantized: str | None  # storage format, from `shipped.stored_quantization`
    # Soft cap c of the attention scores, c * tanh(score / c). None: no cap.
    attention_softcap: float | None = None
    # Parameters of matrices outside of the layers, except embedding and head.
    other_matmul: int = 0
    # Sizes of a vision part, which are not included in any other attribute: the parameters of the
    # vision part, the parameters of the projector, and, per token of a picture, the bytes of the
    # input and the FLOPs of the forward.
    vision_parameters: int = 0
    projector_parameters: int = 0
    picture_bytes: int = 0
    picture_flops: int = 0
    # JSON of the config values from which `measured_spec` measured the model. Empty if the sizes
    # are from the table of architectures.
    measured: str = ""

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @cached_property
    def widest(self) -> Layer:
        """Layer with the widest activation."""
        return max(self.layers, key=lambda layer: layer.intermediate)

    @cached_property
    def head_dim(self) -> int:
        """Maximum head width, which the attention kernel must support."""
        return max(max(layer.head_dim, layer.value_dim) for layer in self.layers)

    @cached_property
    def linear_matrices(self) -> int:
        """Number of parameters of all layers' matrices, without experts."""
        return sum(layer.matmul for layer in self.layers)

    @cached_property
    def layer_matrices(self) -> int:
        """Number of parameters of all layers' matrices, including experts."""
        return sum(layer.matmul + layer.experts for layer in self.layers)

    @cached_property
    def expert_stacks(self) -> int:
        """Number of parameters of the stacks of experts that can be quantized."""
        return sum(layer.experts - layer.own_experts for layer in self.layers)

    @cached_property
    def active(self) -> int:
        """Number of parameters that each token is multiplied with, without embedding and head."""
        return self.other_matmul + sum(layer.active for layer in self.layers)

    @cached_property
    def active_of_experts(self) -> int:
        """Number of parameters of a token's experts, which `active` includes."""
        return sum(layer.active - layer.matmul for layer in self.layers)


def read_spec(config: Config, *, where: str, trust_remote_code: bool = False) -> ModelSpec:
    """Return the spec of a parsed config.json of a family in the table of architectures.

    Raise ModelError if the type is not in the table, or if a size is missing or invalid.

    Args:
        where: the name of the config in error messages.
        trust_remote_code: also read types that are not in the table, as if they were Llama models,
            if their repository contains code.
    """
    try:
        with errors_at(where):
            return _read_sizes(config, where, trust_remote_code)
    # Invalid values raise these errors, for example text instead of a number, a 0, or a list.
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            "a value in the config is invalid",
            where=where,
            why=one_line(error),
            fix=FETCH_CONFIG,
        ) from error


def one_line(error: BaseException) -> str:
    """Return an error of another library as one line of limited length, with the error's type."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _read_sizes(config: Config, where: str, trust_remote_code: bool) -> ModelSpec:
    check_supported(config, where)
    model_type = str(config["model_type"])
    if model_type not in ARCHITECTURES and not (trust_remote_code and "auto_map" in config):
        raise ModelError(
            f"the sizes of {model_type} cannot be read from its config",
            fix=f"use a model of one of these types: {families_text()}",
        )
    family = ARCHITECTURES.get(model_type, Architecture("code of the repository"))
    depth = _size(config, "num_hidden_layers")
    hidden = _size(config, "hidden_size")
    intermediate = _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    vocab = _size(config, "vocab_size")
    kv_heads = _size(config, "num_key_value_heads", family.kv_heads or heads)
    head_dim = _size(config, "head_dim", family.head_dim or hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            fix="correct num_attention_heads or num_key_value_heads",
        )
    tied = bool(config.get("tie_word_embeddings", family.tied))
    layer = _dense_layer(hidden, intermediate, heads, kv_heads, head_dim)
    window, slides = _windows(config, family, depth)
    # All sliding layers are one object.
    sliding = replace(layer, window=window)
    layers = tuple(sliding if slides_here else layer for slides_here in slides)
    layer_parameters = layer.matmul + _vector_parameters(config, family, hidden, layer)
    # Number of embedding tables: the embedding and the head, or one matrix for both if tied.
    tables = 1 if tied else 2
    return ModelSpec(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        tied=tied,
        context=_size(config, "max_position_embeddings", 2048),
        position_limit=stated_position_limit(config, layers, where=where),
        # Sum of the embedding and the head, the layers, and the norm before the head.
        parameters=vocab * hidden * tables + depth * layer_parameters + hidden,
        head_matmul=vocab * hidden,
        quantized=stored_quantization(config, where),
        attention_softcap=config.get("attn_logit_softcapping", family.attention_softcap),
    )


def _dense_layer(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> Layer:
    """Return a Llama-like layer with attention and a gated MLP."""
    q = heads * head_dim
    kv = kv_heads * head_dim
    # The projections q, k and v, then o, then the three matrices of the MLP.
    matmul = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * intermediate
    return Layer(
        mixing="attention",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        intermediate=intermediate,
        matmul=matmul,
        active=matmul,
        largest=hidden * intermediate,
    )


def _vector_parameters(config: Config, family: Architecture, hidden: int, layer: Layer) -> int:
    """Return the number of parameters of a layer's biases and norms."""
    q = layer.heads * layer.head_dim
    kv = layer.kv_heads * layer.head_dim
    stated_bias = bool(config.get("attention_bias", False))
    has_qkv_bias = stated_bias if family.qkv_bias is None else family.qkv_bias
    has_output_bias = stated_bias if family.output_bias is None else family.output_bias
    count = family.norms * hidden
    if has_qkv_bias:
        count += q + 2 * kv
    if has_output_bias:
        count += hidden
    if config.get("mlp_bias", False):
        count += 2 * layer.intermediate + hidden
    if family.head_norms == "head":
        count += 2 * layer.head_dim
    elif family.head_norms == "projection":
        count += q + kv
    return count


def check_decoder(config: Config, where: str) -> None:
    """Raise ModelError if the config has no model_type, or if it is an encoder's config."""
    with errors_at(where):
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ModelError(
                "the config has no model_type",
                why="model_type tells which architecture the weights have",
                fix="use the folder of a Transformers checkpoint; for a PEFT adapter, set "
                "`adapter.from` to its folder",
            )
        if _is_encoder(model_type.lower().replace("-", "_"), config):
            raise ModelError(
                f"{model_type} is an encoder or encoder-decoder, which is not supported",
                fix=f"use a text decoder, such as {families_text()}",
            )
        text = config.get("text_config", {})
        if not isinstance(text, Mapping) or (not text and "text_config" in config):
            what = (
                f"text_config is {text!r:.100}"
                if text is not None
                else "the config has no text_config"
            )
            raise _no_text(what)
        _check_sizes(config)
        _check_shares(config)
        if text:
            stated_quantization(text, where)
            check_decoder({"model_type": model_type, **text}, where)


def _no_text(what: str) -> ModelError:
    return ModelError(
        what,
        why="it describes the text model, which is trained",
        fix=FETCH_CONFIG,
    )


def _check_sizes(config: Config, section: str = "") -> None:
    """Raise ModelError if a size is not a whole number from 0 to its maximum in SIZE_KEYS.

    Sections such as `text_config` are checked as well. Without this check, building a model of a
    huge size would take forever.
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            _check_sizes(value, f"{section}{key}.")
        for pattern, largest in SIZE_KEYS.items():
            if not re.fullmatch(pattern, key):
                continue
            sizes = value if isinstance(value, list) else [value]
            for size in sizes:
                if size is not None and not (isinstance(size, int) and 0 <= size <= largest):
                    raise ModelError(
                        f"{section}{key} is {size!r:.100}: it must be a whole number from 0 to "
                        f"{largest:,}",
                        fix=FETCH_CONFIG,
                    )


def _check_shares(config: Config) -> None:
    """Raise ModelError for an invalid dropout or an invalid number of experts per token.

    With these values, a step would fail or compute another model.
    """
    experts = 0
    for key in _EXPERTS:
        if isinstance(config.get(key), int):
            experts = config[key]
            break
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if "dropout" in key and not 0 <= value < 1:
            expected = "at least 0 and below 1"
        # `experts` is 0 for a dense model of a family with optional experts (Granite 4).
        elif key in EXPERTS_PER_TOKEN and experts > 0 and not 1 <= value <= experts:
            expected = f"from 1 to the number of experts, {experts:,}"
        else:
            continue
        raise ModelError(f"{key} is {value}: it must be {expected}", fix=FETCH_CONFIG)


def _is_encoder(name: str, config: Config) -> bool:
    """Return whether the type (lowercase with underscores) or the config belongs to an encoder."""
    is_named_so = any(name.endswith(part) or name.startswith(f"{part}_") for part in _ENCODERS)
    # The value "vision" is allowed, because then only tokens of the same picture attend in both
    # directions.
    bidirectional = config.get("use_bidirectional_attention") in (True, "all")
    return is_named_so or bidirectional or bool(config.get("is_encoder_decoder"))


def check_supported(config: Config, where: str, *, vision: bool = False) -> None:
    """Raise ModelError for an encoder and for an unsupported quantization.

    Args:
        vision: whether the model is trained with pictures. Raise ModelError if this is not
            supported.
    """
    with errors_at(where):
        check_decoder(config, where)
        model_type = str(config["model_type"])
        if vision and model_type in _OTHER_PICTURES:
            raise ModelError(
                f"{model_type} cannot be trained with pictures",
                why=_OTHER_PICTURES[model_type],
                fix="set model.vision=false, or use another vision-language model",
            )
        _check_describes_text(config)
        stored = stated_quantization(config, where)
        form = shipped_form(config, where)
        if "text_config" in config and stored and (form is None or form.method == "mxfp4"):
            method = stored.get("quant_method", "an unnamed method")
            raise ModelError(
                f"the weights of this {model_type} are quantized with {method}",
                why="for vision-language models, only plain weights, fp8 and nvfp4 are supported",
                fix="use the unquantized model; model.quantize: nf4 then quantizes its text model "
                "as it is loaded",
            )


def _check_describes_text(config: Config) -> None:
    """Raise ModelError if the config of a multimodal model has no sizes of the text model.

    Transformers would use the default sizes of another model.
    """
    known = read_model_types().get(str(config["model_type"]))
    if known is None or not known.text:
        return
    # The sizes can be at the top level, or in a section whose name is not text_config.
    sections = [value for value in config.values() if isinstance(value, Mapping)]
    if any("vocab_size" in part or "text_config" in part for part in (config, *sections)):
        return
    raise _no_text("the config has no text_config")


def _size(config: Config, name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = repr(value) if name in config else "missing"
        raise ModelError(f"{name} is {shown}: it must be a whole number above 0", fix=FETCH_CONFIG)
    return value


def check_seq_len(spec: ModelSpec, seq_len: int, *, where: str) -> None:
    """Raise RecipeError if `data.seq_len` is larger than the number of positions of the model.

    Args:
        where: the name of the model's config.
    """
    limit = spec.position_limit
    if limit is not None and seq_len > limit:
        raise RecipeError(
            f"data.seq_len is {seq_len:,}, but the model supports at most {limit:,}",
            where="data.seq_len",
            why=f"max_position_embeddings and the rotary scaling in {where} set this limit; the "
            "model was not trained on longer sequences",
            fix=f"set data.seq_len={limit}",
        )


def stated_position_limit(config: Config, layers: Iterable[Layer], *, where: str) -> int | None:
    """Return `ModelSpec.position_limit` for a config and its layers.

    If the config is ambiguous (`max_position_embeddings` before or after the scaling), use the
    larger length. Raise ModelError if the rotary parameters are invalid.

    Args:
        where: the name of the config in error messages.
    """
    try:
        return _position_limit(config.get("text_config") or config, layers)
    # Invalid values raise these errors, for example text instead of a number, an infinite factor,
    # or a list.
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            "max_position_embeddings, rope_parameters or rope_scaling has a wrong type",
            where=where,
            why=one_line(error),
            fix=f"correct these keys; or {FETCH_CONFIG}",
        ) from error


def _position_limit(config: Config, layers: Iterable[Layer]) -> int | None:
    positions = config.get("max_position_embeddings")
    if positions is None:
        return None
    # With a sliding window there is no limit, because the distance from a query to a key never
    # exceeds the trained distance.
    if any(layer.window is not None and layer.window < positions for layer in layers):
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # The config has one set of rotary parameters per layer type, or one set for all layers. Use the
    # largest limit.
    by_layer_type = [value for value in scaling.values() if isinstance(value, Mapping)]
    scalings = by_layer_type or [scaling]
    return max(_scaled_positions(config, scaling, positions) for scaling in scalings)


def _scaled_positions(config: Config, scaling: Config, positions: int) -> int:
    """Return the maximum number of positions for one set of rotary parameters."""
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    key = "original_max_position_embeddings"
    original: Any = scaling.get(key) or config.get(key)
    factor: Any = scaling.get("factor") or 1.0
    if rope_type == "default":
        return positions
    if rope_type == "llama3" and original is not None and original < positions:
        # Llama 3.2 has a factor of 32 for 8,192 positions, but was trained for
        # max_position_embeddings.
        return positions
    # Multiply the original length by `factor`. If there is no original length, use the stated
    # length.
    return max(positions, int((original or positions) * factor))


def _windows(config: Config, family: Architecture, layers: int) -> tuple[int | None, list[bool]]:
    """Return the attention window, and for each layer whether it uses the window.

    The rules are those of the families' config classes in Transformers.
    """
    default = 4096 if family.window in ("every-second", "pattern") else None
    window = config.get("sliding_window", default)
    is_off = family.window == "opt-in" and not config.get("use_sliding_window", False)
    if window is None or family.window == "none" or is_off:
        return None, [False] * layers
    layer_types = config.get("layer_types")
    if family.window == "all":
        slides = [True] * layers
    elif layer_types:
        slides = [layer_type == "sliding_attention" for layer_type in layer_types]
    elif family.window == "opt-in":
        first = config.get("max_window_layers", 28)
        slides = [layer >= first for layer in range(layers)]
    else:
        period = config.get("sliding_window_pattern", 6) if family.window == "pattern" else 2
        # The last layer of each period has full attention.
        slides = [(layer + 1) % period != 0 for layer in range(layers)]
    return window, slides


def adapter_parameters(spec: ModelSpec, adapter: Adapter, tensor: int = 1) -> int:
    """Return the number of trained adapter parameters on each of `tensor` ranks.

    The model's family must be in the table of architectures. With tensor parallelism, lora_B is
    sharded in layers that are split by output, and lora_A in layers that are split by input (o and
    down). Every rank has the entire other factor. A target that names a linear layer of one decoder
    layer is counted for all decoder layers.
    """
    layer = spec.layers[0]
    hidden = spec.hidden
    wide = layer.intermediate
    q = layer.heads * layer.head_dim
    kv = layer.kv_heads * layer.head_dim
    # For each linear layer: the width that every rank holds entirely, and the width that is split.
    widths = {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
    }
    family = ARCHITECTURES.get(spec.model_type)
    if family is not None and family.joined:
        widths = {"qkv_proj": (hidden, q + 2 * kv), "gate_up_proj": (hidden, 2 * wide)}
    widths["o_proj"] = (hidden, q)
    widths["down_proj"] = (hidden, wide)

    if adapter.target == "all-linear":
        targets = set(widths)
    elif isinstance(adapter.target, str):
        targets = {last_part(adapter.target)}
    else:
        targets = set(map(last_part, adapter.target))
    count = 0
    for name in targets & widths.keys():
        whole, shared = widths[name]
        # A is [rank, in] and B is [out, rank]. One of the widths `in` and `out` is split over the
        # ranks.
        count += spec.depth * adapter.rank * (whole + ceil_div(shared, tensor))
    if "lm_head" in targets:
        count += adapter.rank * (hidden + ceil_div(spec.vocab, tensor))
    # Embedding tables are split along the vocabulary over the tensor-parallel ranks.
    saved = map(last_part, adapter.modules_to_save)
    tables = sum(name in ("embed_tokens", "lm_head") for name in saved)
    return count + ceil_div(tables * spec.head_matmul, tensor)


def flops(
    spec: ModelSpec,
    documents: Iterable[int],
    supervised: int,
    *,
    trained: Literal["full", "lora"],
    adapter_parameters: int = 0,
    forwards: int = 0,
) -> float:
    """Return the floating-point operations that a training step requires, the numerator of MFU.

    The count follows PaLM (Chowdhery et al., 2022, appendix B). Per token, a matrix parameter costs
    2 in the forward, 2 for the gradient of the input, and 2 for the gradient of the weight unless
    it is frozen. In contrast to PaLM, attention counts only the pairs that the causal mask and the
    window leave in each document, and the head counts only positions with a label. Recomputation,
    norms, rotary embeddings and the softmax are not counted. A mixture of experts counts the
    selected experts. A recurrent layer counts the recurrence itself, not the chunked matmuls of a
    kernel.

    Args:
        documents: lengths in tokens, without padding.
        supervised: number of positions whose label enters the loss.
        adapter_parameters: number of trained adapter parameters. Each costs 6 per token.
        forwards: number of additional forwards of the same tokens, for example by a reference
            model.
    """
    lengths = list(documents)
    tokens = sum(lengths)
    # 2 for the forward, 2 for the gradient of the input, and 2 for the gradient of a trained
    # weight.
    per_parameter = (6 if trained == "full" else 4) + 2 * forwards
    # Number of (token, parameter) products. The head is computed only for tokens with a label.
    products = spec.active * tokens + spec.head_matmul * supervised
    matmul = per_parameter * products
    attention = 0
    recurrence = 0
    # Count equal layers once: a model has many layers, but few kinds.
    for layer, count in Counter(spec.layers).items():
        pairs = sum(_pairs(n, layer) for n in lengths)
        # The matmuls q k^T and p v cost 2 operations per pair and channel each.
        channels = layer.heads * (layer.head_dim + layer.value_dim)
        # The backward costs twice as much as the forward, so the factor is 1 + 2 = 3. A
        # multiply-add counts as 2.
        attention += (3 + forwards) * 2 * count * pairs * channels
        # A token decays, updates and reads the state. Each of the three costs 2 operations per
        # element.
        recurrence += (3 + forwards) * 6 * count * layer.state * tokens
    return float(matmul + attention + recurrence + 6 * adapter_parameters * tokens)


def _pairs(length: int, layer: Layer) -> int:
    """Return the number of (query, visible key) pairs in a document of this length."""
    if layer.chunk is not None and length > layer.chunk:
        chunks, rest = divmod(length, layer.chunk)
        # Chunks are independent. Add the pairs of the full chunks and of the last, shorter chunk.
        return chunks * _pairs(layer.chunk, layer) + _pairs(rest, layer)
    max_keys = min(length, layer.window) if layer.window is not None else length
    # The first max_keys queries see 1 + 2 + ... + max_keys keys. Each later query sees max_keys
    # keys.
    return max_keys * (max_keys + 1) // 2 + (length - max_keys) * max_keys


def attention_weight(spec: ModelSpec, *, trained: Literal["full", "lora"]) -> float:
    """Return the cost of a (query, key) pair relative to the matmuls of a supervised token."""
    one_token = flops(spec, [1], 0, trained=trained)  # 1 pair
    two_tokens = flops(spec, [2], 0, trained=trained)  # 3 pairs
    # Two rows of one token have 2 pairs, and a row of two tokens has 3. The difference is one pair.
    pair = two_tokens - 2 * one_token
    return pair / (flops(spec, [1], 1, trained=trained) - pair)
