"""What a model is, read from its config.json alone: shape, parameter counts, the work of one step.

Nothing heavy is imported. A config that this engine cannot train (mixture of experts, images, encoders, state-space
layers, other quantisation) is refused here, by name, before a byte of weights is read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.architectures import ARCHITECTURES, Architecture, families_text

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_MODELS = ("mixtral", "dbrx", "gpt_oss", "deepseek_v2", "deepseek_v3", "arctic")
_MODALITIES = ("vision_config", "audio_config", "vision_tower", "image_token_id")
_MULTIMODAL = ("llava", "mllama", "paligemma", "idefics3", "gemma3", "gemma3n", "llama4")
_ENCODERS = ("bert", "roberta", "deberta", "electra", "albert", "t5", "bart", "pegasus", "marian", "whisper", "clip")
_STATE_SPACE = ("mamba", "rwkv", "xlstm", "jamba", "zamba", "bamba", "falcon_h1", "recurrent_gemma", "nemotron_h")
_REASONS = {
    "phi": "Phi-1 to Phi-2 have a head with a bias, which the loss does not compute; Phi-3, 3.5 and 4 work",
    "gpt2": "GPT-2 stores its linear layers transposed",
}


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int  # the longest sequence that the model was made for, in tokens
    # The same with the scaling of rotary embeddings that config.json asks for, as a limit of data.seq_len; None: it names
    # none, or its layers see a window, which moves along with the position.
    position_limit: int | None
    windows: tuple[int | None, ...]  # per layer, how many tokens back a position sees (itself counted), or None for all
    parameters: int  # all of them, a tied head counted once
    layer_matmul: int  # parameters of one layer's matrices, which every token is multiplied with
    head_matmul: int  # parameters of the head's matrix, which every position with a label is multiplied with
    quantised: str | None  # "bnb-nf4" for a ready-made bitsandbytes 4-bit checkpoint
    final_softcap: float | None = None  # logits become cap * tanh(logits / cap) before the loss; None: as they are
    attention_softcap: float | None = None  # the same for attention scores
    logit_scale: float = 1.0  # logits are multiplied by it before the loss (and before `final_softcap`)


def read_spec(config: Mapping[str, Any], *, where: str, trust_remote_code: bool = False) -> ModelSpec:
    """The spec of a parsed config.json, which errors call `where`.

    `trust_remote_code` takes a type that is not in the table, as Llama's shape, when its repository ships the code.
    ModelError where it is no decoder that this engine trains, or a size is missing or impossible.
    """
    try:
        return _read_sizes(config, where, trust_remote_code)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # text where a number belongs, 0, a list
        fix = "take config.json from the model's page again: tunesmith fetch MODEL"
        what = "a value of the config is not one that its key can have"
        raise ModelError(what, where=where, why=f"{type(error).__name__}: {error}"[:300], fix=fix) from error


def _read_sizes(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> ModelSpec:
    _check_supported(config, where, trust_remote_code)
    kind = str(config["model_type"])
    family = ARCHITECTURES.get(kind, Architecture("code of the repository"))
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    layers, hidden, intermediate, heads, vocab = (_size(config, name, where) for name in names)
    kv_heads = _size(config, "num_key_value_heads", where, family.kv_heads or heads)
    head_dim = _size(config, "head_dim", where, family.head_dim or hidden // heads)
    if heads % kv_heads:
        what = f"{heads} attention heads cannot share {kv_heads} key-value heads"
        raise ModelError(what, where=where, fix="correct num_attention_heads or num_key_value_heads")
    if not 0 <= (config.get("attention_dropout") or 0) < 1:
        raise ValueError(f"attention_dropout is {config['attention_dropout']}")
    tied = bool(config.get("tie_word_embeddings", family.tied))
    attention_bias, mlp_bias = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    output_bias = attention_bias if family.output_bias is None else family.output_bias
    q, kv = heads * head_dim, kv_heads * head_dim
    matmul = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * intermediate
    biases = qkv_bias * (q + 2 * kv) + output_bias * hidden + mlp_bias * (2 * intermediate + hidden)
    head_norms = {"none": 0, "head": 2 * head_dim, "projection": q + kv}[family.head_norms]
    layer = matmul + biases + family.norms * hidden + head_norms
    final, scores = family.softcaps or (None, None)
    windows = _windows(config, family, layers)
    return ModelSpec(
        model_type=kind, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, vocab=vocab, tied=tied, context=_size(config, "max_position_embeddings", where, 2048),
        position_limit=_position_limit(config, windows), windows=windows,
        parameters=vocab * hidden * (1 if tied else 2) + layers * layer + hidden,
        layer_matmul=matmul, head_matmul=vocab * hidden, quantised=_quantised(config, where),
        final_softcap=config.get("final_logit_softcapping", final) if family.softcaps else None,
        attention_softcap=config.get("attn_logit_softcapping", scores) if family.softcaps else None,
        logit_scale=1.0 / config.get("logits_scaling", 1.0) if family.logits_scaling else 1.0,
    )  # fmt: skip


def _check_supported(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> None:
    """Raise ModelError, naming what the model is, unless it is a dense text decoder of a known family."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        why = "it is the key that says which architecture the weights belong to"
        fix = "give the folder of a Transformers checkpoint; a PEFT adapter goes under `adapter.from`"
        raise ModelError("the config names no model_type", where=where, why=why, fix=fix)
    if what := _other_kind(kind, config):
        fix = f"take a dense text decoder: {families_text()}"
        raise ModelError(f"{kind} is {what}, which tunesmith does not train", where=where, fix=fix)
    ships = "auto_map" in config
    if kind in ARCHITECTURES or (trust_remote_code and ships):
        return
    what = f"{kind} is not among the families that tunesmith is tested with"
    why = _REASONS.get(kind, "its repository ships its own code, which runs only when trusted" if ships else "")
    fix = "read that code and set model.trust_remote_code: true, or " if ships else ""
    raise ModelError(what, where=where, why=why, fix=f"{fix}take one of: {families_text()}")


