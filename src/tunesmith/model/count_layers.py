"""The widths and parameters of a model's layers, counted on meta after one forward of it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.decoder import find_layers, find_text_part, vision_parameters
from tunesmith.model.experts import CalledByInterface
from tunesmith.model.meta_forward import LayerCall, are_experts, count_experts
from tunesmith.model.spec import Layer, ModelSpec

# Keys whose product is the state of a recurrent layer: its heads, and the channels of a key (or of
# the state) and of a value.
STATE_KEYS = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),  # gated delta rule
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),  # Nemotron-H
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),  # Bamba, Falcon-H1, Granite 4
    ("n_mamba_heads", "mamba_headdim", "mamba_d_state"),  # Zamba2
    ("num_heads", "head_dim", "state_size"),  # Mamba2
)


def count_layers(
    model: PreTrainedModel, calls: list[LayerCall], experts_per_token: int | None
) -> ModelSpec:
    """The spec of a model on meta, whose layers were seen to do `calls`.

    experts_per_token: as the config says, if it does.
    """
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
        per_token = call.experts_per_token or experts_per_token
        layer = _count_layer(module, call, config, per_token)
        if kind == "chunked_attention":
            layer = replace(layer, chunk=values["attention_chunk_size"])
        counted.append(layer)
    head = model.get_output_embeddings().weight
    _, text = find_text_part(model)
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
        parameters=sum(p.numel() for p in model.parameters())
        - sum(p.numel() for _, p in vision_parameters(model)),
        head_matmul=head.numel(),
        quantized=None,
        attention_softcap=softcaps[0] if softcaps else None,
        # What is left of all matrices: projections before the first layer or after the last.
        other_matmul=_matrices(text) - in_layers - (head.numel() if text is model else 0),
    )


def _count_layer(
    module: nn.Module, call: LayerCall, config: PretrainedConfig, experts_per_token: int | None
) -> Layer:
    """One layer's widths and parameters."""
    matmul = _matrices(module)
    experts = 0
    expert_count = 0
    interface_per_token = 0
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
        per_token = experts_per_token or count
        if _has_interface(part):
            expert_count = count
            interface_per_token = per_token
        for stack in stacks:
            experts += stack.numel()
            if not _has_interface(part):
                own_experts += stack.numel()
            # A token is multiplied with its own experts' share of the stack.
            active += stack.numel() * per_token // count
            largest = max(largest, stack.numel())
        # The smallest is down, or up alone: gate and up in one are twice as wide.
        width = min(stack.numel() // count // config.hidden_size for stack in stacks)
        intermediate = max(intermediate, per_token * width)
    state = 0
    # Every recurrent layer that STATE_KEYS knows has a short convolution; an MLP alone has none.
    if any(isinstance(part, nn.Conv1d) for part in module.modules()):
        state = _state(config.to_dict())
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
        experts_per_token=interface_per_token,
        own_experts=own_experts,
        window=call.window,
        state=state,
    )


def _has_interface(experts: nn.Module) -> bool:
    """Tell whether frozen experts are computed as Transformers' interface calls them.

    With an adapter Llama 4's are, which have code of their own in Transformers.
    """
    is_called = isinstance(experts, CalledByInterface)
    return is_called or type(experts).__name__ == "Llama4TextExperts"


def _is_matrix(name: str, weight: nn.Parameter) -> bool:
    """Tell whether tokens are multiplied with this parameter: stacks of biases are no matrices."""
    return weight.ndim == 2 and name.rpartition(".")[2] == "weight"


def _matrices(model: nn.Module) -> int:
    """Parameters of a module's matrices; those of embeddings are looked up."""
    count = 0
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            own = module.named_parameters(recurse=False)
            count += sum(weight.numel() for name, weight in own if _is_matrix(name, weight))
    return count


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of all experts of a module that has some: [experts, out, in], or in, out.

    DBRX holds them in a module below, as [experts * out, in].
    """
    stacks = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
    if stacks and (count_experts(module) or are_experts(module)):
        return stacks
    if not are_experts(module):
        return []
    # Linear layers are counted as matrices.
    below = module.named_parameters()
    return [weight for name, weight in below if weight.ndim > 1 and not _is_matrix(name, weight)]


def _state(values: Mapping[str, Any]) -> int:
    """Elements of a recurrent layer's state, of a config's values; 0 where it keeps to none of
    STATE_KEYS.
    """
    for keys in STATE_KEYS:
        if all(isinstance(values.get(key), int) for key in keys):
            return math.prod(values[key] for key in keys)
    return 0
