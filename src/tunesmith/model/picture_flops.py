"""The floating-point operations of a frozen vision part, counted in a forward without products.

Its weights are zeros that take no memory, and matrix products and attention hand on zeros of the
shape that they would have. All else is computed: into how many patches, tiles and windows a vision
part divides a picture depends on values, which tensors on meta do not have.
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

from tunesmith.model.load import replace_parameters
from tunesmith.model.vision import see

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
    """Run products on meta, where a counter sees their shapes, and return zeros."""

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
        result = product(*on_meta[0], **on_meta[1])
        return _zeros(result)


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """The two products of attention over all pairs, without the softmax between them.

    On meta that of torch takes a hundred times as long.
    """
    # One head of keys and values stands for all: queries may have more heads than these.
    return (query @ key[..., :1, :, :].mT) @ value[..., :1, :, :]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def count_picture_flops(model: PreTrainedModel, pictures: Mapping[str, Tensor]) -> int:
    """Count the operations of a whole model's vision part and projector, forward: 2 a multiply-add.

    Those of products and of attention's pairs, all of them but what windows leave out.

    Args:
        model: on meta; its parameters become zeros.
        pictures: the inputs of one call.
    """
    replace_parameters(model, _zeros)
    with FlopCounterMode(display=False) as counter, _ProductsOnMeta():
        see(model, pictures)
    return int(counter.get_total_flops())
