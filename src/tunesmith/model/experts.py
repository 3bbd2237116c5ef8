"""All experts of a layer, as this package has them: a mixin of Transformers' own classes."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.formats.base import FrozenStack
from tunesmith.formats.dense import dense_stack
from tunesmith.formats.stack import ExpertStack
from tunesmith.model.fused import add_mixin


@runtime_checkable
class HasExperts(Protocol):
    """A module that says how many experts it holds, or chooses among."""

    num_experts: int


@runtime_checkable
class CalledByInterface(Protocol):
    """A module that Transformers calls through its experts interface, which marks it so."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool


LORA_SUFFIX = "_lora"  # ends the name of the module beside a stack that has its A and B


class StackUpdate(nn.Module):
    """The update of one stack by an adapter; a child of the experts' module."""

    @abstractmethod
    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A [experts, rank, in] and B [experts, rank, out] times the scaling, or None twice."""


class Experts(nn.Module):
    """All experts of a layer: a mixin of the class that Transformers calls by its interface.

    Attributes:
        num_experts ... is_concatenated: as Transformers sets them.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool = False  # no flag of Transformers 5.17
    is_transposed: bool
    is_concatenated: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module
    _apply_gate: Callable[[Tensor], Tensor]

    @property
    def stack_names(self) -> tuple[str, str]:
        """Names of the two stacks: of the input, and of the output."""
        return _stack_names(self.has_gate)

    def stacks_in_order(self) -> list[str]:
        """`stack_names` in the order in which the module has them."""
        return sorted(self.stack_names, key=_held_names(self).index)

    def codes(self, name: str) -> ExpertStack | None:
        """The stack of this name where it is stored in codes; None: it is a parameter."""
        codes = self._modules.get(name)
        return codes if isinstance(codes, ExpertStack) else None

    def update(self, name: str) -> StackUpdate | None:
        """The adapter's update of the stack of this name, if it has one."""
        update = self._modules.get(name + LORA_SUFFIX)
        return update if isinstance(update, StackUpdate) else None

    def stack(self, name: str) -> FrozenStack:
        """This rank's part of the stack of this name, as the products take it."""
        codes = self.codes(name)
        if codes is not None:
            return codes.frozen_stack()
        weight = local_part(self.get_parameter(name))
        return dense_stack(weight, is_transposed=bool(self.is_transposed))

    def bias(self, name: str) -> Tensor:
        """This rank's part of the biases of a stack: [experts, out]."""
        return local_part(self.get_parameter(f"{name}_bias"))

    def store(self, name: str, stack: ExpertStack) -> None:
        """Have a stack in codes in place of the parameter of this name."""
        delattr(self, name)
        self.add_module(name, stack)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The function between the two stacks."""
        return self._apply_gate if self.has_gate else self.act_fn

    def trains_in_full(self) -> bool:
        """Tell whether a stack gets gradients."""
        dense = [name for name in self.stack_names if self.codes(name) is None]
        return any(self.get_parameter(name).requires_grad for name in dense)


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """The experts of each layer that Transformers calls by its interface, by full name.

    They become `Experts` when they are found first.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found[name] = module
        elif _has_stacks(module):
            found[name] = add_mixin(module, Experts)
    return found


def _has_stacks(module: nn.Module) -> bool:
    if not isinstance(module, CalledByInterface) or not isinstance(module, HasExperts):
        return False
    return set(_stack_names(module.has_gate)) <= set(_held_names(module))


def _stack_names(has_gate: bool) -> tuple[str, str]:
    return "gate_up_proj" if has_gate else "up_proj", "down_proj"


def _held_names(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, and of the modules right below it."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return names + [name for name, _ in module.named_children()]
