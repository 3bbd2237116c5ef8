"""Pictures as inputs of a vision-language model, whose vision part converts them to features.

The features are passed to the model together with the token ids, in the arguments that Transformers
provides. Transformers replaces the embeddings of the placeholder tokens by the features.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.known.decoder import find_decoder, has_vision_language_class, vision_parameters
from tunesmith.model.layers.documents import copy_to_device

# Name of our attention for vision parts. Because the name contains "flash", Transformers passes all
# windows in one call, together with their boundaries.
VISION_ATTENTION = "tunesmith_flash_windows"

# Outputs of a vision part that are not used if there is a `pooler_output`.
HIDDEN_STATES = ("last_hidden_state", "hidden_states", "attentions")


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the text model.

    The vision part gets `attend_windows` if it takes the patches of all pictures in one row.
    Otherwise its attention is unchanged.
    """
    if not has_vision_language_class(model):
        model.set_attn_implementation(name)
        return
    names = {text_key(model.config): name}
    has_vision = any(vision_parameters(model))
    if has_vision and "image_grid_thw" in inspect.signature(type(model).forward).parameters:
        AttentionInterface.register(VISION_ATTENTION, attend_windows)
        names["vision_config"] = VISION_ATTENTION
    model.set_attn_implementation(names)


def attend_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **others: object,
) -> tuple[Tensor, None]:
    """Compute attention within windows or pictures, with one call per distinct length.

    Args:
        query, key, value: [1, heads, n, d].
        cu_seq_lens_q: [windows + 1], the boundaries of the windows.

    Returns:
        [1, n, heads, d], and None in place of the attention weights.
    """
    out = torch.empty_like(query)
    edges = cu_seq_lens_q.cpu().long()
    lengths = edges.diff()
    for length in lengths.unique().tolist():
        starts = edges[:-1][lengths == length]
        # [windows of this length, length]
        places = starts.unsqueeze(1) + torch.arange(length)
        index = _to_device(places.flatten(), query.device)
        by_window = []
        for x in (query, key, value):
            # [heads, windows * length, d] -> [windows, heads, length, d]
            rows = x[0].index_select(1, index)
            by_window.append(rows.unflatten(1, places.shape).transpose(0, 1))
        q, k, v = by_window
        result = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        result = result.transpose(0, 1).flatten(1, 2)
        out.index_copy_(2, index, result.unsqueeze(0))
    return out.transpose(1, 2), None


def text_key(full_config: PretrainedConfig) -> str:
    """Return the key of a vision-language model's config that contains its text part's config."""
    text = full_config.get_text_config()
    for key in full_config.sub_configs:
        if vars(full_config).get(key) is text:
            return key
    raise ModelError(
        f"this {full_config.model_type} consists of separate models",
        why="Transformers has no class that returns the logits of all of them",
        fix="save the model that contains the text model (its config has text_config) separately",
    )


def mark_pictures(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return arguments for a vision-language model's forward that mark the picture tokens.

    Transformers uses them to compute positions and attention masks.
    """
    known = inspect.signature(type(model).forward).parameters
    is_picture = (ids == model.config.image_token_id).long()
    names = ("mm_token_type_ids", "token_type_ids")
    return {name: is_picture for name in names if name in known}


def picture_features(
    model: PreTrainedModel, pictures: Mapping[str, Tensor], *, trains: bool = False
) -> Any:
    """Return the features of pictures as the vision-language model's forward expects them.

    Args:
        trains: whether to build the autograd graph for a trained projector. For a frozen projector,
            the graph would only keep activations in memory.
    """
    # Keep sizes and grids (integers) on the host, because the vision part reads their values.
    inputs = dict(pictures)
    for name, tensor in pictures.items():
        if tensor.is_floating_point():
            inputs[name] = _to_device(tensor, model.device).to(model.dtype)
    entire: Any = find_decoder(model)
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()), _SizesOnHost():
        output = entire.get_image_features(**inputs, return_dict=True)
    if "pooler_output" not in output:
        return output
    # Drop the vision part's hidden states, which would use memory during the decoder's forward.
    kept = {name: value for name, value in output.items() if name not in HIDDEN_STATES}
    return type(output)(**kept)


class _SizesOnHost(TorchFunctionMode):
    """A mode that computes windows, positions and lengths of pictures on the host.

    A vision part reads these values many times. Reading from the device would synchronize each
    time. An operator that also has an argument on the device runs on the device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Use a simple loop, because this runs for every operator and `tree_leaves` is ten times
        # slower.
        values = [*args, *kwargs.values()]
        for value in values:
            if isinstance(value, list | tuple):
                values += value
        tensors = [value for value in values if isinstance(value, Tensor)]
        devices = [tensor.device for tensor in tensors if not tensor.is_cpu]
        if 0 < len(devices) < len(tensors):
            to_device = partial(_to_device, device=devices[0])
            args, kwargs = tree_map_only(Tensor, to_device, (args, kwargs))
        elif not devices and func in (Tensor.to, torch.as_tensor):
            # Do not copy to the device now. The tensor is copied if an operator needs it there.
            cpu = torch.device("cpu")
            args, kwargs = tree_map_only(torch.device, lambda _: cpu, (args, kwargs))
        return func(*args, **kwargs)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting.

    Scalars are not copied, because operators accept them from any device.
    """
    if not tensor.is_cpu or not tensor.ndim:
        return tensor
    return copy_to_device(tensor, device)


def add_features_by_place(model: nn.Module) -> None:
    """Make text models with DeepStack add the features of pictures by index instead of by mask.

    DeepStack (arXiv:2406.04334) adds features of the vision encoder to the hidden states of several
    layers.

    Indexing with a mask, as Transformers does, waits for the device to count the selected tokens.
    """
    for module in model.modules():
        if hasattr(module, "_deepstack_process"):
            # Set the attribute on the instance, so that it hides the method of the class.
            vars(module)["_deepstack_process"] = _add_features


def _add_features(hidden: Tensor, is_picture: Tensor, features: Tensor) -> Tensor:
    """Add features [m, width] to the m picture tokens in the hidden states [rows, n, width]."""
    # The stable sort puts the positions of picture tokens, where `~is_picture` is 0, first.
    places = (~is_picture).flatten().argsort(stable=True)[: len(features)]
    added = hidden.flatten(0, 1).index_add(0, places, features.to(hidden.dtype))
    return added.view_as(hidden)


def add_zero_gradients(projector: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """Give the trained projector zero gradients in a batch without pictures.

    All ranks must compute gradients of the same parameters, even if only some have pictures.

    Returns:
        `hidden` plus zero. Its autograd graph contains the projector's parameters.
    """
    zeros = []
    for module in projector:
        for parameter in module.parameters():
            zeros.append(0 * parameter.sum())
    if not zeros:
        return hidden
    return hidden + torch.stack(zeros).sum().to(hidden.dtype)
