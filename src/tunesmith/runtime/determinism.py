"""The settings of `train.deterministic`: equal steps come out bit for bit alike on a GPU too.

By default FlashAttention's backward and sums by index add up in the order in which thread blocks
end. For both torch has a second, deterministic form (attention_backward.cu asks the flag), and an
operator that has none raises. Inductor then times no kernels against each other, and cuBLAS takes a
workspace of fixed size.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.errors import MachineError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CHOICES = (":4096:8", ":16:8")  # those that NVIDIA calls deterministic; the first is faster


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Have torch compute deterministically inside the block, if `enabled`.

    Its settings are restored afterwards. MachineError after the first use of CUDA: cuBLAS reads its
    variable, which stays set, only once.
    """
    if not enabled:
        yield
        return
    if os.environ.get(WORKSPACE) not in CHOICES:
        if torch.cuda.is_initialized():
            raise MachineError(
                "the cuBLAS workspace can no longer be changed",
                where="train.deterministic",
                why=f"CUDA was started without {WORKSPACE}",
                fix=f"start Python with {WORKSPACE}={CHOICES[0]} in its environment, or "
                "train.deterministic=false",
            )
        os.environ[WORKSPACE] = CHOICES[0]
    mode = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        # It writes over every new tensor, and shows bugs alone.
        memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        memory.fill_uninitialized_memory = fills
