"""Selection of torch's CUDA kernel for attention over packed documents.

The kernels are tried in order, and the first one with correct results is used. Since version 2.15,
torch prefers cuDNN if cuDNN supports the case: Hopper and data-center Blackwell GPUs, causal
attention, heads of width 128 or less. Otherwise torch uses FlashAttention: version 4 or 3 if its
package is installed, else torch's built-in version 2.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Optional FlashAttention packages: torch's name and the product name of each.
FLASH_ATTENTION_NAMES = {"FA4": "FlashAttention 4", "FA3": "FlashAttention 3"}
TORCH_KERNEL = "torch's own FlashAttention 2"


def choose_kernel(find_fault: Callable[[], str]) -> tuple[str, list[str]]:
    """Make torch use the first attention kernel that gives correct results in this process.

    Args:
        find_fault: runs the kernel that torch currently selects. It returns a description of the
            fault, or "" if the kernel is correct.

    Returns:
        The name of the kernel, or "" if there is none, and the faults of the kernels that were
        tried before.
    """
    faults: list[str] = []
    # varlen_attn does not support the MATH backend, so `refusal` is its error for an unsupported
    # backend.
    with sdpa_kernel(SDPBackend.MATH):
        refusal = find_fault()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        fault = find_fault()
    # Before torch 2.15, varlen_attn ignores the `sdpa_kernel` choice. If both trials give the same
    # result, cuDNN did not run.
    if fault != refusal:
        if not fault:
            return "cuDNN", faults
        faults.append(f"cuDNN: {fault}")
        # Disable cuDNN entirely, because torch could select it for shapes that were not tested.
        torch.backends.cuda.enable_cudnn_sdp(False)
    for version, name in FLASH_ATTENTION_NAMES.items():
        if not _activate(version):
            continue
        fault = find_fault()
        if not fault:
            return name, faults
        faults.append(f"{name}: {fault}")
        # Restore torch's built-in kernel before the next version is activated.
        nn.attention.restore_flash_attention_impl()
    fault = find_fault()
    if not fault:
        return TORCH_KERNEL, faults
    return "", [*faults, f"{TORCH_KERNEL}: {fault}"]


def _activate(version: str) -> bool:
    """Activate a version of FlashAttention in torch. Return False if it is not installed."""
    try:
        nn.attention.activate_flash_attention_impl(version)
    except (ImportError, ValueError):
        return False
    return True
