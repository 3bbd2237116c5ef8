"""AdamW, the learning-rate schedule, clipping, and how 16-bit weights are updated.

The optimizer always updates an fp32 tensor, or a bf16 one with stochastic rounding:

- a trained fp32 parameter (every LoRA matrix is one) is updated in place;
- a trained 16-bit parameter has an fp32 master copy. A hook moves each gradient into the master's fp32 gradient as
  soon as autograd has made it, so micro batches accumulate in fp32 and the 16-bit gradient is freed at once;
- with `master_weights: stochastic` there is no copy: the update is computed in fp32 and rounded up or down at random,
  with probability by the distance, so that small updates are kept on average (Zamirai et al. 2020, arXiv:2010.06192).

`adamw-8bit` stores both moments in 8 bits with one scale a block of 256 (Dettmers et al. 2022, arXiv:2110.02861).
`optimizer_in_backward` updates each parameter as soon as its gradient is complete, so the gradients of the whole model
never exist together (Lv et al. 2023, arXiv:2306.09782). Weight decay is decoupled (Loshchilov and Hutter,
arXiv:1711.05101).
"""

from tunesmith.optim.adamw import checkpoint_bytes_per_parameter, state_bytes_per_parameter
from tunesmith.optim.lr_schedule import learning_rate, warmup_steps
from tunesmith.optim.optimizer import Optimizer

__all__ = [
    "Optimizer",
    "checkpoint_bytes_per_parameter",
    "learning_rate",
    "state_bytes_per_parameter",
    "warmup_steps",
]
