"""The formats that keep the codes of a quantized checkpoint, by `ShippedForm.method`."""

from tunesmith.formats.as_shipped import AsShipped
from tunesmith.formats.form import ShippedForm
from tunesmith.formats.fp8_blocks import Fp8Blocks
from tunesmith.formats.mxfp4 import Mxfp4
from tunesmith.formats.nvfp4 import Nvfp4

SHIPPED_FORMATS: dict[str, type[AsShipped]] = {"fp8": Fp8Blocks, "mxfp4": Mxfp4, "nvfp4": Nvfp4}


def shipped_format(form: ShippedForm) -> AsShipped:
    """Return the format for weights that a checkpoint stores in this form."""
    return SHIPPED_FORMATS[form.method](form)
