"""Pictures in a vision-language model in whole: its vision part makes features of them.

The features go to the model beside the ids, by the arguments that Transformers has for them: it
puts them in the place of the placeholders.
"""

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.model.decoder import find_decoder, is_whole


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the text model; a vision part keeps its own."""
    if is_whole(model):
        model.set_attn_implementation({text_key(model.config): name})
    else:
        model.set_attn_implementation(name)


def text_key(whole: PretrainedConfig) -> str:
    """Return the key under which a vision-language model's config has that of its text part."""
    text = whole.get_text_config()
    keys = [key for key in whole.sub_configs if vars(whole).get(key) is text]
    return keys[0]


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
    inputs = {}
    # Of a batch on a GPU they are on the host, pinned.
    for name, tensor in pictures.items():
        dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
        inputs[name] = tensor.to(model.device, non_blocking=True).to(dtype)
    whole: Any = find_decoder(model)
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        return whole.get_image_features(**inputs, return_dict=True)


def with_unused(projector: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """Return hidden states of a batch without pictures, with gradients of zero for the projector
    that is trained: each rank must have the same gradients, whatever its pictures.
    """
    zeros = [0 * p.sum() for module in projector for p in module.parameters()]
    return hidden + torch.stack(zeros).sum().to(hidden.dtype) if zeros else hidden
