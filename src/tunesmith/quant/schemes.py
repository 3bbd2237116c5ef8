"""One `Scheme` for each value of `model.quantize`. This module does not import torch.

A scheme contains the bytes per weight of the frozen base, the costs of a micro batch, the
requirements for the machine, and how the layers of a model on the meta device are replaced. Plans,
checks and the code that builds a model use these attributes instead of comparing values of
`model.quantize`. Two modules still compare values: `config/check.py`, because its rules refer to
the values by name, and `model/arch/load.py`, which reads checkpoints that are already nf4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.model.weights.shipped import AS_SHIPPED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunesmith.config.schema import Model
    from tunesmith.formats.form import ShippedForm

PROBE_ROWS = (4096, 16, 1)  # rows of x in fp8 trials: many (3 GiB for an 8B model), few, one


@dataclass(frozen=True)
class Scheme:
    """Storage scheme for the base model's weights. By default, weights are stored in the dtype of
    the model.

    Attributes:
        name: the value of `model.quantize`.
        weight_bytes: bytes per weight of a linear layer, without scales. None means the size of the
            model's dtype.
        scale_bytes: bytes of the scales of a linear layer, per weight.
        expert_bytes: bytes per weight of a stack of experts, without scales. None means the size of
            the model's dtype.
        expert_scale_bytes: bytes of the scales of a stack, per weight. They are not split over
            ranks.
        expert_dense_bytes: bytes read and written to dequantize a stack, per weight.
        compiled_dense_bytes: bytes per weight that a compiled kernel reads and writes to dequantize
            a stack. 0 means that there is no such kernel.
        block: number of consecutive weights of a row that share a scale. They must be on the same
            rank.
        traffic_bytes: bytes read and written by one forward and backward, per weight. This is the
            fixed cost of a micro batch, because both passes read the weight.
        has_fp8_matmuls: whether the scheme uses fp8 matmuls. On machines without fp8 matmuls, the
            base is not quantized. `weight_bytes` does not include 4 bytes for the scale of a row.
        is_decoded: whether weights are dequantized for each matmul, and again in the backward.
        is_cut: whether a layer can be split over tensor-parallel ranks.
    """

    name: str = "none"
    weight_bytes: float | None = None
    scale_bytes: float = 0.0
    expert_bytes: float | None = None
    expert_scale_bytes: float = 0.0
    expert_dense_bytes: float = 0.0
    compiled_dense_bytes: float = 0.0
    block: int = 1
    # Unquantized 16-bit weights: two passes read 2 bytes per weight.
    traffic_bytes: float = 4.0
    has_fp8_matmuls: bool = False
    is_decoded: bool = False
    is_cut: bool = True

    def storage(self, scaling: str | None, dtype: str) -> str:
        """Return the storage format for a plan, given the machine's fp8 scaling recipe."""
        if self.has_fp8_matmuls:
            return scaling or dtype
        return self.name if self.is_decoded else dtype

    def backward_elements(self, weights: int, itemsize: int) -> int:
        """Return the number of elements that the backward of a matmul allocates for its weight.

        Args:
            weights: number of weights of the matrix.
            itemsize: bytes per element of the matmul's dtype.
        """
        if self.has_fp8_matmuls:
            # Transposed fp8 codes of two matrices, one byte per code. There are two because gate
            # and up are multiplied in one matmul.
            return 2 * weights // itemsize
        if self.is_decoded:
            return weights
        return 0

    def replace_linears(
        self, model: nn.Module, dtype: torch.dtype, form: ShippedForm | None = None
    ) -> None:
        """Replace layers and stacks of a model on the meta device by modules of the scheme. Call
        this before the adapter is added.

        Layers for fp8 matmuls are inserted by `convert_to_eight_bit` after planning, because their
        scaling recipe depends on the machine.

        Args:
            form: the stored form of the checkpoint if it is quantized.
        """
        if not self.is_decoded:
            return
        # Import these modules here, because they import torch and this module must not.
        from tunesmith.formats.nf4 import Nf4
        from tunesmith.formats.registry import shipped_format
        from tunesmith.quant.replace import replace_by_codes

        if self.name == AS_SHIPPED:
            assert form is not None  # guaranteed by `check_quantize`
            replace_by_codes(model, shipped_format(form), dtype, form)
        else:
            assert self is NF4, f"{self.name} has no format"
            replace_by_codes(model, Nf4(dtype), dtype)

    def select_scaling(
        self, device: torch.device, shapes: Sequence[tuple[int, int]]
    ) -> tuple[str | None, str]:
        """Return the fp8 scaling recipe for this device and the reason, or (None, "") without fp8.

        Args:
            shapes: (out_features, in_features) of the layers, from `eight_bit_shapes`.
        """
        if not self.has_fp8_matmuls:
            return None, ""
        from tunesmith.formats import fp8

        return fp8.select_scaling(device, shapes, PROBE_ROWS)


