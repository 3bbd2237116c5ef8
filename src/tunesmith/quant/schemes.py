"""The meaning of each word of `model.quantize`: one value a scheme. Importable without torch.

A scheme knows how many bytes a weight of the frozen base takes, what a micro batch costs it, what
the machine must have, and how a model on meta gets its layers. Plans, checks and the building of a
model ask it and compare no words. Two rooms below this one still do: `config/check.py`, whose rules
are about the words themselves, and `model/load.py`, which reads checkpoints that are nf4 already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.model.shipped import AS_SHIPPED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunesmith.config.schema import Model
    from tunesmith.formats.form import ShippedForm

PROBE_ROWS = (4096, 16, 1)  # of x, tried with fp8: many (3 GiB for an 8B model), few, and one


@dataclass(frozen=True)
class Scheme:
    """A way to store the base; by default in the dtype of the model.

    Attributes:
        name: the word of `model.quantize`.
        weight_bytes: of a stored weight of a layer without its scales; None: as the model's dtype.
        scale_bytes: of the scales, per weight.
        expert_bytes: of a stored weight of a stack of experts without its scales; None: as the
            model's dtype.
        expert_scale_bytes: of the scales of a stack, per weight, that no rank shares.
        expert_dense_bytes: per weight, read and written where a stack is dequantized.
        compiled_dense_bytes: the same by a kernel of the compiler; 0: there is none.
        block: neighbors in a row that share a scale, so that a rank must have all of them.
        traffic_bytes: per weight, of one forward and backward. This is the fixed cost of a micro
            batch: both passes read the weight.
        has_fp8_matmuls: it needs a machine with them; the base stays dense on others. The scales of
            its rows, 4 bytes each, are not counted.
        is_decoded: codes and scales are dequantized for one product at a time: in the backward once
            more.
        is_cut: a tensor group can share a layer.
    """

    name: str = "none"
    weight_bytes: float | None = None
    scale_bytes: float = 0.0
    expert_bytes: float | None = None
    expert_scale_bytes: float = 0.0
    expert_dense_bytes: float = 0.0
    compiled_dense_bytes: float = 0.0
    block: int = 1
    # Dense in 16 bits: two passes read 2 bytes a weight.
    traffic_bytes: float = 4.0
    has_fp8_matmuls: bool = False
    is_decoded: bool = False
    is_cut: bool = True

    def storage(self, scaling: str | None, dtype: str) -> str:
        """Name the stored base as a plan does, on a machine with this scaling recipe of fp8."""
        if self.has_fp8_matmuls:
            return scaling or dtype
        return self.name if self.is_decoded else dtype

    def backward_elements(self, weights: int, itemsize: int) -> int:
        """Elements of a matmul's dtype that its backward makes of a matrix with so many weights."""
        if self.has_fp8_matmuls:
            # The transposed codes, a byte each, of two such matrices: gate and up share a product.
            return 2 * weights // itemsize
        return weights if self.is_decoded else 0

    def replace_linears(
        self, model: nn.Module, dtype: torch.dtype, form: ShippedForm | None = None
    ) -> None:
        """Insert the scheme's empty layers and stacks of experts into a model on meta, before its
        adapter.

        The scaling recipe of fp8 depends on the machine, so `convert_to_eight_bit` inserts those
        layers once the plan is complete.

        form: of the checkpoint, where that is quantized.
        """
        if not self.is_decoded:
            return
        # They load torch.
        from tunesmith.formats.nf4 import Nf4
        from tunesmith.formats.registry import shipped_format
        from tunesmith.quant.replace import replace_by_codes

        if self.name == AS_SHIPPED:
            assert form is not None  # `check_quantize` refuses others
            replace_by_codes(model, shipped_format(form), dtype, form)
        else:
            assert self is NF4, f"{self.name} has no format"
            replace_by_codes(model, Nf4(dtype), dtype)

    def check_device(self, device: torch.device) -> None:
        """MachineError where a package that the scheme needs is missing or has no code for it."""
        if self.name == "nf4":
            from tunesmith.formats.nf4 import check_nf4

            check_nf4(device)

    def select_scaling(
        self, device: torch.device, shapes: Sequence[tuple[int, int]]
    ) -> tuple[str | None, str]:
        """The scaling recipe of fp8 on this device and why; (None, "") where none is needed.

        shapes: (out_features, in_features) of the layers, as of `eight_bit_shapes`.
        """
        if not self.has_fp8_matmuls:
            return None, ""
        from tunesmith.formats import fp8

        return fp8.select_scaling(device, shapes, PROBE_ROWS)


