"""Floating-point operations of a frozen vision part, counted in one forward without matmuls.

The weights are zeros that use no memory. Matmuls and attention only return zeros of the correct
shape. All other operations are computed, because the number of patches, tiles and windows depends
on tensor values, which the meta device does not have.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tunesmith.model.arch.load import replace_parameters
from tunesmith.model.layers.vision import picture_features

PRODUCTS = (
    functional.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.conv2d,
    torch.conv3d,
)


class _ProductsOnMeta(TorchFunctionMode):
    """A mode that runs matmuls on meta, where FlopCounterMode counts them, and returns zeros."""

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            product = _attend
        elif func in PRODUCTS:
            product = func
        else:
            return func(*args, **kwargs)
        on_meta = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return _zeros(product(*on_meta[0], **on_meta[1]))


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Compute the two matmuls of attention without the softmax.

    Torch's own attention function is a hundred times slower on meta.
    """
    # Use the first head of keys and values for all query heads, because there can be fewer key
    # heads than query heads. The number of operations is the same.
    return (query @ key[..., :1, :, :].mT) @ value[..., :1, :, :]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def count_picture_flops(model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of one forward of the vision part and the projector.

    A multiply-add counts as 2. Only matmuls and attention are counted. Attention is counted for all
    pairs of tokens in a sequence, or in a window if the model splits the sequence into windows.

    Args:
        model: a vision-language model on meta. Its parameters are replaced by zeros.
        pictures: the picture inputs of one forward.
    """
    replace_parameters(model, _zeros)
    with FlopCounterMode(display=False) as counter, _ProductsOnMeta():
        picture_features(model, pictures)
    return int(counter.get_total_flops())