DENSE = Scheme()
# Two passes read 1 byte per weight.
FP8 = Scheme("fp8", weight_bytes=1, traffic_bytes=2.0, has_fp8_matmuls=True)
NF4 = Scheme(
    "nf4",
    is_decoded=True,
    weight_bytes=0.5,
    # An 8-bit scale per 64 weights, and an fp32 scale per 256 of these scales.
    scale_bytes=1 / 64 + 4 / (64 * 256),
    expert_bytes=0.5,
    expert_scale_bytes=1 / 64 + 4 / (64 * 256),
    # bitsandbytes' kernel reads the codes and fp32 scales, and writes the dequantized weight.
    expert_dense_bytes=0.5 + 4 / 64 + 2,
    block=64,
    # Per pass, the codes are read, and the dequantized weight is written and read: 2 x (0.52 + 2 +
    # 2).
    traffic_bytes=9.03,
)
SHIPPED = Scheme(
    AS_SHIPPED,
    is_decoded=True,
    weight_bytes=1,
    # An fp32 scale per 128 x 128 weights. A scale per matrix needs less. A scale per row needs
    # more: 4 bytes per some thousand weights, which are not counted.
    scale_bytes=4 / (128 * 128),
    expert_bytes=1,
    expert_scale_bytes=4 / (128 * 128),
    # Steps in plain PyTorch: convert codes to fp32, apply the scales, convert to 16 bits.
    expert_dense_bytes=(1 + 4) + (4 + 4) + (4 + 2),
    is_cut=False,
    # Per pass, the codes are read, and the dequantized weight is written and read: 2 x (1 + 2 + 2).
    traffic_bytes=10.0,
)
# Experts of gpt-oss. They cannot be split over tensor-parallel ranks, but FSDP shards codes and
# scales. There are two codes per byte, and a scale byte per 32 codes.
SHIPPED_MXFP4 = Scheme(
    AS_SHIPPED,
    is_decoded=True,
    expert_bytes=1 / 2 + 1 / 32,
    # Steps in plain PyTorch: convert bytes to int32, look up two values per byte, apply the scales.
    expert_dense_bytes=(0.5 + 2) + (2 + 2) + (2 + 2),
    compiled_dense_bytes=0.5 + 1 / 32 + 2,
    # Per pass, codes are read, and the dequantized weight is written and read: 2 x (0.53 + 2 + 2).
    traffic_bytes=9.06,
)
# Two codes per byte, and a scale byte per 16 codes, both for linear layers and experts. The scales
# are split over the ranks.
SHIPPED_NVFP4 = Scheme(
    AS_SHIPPED,
    is_decoded=True,
    weight_bytes=1 / 2 + 1 / 16,
    expert_bytes=1 / 2 + 1 / 16,
    # Steps in plain PyTorch: convert bytes to int32, look up two fp32 values per byte, apply the
    # scales, convert to 16 bits.
    expert_dense_bytes=(0.5 + 2) + (2 + 4) + (4 + 4) + (4 + 2),
    is_cut=False,
    # Per pass, codes are read, and the dequantized weight is written and read: 2 x (0.56 + 2 + 2).
    traffic_bytes=9.13,
)
SCHEME_BY_FORM = {"fp8": SHIPPED, "mxfp4": SHIPPED_MXFP4, "nvfp4": SHIPPED_NVFP4}
SCHEMES = {scheme.name: scheme for scheme in (DENSE, FP8, NF4, SHIPPED)}


def scheme_of(model: Model, shipped: str | None = None) -> Scheme:
    """Return the scheme of a recipe's `model` section.

    For `auto`, return the unquantized scheme, because `resolve_quantize` replaces `auto` if the
    base is stored quantized.

    Args:
        shipped: the storage format of the base (`ModelSpec.quantized`), which determines the bytes
            per weight.
    """
    if model.quantize == AS_SHIPPED:
        return SCHEME_BY_FORM.get(shipped or "", SHIPPED)
    if model.quantize == "auto":
        return DENSE
    return SCHEMES[model.quantize]
