"""Random weights instead of a checkpoint, for speed measurements, which depend only on shapes.

Matrices are normally distributed, weights of norms are one, and biases are zero. This is the same
as in `PreTrainedModel._init_weights` for Llama, Qwen 3 and Mistral. Each tensor has its own
generator, seeded by (seed, name), so that its values do not depend on other tensors.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tunesmith.formats.linear import FrozenTensors
from tunesmith.model.weights.weights import Hook

STD = 0.02  # `initializer_range` of all models in `shapes.py`


def seed_of(seed: int, name: str) -> int:
    """Return the seed of one tensor, derived from the run's seed and the tensor's full name."""
    # Use 56 bits, because `manual_seed` accepts signed 64-bit numbers.
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


@torch.no_grad()
def init_weight(target: Tensor, name: str, seed: int) -> None:
    """Fill the parameter `name` with random values.

    Equal seeds give equal values on the same device.
    """
    if target.ndim < 2:
        target.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        generator = torch.Generator(target.device).manual_seed(seed_of(seed, name))
        target.normal_(0.0, STD, generator=generator)


def init_random_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Tensor],
    *,
    seed: int,
    convert: Mapping[str, Hook],
    device: torch.device | None,
) -> None:
    """Fill a materialized model as `load_weights` does, but with random tensors, one at a time.

    Args:
        checkpoint: for each tensor of a checkpoint, its name and a meta tensor of its shape and
            dtype. The adapter's parameters are not in it and are not changed.
        convert: the hooks, as in `load_weights`.
        device: the device on which the values are drawn. None: the device of each parameter.
    """
    targets = dict(model.named_parameters(remove_duplicate=False))
    for name, like in checkpoint.items():
        hook = convert.get(name)
        if hook is not None:
            holder = model.get_submodule(name.removesuffix(".weight"))
            if isinstance(holder, FrozenTensors) and not holder.format.rounds:
                # The hook draws random codes directly, so no dense weight is needed.
                hook({"": like})
                continue
        target = targets.get(name)
        if target is None:  # a quantized module replaces the parameter
            target = next(model.get_submodule(name).parameters())
        place = device or target.device
        if hook is None and place == target.device:
            init_weight(target, name, seed)
            continue
        dense = torch.empty(like.shape, dtype=like.dtype, device=place)
        init_weight(dense, name, seed)
        # The hook quantizes the values like a stored weight.
        if hook is not None:
            hook({"": dense})
        else:
            target.copy_(dense)
