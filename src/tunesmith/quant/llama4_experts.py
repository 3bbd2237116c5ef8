"""Llama 4's experts, computed only for the tokens that selected them.

Transformers multiplies every token by every expert, and scales a token to zero for the experts that
it has not selected. In Llama 4, the routing weight scales the input of an expert. In other models,
it scales the output.

    y = shared(x) + sum over a token's k experts of  expert(sigmoid(score) x)
"""

from typing import Any

from torch import Tensor, nn

from tunesmith.model.layers.experts import Experts
from tunesmith.quant.experts import experts_forward

# Name of the class that `Llama4Moe` replaces. The name is compared because importing the class is
# slow.
LLAMA4_MOE_CLASS = "Llama4TextMoe"


class Llama4Experts(Experts):
    """The experts of a Llama 4 layer. The parameters are the same as in Transformers'
    `Llama4TextExperts`.

    Attributes:
        gate_up_proj: [experts, hidden, 2 * width]. The columns of gate come before those of up.
        down_proj: [experts, width, hidden].
    """

    # Flags of Transformers' experts interface. Transformers sets them only for the experts of other
    # models.
    has_gate = True
    has_bias = False
    is_transposed = True
    is_concatenated = True
    # Flag that is True if Transformers distributes the experts over the ranks.
    _is_expert_parallel = False

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj
        self.act_fn = experts.act_fn

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts. The routing weights scale the inputs instead of the outputs."""
        # Create a row for each copy of a token: [n, k, hidden] -> [n * k, hidden].
        rows = (hidden.unsqueeze(1) * top_k_weights.unsqueeze(2)).flatten(0, 1)
        chosen = top_k_index.reshape(-1, 1)
        y: Tensor = experts_forward(self, rows, chosen, rows.new_ones(chosen.shape))
        return y.unflatten(0, top_k_index.shape).sum(1)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = up * self.act_fn(gate)
        return gated


class Llama4Moe(nn.Module):
    """MoE layer with a router, experts and a shared expert. It replaces a `Llama4TextMoe`.

    Its parameters have the same names as in `Llama4TextMoe`.
    """

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.top_k: int = moe.top_k
        self.hidden_dim: int = moe.hidden_dim
        self.experts = Llama4Experts(moe.experts)
        self.router = moe.router
        self.shared_expert = moe.shared_expert
        self.train(moe.training)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the layer's output.

        Args:
            hidden_states: [..., hidden].

        Returns:
            The output [n, hidden], and the router's logits [n, experts].
        """
        x = hidden_states.reshape(-1, self.hidden_dim)
        all_weights, logits = self.router(x)
        chosen = logits.topk(self.top_k, dim=1).indices
        weights = all_weights.gather(1, chosen)
        return self.shared_expert(x) + self.experts(x, chosen, weights), logits


def choose_top_k(model: nn.Module) -> None:
    """Make each MoE layer of a Llama 4 compute only the selected experts, in place."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == LLAMA4_MOE_CLASS:
            model.set_submodule(name, Llama4Moe(module))
