"""Registry of all formats by name."""

import json
from functools import lru_cache

from tunesmith.formats.as_shipped import AsShipped
from tunesmith.formats.base import Format
from tunesmith.formats.dense import Dense
from tunesmith.formats.form import ShippedForm
from tunesmith.formats.fp8 import Fp8
from tunesmith.formats.fp8_blocks import Fp8Blocks
from tunesmith.formats.mxfp4 import Mxfp4
from tunesmith.formats.nf4 import Nf4
from tunesmith.formats.nvfp4 import Nvfp4

FORMATS: dict[str, type[Format]] = {
    kind.name: kind for kind in (Dense, Nf4, Fp8, Fp8Blocks, Mxfp4, Nvfp4)
}
SHIPPED_FORMATS: dict[str, type[AsShipped]] = {"fp8": Fp8Blocks, "mxfp4": Mxfp4, "nvfp4": Nvfp4}


@lru_cache(maxsize=256)
def find_format(encoding: str) -> Format:
    """Create the format object for the string `encoding` (see `Format.encoding`)."""
    name, *options = json.loads(encoding)
    return FORMATS[name].parse(*options)


def shipped_format(form: ShippedForm) -> AsShipped:
    """Return the format for weights that a checkpoint stores in this form."""
    return SHIPPED_FORMATS[form.method](form)
