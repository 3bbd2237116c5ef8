"""Wrappers of private functions of torch. No other module uses private names of torch.

If a new release of torch renames or removes a private function, only this module must be adapted.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

# The only fp8 matmul that torch 2.11 to 2.13 offer on both GPU and CPU. On a CPU, torch 2.11
# supports only one scale per tensor.
scaled_mm = torch._scaled_mm

# Function that sets the options of PYTORCH_ALLOC_CONF in a running process. torch 2.11 deprecates
# the older name.
_newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
set_allocator = _newer or torch.cuda.memory._set_allocator_settings


def collective(name: str, x: Tensor, *arguments: object) -> Tensor:
    """Run a collective and return its result as a new plain tensor.

    torch.compile can trace the call without a graph break. The torch operators are called directly,
    because torch renamed their public wrappers between 2.11 and 2.13.

    Args:
        name: `all_reduce`, `all_gather_into_tensor` or `reduce_scatter_tensor`. The last two work
            on dimension 0.
        arguments: for `all_reduce`: op, group. For `all_gather_into_tensor`: size, group. For
            `reduce_scatter_tensor`: op, size, group. `group` is the name of a process group.
    """
    operators = torch.ops._c10d_functional
    operator = getattr(operators, name)
    if torch.compiler.is_compiling():
        # The operator returns before the collective is complete, so wait for the result with
        # `wait_tensor`.
        return operators.wait_tensor(operator(x.contiguous(), *arguments))
    _entered.append(name)
    try:
        return operators.wait_tensor(operator(x.contiguous(), *arguments))
    finally:
        _entered.pop()


_entered: list[str] = []


class SavingContext(FunctionCtx):
    """Type of the `ctx` argument of an autograd function, with annotations that torch's class
    lacks.
    """

    saved_tensors: tuple[Any, ...]  # has None for each value that was saved as None
    needs_input_grad: tuple[bool, ...]


def current_collective() -> str:
    """Return the name of the collective that this process is executing, or "".

    Only calls of `collective` are known. The name is used to diagnose a run that hangs.
    """
    return _entered[-1] if _entered else ""


def find_nccl_error() -> str:
    """Return NCCL's error if a collective in any process group has failed, or "".

    NCCL does not raise this error. The GPU waits for the failed collective instead.
    """
    from torch.distributed import distributed_c10d

    # Copy the groups into a list, because other threads may create groups during the iteration.
    groups = [*distributed_c10d._world.pg_map]
    backends = [group._get_backend(device) for group in groups for device in group._device_types]
    errors = {backend.get_error().name for backend in backends if backend.name() == "nccl"}
    return ", ".join(f"NCCL: {error}" for error in sorted(errors - {"SUCCESS"}))


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edges: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator for causal attention that torch's public `varlen_attn` calls.

    The public function cannot be used, because its backward always uses the unmodified output and
    log-sum-exp of its forward. Attention with a sink needs modified values of both.

    Returns:
        The output, the log-sum-exp [heads, n] in fp32, and the random state.
    """
    left = -1 if window is None else window - 1
    return torch.ops.torch_attn._varlen_attn(
        q,
        k,
        v,
        edges,
        edges,
        longest,
        longest,
        is_causal=window is None,
        scale=scale,
        window_size=[left, 0],
        enable_gqa=q.shape[1] != k.shape[1],
    )


def varlen_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    edges: Tensor,
    random_state: Tensor,
    *,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v for `varlen_forward`.

    `out` and `lse` may be modified versions of the values that `varlen_forward` returned.
    """
    left = -1 if window is None else window - 1
    return torch.ops.torch_attn._varlen_attn_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        edges,
        edges,
        longest,
        longest,
        window is None,
        random_state,
        scale=scale,
        window_size=[left, 0],
    )


def mark_varying(tensor: Tensor, dim: int) -> None:
    """Mark a dimension whose size changes between calls, so that torch.compile makes it dynamic.

    Otherwise torch.compile builds another graph for each size.
    """
    # Import inside the function: the import is slow, and only compiled runs need it.
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, dim)


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return the slice of each dimension of a DTensor's global shape that this rank holds.

    For a plain tensor the slices cover the entire tensor.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def let_codes_be_sharded() -> None:
    """Patch FSDP of torch 2.11 so that it can shard frozen integer parameters.

    torch 2.11 creates each shard as a parameter with requires_grad=True, which fails for integers
    (pytorch#177844).
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(x: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(x, requires_grad and x.is_floating_point())

    if torch.__version__ < "2.12":
        vars(_fsdp_param)["nn"] = SimpleNamespace(Module=nn.Module, Parameter=parameter)


def restart_compiler() -> None:
    """Reset torch.compile: clear its caches, including failed builds, and end its worker processes.

    New workers are needed because a worker keeps the environment variables of its start.
    """
    from torch._inductor.async_compile import CompiledTritonKernels, shutdown_compile_workers

    torch.compiler.reset()
    shutdown_compile_workers()
    CompiledTritonKernels.cache_clear()


def set_elastic_agent(agent: type) -> None:
    """Replace the agent class with which torch's elastic launcher starts the ranks of this node.

    Args:
        agent: a subclass of torch's LocalElasticAgent.
    """
    from torch.distributed.launcher import api

    vars(api)["LocalElasticAgent"] = agent
