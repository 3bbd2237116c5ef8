"""The spec of any decoder: read from config.json where the table has its family, else measured.

To measure, the model is built without weights and run on meta: parameters are counted, and each
layer is seen at work. That takes some seconds, so what was measured stays on the disk, by the
config and the version of Transformers. Nothing heavy is imported for a family of the table, nor for
a model that was measured before.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.host.files import measure_once
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.names import text_part
from tunesmith.model.shipped import stored_quantization
from tunesmith.model.spec import (
    EXPERTS_PER_TOKEN,
    Layer,
    ModelSpec,
    check_decoder,
    read_spec,
    stated_position_limit,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from tunesmith.model.meta_forward import LayerCall

FORMAT = 6  # of the cached files; how layers are counted, counts
# A whole number of the chunks that recurrent layers compute in: 64 tokens, of Mamba2 256.
TOKENS = 256
# Of one core. For 400 layers, the most that a config may have, Qwen3.5's MoE takes 6 on meta and 16
# for the memory of training; FalconMamba, which loops over the tokens, takes 25 on meta.
MAX_SPEC_SECONDS = 300.0
# What a config says beside the model's sizes.
NO_SIZES = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
)
# Keys whose product is the state of a recurrent layer: its heads, and the channels of a key (or of
# the state) and of a value.
STATE_KEYS = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),  # gated delta rule
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),  # Nemotron-H
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),  # Bamba, Falcon-H1, Granite 4
    ("n_mamba_heads", "mamba_headdim", "mamba_d_state"),  # Zamba2
    ("num_heads", "head_dim", "state_size"),  # Mamba2
)
# Keys for how many experts a token goes to, of models whose experts Transformers does not call
# through its interface.
PER_TOKEN = (*EXPERTS_PER_TOKEN, "top_k")


def model_spec(
    config: Mapping[str, Any], *, where: str, trust_remote_code: bool = False
) -> ModelSpec:
    """The spec of a parsed config.json, which errors call `where`.

    It says nothing about whether this engine trains the model. Raises as `read_spec` for a family
    of the table, else as `measure_spec`.
    """
    check_decoder(config, where)
    runs_own_code = trust_remote_code and "auto_map" in config
    if config["model_type"] in ARCHITECTURES or runs_own_code:
        return read_spec(config, where=where, trust_remote_code=trust_remote_code)
    return measure_spec(config, where=where)


def measure_spec(config: Mapping[str, Any], *, where: str) -> ModelSpec:
    """The spec of a model of Transformers, from its parsed config.json or `to_dict` of its config.

    Of a checkpoint with images or sound it is that of the text model. Only code of Transformers
    runs. ModelError where that cannot build the model, or the model does not run on meta.
    """
    quantized = stored_quantization(config, where)
    sizes = {key: value for key, value in config.items() if key not in NO_SIZES}
    sizes.pop("quantization_config", None)
    text = json.dumps(sizes, sort_keys=True, default=str)
    key = [FORMAT, version("transformers"), sizes]
    spec = measure_once("specs", key, lambda: _measure(sizes, where), _decode)
    # Read off the config each time: neither is in what was measured.
    limit = stated_position_limit(config, spec.layers, where=where)
    return replace(spec, quantized=quantized, position_limit=limit, measured=text)


def _decode(values: dict[str, Any]) -> ModelSpec:
    """The spec as the cache has it."""
    layers = tuple(Layer(**layer) for layer in values.pop("layers"))
    return ModelSpec(layers=layers, **values)


def _measure(sizes: Mapping[str, Any], where: str) -> ModelSpec:
    """Build and run the model, and count what is seen."""
    from tunesmith.model.meta_forward import run_on_meta

    config = text_config(sizes, where)
    # The text part of a composite may be a family of the table.
    if config.model_type in ARCHITECTURES:
        return read_spec(config.to_dict(), where=where)
    try:
        with limit_measuring(config.model_type):
            model = build_to_measure(config)
            calls, _ = run_on_meta(model, TOKENS)
            return _count(model, calls)
    except ModelError as error:
        error.where = error.where or where
        raise
    # Of a tensor on meta: its code asks, for example, which tokens go where.
    except NotImplementedError as error:
        raise ModelError(
            f"the sizes of this {config.model_type} cannot be measured",
            where=where,
            why=f"its code depends on tensor values, which are not available here: {error}",
            fix="use a model of another type: tunesmith models lists those that are supported",
        ) from error
    # Code of 140 model types, on a config that may be absurd.
    except Exception as error:
        raise _cannot_measure(sizes, where, error) from error


def limit_measuring(model_type: str) -> "AbstractContextManager[None]":
    """ModelError where what is built and run on meta within takes more than MAX_SPEC_SECONDS."""
    from tunesmith.model.deadline import deadline

    why = "the model is built and run once, without weights, to measure each layer"
    return deadline(MAX_SPEC_SECONDS, f"measuring this {model_type}", why=why)


def text_config(sizes: Mapping[str, Any], where: str) -> "PretrainedConfig":
    """The config of a model's text part, with all defaults; ModelError where Transformers does not
    read it.
    """
    from transformers import AutoConfig, PretrainedConfig

    values = _decode_floats(sizes)
    try:
        whole: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        config = text_part(whole)
    # Unknown types, and keys of the wrong kind, in many forms.
    except Exception as error:
        raise _cannot_measure(sizes, where, error) from error
    # Ids of tokens are no sizes, and a family's default may be beyond a small vocabulary.
    padding = config.to_dict().get("pad_token_id")
    if padding is not None and padding >= config.vocab_size:
        config.pad_token_id = None
    return config


def _decode_floats(value: Any) -> Any:
    """A value of config.json with Transformers' form of what JSON has no number for,
    `{"__float__": "Infinity"}`, as a float.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decode_floats(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_decode_floats(part) for part in value]
    return value


