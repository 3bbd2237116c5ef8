"""Settings for `train.deterministic`. With these settings, a repeated step gives bit for bit equal
results, also on a GPU.

By default, FlashAttention's backward and index additions sum in the order in which thread blocks
finish. torch has a deterministic version of both, which these settings select (for attention, see
attention_backward.cu). An operator that has no deterministic version raises an error. Inductor no
longer selects kernels by benchmarks, and cuBLAS uses a workspace of fixed size.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.errors import MachineError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CHOICES = (":4096:8", ":16:8")  # the values that NVIDIA calls deterministic; the first is faster


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Context manager that makes torch compute deterministically if `enabled` is True.

    At the end of the block, torch's settings are restored, but the environment variable of cuBLAS
    remains set. Raise MachineError if CUDA was already used without the variable, because cuBLAS
    reads it only once.
    """
    if not enabled:
        yield
        return
    import torch

    if os.environ.get(WORKSPACE) not in CHOICES:
        if torch.cuda.is_initialized():
            raise MachineError(
                "deterministic training can no longer be enabled in this process",
                where="train.deterministic",
                why="cuBLAS reads its settings only when CUDA starts, and CUDA was started without "
                f"{WORKSPACE}",
                fix=f"start Python with {WORKSPACE}={CHOICES[0]} in its environment, or "
                "set train.deterministic=false",
            )
        os.environ[WORKSPACE] = CHOICES[0]
    mode = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        # Turn this option off: it only helps to find bugs, and it takes time to fill every new
        # tensor.
        memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        memory.fill_uninitialized_memory = fills