def _other_kind(kind: str, config: Mapping[str, Any]) -> str:
    """What a config is when it is no dense text decoder, else an empty string."""
    name = kind.lower().replace("-", "_")
    experts = next((config[key] for key in _EXPERTS if (config.get(key) or 0) > 1), 0)
    if experts or "moe" in name or name in _EXPERT_MODELS:
        return f"a mixture of {experts} experts" if experts else "a mixture of experts"
    if any(key in config for key in _MODALITIES) or name.endswith("_vl") or name in _MULTIMODAL:
        return "a multimodal model (text with images or sound)"
    if any(part in name for part in _STATE_SPACE):
        return "a state-space or recurrent model"
    encoder = any(name.endswith(part) or name.startswith(f"{part}_") for part in _ENCODERS)
    if encoder or config.get("is_encoder_decoder") or config.get("use_bidirectional_attention"):
        return "an encoder or encoder-decoder"
    return ""


def _quantised(config: Mapping[str, Any], where: str) -> str | None:
    """`bnb-nf4` for bitsandbytes' 4-bit NormalFloat checkpoints, None for plain ones; refuse every other kind."""
    stored = config.get("quantization_config")
    if not stored:
        return None
    method = str(stored.get("quant_method", ""))
    if method in ("bitsandbytes", "bitsandbytes_4bit", "") and stored.get("load_in_4bit"):
        if stored.get("bnb_4bit_quant_type") == "nf4":
            return "bnb-nf4"
        method = f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"
    elif stored.get("load_in_8bit"):
        method = "bitsandbytes 8-bit"
    what = f"the weights are quantised with {method or 'an unnamed method'}"
    why = "plain weights and bitsandbytes nf4 are read; other formats are for serving, not for training"
    raise ModelError(what, where=where, why=why, fix="take the unquantised model and set model.quantize: nf4")


