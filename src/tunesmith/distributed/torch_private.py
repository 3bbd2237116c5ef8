"""The private names of torch that the engine needs, here and nowhere else.

A new release of torch may move them.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

# The only fp8 matmul that torch 2.11 to 2.13 share on GPU and CPU. On a CPU, 2.11 scales
# tensor-wise only.
scaled_mm = torch._scaled_mm

# Sets the options of PYTORCH_ALLOC_CONF in a process that has begun. torch 2.11 deprecates the
# older name.
_newer = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
set_allocator = _newer or torch.cuda.memory._set_allocator_settings


def collective(name: str, x: Tensor, *arguments: object) -> Tensor:
    """The result of a collective as a new plain tensor, which torch.compile keeps in one graph.

    torch's functions around these operators were renamed between 2.11 and 2.13.

    Args:
        name: `all_reduce` (op, group), `all_gather_into_tensor` (size, group) or
            `reduce_scatter_tensor` (op, size, group), by rows.
        arguments: as in the parentheses; group: a process group's name.
    """
    operators = torch.ops._c10d_functional
    operator = getattr(operators, name)
    if torch.compiler.is_compiling():
        # These operators return at once; the result may be read after `wait_tensor`.
        return operators.wait_tensor(operator(x.contiguous(), *arguments))
    _entered.append(name)
    try:
        return operators.wait_tensor(operator(x.contiguous(), *arguments))
    finally:
        _entered.pop()


_entered: list[str] = []


class SavingContext(FunctionCtx):
    """The context of an autograd function, with what torch's annotations of it leave out."""

    saved_tensors: tuple[Any, ...]  # None of what was saved as None
    needs_input_grad: tuple[bool, ...]


def current_collective() -> str:
    """The collective that this process is in by `collective`; else empty.

    For the diagnosis of a run that hangs.
    """
    return _entered[-1] if _entered else ""


def find_nccl_error() -> str:
    """NCCL's error of a collective of any group; else empty.

    The GPU waits for such a collective, and nothing raises the error.
    """
    from torch.distributed import distributed_c10d

    # A list of its own, as other threads may make groups meanwhile.
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
    """Run the operator behind `varlen_attn`, causal: output, lse [heads, n] in fp32, random state.

    The public function's backward takes its own output and lse; attention with a sink needs others.
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
    """Gradients of q, k and v for `varlen_forward`, with any output and lse in place of its own."""
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
    """Tell torch.compile that a dimension differs from call to call.

    Otherwise each size of it makes a graph of its own.
    """
    # A slow import, for runs that compile only.
    from torch._dynamo import maybe_mark_dynamic

    maybe_mark_dynamic(tensor, dim)


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of a DTensor's global shape this rank holds, dimension by dimension.

    Of a plain tensor all of it.
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
    """Let FSDP of torch 2.11 shard frozen integers.

    It first makes each shard a parameter with gradients (pytorch#177844).
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(x: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(x, requires_grad and x.is_floating_point())

    if torch.__version__ < "2.12":
        vars(_fsdp_param)["nn"] = SimpleNamespace(Module=nn.Module, Parameter=parameter)


def restart_compiler() -> None:
    """Forget what torch.compile has built or failed to build, and end its workers.

    Workers keep the environment that they began with.
    """
    from torch._inductor.async_compile import CompiledTritonKernels, shutdown_compile_workers

    torch.compiler.reset()
    shutdown_compile_workers()
    CompiledTritonKernels.cache_clear()


def set_elastic_agent(agent: type) -> None:
    """Let torch's elastic launcher start the ranks of this node by `agent`.

    agent: a subclass of its LocalElasticAgent.
    """
    from torch.distributed.launcher import api

    vars(api)["LocalElasticAgent"] = agent
