"""The form of a checkpoint's weights, as its config.json says. No torch is imported here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.units import ceil_div

FETCH = "fetch the model again: tunesmith fetch MODEL"
ROW = (1, 0)  # as a block: all of a row
# How the name of the scales of a weight in fp8 ends, by Transformers and by other tools.
WEIGHT_SCALE_INV = ".weight_scale_inv"
WEIGHT_SCALE = ".weight_scale"
NVFP4_GROUP = 16  # weights of a row that share a scale
MXFP4_GROUP = 32  # weights of a row that share an exponent


@dataclass(frozen=True)
class Nvfp4Names:
    """The names of a tool for the three tensors of a weight in nvfp4, after its module's.

    Attributes:
        codes: two a byte; scales: one for 16 weights of a row; scale: one of all.
        divides: `scales` are divided by `scale`; False: multiplied.
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
    """The form in which a checkpoint stores its weights, as its config.json says.

    Attributes:
        method: fp8, nvfp4 or mxfp4.
        block: rows and columns of a weight that share a scale; ROW: one a row; None: all share one.
        not_converted: patterns of the modules whose weights are plain.
        converted: those of the modules whose weights are not; empty: all others.
        has_expressions: these patterns are regular expressions; False: Transformers' own.
        scale_suffix: how the name of the scales of fp8 ends.
        names: of the tensors of nvfp4.
    """

    method: str
    block: tuple[int, int] | None = None
    not_converted: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    has_expressions: bool = False
    scale_suffix: str = WEIGHT_SCALE_INV
    names: Nvfp4Names | None = None

    def describe(self) -> str:
        """Words for the user."""
        if self.method != "fp8":
            return self.method.upper()
        if self.block is None:
            return "FP8 with a scale a matrix"
        if self.block == ROW:
            return "FP8 with a scale a row"
        rows, columns = self.block
        return f"FP8 in blocks of {rows} x {columns}"

    @property
    def plain_key(self) -> str:
        """Name the list in `quantization_config` that `not_converted` comes from."""
        if self.has_expressions:
            return "ignore"
        # AutoFP8's
        return "ignored_layers" if self.scale_suffix == WEIGHT_SCALE else "modules_to_not_convert"

    def has_codes(self, module: str) -> bool:
        """Tell whether the weights of a module, by its name in the checkpoint, are in codes; of
        forms that have regular expressions.
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
