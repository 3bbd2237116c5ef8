"""What a model is, read from its config.json alone: shape, parameter counts, the work of one step.

Nothing heavy is imported, so that `plan`, `fetch` and `--help` can answer at once. A config that this engine cannot
train as it stands (mixture of experts, images, encoders, state-space layers, other quantisation) is refused here, by
name, before a byte of weights is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.errors import ModelError


@dataclass(frozen=True)
class SpecDefaults:
    """Where a family's layers differ in size from Llama's, and the defaults its config.json may leave out."""

    examples: str
    tied: bool = False  # default of tie_word_embeddings
    head_dim: int | None = None  # default; None: hidden_size / heads
    kv_heads: int | None = None  # default; None: as many as heads
    qkv_bias: bool | None = None  # None: as `attention_bias` says
    output_bias: bool | None = None  # None: as `attention_bias` says
    norms: int = 2  # per layer, each of hidden_size
    head_norms: Literal["none", "head", "projection"] = "none"  # norms on q and k: over one head, or all of them
    window: Literal["none", "all", "opt-in", "every-second", "pattern"] = "none"


FAMILIES: dict[str, SpecDefaults] = {
    "llama": SpecDefaults("Llama 2, 3, 3.1, 3.2, 3.3, SmolLM, SmolLM2, Yi, TinyLlama"),
    "mistral": SpecDefaults("Mistral 7B, Nemo, Small", kv_heads=8, qkv_bias=False, output_bias=False, window="all"),
    "qwen2": SpecDefaults("Qwen2, Qwen2.5", qkv_bias=True, output_bias=False, window="opt-in"),
    "qwen3": SpecDefaults("Qwen3 (dense)", head_dim=128, head_norms="head", window="opt-in"),
    "gemma": SpecDefaults("Gemma", tied=True, head_dim=256, kv_heads=16),
    "gemma2": SpecDefaults("Gemma 2", tied=True, head_dim=256, kv_heads=4, norms=4, window="every-second"),
    "gemma3_text": SpecDefaults(
        "Gemma 3 (text)", tied=True, head_dim=256, kv_heads=4, norms=4, head_norms="head", window="pattern"
    ),
    "phi3": SpecDefaults("Phi-3, Phi-3.5, Phi-4", qkv_bias=False, output_bias=False, window="all"),
    "smollm3": SpecDefaults("SmolLM3", tied=True, kv_heads=4),
    "olmo2": SpecDefaults("OLMo 2", head_norms="projection"),
    "granite": SpecDefaults("Granite 3"),
}

_ENCODERS = ("bert", "roberta", "deberta", "electra", "albert", "t5", "bart", "pegasus", "marian", "whisper", "clip")
_STATE_SPACE = ("mamba", "rwkv", "xlstm", "jamba", "zamba", "bamba", "falcon_h1", "recurrent_gemma", "nemotron_h")
_REASONS = {
    "phi": "Phi-1 to Phi-2 have a head with a bias, which the loss does not compute; Phi-3, 3.5 and 4 work",
    "gpt2": "GPT-2 stores its linear layers transposed",
}


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a decoder.

    Attributes:
        windows: per layer, how many tokens back a position sees (itself counted), or None for all of them.
        parameters: all of them, a tied head counted once.
        layer_matmul: parameters of one layer's matrices, which every token is multiplied with.
        head_matmul: parameters of the head's matrix, which every position with a label is multiplied with.
        quantised: "bnb-nf4" for a ready-made bitsandbytes 4-bit checkpoint, else None.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int
    sliding_window: int | None
    windows: tuple[int | None, ...]
    parameters: int
    layer_matmul: int
    head_matmul: int
    quantised: str | None

    @property
    def matmul_parameters(self) -> int:
        """Parameters of all matrices that tokens are multiplied with: the layers and the head, not the embedding."""
        return self.layers * self.layer_matmul + self.head_matmul


def families_text() -> str:
    """The families that work, for messages and the documentation: `llama (Llama 2, ...), ...`."""
    return "; ".join(f"{name} ({family.examples})" for name, family in FAMILIES.items())


def read_spec(config: Mapping[str, Any], *, where: str, trust_remote_code: bool = False) -> ModelSpec:
    """Read the facts from a config.json.

    Args:
        config: the parsed file.
        where: how to name the file in an error.
        trust_remote_code: take a type that is not in the table, as Llama's shape, when its repository ships the code.

    Raises:
        ModelError: the model is not a decoder that this engine trains, or a size is missing or impossible.
    """
    check_supported(config, where=where, trust_remote_code=trust_remote_code)
    kind = str(config["model_type"])
    family = FAMILIES.get(kind, SpecDefaults("code of the repository"))
    layers, hidden, intermediate, heads, vocab = (
        _size(config, name, where)
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    )
    kv_heads = _size(config, "num_key_value_heads", where, family.kv_heads or heads)
    head_dim = _size(config, "head_dim", where, family.head_dim or hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            where=where,
            fix="correct num_attention_heads or num_key_value_heads",
        )
    tied = bool(config.get("tie_word_embeddings", family.tied))
    attention_bias, mlp_bias = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    output_bias = attention_bias if family.output_bias is None else family.output_bias
    q, kv = heads * head_dim, kv_heads * head_dim
    matmul = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * intermediate
    biases = qkv_bias * (q + 2 * kv) + output_bias * hidden + mlp_bias * (2 * intermediate + hidden)
    head_norms = {"none": 0, "head": 2 * head_dim, "projection": q + kv}[family.head_norms]
    layer = matmul + biases + family.norms * hidden + head_norms
    windows = _windows(config, family, layers)
    return ModelSpec(
        model_type=kind, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, vocab=vocab, tied=tied, context=_size(config, "max_position_embeddings", where, 2048),
        sliding_window=next((w for w in windows if w), None), windows=windows,
        parameters=vocab * hidden * (1 if tied else 2) + layers * layer + hidden,
        layer_matmul=matmul, head_matmul=vocab * hidden, quantised=_quantised(config, where),
    )  # fmt: skip


def check_supported(config: Mapping[str, Any], *, where: str, trust_remote_code: bool = False) -> None:
    """Raise ModelError, naming what the model is, unless it is a dense text decoder of a known family."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(
            "the config names no model_type",
            where=where,
            why="it is the key that says which architecture the weights belong to",
            fix="give the folder of a Transformers checkpoint; a PEFT adapter goes under `adapter.from`",
        )
    what = _foreign(kind, config)
    if what:
        raise ModelError(
            f"{kind} is {what}, which tunesmith does not train",
            where=where,
            fix=f"take a dense text decoder: {families_text()}",
        )
    if kind in FAMILIES or (trust_remote_code and "auto_map" in config):
        return
    ships = "auto_map" in config
    raise ModelError(
        f"{kind} is not among the families that tunesmith is tested with",
        where=where,
        why=_REASONS.get(kind, "its repository ships its own code, which runs only when trusted" if ships else ""),
        fix=("read that code and set model.trust_remote_code: true, or " if ships else "")
        + f"take one of: {families_text()}",
    )


