"""What a process does before others are forked from it, beside the imports of `ranks.PRELOADED`."""

import ctypes
import gc
import sys
from pathlib import Path

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.chat_template_utils import render_jinja_template

from recipes import CHATML
from tunesmith.config.schema import run_type
from tunesmith.host.packages import installed_versions, source_digest
from tunesmith.tokens.text.builtin_templates import with_tools

HUGE = 2 << 20  # bytes of a huge page
MADV_COLLAPSE = 25  # of Linux 6.1


def collapse_pages() -> None:
    """Join pages to huge ones, if the kernel can: a fork takes 16 ms of CPU time instead of 29."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, permissions, _, _, inode, *name = line.split()
        if inode != "0" or not permissions.startswith("rw") or name not in ([], ["[heap]"]):
            continue
        first, end = (int(address, 16) for address in place.split("-"))
        first = (first + HUGE - 1) // HUGE * HUGE
        end = end // HUGE * HUGE
        if first < end:
            madvise(first, end - first, MADV_COLLAPSE)


# bitsandbytes asks a GPU for its kind, after which no process can be forked
if not torch.cuda.is_available():
    import bitsandbytes  # noqa: F401

# What does not change is found once, not in each process: the schema's types, the digest of the
# package, the 400 patterns of Transformers' renamed weights, the compiled templates of the tiny models.
run_type()
source_digest()
installed_versions()
get_checkpoint_conversion_mapping("llama")
for template in (CHATML, with_tools(CHATML)):
    render_jinja_template([[{"role": "user", "content": ""}]], chat_template=template)
torch.manual_seed(torch.initial_seed())  # as it was; its wrapper is made at the first call
gc.collect()
gc.freeze()  # a collection in a child leaves these objects' pages as they are, shared
collapse_pages()
