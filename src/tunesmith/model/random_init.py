"""Random weights in place of a checkpoint's, drawn on the device: for measuring speed, which
depends on shapes alone.

Matrices are normal, norms' weights one and biases zero, as in `PreTrainedModel._init_weights` for
Llama, Qwen 3 and Mistral. Each tensor has a generator seeded by (seed, its name): it depends on no
other tensor.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tunesmith.formats.linear import FrozenTensors
from tunesmith.model.weights import Hook

STD = 0.02  # initializer_range of every model in `shapes.py`


def seed_of(seed: int, name: str) -> int:
    """A seed for one tensor, fixed by the run's seed and the tensor's full name."""
    # 56 bits: `manual_seed` takes 64, with a sign.
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


@torch.no_grad()
def init_weight(target: Tensor, name: str, seed: int) -> None:
    """Draw the values of the parameter `name` into `target`: on one device the same each time."""
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
    """Initialise a materialized model as `load_weights` loads one, from tensors that are drawn one
    at a time.

    `checkpoint` has what a checkpoint would hold: name -> a tensor (on meta) of that shape and
    dtype; an adapter's parameters are left as they are. `convert` is that of `load_weights`. They
    are drawn on `device`; None: where each parameter is.
    """
    targets = dict(model.named_parameters(remove_duplicate=False))
    for name, like in checkpoint.items():
        hook = convert.get(name)
        if hook is not None:
            holder = model.get_submodule(name.removesuffix(".weight"))
            if isinstance(holder, FrozenTensors) and not holder.format.rounds:
                # Its codes are drawn: no dense weight is needed.
                hook({"": like})
                continue
        target = targets.get(name)
        if target is None:  # a module in codes stands in its place
            target = next(model.get_submodule(name).parameters())
        place = device or target.device
        if hook is None and place == target.device:
            init_weight(target, name, seed)
            continue
        dense = torch.empty(like.shape, dtype=like.dtype, device=place)
        init_weight(dense, name, seed)
        # Rounded by the hook as a stored weight would be.
        if hook is not None:
            hook({"": dense})
        else:
            target.copy_(dense)