DENSE = Scheme()
# Two passes read 1 byte a weight.
FP8 = Scheme("fp8", weight_bytes=1, traffic_bytes=2.0, has_fp8_matmuls=True)
NF4 = Scheme(
    "nf4",
    is_decoded=True,
    weight_bytes=0.5,
    # An 8-bit scale of 64 weights, an fp32 scale of 256 of these.
    scale_bytes=1 / 64 + 4 / (64 * 256),
    expert_bytes=0.5,
    expert_scale_bytes=1 / 64 + 4 / (64 * 256),
    # bitsandbytes' kernel: the codes, scales in fp32, the dense weight.
    expert_dense_bytes=0.5 + 4 / 64 + 2,
    block=64,
    # The codes are read, and the dequantized weight is written and read: 2 x (0.52 + 2 + 2).
    traffic_bytes=9.03,
)
SHIPPED = Scheme(
    AS_SHIPPED,
    is_decoded=True,
    weight_bytes=1,
    # An fp32 scale of 128 x 128 weights. One of all takes less. One of each row takes more, 4 bytes
    # for some thousand weights, which is not counted.
    scale_bytes=4 / (128 * 128),
    expert_bytes=1,
    expert_scale_bytes=4 / (128 * 128),
    # In plain PyTorch: codes to fp32, times the scales, to 16 bits.
    expert_dense_bytes=(1 + 4) + (4 + 4) + (4 + 2),
    is_cut=False,
    # The codes are read, and the dequantized weight is written and read: 2 x (1 + 2 + 2).
    traffic_bytes=10.0,
)
# Of gpt-oss the experts, which no tensor group cuts: two codes a byte, and a byte of scale for 32
# of them, which ranks share.
SHIPPED_MXFP4 = Scheme(
    AS_SHIPPED,
    is_decoded=True,
    expert_bytes=1 / 2 + 1 / 32,
    # In plain PyTorch: bytes to int32, two values of each looked up, times the scales.
    expert_dense_bytes=(0.5 + 2) + (2 + 2) + (2 + 2),
    compiled_dense_bytes=0.5 + 1 / 32 + 2,
    # 2 x (0.53 + 2 + 2)
    traffic_bytes=9.06,
)
# Two codes a byte, and a byte of scale for 16 of them, which ranks share; experts as the rest.
SHIPPED_NVFP4 = Scheme(
    AS_SHIPPED,
    is_decoded=True,
    weight_bytes=1 / 2 + 1 / 16,
    expert_bytes=1 / 2 + 1 / 16,
    # In plain PyTorch: bytes to int32, two values of each looked up in fp32, times the scales, to
    # 16 bits.
    expert_dense_bytes=(0.5 + 2) + (2 + 4) + (4 + 4) + (4 + 2),
    is_cut=False,
    # 2 x (0.56 + 2 + 2)
    traffic_bytes=9.13,
)
OF_FORMS = {"fp8": SHIPPED, "mxfp4": SHIPPED_MXFP4, "nvfp4": SHIPPED_NVFP4}
SCHEMES = {scheme.name: scheme for scheme in (DENSE, FP8, NF4, SHIPPED)}


def scheme_of(model: Model, shipped: str | None = None) -> Scheme:
    """The scheme of a recipe's `model` section.

    `auto` is dense here: where a base ships in codes, `resolve_quantize` has replaced it.

    shipped: how the base does (`ModelSpec.quantized`), for sizes.
    """
    if model.quantize == AS_SHIPPED:
        return OF_FORMS.get(shipped or "", SHIPPED)
    return DENSE if model.quantize == "auto" else SCHEMES[model.quantize]
