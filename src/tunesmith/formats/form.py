"""The storage formats of checkpoints, as their config.json describes them.

This module does not import torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.units import ceil_div

FETCH = "fetch the model again: tunesmith fetch MODEL"
ROW = (1, 0)  # value of `block` for one scale per row
# Suffixes of the names of FP8 scales: first in files of Transformers, then in those of other tools.
WEIGHT_SCALE_INV = ".weight_scale_inv"
WEIGHT_SCALE = ".weight_scale"
NVFP4_GROUP = 16  # number of weights of a row that share a scale
MXFP4_GROUP = 32  # number of weights of a row that share an exponent


@dataclass(frozen=True)
class Nvfp4Names:
    """A tool's names for the three tensors of an NVFP4 weight, after the name of the module.

    Attributes:
        codes: suffix of the codes, two per byte.
        scales: suffix of the scales, one per 16 weights of a row.
        scale: suffix of the single scale of the entire weight.
        divides: whether `scales` are divided by `scale`. If False, they are multiplied by `scale`.
    """

    codes: str
    scales: str
    scale: str
    divides: bool


COMPRESSED_TENSORS = Nvfp4Names(
    ".weight_packed", ".weight_scale", ".weight_global_scale", divides=True
)
MODELOPT = Nvfp4Names(".weight", ".weight_scale", ".weight_scale_2", divides=False)


@dataclass(frozen=True)
class ShippedForm:
    """The storage format of a checkpoint's weights, as its config.json describes it.

    Attributes:
        method: fp8, nvfp4 or mxfp4.
        block: rows and columns of a block of weights that share a scale. ROW means one scale per
            row. None means one scale for the entire weight.
        not_converted: patterns for the names of modules that are not quantized.
        converted: patterns for the names of modules that are quantized. Empty means all modules
            that do not match `not_converted`.
        has_expressions: whether the patterns are regular expressions. If False, they have
            Transformers' syntax.
        scale_suffix: suffix of the names of FP8 scales.
        names: names of the NVFP4 tensors.
    """

    method: str
    block: tuple[int, int] | None = None
    not_converted: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    has_expressions: bool = False
    scale_suffix: str = WEIGHT_SCALE_INV
    names: Nvfp4Names | None = None

    def describe(self) -> str:
        """Return the format as text for messages, for example "FP8 with one scale per row"."""
        if self.method != "fp8":
            return self.method.upper()
        if self.block is None:
            return "FP8 with one scale per matrix"
        if self.block == ROW:
            return "FP8 with one scale per row"
        rows, columns = self.block
        return f"FP8 in blocks of {rows} x {columns}"

    @property
    def plain_key(self) -> str:
        """Name of the list in `quantization_config` from which `not_converted` was read."""
        if self.has_expressions:
            return "ignore"
        # AutoFP8 calls the list "ignored_layers".
        return "ignored_layers" if self.scale_suffix == WEIGHT_SCALE else "modules_to_not_convert"

    def has_codes(self, module: str) -> bool:
        """Return whether the weights of the module with this name in the checkpoint are quantized.

        The patterns must be regular expressions.
        """
        if _matches(self.not_converted, module):
            return False
        return not self.converted or _matches(self.converted, module)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a weight [rows, columns]."""
        if self.block is None:
            return 1, 1
        height, width = self.block
        return ceil_div(rows, height), ceil_div(columns, width) if width else 1


def _matches(expressions: Sequence[str], name: str) -> bool:
    return any(re.match(expression, name) for expression in expressions)
