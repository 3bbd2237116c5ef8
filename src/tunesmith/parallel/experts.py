"""Experts over ranks: each rank of an expert group keeps some experts of every layer, with their
adapter and its moments; see `quant/expert_ranks.py` for how they compute.

The gradients of a rank's experts are those of all tokens of its group: they are summed over the
copies of the group alone. Stacks and factors are DTensors on the mesh of the group, so that
loading, clipping and checkpoints know their whole shapes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tunesmith.adapter.expert_lora import ExpertsLora
from tunesmith.errors import RecipeError
from tunesmith.methods.base import TrainModel
from tunesmith.parallel.mesh import Mesh, check_experts
from tunesmith.quant.expert_ranks import ExpertRanks
from tunesmith.quant.experts import RANKS, expert_modules, stack_names, use_grouped_experts

KEY = "parallel.experts"


def divide_experts(root: TrainModel, mesh: Mesh) -> frozenset[str]:
    """Leave this rank its experts of each layer, in place; a model with its adapter, on meta.

    Returns:
        The names, in the causal LM, of the trained parameters that a rank has for its own experts.

    Raises:
        RecipeError: for experts that this does not divide.
    """
    if mesh.expert_mesh is None:
        return frozenset()
    modules = expert_modules(root.model)
    _check_modules(modules, mesh.shape.experts)
    use_grouped_experts(root.model)
    ranks = ExpertRanks(mesh.expert_mesh.get_group())
    trained = set()
    for name, module in modules.items():
        setattr(module, RANKS, ranks)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape[0] == module.num_experts:
                _shard(module, key, 0, mesh)
        for child, update in module.named_children():
            if isinstance(update, ExpertsLora):
                _shard(update, "lora_A", 0, mesh)
                _shard(update, "lora_B", 2, mesh)
                trained |= {f"{name}.{child}.lora_A", f"{name}.{child}.lora_B"}
    root.expert_ranks = ranks
    return frozenset(trained)


def divided_parameters(root: TrainModel) -> set[nn.Parameter]:
    """What `divide_experts` has left of all experts, trained or not; FSDP2 leaves it alone."""
    if root.expert_ranks is None:
        return set()
    parameters: set[nn.Parameter] = set()
    for module in expert_modules(root.model).values():
        parameters |= {p for p in module.parameters() if isinstance(p, DTensor)}
    return parameters


def _check_modules(modules: Mapping[str, Any], size: int) -> None:
    """RecipeError for what the modules themselves show, after the checks by the spec."""
    if not modules:
        raise RecipeError(
            "the experts of this model cannot be divided over ranks",
            where=KEY,
            why="Transformers does not call them by its experts interface",
            fix=f"{KEY}=1",
        )
    for name, module in modules.items():
        check_experts(module.num_experts, size)
        for stack in stack_names(module):
            weight = getattr(module, stack)
            is_dense = isinstance(weight, Tensor) and weight.is_floating_point()
            if not is_dense or weight.requires_grad:
                raise RecipeError(
                    f"{name}.{stack} cannot be divided over ranks",
                    where=KEY,
                    why="only frozen unquantized weights can",
                    fix=f"{KEY}=1",
                )


def _shard(module: nn.Module, name: str, dim: int, mesh: Mesh) -> None:
    """Leave this rank its part of a parameter along `dim`."""
    assert mesh.expert_mesh is not None
    whole = module.get_parameter(name)
    part = whole.detach().chunk(mesh.shape.experts, dim)[mesh.expert_mesh.get_local_rank()]
    # A copy, so that the memory of the other parts is freed.
    part = part.clone(memory_format=torch.contiguous_format)
    tensor = DTensor.from_local(part, mesh.expert_mesh, [Shard(dim)], run_check=False)
    setattr(module, name, nn.Parameter(tensor, requires_grad=whole.requires_grad))
