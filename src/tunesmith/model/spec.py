"""A model as its config.json alone describes it: shape, parameters, the work of one step.

Nothing heavy is imported. A config that names an encoder, or another quantization, is refused here,
by name, before a byte of weights is read; whether the layers of any other model train is measured,
in `support`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError, errors_at
from tunesmith.model.architectures import ARCHITECTURES, Architecture, families_text
from tunesmith.model.model_types import read_model_types
from tunesmith.model.safetensors_files import Config
from tunesmith.model.shipped import (
    FETCH_CONFIG,
    shipped_form,
    stated_quantization,
    stored_quantization,
)
from tunesmith.units import ceil_div

# Types that take pictures otherwise than as tokens of the text.
_OTHER_PICTURES = {
    "mllama": "its text model attends to pictures in layers of their own (cross-attention)",
    "idefics": "its text model attends to pictures in layers of their own (cross-attention)",
    "llama4": "its projector runs outside of what Transformers makes the features of pictures by",
}
_ENCODERS = (
    "bert",
    "roberta",
    "deberta",
    "electra",
    "albert",
    "t5",
    "bart",
    "pegasus",
    "marian",
    "whisper",
    "clip",
)

# Keys that count decoder layers.
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


# Pattern of keys of sizes -> their maximum, which is far above the values of any model.
SIZE_KEYS = {
    "num_(hidden_|encoder_|decoder_)?layers|(en|de)coder_layers|n_layers?|depth": 1_000,
    "num_(attention_|key_value_|kv_)?heads|n_heads?|head_dim|n(um)?_(local_|routed_)?experts": 1
    << 16,
    "([a-z_]+_)?(hidden|intermediate|vocab)_size|n_embd|n_inner|d_model|d_ff|ffn_dim": 1 << 24,
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer, in widths and parameters.

    Attributes:
        mixing: how tokens reach each other: each sees the ones before it, or a state goes from
            token to token. What has no attention counts as recurrent; its heads are 0, and an MLP
            alone has no state either.
        value_dim: channels of a head's values; `head_dim` are those of its queries and keys.
        intermediate: the widest activation of a token; in a mixture of experts, of all experts that
            the token goes to.
        window: how many tokens back a position sees (itself counted); None: all.
        chunk: attention stays within chunks of so many tokens; None: it does not.
        matmul: parameters of the matrices that every token is multiplied with.
        experts: parameters of the stacks of experts.
        expert_count: experts of a layer that Transformers calls through its experts interface;
            experts_per_token: of these, that a token goes to.
        own_experts: of these, those that the model's own code multiplies, not Transformers'
            interface: no scheme quantizes them.
        active: parameters that a token is multiplied with: `matmul` and its share of `experts`.
        state: elements of the state that a token updates, in a recurrent layer.
        largest: parameters of the largest matrix; of a stack of experts, the whole stack.
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

    Its sums over the layers are cached: the search for what fits reads them a million times.
    """

    model_type: str
    layers: tuple[Layer, ...]
    hidden: int
    vocab: int
    tied: bool
    context: int  # the longest sequence that the model supports, in tokens
    # The same with the scaling of rotary embeddings that config.json asks for, as a limit of
    # data.seq_len; None: it names none, or its layers see a window, which moves along with the
    # position.
    position_limit: int | None
    parameters: int  # all of them, a tied head counted once
    # Parameters of the head's matrix, which every position with a label is multiplied with.
    head_matmul: int
    quantized: str | None  # how the checkpoint is: `shipped.stored_quantization`
    # Attention scores become cap * tanh(score / cap); None: as they are.
    attention_softcap: float | None = None
    # Parameters of matrices outside the layers, without embedding and head.
    other_matmul: int = 0
    # Of a vision part that is there too, which all other figures leave out, and of its projector
    # alone; and for one token of a picture the bytes of what it is given, and the operations of its
    # forward.
    vision_parameters: int = 0
    projector_parameters: int = 0
    picture_bytes: int = 0
    picture_flops: int = 0
    # What `measured_spec` measured the model by, as JSON; empty: the sizes are from the table.
    measured: str = ""

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @cached_property
    def widest(self) -> Layer:
        """The layer with the widest activation."""
        return max(self.layers, key=lambda layer: layer.intermediate)

    @cached_property
    def head_dim(self) -> int:
        """The most channels of a head, which the attention kernel has to take."""
        return max(max(layer.head_dim, layer.value_dim) for layer in self.layers)

    @cached_property
    def linear_matrices(self) -> int:
        """Parameters of all layers' matrices but the experts."""
        return sum(layer.matmul for layer in self.layers)

    @cached_property
    def layer_matrices(self) -> int:
        """Parameters of all layers' matrices, experts and all."""
        return sum(layer.matmul + layer.experts for layer in self.layers)

    @cached_property
    def expert_stacks(self) -> int:
        """Parameters of the stacks of experts that a scheme may quantize."""
        return sum(layer.experts - layer.own_experts for layer in self.layers)

    @cached_property
    def active(self) -> int:
        """Parameters that every token is multiplied with: embedding and head are not counted."""
        return self.other_matmul + sum(layer.active for layer in self.layers)

    @cached_property
    def active_of_experts(self) -> int:
        """Count the parameters in `active` of the experts that a token goes to."""
        return sum(layer.active - layer.matmul for layer in self.layers)