def _foreign(kind: str, config: Mapping[str, Any]) -> str:
    """Say what a config is when it is no dense text decoder, else an empty string."""
    name = kind.lower().replace("-", "_")
    experts = [
        k
        for k in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        if (config.get(k) or 0) > 1
    ]
    if experts or "moe" in name or name in ("mixtral", "dbrx", "gpt_oss", "deepseek_v2", "deepseek_v3", "arctic"):
        count = f" of {config[experts[0]]} experts" if experts else ""
        return f"a mixture{count or ' of experts'}"
    if any(k in config for k in ("vision_config", "audio_config", "vision_tower", "image_token_id")) or (
        name.endswith("_vl") or name in ("llava", "mllama", "paligemma", "idefics3", "gemma3", "gemma3n", "llama4")
    ):
        return "a multimodal model (text with images or sound)"
    if any(part in name for part in _STATE_SPACE):
        return "a state-space or recurrent model"
    if config.get("is_encoder_decoder") or config.get("use_bidirectional_attention") or any(
        name == part or name.endswith(part) or name.startswith(f"{part}_") for part in _ENCODERS
    ):  # fmt: skip
        return "an encoder or encoder-decoder"
    return ""


def _quantised(config: Mapping[str, Any], where: str) -> str | None:
    """`bnb-nf4` for bitsandbytes' 4-bit NormalFloat checkpoints, None for plain ones; refuse every other kind."""
    spec = config.get("quantization_config")
    if not spec:
        return None
    method = str(spec.get("quant_method", ""))
    if method in ("bitsandbytes", "bitsandbytes_4bit", "") and spec.get("load_in_4bit"):
        if spec.get("bnb_4bit_quant_type") == "nf4":
            return "bnb-nf4"
        method = f"bitsandbytes {spec.get('bnb_4bit_quant_type', 'fp4')}"
    elif spec.get("load_in_8bit"):
        method = "bitsandbytes 8-bit"
    raise ModelError(
        f"the weights are quantised with {method or 'an unnamed method'}",
        where=where,
        why="plain weights and bitsandbytes nf4 are read; other formats are for serving, not for training",
        fix="take the unquantised model and set model.quantize: nf4",
    )


def _size(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = f"{value!r}" if name in config else "nothing"
        raise ModelError(
            f"{name} is {found}, where a whole number above 0 must stand",
            where=where,
            fix="take config.json from the model's page again: tunesmith fetch MODEL",
        )
    return value


def _windows(config: Mapping[str, Any], family: SpecDefaults, layers: int) -> tuple[int | None, ...]:
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


def _pairs(length: int, window: int | None) -> int:
    """Query-key pairs of one causal document: each position sees itself and up to window - 1 before it."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def flops(
    facts: ModelSpec,
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

    Args:
        facts: the model.
        documents: length of each document, in tokens, padding not counted.
        supervised: positions whose label enters the loss.
        trained: "full", or "lora" for a frozen base.
        adapter_parameters: with "lora", parameters of all A and B, which cost 6 each per token.
    """
    lengths = list(documents)
    tokens = sum(lengths)
    per_parameter = 6 if trained == "full" else 4
    matmul = per_parameter * (facts.layers * facts.layer_matmul * tokens + facts.head_matmul * supervised)
    # The backward of attention takes twice its forward.
    return float(matmul + 3 * _attention(facts, lengths) + 6 * adapter_parameters * tokens)


def _attention(facts: ModelSpec, lengths: Sequence[int]) -> int:
    """Operations of attention's forward in all layers: q k^T and p v, 2 products of 2 operations a pair and channel."""
    counted: dict[int | None, int] = {}
    for window in facts.windows:
        counted[window] = counted.get(window, 0) + 1
    pairs = sum(many * sum(_pairs(n, window) for n in lengths) for window, many in counted.items())
    return 4 * pairs * facts.heads * facts.head_dim
