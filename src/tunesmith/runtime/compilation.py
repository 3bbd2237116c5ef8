"""torch.compile where it pays.

Every decoder layer is compiled by itself: the layers are alike, so one graph serves all, and the
first step takes seconds instead of the minutes of a whole model. Shapes that would make another
graph are fixed or marked as dynamic: the longest document is one number for the whole run, the
number of documents is dynamic, and so is the number of tokens where steps differ in it
(`global_batch` in examples). On a CPU it gained nothing (SmolLM2-135M, 2 cores).
"""

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from glob import glob
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.distributed.torch_private import mark_varying, restart_compiler
from tunesmith.errors import MachineError, first_line
from tunesmith.host.files import cache_folder
from tunesmith.host.packages import source_digest
from tunesmith.host.shell import shell_path
from tunesmith.loss import LossAndGradFn
from tunesmith.model.documents import Documents, current_documents
from tunesmith.model.fused import add_mixin

CACHE = "TORCHINDUCTOR_CACHE_DIR"
# What Triton reads for its assembler; from 3.6 on the second for Blackwell (sm_100 and later), and
# the first for others.
ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
# A program that exits with 0 where the compiler runs on the device that its argument names.
ATTEMPT = """import sys, torch; from tunesmith.runtime.compilation import compiler_fault
sys.exit(compiler_fault(torch.device(sys.argv[1])) or 0)"""


def select_compile(choice: str, device: torch.device) -> tuple[bool, str]:
    """Choose whether `train.compile` (auto, on or off) compiles layers on `device`, and say why."""
    if choice == "off":
        return False, "as train.compile says"
    if device.type != "cuda":
        if choice == "on":
            return True, "as train.compile says"
        return False, "it does not help on a CPU"
    fault, assembler = probe_compiler(device)
    if choice == "on":
        return True, f"as train.compile says{assembler}"
    return not fault, fault or f"the compiler runs on this GPU{assembler}"


@cache
def probe_compiler(device: torch.device) -> tuple[str, str]:
    """Why the compiler does not run on a device, or ""; and which assembler stands for Triton's."""
    fault = compiler_fault(device)
    if "ptxas" not in fault.lower():
        return fault, ""
    paths = assemblers()
    path = next((path for path in paths if runs_with(path, device)), None)
    if path is None:
        others = f"so do {', '.join(paths)}" if paths else "no other CUDA toolkit was found"
        return f"{fault}; {others}; install a newer CUDA toolkit, or set {ASSEMBLERS[0]}", ""
    # Both names: which of them Triton reads depends on its version and the chip.
    os.environ |= dict.fromkeys(ASSEMBLERS, path)
    restart_compiler()
    fault = compiler_fault(device)
    if fault:
        settings = " ".join(f"{name}={path}" for name in ASSEMBLERS)
        return f"{fault}; in a new process it works: start again with {settings}", ""
    return "", f", with {path} instead of Triton's assembler, which does not support it"


def compiler_fault(device: torch.device) -> str:
    """Why the compiler does not run on a device, or "", by trying a small function.

    New chips come before the assembler that Triton ships knows them, and a C compiler is not on
    every machine.
    """
    use_persistent_cache()
    x = torch.linspace(-1, 1, 64, device=device)
    try:
        is_right = torch.allclose(torch.compile(F.silu)(x), F.silu(x))
    except Exception as error:  # whatever a compiler may raise, training goes on without it
        # Below Triton's first line, which names no reason.
        match = re.search(r"ptxas (?:fatal|error).*", str(error))
        reason = match[0] if match else first_line(error)
        return f"the compiler does not run here: {reason}"
    return "" if is_right else "the compiler gives wrong results here"


def runs_with(assembler: str, device: torch.device) -> bool:
    """Check whether the compiler runs with that ptxas, in a process of its own.

    A failed compile leaves worker processes behind that keep their environment.
    """
    command = [sys.executable, "-c", ATTEMPT, str(device)]
    env = os.environ | dict.fromkeys(ASSEMBLERS, assembler)
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        process = subprocess.run(command, env=env, capture_output=True, timeout=300, check=False)
        return process.returncode == 0
    return False


def assemblers() -> list[str]:
    """Every ptxas here, each once.

    As the user set it, on PATH, of CUDA_HOME, below /usr/local (newest first), in NVIDIA's wheels.
    """
    toolkits = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    toolkits += sorted(glob("/usr/local/cuda*"), reverse=True)
    toolkits += sorted(glob(f"{Path(torch.__file__).parents[1]}/nvidia/*"), reverse=True)
    paths = [os.environ.get(name) for name in ASSEMBLERS]
    paths.append(shutil.which("ptxas"))
    paths += [f"{toolkit}/bin/ptxas" for toolkit in toolkits]
    files = [os.path.realpath(path) for path in paths if path and os.access(path, os.X_OK)]
    return list(dict.fromkeys(files))


