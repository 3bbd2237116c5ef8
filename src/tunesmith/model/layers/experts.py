"""Access to all experts of a layer, as a mixin that is added to Transformers' own classes."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.formats.base import FrozenStack
from tunesmith.formats.dense import dense_stack
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.layers.fused import add_mixin


@runtime_checkable
class CalledByInterface(Protocol):
    """A module that Transformers calls through its experts interface.

    The interface sets the flags below.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool


LORA_SUFFIX = "_lora"  # name suffix of a stack's adapter, a module with lora_A and lora_B


class Experts(nn.Module):
    """Mixin for the module with a layer's experts, called through Transformers' interface.

    Transformers sets the attributes from `num_experts` to `is_concatenated`.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool = False  # Transformers 5.17 does not set this flag
    is_transposed: bool
    is_concatenated: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module
    _apply_gate: Callable[[Tensor], Tensor]

    @property
    def stack_names(self) -> tuple[str, str]:
        """Names of the two stacks of weights: the input projection and the output projection."""
        return _stack_names(self.has_gate)

    def stacks_in_order(self) -> list[str]:
        """Return `stack_names` in the order in which the module defines them."""
        return sorted(self.stack_names, key=_held_names(self).index)

    def codes(self, name: str) -> ExpertStack | None:
        """Return the quantized stack of this name, or None if the stack is not quantized."""
        codes = self._modules.get(name)
        if isinstance(codes, ExpertStack):
            return codes
        return None

    def update(self, name: str) -> Any:
        """Return the adapter of the stack of this name (an `ExpertsLora`), or None."""
        return self._modules.get(name + LORA_SUFFIX)

    def stack(self, name: str) -> FrozenStack:
        """Return this rank's shard of the named stack, in the form that the matmuls use."""
        codes = self.codes(name)
        if codes is not None:
            return codes.frozen_stack()
        weight = local_part(self.get_parameter(name))
        return dense_stack(weight, is_transposed=bool(self.is_transposed))

    def bias(self, name: str) -> Tensor:
        """Return this rank's shard of the biases of a stack: [experts, out]."""
        return local_part(self.get_parameter(f"{name}_bias"))

    def store(self, name: str, stack: ExpertStack) -> None:
        """Replace the parameter of this name by a quantized stack."""
        delattr(self, name)
        self.add_module(name, stack)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation function between the two stacks."""
        return self._apply_gate if self.has_gate else self.act_fn

    def trains_in_full(self) -> bool:
        """Return whether at least one stack requires gradients."""
        dense = [name for name in self.stack_names if self.codes(name) is None]
        return any(self.get_parameter(name).requires_grad for name in dense)


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """Return the full names and modules of experts called through Transformers' interface.

    The first call adds the mixin `Experts` to these modules.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found[name] = module
        elif _has_stacks(module):
            found[name] = add_mixin(module, Experts)
    return found


def _has_stacks(module: nn.Module) -> bool:
    if not isinstance(module, CalledByInterface) or not hasattr(module, "num_experts"):
        return False
    return set(_stack_names(module.has_gate)) <= set(_held_names(module))


def _stack_names(has_gate: bool) -> tuple[str, str]:
    return "gate_up_proj" if has_gate else "up_proj", "down_proj"


def _held_names(module: nn.Module) -> list[str]:
    """Return the names of the module's own parameters and of its direct children."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return names + [name for name, _ in module.named_children()]