def build_to_measure(config: "PretrainedConfig", dtype: Any = "bf16") -> "PreTrainedModel":
    """The model with all its parameters and buffers on meta; raises as `load.build_on_meta`."""
    import torch

    from tunesmith.model.load import build_on_meta

    # `build_on_meta` computes buffers for real, and some models their parameters with them.
    with torch.device("meta"):
        model = build_on_meta(config, Model(name=config.model_type, dtype=dtype))
    return model.to("meta")


def _cannot_measure(config: Mapping[str, Any], where: str, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    why = f"{type(error).__name__}: {text[:300]}"
    fix = (
        "take config.json from the model's page again: tunesmith fetch MODEL; "
        "a newer type needs a newer Transformers"
    )
    if "auto_map" in config:
        why = f"its repository contains code, which runs only if trusted; {why}"
        fix = "review that code, then set model.trust_remote_code: true"
    return ModelError(
        f"Transformers cannot build this {config['model_type']} from its config",
        where=where,
        why=why,
        fix=fix,
    )


def _count(model: "PreTrainedModel", calls: "list[LayerCall]") -> ModelSpec:
    """The spec of a model on meta, whose layers were seen to do `calls`."""
    from tunesmith.model.decoder import find_layers

    config = model.config.get_text_config()
    values = config.to_dict()
    layers = list(model.get_submodule(find_layers(model)).children())
    if len(calls) != len(layers):
        raise ModelError(
            f"{len(layers)} layers of this {config.model_type} run {len(calls)} times",
            why="a plan counts one run of each layer in a forward",
            fix="use a model whose layers run once: tunesmith models lists the supported types",
        )
    kinds = values.get("layer_types") or [""] * len(layers)
    counted = []
    for module, call, kind in zip(layers, calls, kinds, strict=True):
        layer = _count_layer(module, call, values, config.hidden_size)
        if kind == "chunked_attention":
            layer = replace(layer, chunk=values["attention_chunk_size"])
        counted.append(layer)
    head = model.get_output_embeddings().weight
    in_layers = sum(_matrices(module) for module in layers)
    softcaps = [call.softcap for call in calls if call.softcap is not None]
    return ModelSpec(
        model_type=config.model_type,
        layers=tuple(counted),
        hidden=config.hidden_size,
        vocab=head.shape[0],
        tied=head is model.get_input_embeddings().weight,
        context=values.get("max_position_embeddings") or 2048,
        position_limit=None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        head_matmul=head.numel(),
        quantized=None,
        attention_softcap=softcaps[0] if softcaps else None,
        # What is left of all matrices: projections before the first layer or after the last.
        other_matmul=_matrices(model) - in_layers - head.numel(),
    )


def _count_layer(
    module: "nn.Module", call: "LayerCall", values: Mapping[str, Any], hidden: int
) -> Layer:
    """One layer's widths and parameters; `values` are those of the config."""
    from torch import nn

    from tunesmith.model.meta_forward import count_experts

    matmul = _matrices(module)
    experts = 0
    expert_count = 0
    experts_per_token = 0
    own_experts = 0
    active = matmul
    intermediate = 0
    largest = 0
    for name, weight in module.named_parameters():
        if _is_matrix(name, weight):
            largest = max(largest, weight.numel())
            # [out, in]: the input of the down projection is the widest activation of a gated MLP.
            intermediate = max(intermediate, weight.shape[1])
    for part in module.modules():
        stacks = _stacks(part)
        if not stacks:
            continue
        count = count_experts(part) or len(stacks[0])
        # As the layer was seen to choose, else as its config says, else all.
        per_token = call.experts_per_token or first_of(values, PER_TOKEN) or count
        if _has_interface(part):
            expert_count = count
            experts_per_token = per_token
        for stack in stacks:
            experts += stack.numel()
            if not _has_interface(part):
                own_experts += stack.numel()
            # A token is multiplied with its own experts' share of the stack.
            active += stack.numel() * per_token // count
            largest = max(largest, stack.numel())
        # The smallest is down, or up alone: gate and up in one are twice as wide.
        width = min(stack.numel() // count // hidden for stack in stacks)
        intermediate = max(intermediate, per_token * width)
    state = 0
    # Every recurrent layer that STATE_KEYS knows has a short convolution; an MLP alone has none.
    if any(isinstance(part, nn.Conv1d) for part in module.modules()):
        state = _state(values)
    return Layer(
        mixing="attention" if call.heads else "recurrent",
        heads=call.heads,
        kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        value_dim=call.value_dim,
        intermediate=intermediate,
        matmul=matmul,
        active=active,
        largest=largest,
        experts=experts,
        expert_count=expert_count,
        experts_per_token=experts_per_token,
        own_experts=own_experts,
        window=call.window,
        state=state,
    )


def _has_interface(experts: "nn.Module") -> bool:
    """Whether frozen experts are computed as Transformers' interface calls them.

    With an adapter Llama 4's are, which have code of their own in Transformers.
    """
    from tunesmith.model.meta_forward import has_interface

    return has_interface(experts) or type(experts).__name__ == "Llama4TextExperts"


def _is_matrix(name: str, weight: "nn.Parameter") -> bool:
    """Whether tokens are multiplied with this parameter: stacks of biases are no matrices."""
    return weight.ndim == 2 and name.rpartition(".")[2] == "weight"


def _matrices(model: "nn.Module") -> int:
    """Parameters of a module's matrices; those of embeddings are looked up."""
    from torch import nn

    count = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if _is_matrix(name, weight):
                count += weight.numel()
    return count


def _stacks(module: "nn.Module") -> "list[nn.Parameter]":
    """The matrices of all experts of a module that has some: [experts, out, in], or in, out.

    DBRX holds them in a module below, as [experts * out, in].
    """
    from tunesmith.model.meta_forward import are_experts, count_experts

    stacks = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
    if stacks and (count_experts(module) or are_experts(module)):
        return stacks
    if not are_experts(module):
        return []
    below = []
    for name, weight in module.named_parameters():
        # Linear layers are counted as matrices.
        if weight.ndim > 1 and not _is_matrix(name, weight):
            below.append(weight)
    return below


def _state(values: Mapping[str, Any]) -> int:
    """Elements of a recurrent layer's state, of a config's values; 0 where it keeps to none of
    STATE_KEYS.
    """
    for keys in STATE_KEYS:
        if all(isinstance(values.get(key), int) for key in keys):
            state = 1
            for key in keys:
                state *= values[key]
            return state
    return 0


def first_of(values: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        if values.get(key):
            return int(values[key])
    return None
