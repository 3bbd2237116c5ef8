"""What training takes beside the weights, in bytes per trained parameter."""

from __future__ import annotations

from tunesmith.config.schema import Train

BLOCK = 256  # elements of an 8-bit moment that share a scale
LEAST_8BIT = 4096  # a smaller tensor keeps fp32 moments, as in bitsandbytes: it costs nothing, and norms are sensitive


def checkpoint_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Moments and fp32 master: what a checkpoint holds beside the weights.

    Args:
        train: optimizer and master_weights count.
        weight_bytes: of one trained weight as the model holds it: 4, or 2 with full fine-tuning in 16 bits.
    """
    moments = 2 * (1 + 4 / BLOCK) if train.optimizer == "adamw-8bit" else 8.0
    return moments + (4.0 if weight_bytes == 2 and train.master_weights == "fp32" else 0.0)


def state_bytes_per_parameter(train: Train, weight_bytes: int) -> float:
    """Gradient, moments and fp32 master: all that a trained parameter takes on the device beside its weight.

    With `optimizer_in_backward` no gradient is counted: there is one tensor's at a time. Tensors below 4,096 elements,
    whose moments stay fp32, are counted like the others. Arguments as above.
    """
    gradient = 2.0 if weight_bytes == 2 and train.master_weights == "stochastic" else 4.0
    return checkpoint_bytes_per_parameter(train, weight_bytes) + (0.0 if train.optimizer_in_backward else gradient)