def _size(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = default if config.get(name) is None else config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = f"{name} is {repr(value) if name in config else 'missing'}: it must be a whole number above 0"
        raise ModelError(what, where=where, fix="take config.json from the model's page again: tunesmith fetch MODEL")
    return value


def check_seq_len(spec: ModelSpec, seq_len: int, *, where: str) -> None:
    """RecipeError for a `data.seq_len` beyond the positions that the config of a model, called `where`, has."""
    limit = spec.position_limit
    if limit is not None and seq_len > limit:
        what = f"data.seq_len is {seq_len:,}, and the model has {limit:,} positions"
        why = f"max_position_embeddings and the rotary scaling in {where}: it was never trained beyond them"
        raise RecipeError(what, where="data.seq_len", why=why, fix=f"data.seq_len={limit}")


def _position_limit(config: Mapping[str, Any], windows: tuple[int | None, ...]) -> int | None:
    """`ModelSpec.position_limit`. Where a config can be read in two ways (`max_position_embeddings` before or after the
    scaling) the larger length is taken."""
    positions = config.get("max_position_embeddings")
    if positions is None or any(window is not None and window < positions for window in windows):
        return None
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_layer_type = [value for value in scaling.values() if isinstance(value, Mapping)]
    return max(_scaled_positions(config, values, positions) for values in by_layer_type or [scaling])


def _scaled_positions(config: Mapping[str, Any], scaling: Mapping[str, Any], positions: int) -> int:
    """How far one set of rotary parameters reaches."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factor = scaling.get("factor") or 1.0
    if kind == "default":
        return positions
    if kind == "llama3" and original is not None and original < positions:
        return positions  # Llama 3.2 has a factor of 32 on 8,192, and was trained up to max_position_embeddings
    return max(positions, int((original or positions) * factor))


def _windows(config: Mapping[str, Any], family: Architecture, layers: int) -> tuple[int | None, ...]:
    """Each layer's attention window. The rules are those of the families' config classes in Transformers."""
    window = config.get("sliding_window", 4096 if family.window in ("every-second", "pattern") else None)
    if window is None or family.window == "none":
        return (None,) * layers
    kinds = config.get("layer_types")
    if family.window == "all":
        slides = [True] * layers
    elif family.window == "opt-in" and not config.get("use_sliding_window", False):
        slides = [False] * layers
    elif kinds:
        slides = [kind == "sliding_attention" for kind in kinds]
    elif family.window == "opt-in":
        slides = [i >= config.get("max_window_layers", 28) for i in range(layers)]
    else:
        every = 2 if family.window == "every-second" else config.get("sliding_window_pattern", 6)
        slides = [(i + 1) % every != 0 for i in range(layers)]
    return tuple(window if s else None for s in slides)


def adapter_parameters(spec: ModelSpec, adapter: Adapter, tensor: int = 1) -> int:
    """Parameters that an adapter trains, on each of `tensor` ranks that compute a layer together.

    Such a rank has A whole and its part of B in the layers that cut their outputs, the other way round in those that cut
    their inputs (o and down). A target of one layer counts as that of all.
    """
    hidden, wide, q, kv = spec.hidden, spec.intermediate, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    family = ARCHITECTURES.get(spec.model_type)
    if family is not None and family.joined:
        linears = {"qkv_proj": (hidden, q + 2 * kv), "gate_up_proj": (hidden, 2 * wide)}
    else:
        linears = {name: (hidden, q if name == "q_proj" else kv) for name in ("q_proj", "k_proj", "v_proj")}
        linears |= {"gate_proj": (hidden, wide), "up_proj": (hidden, wide)}
    linears |= {"o_proj": (q, hidden), "down_proj": (wide, hidden)}
    names = [adapter.target] if isinstance(adapter.target, str) else adapter.target
    wanted = {*linears} if adapter.target == "all-linear" else {name.rpartition(".")[2] for name in names}
    count = 0
    for name in wanted & {*linears}:
        whole, cut = linears[name] if name not in ("o_proj", "down_proj") else reversed(linears[name])
        count += spec.layers * adapter.rank * (whole + -(-cut // tensor))
    tables = [name for name in adapter.modules_to_save if name.rpartition(".")[2] in ("embed_tokens", "lm_head")]
    return count + -(-len(tables) * spec.head_matmul // tensor)


def flops(
    spec: ModelSpec,
    documents: Iterable[int],
    supervised: int,
    *,
    trained: Literal["full", "lora"],
    adapter_parameters: int = 0,
) -> float:
    """Floating-point operations that a training step needs, the numerator of MFU.

    As in PaLM (Chowdhery et al., 2022, appendix B): a matrix parameter costs 2 per token forward, 2 for the gradient of
    its input and 2 for its own; a frozen one has no third part. Unlike there, attention counts only the pairs that a
    causal mask (and a window) leaves, document by document, and the head only the positions that carry a label.
    Recomputation, norms, rotary embeddings and the softmax are not counted.

    `documents` are lengths in tokens without padding; `supervised` counts the positions whose label enters the loss. Each
    of the `adapter_parameters` costs 6 per token.
    """
    lengths = list(documents)
    tokens = sum(lengths)
    per_parameter = 6 if trained == "full" else 4
    matmul = per_parameter * (spec.layers * spec.layer_matmul * tokens + spec.head_matmul * supervised)
    pairs = 0  # of a query and a key that it sees, over all layers and documents
    for window, layers in Counter(spec.windows).items():
        for n in lengths:
            most = n if window is None else min(n, window)  # keys that a query sees
            pairs += layers * (most * (most + 1) // 2 + (n - most) * most)
    # Attention's q k^T and p v cost 2 operations each a pair and channel; their backward takes twice the forward.
    attention = 3 * 4 * pairs * spec.heads * spec.head_dim
    return float(matmul + attention + 6 * adapter_parameters * tokens)


def attention_weight(spec: ModelSpec, *, trained: Literal["full", "lora"]) -> float:
    """What one pair of a query and a key that it sees costs, as a share of what a supervised token's matmuls cost."""
    one, two = (flops(spec, [n], 0, trained=trained) for n in (1, 2))  # 1 and 3 pairs
    pair = two - 2 * one
    return pair / (flops(spec, [1], 1, trained=trained) - pair)
