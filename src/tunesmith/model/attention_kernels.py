"""Which of torch's kernels computes attention over packed documents on CUDA: the first that is
right, by trying.

From 2.15 on torch takes cuDNN where it can: Hopper and data-center Blackwell, heads of at most 128,
causal. Elsewhere it is FlashAttention: the fourth or third version where a package of it is
installed, else torch's own second.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Torch's names of what may be installed.
FLASH_ATTENTION_NAMES = {"FA4": "FlashAttention 4", "FA3": "FlashAttention 3"}
TORCH_KERNEL = "torch's own FlashAttention 2"


def choose_kernel(find_fault: Callable[[], str]) -> tuple[str, list[str]]:
    """Let torch take the first kernel without a fault; the choice holds for this process.

    `find_fault` tries whatever torch takes, and returns what is wrong with it, or "".

    Returns:
        The kernel's name, or "" if there is none, and the faults of the kernels before it.
    """
    faults: list[str] = []
    with sdpa_kernel(SDPBackend.MATH):  # which is none of them
        refusal = find_fault()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        fault = find_fault()
    # Before 2.15 torch had one kernel here, whatever the choice.
    # The same answer in both: the choice had no effect, so cuDNN is not what ran.
    if fault != refusal:
        if not fault:
            return "cuDNN", faults
        faults.append(f"cuDNN: {fault}")
        # Torch might take it for other shapes than those that were tried.
        torch.backends.cuda.enable_cudnn_sdp(False)
    for version, name in FLASH_ATTENTION_NAMES.items():
        if not _activate(version):
            continue
        fault = find_fault()
        if not fault:
            return name, faults
        faults.append(f"{name}: {fault}")
        # Back to torch's own before the next version is activated.
        nn.attention.restore_flash_attention_impl()
    fault = find_fault()
    if not fault:
        return TORCH_KERNEL, faults
    return "", [*faults, f"{TORCH_KERNEL}: {fault}"]


def _activate(version: str) -> bool:
    """Let torch take a version of FlashAttention; False where there is none."""
    try:
        nn.attention.activate_flash_attention_impl(version)
    except (ImportError, ValueError):
        return False
    return True