def read_spec(config: Config, *, where: str, trust_remote_code: bool = False) -> ModelSpec:
    """The spec of a parsed config.json of a family in the table, which errors call `where`.

    `trust_remote_code` takes a type that is not in the table, as Llama's shape, when its repository
    ships the code. ModelError where it is another type, or a size is missing or impossible.
    """
    try:
        with errors_at(where):
            return _read_sizes(config, where, trust_remote_code)
    # Text where a number belongs, 0, a list.
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            "a value in the config is invalid",
            where=where,
            why=f"{type(error).__name__}: {error}"[:300],
            fix=FETCH_CONFIG,
        ) from error


def _read_sizes(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> ModelSpec:
    check_supported(config, where)
    model_type = str(config["model_type"])
    if model_type not in ARCHITECTURES and not (trust_remote_code and "auto_map" in config):
        raise ModelError(
            f"the sizes of {model_type} are not read from its config alone",
            fix=f"take one of: {families_text()}",
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
        what = f"{heads} attention heads cannot share {kv_heads} key-value heads"
        raise ModelError(what, fix="correct num_attention_heads or num_key_value_heads")
    tied = bool(config.get("tie_word_embeddings", family.tied))
    layer = _dense_layer(hidden, intermediate, heads, kv_heads, head_dim)
    windows = _windows(config, family, depth)
    # One object for all layers that slide: a config may say millions of layers.
    widths = (window for window in windows if window is not None)
    sliding = replace(layer, window=next(widths, None))
    layers = tuple(layer if window is None else sliding for window in windows)
    layer_parameters = layer.matmul + _vector_parameters(config, family, hidden, layer)
    # Embedding and head, or one matrix for both.
    tables = 1 if tied else 2
    return ModelSpec(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        tied=tied,
        context=_size(config, "max_position_embeddings", 2048),
        position_limit=stated_position_limit(config, layers, where=where),
        # Matrices outside the layers, the layers, and the norm before the head.
        parameters=vocab * hidden * tables + depth * layer_parameters + hidden,
        head_matmul=vocab * hidden,
        quantized=stored_quantization(config, where),
        attention_softcap=config.get("attn_logit_softcapping", family.attention_softcap),
    )


def _dense_layer(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> Layer:
    """A Llama-like layer: attention and a gated MLP."""
    q = heads * head_dim
    kv = kv_heads * head_dim
    # q, k and v in one term, o, and the three matrices of the MLP.
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
    """Parameters of a layer's biases and norms."""
    q = layer.heads * layer.head_dim
    kv = layer.kv_heads * layer.head_dim
    attention_bias = bool(config.get("attention_bias", False))
    has_qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    has_output_bias = attention_bias if family.output_bias is None else family.output_bias
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
    """ModelError for a config that names no type, or one of an encoder."""
    with errors_at(where):
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ModelError(
                "the config names no model_type",
                why="it defines the architecture of the weights",
                fix="give the folder of a Transformers checkpoint; a PEFT adapter goes under "
                "`adapter.from`",
            )
        if _is_encoder(model_type.lower().replace("-", "_"), config):
            raise ModelError(
                f"{model_type} is an encoder or encoder-decoder, which tunesmith does not train",
                fix=f"use a text decoder, such as {families_text()}",
            )
        text = config.get("text_config", {})
        if not isinstance(text, Mapping) or (not text and "text_config" in config):
            what = "the config has no text_config"
            raise _no_text(what if text is None else f"text_config is {text!r:.100}")
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


def _check_sizes(config: Mapping[str, Any], section: str = "") -> None:
    """Raise ModelError for a size that is not a whole number from 0 to its maximum in SIZE_KEYS,
    also in a section such as `text_config`: building such a model would never end.
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            _check_sizes(value, f"{section}{key}.")
        for pattern, largest in SIZE_KEYS.items():
            if not re.fullmatch(pattern, key):
                continue
            for size in value if isinstance(value, list) else [value]:
                if size is not None and not (isinstance(size, int) and 0 <= size <= largest):
                    raise ModelError(
                        f"{section}{key} is {size!r:.100}: it must be a whole number from 0 to "
                        f"{largest:,}",
                        fix=FETCH_CONFIG,
                    )


def _check_shares(config: Mapping[str, Any]) -> None:
    """ModelError for a dropout that is none, and for a token that goes to no expert or to more than
    there are: a step would fail, or compute another model.
    """
    experts = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), 0)
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if "dropout" in key and not 0 <= value < 1:
            expected = "at least 0 and below 1"
        # 0 experts: a dense model of a family that may have some (Granite 4).
        elif key in EXPERTS_PER_TOKEN and experts > 0 and not 1 <= value <= experts:
            expected = f"from 1 to the number of experts, {experts:,}"
        else:
            continue
        raise ModelError(f"{key} is {value}: it must be {expected}", fix=FETCH_CONFIG)


def _is_encoder(name: str, config: Config) -> bool:
    """By its type, in small letters and underscores, and its keys."""
    is_named_so = any(name.endswith(part) or name.startswith(f"{part}_") for part in _ENCODERS)
    # "vision": between the tokens of an image alone.
    bidirectional = config.get("use_bidirectional_attention") in (True, "all")
    return is_named_so or bidirectional or bool(config.get("is_encoder_decoder"))


def check_supported(config: Config, where: str, *, vision: bool = False) -> None:
    """Raise ModelError, naming what the model is, for an encoder and for a quantization that is not
    read.

    vision: pictures are welcome, where the model takes them in a way that is trained here.
    """
    with errors_at(where):
        check_decoder(config, where)
        model_type = str(config["model_type"])
        if vision and model_type in _OTHER_PICTURES:
            raise ModelError(
                f"{model_type} does not train with pictures here",
                why=_OTHER_PICTURES[model_type],
                fix="model.vision=false, or another vision-language model",
            )
        _check_describes_text(config)
        stored = stated_quantization(config, where)
        form = shipped_form(config, where)
        if "text_config" in config and stored and (form is None or form.method == "mxfp4"):
            method = stored.get("quant_method", "an unnamed method")
            raise ModelError(
                f"the weights of this {model_type} are quantized with {method}",
                why="of a vision-language model plain weights, fp8 and nvfp4 are read",
                fix="take the unquantized model; model.quantize: nf4 then quantizes its text model "
                "as it is loaded",
            )


def _check_describes_text(config: Config) -> None:
    """Raise ModelError if a config with other parts has no sizes of the text model: Transformers
    fills in the sizes of another model.
    """
    known = read_model_types().get(str(config["model_type"]))
    if known is None or not known.text:
        return
    # The text model may be in a section of another name, or at the top.
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
    """RecipeError for a `data.seq_len` beyond the positions that the config of a model, called
    `where`, has.
    """
    limit = spec.position_limit
    if limit is not None and seq_len > limit:
        raise RecipeError(
            f"data.seq_len is {seq_len:,}, but the model has {limit:,} positions",
            where="data.seq_len",
            why=f"max_position_embeddings and the rotary scaling in {where}: it was never trained "
            "beyond them",
            fix=f"data.seq_len={limit}",
        )


def stated_position_limit(
    config: Mapping[str, Any], layers: Iterable[Layer], *, where: str
) -> int | None:
    """`ModelSpec.position_limit` of a model with these layers; errors call its config `where`.

    Where a config can be read in two ways (`max_position_embeddings` before or after the scaling)
    the larger length counts. ModelError where its rotary parameters are none.
    """
    try:
        return _position_limit(config.get("text_config") or config, layers)
    # Text where a number belongs, a factor that is infinite, a list.
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            "the config's positions or rotary parameters are not a mapping of numbers",
            where=where,
            why=f"{type(error).__name__}: {error}"[:300],
            fix="correct max_position_embeddings, rope_parameters or rope_scaling; or "
            f"{FETCH_CONFIG}",
        ) from error


def _position_limit(config: Mapping[str, Any], layers: Iterable[Layer]) -> int | None:
    positions = config.get("max_position_embeddings")
    if positions is None:
        return None
    # A window moves along with the position: no distance is longer than those it was trained on.
    if any(layer.window is not None and layer.window < positions for layer in layers):
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Parameters by kind of layer, or one set: the one that reaches furthest counts.
    by_layer_type = [value for value in scaling.values() if isinstance(value, Mapping)]
    scalings = by_layer_type or [scaling]
    return max(_scaled_positions(config, scaling, positions) for scaling in scalings)


def _scaled_positions(config: Config, scaling: Config, positions: int) -> int:
    """Compute how far one set of rotary parameters reaches."""
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    key = "original_max_position_embeddings"
    original: Any = scaling.get(key) or config.get(key)
    factor: Any = scaling.get("factor") or 1.0
    if rope_type == "default":
        return positions
    if rope_type == "llama3" and original is not None and original < positions:
        # Llama 3.2 has a factor of 32 on 8,192, and was trained up to max_position_embeddings.
        return positions
    # `factor` multiplies the original length; without one, the stated length.
    return max(positions, int((original or positions) * factor))


def _windows(
    config: Mapping[str, Any], family: Architecture, layers: int
) -> tuple[int | None, ...]:
    """Each layer's attention window.

    The rules are those of the families' config classes in Transformers.
    """
    default = None
    if family.window in ("every-second", "pattern"):
        default = 4096
    window = config.get("sliding_window", default)
    if window is None or family.window == "none":
        return (None,) * layers
    if family.window == "opt-in" and not config.get("use_sliding_window", False):
        return (None,) * layers
    layer_types = config.get("layer_types")
    if family.window == "all":
        slides = [True] * layers
    elif layer_types:
        slides = [layer_type == "sliding_attention" for layer_type in layer_types]
    elif family.window == "opt-in":
        first = config.get("max_window_layers", 28)
        slides = [layer >= first for layer in range(layers)]
    else:
        period = 2
        if family.window == "pattern":
            period = config.get("sliding_window_pattern", 6)
        # The last layer of each period sees everything.
        slides = [(layer + 1) % period != 0 for layer in range(layers)]
    return tuple(window if slides_here else None for slides_here in slides)


def adapter_parameters(spec: ModelSpec, adapter: Adapter, tensor: int = 1) -> int:
    """Parameters that an adapter of a family in the table trains, on each of `tensor` ranks that
    compute a layer together.

    Such a rank has A whole and its part of B in the layers that cut their outputs, the other way
    round in those that cut their inputs (o and down). A target of one layer counts as that of all.
    """
    layer = spec.layers[0]
    hidden = spec.hidden
    wide = layer.intermediate
    q = layer.heads * layer.head_dim
    kv = layer.kv_heads * layer.head_dim
    # (width that every rank has whole, width that ranks share) of each linear layer.
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

    names = [adapter.target] if isinstance(adapter.target, str) else adapter.target
    targets = {_last_part(name) for name in names}
    if adapter.target == "all-linear":
        targets = set(widths)
    count = 0
    for name in targets & widths.keys():
        whole, shared = widths[name]
        # A is [rank, in], B [out, rank]: rank * (in + out), of which one width is cut over the
        # ranks.
        count += spec.depth * adapter.rank * (whole + ceil_div(shared, tensor))
    if "lm_head" in targets:
        count += adapter.rank * (hidden + ceil_div(spec.vocab, tensor))
    # A table is sharded along the vocabulary over the tensor group.
    saved = map(_last_part, adapter.modules_to_save)
    tables = sum(name in ("embed_tokens", "lm_head") for name in saved)
    return count + ceil_div(tables * spec.head_matmul, tensor)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def flops(
    spec: ModelSpec,
    documents: Iterable[int],
    supervised: int,
    *,
    trained: Literal["full", "lora"],
    adapter_parameters: int = 0,
    forwards: int = 0,
) -> float:
    """Floating-point operations that a training step needs, the numerator of MFU.

    As in PaLM (Chowdhery et al., 2022, appendix B): a matrix parameter costs 2 per token forward, 2
    for the gradient of its input and 2 for its own; a frozen one has no third part. Unlike there,
    attention counts only the pairs that a causal mask (and a window) leaves, document by document,
    and the head only the positions that carry a label. Recomputation, norms, rotary embeddings and
    the softmax are not counted. Of a mixture of experts those count that a token goes to, of a
    recurrent layer the recurrence itself, not the products that a kernel makes of it by chunks.

    `documents` are lengths in tokens without padding; `supervised` counts the positions whose label
    enters the loss. Each of the `adapter_parameters` costs 6 per token. `forwards` are passes of
    the same tokens beside the one that is trained on, such as a reference's.
    """
    lengths = list(documents)
    tokens = sum(lengths)
    # 2 forward, 2 for the gradient of the input, 2 for the weight's if it is trained.
    per_parameter = (6 if trained == "full" else 4) + 2 * forwards
    # Products of a token and a parameter: the head sees only tokens with a label.
    products = spec.active * tokens + spec.head_matmul * supervised
    matmul = per_parameter * products
    attention = 0
    recurrence = 0
    # Equal layers are counted once: a model has few kinds and many layers.
    for layer, count in Counter(spec.layers).items():
        pairs = sum(_pairs(n, layer) for n in lengths)
        # Attention's q k^T and p v cost 2 operations each a pair and channel; their backward takes
        # twice the forward.
        channels = layer.heads * (layer.head_dim + layer.value_dim)
        # 3: a forward and a backward of twice its work. 2: a multiplication and an addition.
        attention += (3 + forwards) * 2 * count * pairs * channels
        # A token's update of a state, its decay and its reading: 2 operations an element each.
        recurrence += (3 + forwards) * 6 * count * layer.state * tokens
    return float(matmul + attention + recurrence + 6 * adapter_parameters * tokens)


def _pairs(length: int, layer: Layer) -> int:
    """Pairs of a query and a key that it sees, in a document of so many tokens."""
    if layer.chunk is not None and length > layer.chunk:
        chunks, rest = divmod(length, layer.chunk)
        # Full chunks and the rest, each by itself: no chunk sees another.
        return chunks * _pairs(layer.chunk, layer) + _pairs(rest, layer)
    most = length  # keys that a query sees
    if layer.window is not None:
        most = min(length, layer.window)
    # 1 + 2 + ... + most, then `most` for each further query.
    return most * (most + 1) // 2 + (length - most) * most


def attention_weight(spec: ModelSpec, *, trained: Literal["full", "lora"]) -> float:
    """Compute what a pair of a query and a key that it sees costs, as a share of a supervised
    token's matmuls.
    """
    one_token = flops(spec, [1], 0, trained=trained)  # 1 pair
    two_tokens = flops(spec, [2], 0, trained=trained)  # 3 pairs
    # A row of two tokens is two rows of one and one more pair.
    pair = two_tokens - 2 * one_token
    return pair / (flops(spec, [1], 1, trained=trained) - pair)
