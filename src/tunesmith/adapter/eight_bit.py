"""Convert the frozen layers of a model to 8 bits, those with an adapter too."""

from collections.abc import Collection

from torch import nn

from tunesmith.adapter.lora import Lora, LoraLinear
from tunesmith.quant.eight_bit import EightBitLinear, eight_bit_names


class LoraEightBitLinear(Lora, EightBitLinear):
    """An `EightBitLinear` with an adapter; it takes over that of a `LoraLinear`."""

    def __init__(self, base: LoraLinear, recipe: str) -> None:
        super().__init__(base, recipe)
        self.lora_A = base.lora_A
        self.lora_B = base.lora_B
        self.scaling = base.scaling
        self.dropout = base.dropout
        self.enabled = base.enabled


def convert_to_eight_bit(model: nn.Module, recipe: str, skip: Collection[nn.Module] = ()) -> int:
    """Convert the layers of `eight_bit_names` to 8 bits, one at a time; return how many.

    Those on meta become empty ones.

    Args:
        recipe: one of `scaled_matmul.SCALING_RECIPES`.
        skip: as of `eight_bit_names`.
    """
    # By name: a list of the layers would keep every dense weight alive.
    names = eight_bit_names(model, skip)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLinear):
            model.set_submodule(name, LoraEightBitLinear(layer, recipe))
        elif isinstance(layer, nn.Linear):
            model.set_submodule(name, EightBitLinear(layer, recipe))
    return len(names)
