"""torch.compile where it pays.

Every decoder layer is compiled by itself: the layers are alike, so one graph serves all, and the first step takes seconds
instead of the minutes of a whole model. Shapes that would make another graph are held fixed or marked as dynamic: the
longest document is one number for the whole run, the number of documents is dynamic, and so is the number of tokens
where steps differ in it (`global_batch` in examples). On a CPU it gained nothing (SmolLM2-135M, 2 cores).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import first_line
from tunesmith.host_files import cache_folder
from tunesmith.loss import Score
from tunesmith.model.documents import Documents
from tunesmith.model.fused import add_mixin
from tunesmith.private import mark_varying

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def select_compile(choice: str, device: torch.device) -> tuple[bool, str]:
    """Whether `train.compile` (auto, on or off) compiles layers on `device`, and why."""
    if choice != "auto":
        return choice == "on", "as train.compile says"
    if device.type != "cuda":
        return False, "on a CPU it gains nothing"
    fault = compiler_fault(device)
    return not fault, fault or "the compiler runs on this GPU"


@cache
def compiler_fault(device: torch.device) -> str:
    """Why the compiler does not run on a device, or "": found by trying a small function.

    New chips come before the assembler that Triton ships knows them, and a C compiler is not on every machine.
    """
    use_persistent_cache()
    x = torch.linspace(-1, 1, 64, device=device)
    try:
        right = torch.allclose(torch.compile(F.silu)(x), F.silu(x))
    except Exception as error:  # whatever a compiler may raise, training goes on without it
        return f"the compiler does not run here: {first_line(error)}"
    return "" if right else "the compiler runs here and gives wrong results"


def use_persistent_cache() -> str:
    """Keep compiled code in our cache folder, unless TORCHINDUCTOR_CACHE_DIR is set; /tmp, torch's default, is often
    emptied. Returns the folder."""
    return os.environ.setdefault(CACHE, str(cache_folder("compiled")))


def compile_layers(layers: Sequence[nn.Module], *, varied: bool, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile each decoder layer in place, at its first forward in training; returns how many.

    `varied`: the number of tokens differs from micro batch to micro batch. `backend`: torch.compile's.
    """
    use_persistent_cache()
    shared = torch.compile(_forward, backend=backend)
    for layer in layers:
        compiled_layer: Any = layer
        add_mixin(compiled_layer, CompiledLayer)
        compiled_layer.compiled, compiled_layer.varied = shared, varied
    return len(layers)


class CompiledLayer(nn.Module):
    """A layer whose forward is compiled while it trains. Generation and validation have other shapes in every batch
    and no backward to fuse: they run uncompiled."""

    compiled: Callable[..., Any]
    varied: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        documents: Documents | None = kwargs.get("documents")
        if not self.training or documents is None:
            return super().forward(*args, **kwargs)
        hidden, *rest = args
        if not hidden.requires_grad:
            # The first layer over frozen embeddings: a gradient that nobody reads costs a thousandth of the step, and a
            # graph of its own for one layer would double what there is to compile.
            args = (hidden.detach().requires_grad_(), *rest)
        mark_varying(documents.cu_seqlens, 0)
        if self.varied:
            n = args[0].shape[1]
            for tensor in _tensors((args, kwargs)):
                if tensor.dim() > 1 and tensor.shape[1] == n:
                    mark_varying(tensor, 1)
        return self.compiled(self, args, kwargs)


def _forward(layer: CompiledLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return super(CompiledLayer, layer).forward(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def compile_score(score: Score) -> Score:
    """The loss of a chunk of logits as one or two kernels; chunks differ in their number of positions."""
    compiled: Score = torch.compile(score)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        for tensor in _tensors(args):
            mark_varying(tensor, 0)
        return compiled(*args)

    return run
