"""Pictures in a vision-language model in whole: its vision part makes features of them.

The features go to the model beside the ids, by the arguments that Transformers has for them: it
puts them in the place of the placeholders.
"""

import inspect
import os
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
from tunesmith.model.decoder import find_decoder, is_whole, vision_parameters

# Transformers hands all windows of a vision part at once, with their edges, to an attention whose
# name has "flash" in it.
VISION_ATTENTION = "tunesmith_flash_windows"

# Outputs of a vision part that a model with a `pooler_output` does not take.
HIDDEN_STATES = ("last_hidden_state", "hidden_states", "attentions")


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the text model.

    A vision part keeps its own, or has `attend_windows` if it takes pictures as patches in one row.
    """
    if not is_whole(model):
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
    """Compute attention within windows or pictures; those of one length share a call.

    Args:
        query, key, value: [1, heads, n, d].
        cu_seq_lens_q: [windows + 1], their edges.

    Returns:
        [1, n, heads, d], and None for the weights.
    """
    out = torch.empty_like(query)
    edges = cu_seq_lens_q.cpu().long()
    lengths = edges.diff()
    for length in lengths.unique().tolist():
        # [windows of this length, length]
        places = edges[:-1][lengths == length, None] + torch.arange(length)
        index = _to_device(places.flatten(), query.device)
        # [heads, windows * length, d] -> [windows, heads, length, d]
        q, k, v = (
            x[0].index_select(1, index).unflatten(1, places.shape).transpose(0, 1)
            for x in (query, key, value)
        )
        result = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out.index_copy_(2, index, result.transpose(0, 1).flatten(1, 2).unsqueeze(0))
    return out.transpose(1, 2), None


def text_key(whole: PretrainedConfig) -> str:
    """Return the key under which a vision-language model's config has that of its text part."""
    text = whole.get_text_config()
    for key in whole.sub_configs:
        if vars(whole).get(key) is text:
            return key
    raise ModelError(
        f"the text part of this {whole.model_type} is inside another part",
        why="its parts are models of their own, and no class returns the logits of all of it",
        fix="save the part that has text_config as a model of its own type",
    )


def mark_pictures(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a whole model's forward that tell which of `ids` are pictures'.

    Positions, and who sees whom, go by them where Transformers computes these.
    """
    known = inspect.signature(type(model).forward).parameters
    is_picture = (ids == model.config.image_token_id).long()
    names = ("mm_token_type_ids", "token_type_ids")
    return {name: is_picture for name in names if name in known}


def skip_device_checks() -> None:
    """Let Transformers not ask the device how many placeholders a batch has, and wait for it.

    What a batch has is counted on the host, row by row.
    """
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"


def see(model: PreTrainedModel, pictures: Mapping[str, Tensor], *, trains: bool = False) -> Any:
    """Return the features of pictures, as the whole model's forward takes them.

    trains: with the graph of a projector that is trained. Of a frozen one activations would stay in
    memory.
    """
    # The vision part asks for the values of sizes and grids: these stay on the host.
    inputs = dict(pictures)
    for name, tensor in pictures.items():
        if tensor.is_floating_point():
            inputs[name] = _to_device(tensor, model.device).to(model.dtype)
    whole: Any = find_decoder(model)
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()), _SizesOnHost():
        output = whole.get_image_features(**inputs, return_dict=True)
    if "pooler_output" not in output:
        return output
    # Hidden states of the vision part would stay in memory until the decoder ends.
    kept = {name: value for name, value in output.items() if name not in HIDDEN_STATES}
    return type(output)(**kept)


class _SizesOnHost(TorchFunctionMode):
    """Compute windows, positions and lengths on the host, where the sizes of pictures are.

    A vision part asks for their values again and again. If they were on the device, the host would
    wait for the device each time. An operator that also takes a tensor of the device runs there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        arguments = (args, kwargs or {})
        # Every operator comes here: `tree_leaves` would take ten times as long.
        values = [*args, *arguments[1].values()]
        for value in values:
            if isinstance(value, list | tuple):
                values += value
        tensors = [x for x in values if isinstance(x, Tensor)]
        others = [x.device for x in tensors if not x.is_cpu]
        if 0 < len(others) < len(tensors):
            to_device = partial(_to_device, device=others[0])
            arguments = tree_map_only(Tensor, to_device, arguments)
        elif not others and func in (Tensor.to, torch.as_tensor):
            # Copied later, if an operator needs it on the device.
            arguments = tree_map_only(torch.device, lambda _: torch.device("cpu"), arguments)
        return func(*arguments[0], **arguments[1])


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host without waiting. Operators take scalars of the host as they are."""
    if not tensor.is_cpu or not tensor.ndim:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def add_features_by_place(model: nn.Module) -> None:
    """Let the layers of a text model that take features of pictures (DeepStack) add them by place.

    Transformers adds them by a mask, and waits for the device to count what is in it.
    """
    for module in model.modules():
        if hasattr(module, "_deepstack_process"):
            # An attribute of the instance hides the method of the class.
            vars(module)["_deepstack_process"] = _add_features


def _add_features(hidden: Tensor, is_picture: Tensor, features: Tensor) -> Tensor:
    """Add features [m, width] to the m tokens of pictures in hidden states [rows, n, width]."""
    # A stable sort puts the places of pictures first, in their order.
    places = (~is_picture).flatten().argsort(stable=True)[: len(features)]
    added = hidden.flatten(0, 1).index_add(0, places, features.to(hidden.dtype))
    return added.view_as(hidden)


def with_unused(projector: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """Return hidden states of a batch without pictures, with gradients of zero for the projector
    that is trained: each rank must have the same gradients, whatever its pictures.
    """
    zeros = [0 * p.sum() for module in projector for p in module.parameters()]
    return hidden + torch.stack(zeros).sum().to(hidden.dtype) if zeros else hidden
