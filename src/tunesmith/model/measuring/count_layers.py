"""Measurement of the widths and parameter counts of a model's layers after a forward on meta."""

import math
from dataclasses import replace

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.config.names import last_part
from tunesmith.errors import ModelError
from tunesmith.model.arch.spec import Layer, ModelSpec
from tunesmith.model.known.decoder import find_layers, find_text_model, vision_parameters
from tunesmith.model.layers.experts import CalledByInterface
from tunesmith.model.measuring.meta_forward import LayerCall, are_experts, count_experts
from tunesmith.model.weights.safetensors_files import Config

# Config keys of the number of heads, the width of a key (or of the state), and the width of a
# value. The product of the three values is the number of elements of a recurrent layer's state.
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
    """Return the spec of a model on the meta device.

    Args:
        calls: what each layer computed in one forward.
        experts_per_token: the value of the config, or None.
    """
    config = model.config.get_text_config()
    values = config.to_dict()
    layers = list(model.get_submodule(find_layers(model)).children())
    if len(calls) != len(layers):
        raise ModelError(
            f"{len(layers)} layers of this {config.model_type} are called {len(calls)} times in "
            "one forward pass",
            why="the memory plan assumes that each layer runs once per forward pass",
            fix="use a model of another type; `tunesmith models` lists the supported types",
        )
    kinds = values.get("layer_types") or [""] * len(layers)
    counted = []
    for module, call, kind in zip(layers, calls, kinds, strict=True):
        layer = _count_layer(module, call, config, call.experts_per_token or experts_per_token)
        if kind == "chunked_attention":
            layer = replace(layer, chunk=values["attention_chunk_size"])
        counted.append(layer)
    head = model.get_output_embeddings().weight
    _, text = find_text_model(model)
    # Matmul weights outside of the layers: projections before the first layer or after the last
    # layer.
    other_matmul = _matrices(text) - sum(map(_matrices, layers))
    if text is model:
        other_matmul -= head.numel()
    softcaps = [call.softcap for call in calls if call.softcap is not None]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parameters -= sum(parameter.numel() for _, parameter in vision_parameters(model))
    return ModelSpec(
        model_type=config.model_type,
        layers=tuple(counted),
        hidden=config.hidden_size,
        vocab=head.shape[0],
        tied=head is model.get_input_embeddings().weight,
        context=values.get("max_position_embeddings") or 2048,
        position_limit=None,
        parameters=parameters,
        head_matmul=head.numel(),
        quantized=None,
        attention_softcap=softcaps[0] if softcaps else None,
        other_matmul=other_matmul,
    )


def _count_layer(
    module: nn.Module, call: LayerCall, config: PretrainedConfig, experts_per_token: int | None
) -> Layer:
    """Return the widths and parameter counts of one layer."""
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
            # Weights are [out, in]. The input of the down projection is the widest activation of a
            # gated MLP.
            intermediate = max(intermediate, weight.shape[1])
    for part in module.modules():
        stacks = _stacks(part)
        if not stacks:
            continue
        count = count_experts(part) or len(stacks[0])
        # If the number of experts per token is unknown, assume that a token uses all experts.
        per_token = experts_per_token or count
        sizes = [stack.numel() for stack in stacks]
        experts += sum(sizes)
        if _has_interface(part):
            expert_count = count
            interface_per_token = per_token
        else:
            own_experts += sum(sizes)
        for size in sizes:
            # Each token is multiplied only with its selected experts.
            active += size * per_token // count
        largest = max(largest, *sizes)
        # The smallest stack is the down or up projection, because a joined gate_up projection is
        # twice as large. Compute the width of one expert from this stack.
        width = min(sizes) // count // config.hidden_size
        intermediate = max(intermediate, per_token * width)
    state = 0
    # Recognize recurrent layers by their short convolution. All layers that STATE_KEYS describes
    # contain one, and a layer with only an MLP does not.
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
    """Return whether frozen experts are called through Transformers' experts interface.

    Llama 4's experts have their own implementation in Transformers, but with an adapter they are
    also called through the interface.
    """
    is_called = isinstance(experts, CalledByInterface)
    return is_called or type(experts).__name__ == "Llama4TextExperts"


def _is_matrix(name: str, weight: nn.Parameter) -> bool:
    """Return whether the parameter is a matmul weight. Stacked biases are not matmul weights."""
    return weight.ndim == 2 and last_part(name) == "weight"


def _matrices(model: nn.Module) -> int:
    """Return the number of matmul parameters of a module, without embeddings."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if _is_matrix(name, weight):
                count += weight.numel()
    return count


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """Return the expert weights of a module: [experts, out, in] or [experts, in, out].

    Return an empty list if the module has no experts. DBRX stores the weights in a child module as
    [experts * out, in].
    """
    stacks = [weight for weight in module.parameters(recurse=False) if weight.ndim == 3]
    has_choice = are_experts(module)
    if stacks and (has_choice or count_experts(module)):
        return stacks
    if not has_choice:
        return []
    for name, weight in module.named_parameters():
        # Skip linear layers, which `_matrices` counts.
        if weight.ndim > 1 and not _is_matrix(name, weight):
            stacks.append(weight)
    return stacks


def _state(values: Config) -> int:
    """Compute the number of elements of a recurrent layer's state from the config's values.

    Return 0 if the config does not have all keys of any row of STATE_KEYS.
    """
    for keys in STATE_KEYS:
        if all(isinstance(values.get(key), int) for key in keys):
            return math.prod(values[key] for key in keys)
    return 0
