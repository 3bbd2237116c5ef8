"""AdamW, the learning rate's course, clipping, and how 16-bit weights are updated.

What is updated is always an fp32 tensor, or a bf16 one with stochastic rounding:

- a trained fp32 parameter (every LoRA matrix is one) is updated in place;
- a trained 16-bit parameter has an fp32 master copy. A hook moves each gradient into the master's fp32 gradient as
  soon as autograd has made it, so accumulation over micro batches is in fp32 and the 16-bit gradient is freed at once;
- with `master_weights: stochastic` there is no copy: the update is computed in fp32 and rounded up or down at random,
  with probability by the distance, so that small updates are kept on average (Zamirai et al. 2020, arXiv:2010.06192).

`adamw-8bit` holds both moments in 8 bits with a scale a block of 256 (Dettmers et al. 2022, arXiv:2110.02861).
`optimizer_in_backward` updates each parameter as soon as its gradient is whole, so that the gradients of the whole model
never exist together (Lv et al. 2023, arXiv:2306.09782). Decoupled weight decay is Loshchilov and Hutter,
arXiv:1711.05101.
"""

from tunesmith.optim.lr_schedule import learning_rate, warmup_steps
from tunesmith.optim.optimizer import Optimizer
from tunesmith.optim.state_size import checkpoint_bytes_per_parameter, state_bytes_per_parameter

__all__ = [
    "Optimizer",
    "checkpoint_bytes_per_parameter",
    "learning_rate",
    "state_bytes_per_parameter",
    "warmup_steps",
]