def use_persistent_cache() -> str:
    """Keep compiled code in our cache folder, unless TORCHINDUCTOR_CACHE_DIR is set.

    /tmp, torch's default, is often emptied, and so it remains only where our folder cannot be
    written. Launched ranks keep it in the same place as a single process. Nodes that share a home
    have a folder each: they may have other chips. In a job of Slurm it is on the node's own disk:
    locks of files are slow on a shared one.

    Code that another version of this package has compiled is not taken.

    Returns:
        The folder.
    """
    # The cache goes by a graph's forward: it would run the backward of before a change.
    of_user = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = of_user + source_digest()
    # Some imports of torch set the variable to torch's own default.
    torch_default = str(Path(tempfile.gettempdir()) / "torchinductor_")
    # Unset, or torch's default: anything else is the user's choice.
    if os.environ.get(CACHE, torch_default).startswith(torch_default):
        place = cache_folder(f"compiled-{os.getuid()}")
        if "SLURM_JOB_ID" in os.environ:
            place = Path(tempfile.gettempdir(), f"tunesmith-compiled-{os.getuid()}")
        with contextlib.suppress(OSError):  # a home that is read only
            folder = private_folder(place)
            os.environ[CACHE] = str(folder / socket.gethostname())
    return os.environ.get(CACHE, "")


def private_folder(folder: Path) -> Path:
    """The folder, created if needed; MachineError where another user owns it or can write to it.

    What is there is run.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    is_open_to_others = stat.S_IMODE(status.st_mode) & 0o077
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or is_open_to_others:
        raise MachineError(
            "other users can write to this folder",
            where=str(folder),
            why="compiled code in it is executed",
            fix=f"rm -r {shell_path(folder)}, or export TORCHINDUCTOR_CACHE_DIR=/a/folder/of/yours",
        )
    return folder


def compile_layers(
    layers: Sequence[nn.Module], *, varied: bool, backend: str | Callable[..., object] = "inductor"
) -> int:
    """Compile each decoder layer in place, at its first forward in training; returns how many.

    Args:
        varied: the number of tokens differs from micro batch to micro batch.
        backend: torch.compile's.
    """
    use_persistent_cache()
    shared = torch.compile(_forward, backend=backend)
    for layer in layers:
        compiled_layer = add_mixin(layer, CompiledLayer)
        compiled_layer.compiled = shared
        compiled_layer.varied = varied
    return len(layers)


class CompiledLayer(nn.Module):
    """A layer whose forward is compiled while it trains.

    Generation and validation have other shapes in every batch and no backward to fuse: they run
    uncompiled.
    """

    compiled: Callable[..., object]
    varied: bool

    def forward(self, *args: object, **kwargs: object) -> object:
        documents = kwargs.get("documents") or current_documents()
        if not self.training or not isinstance(documents, Documents):
            return super().forward(*args, **kwargs)
        hidden, *rest = args
        assert isinstance(hidden, Tensor)
        if not hidden.requires_grad:
            # The first layer over frozen embeddings: a gradient that nobody reads costs a
            # thousandth of the step, and a graph of its own for one layer would double what there
            # is to compile.
            args = (hidden.detach().requires_grad_(), *rest)
        mark_varying(documents.cu_seqlens, 0)
        for tensor in documents.repeated or ():
            mark_varying(tensor, 0)
        if documents.chunks is not None:
            mark_varying(documents.chunks.cu_seqlens, 0)
        if self.varied:
            for of_documents in (documents, documents.chunks):
                if of_documents is not None and of_documents.spans is not None:
                    mark_varying(of_documents.spans, 1)
            # [1, tokens, ...]: the second dimension of whatever has one entry a token.
            length = hidden.shape[1]
            for tensor in _tensors((args, kwargs)):
                if tensor.dim() > 1 and tensor.shape[1] == length:
                    mark_varying(tensor, 1)
        return self.compiled(self, args, kwargs)


def _forward(layer: CompiledLayer, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    # The class behind the mixin, whose forward is compiled; the mixin itself stays out of the
    # graph.
    return super(CompiledLayer, layer).forward(*args, **kwargs)


def compile_apart(
    name: str, backend: str | Callable[..., object] = "inductor"
) -> Callable[..., object]:
    """The compiled forward of layers with graphs of its own, for `CompiledLayer.compiled`.

    One for each shape of an adapter. The compiler keeps graphs by the code of a function and its
    name. In a shared place the second shape would make it dynamic, and so give other kernels, and
    other bits, than a run of that shape alone.
    """
    code = _forward.__code__.replace(co_name=name)
    return torch.compile(FunctionType(code, _forward.__globals__), backend=backend)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def compile_loss(loss_and_grad_fn: LossAndGradFn) -> LossAndGradFn:
    """The loss of a chunk of logits as one or two kernels.

    Chunks differ in their number of positions.
    """
    compiled: LossAndGradFn = torch.compile(loss_and_grad_fn)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        for tensor in _tensors(args):
            mark_varying(tensor, 0)
        return compiled(*args)

    return run
