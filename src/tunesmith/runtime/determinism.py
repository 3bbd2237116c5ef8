"""Steps that come out bit for bit alike, on a GPU too: what `train.deterministic` turns on, and off after the run.

By default FlashAttention's backward and sums by index add up in the order in which blocks of threads come to an end.
torch has another form of all operators of a step: FlashAttention writes dq in parts that are summed in their order
(torch's attention_backward.cu asks the flag), sums by index sort first, Inductor does not time kernels against each other.
cuBLAS needs a workspace of fixed size. An operator without such a form raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tunesmith.errors import MachineError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CHOICES = (":4096:8", ":16:8")  # those that NVIDIA calls deterministic; the first is faster


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Have torch compute deterministically inside the block, if `wanted`; then all is as it was before.

    Enter it before the first product on a GPU, as cuBLAS reads its environment variable once; that one stays set.
    MachineError where it is too late.
    """
    if not wanted:
        yield
        return
    if os.environ.get(WORKSPACE) not in CHOICES:
        if torch.cuda.is_initialized():
            what, why = (
                "it is too late to make cuBLAS deterministic",
                f"this process uses CUDA already, without {WORKSPACE}",
            )
            fix = f"start Python with {WORKSPACE}={CHOICES[0]} in its environment, or set train.deterministic=false"
            raise MachineError(what, where="train.deterministic", why=why, fix=fix)
        os.environ[WORKSPACE] = CHOICES[0]
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # it writes over every new tensor, and shows bugs alone
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        memory.fill_uninitialized_memory = fills
