"""What a process does before others are forked from it, beside the imports of `ranks.PRELOADED`."""

import gc

import torch

from tunesmith.config.typed import run_type

# bitsandbytes asks a GPU for its kind, after which no process can be forked
if not torch.cuda.is_available():
    import bitsandbytes  # noqa: F401

run_type()  # the schema's types are built once, not in each process
gc.collect()
gc.freeze()  # a collection in a child leaves these objects' pages as they are, shared
