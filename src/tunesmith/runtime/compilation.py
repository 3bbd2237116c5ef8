"""torch.compile for the decoder layers and the loss, on devices where it saves time.

Every decoder layer is compiled separately. The layers have the same code, so all layers share one
graph, and compilation takes seconds. The compilation of an entire model would take minutes. A
changed size would cause a new graph, so sizes are fixed or marked as dynamic. The maximum length of
a document is fixed for the entire run, and the number of documents is dynamic. The number of tokens
is dynamic if it differs between steps (`global_batch` in examples). On a CPU, compilation saved no
time (SmolLM2-135M, 2 cores).
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
from tunesmith.model.layers.documents import Documents, current_documents
from tunesmith.model.layers.fused import add_mixin

CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Environment variables with the path of Triton's assembler. Triton 3.6 and later read the second
# variable for Blackwell (sm_100 and later) and the first variable for other chips.
ASSEMBLERS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
# Python program that exits with 0 if the compiler works on the device that its argument names.
ATTEMPT = """import sys, torch; from tunesmith.runtime.compilation import compiler_fault
sys.exit(compiler_fault(torch.device(sys.argv[1])) or 0)"""


def select_compile(choice: str, device: torch.device) -> tuple[bool, str]:
    """Return whether the layers are compiled on `device`, and the reason. `choice` is the value of
    `train.compile` (auto, on or off).
    """
    if choice == "off":
        return False, "as train.compile says"
    if device.type != "cuda":
        if choice == "on":
            return True, "as train.compile says"
        return False, "compilation does not help on a CPU"
    fault, assembler = probe_compiler(device)
    if choice == "on":
        return True, f"as train.compile says{assembler}"
    return not fault, fault or f"the compiler runs on this GPU{assembler}"


@cache
def probe_compiler(device: torch.device) -> tuple[str, str]:
    """Test the compiler on the device, and return two texts. The first says why it does not work,
    or is "" if it works. The second says which assembler (ptxas) replaces Triton's own, or is "".
    """
    fault = compiler_fault(device)
    if "ptxas" not in fault.lower():
        return fault, ""
    paths = assemblers()
    path = next((path for path in paths if runs_with(path, device)), None)
    if path is None:
        others = "no other CUDA toolkit was found"
        if paths:
            others = f"these assemblers fail too: {', '.join(paths)}"
        return f"{fault}; {others}; install a newer CUDA toolkit, or set {ASSEMBLERS[0]}", ""

    # Set both variables, because it depends on Triton's version and on the chip which of them
    # Triton reads.
    os.environ |= dict.fromkeys(ASSEMBLERS, path)
    restart_compiler()
    fault = compiler_fault(device)
    if fault:
        settings = " ".join(f"{name}={path}" for name in ASSEMBLERS)
        return f"{fault}; the compiler works in a new process, so start again with {settings}", ""
    return "", f", with {path} instead of Triton's assembler, which does not support this GPU"


def compiler_fault(device: torch.device) -> str:
    """Compile a small function on the device. Return the error, or "" if the compiler works.

    The assembler in Triton may not support new chips, and a machine may have no C compiler.
    """
    use_persistent_cache()
    x = torch.linspace(-1, 1, 64, device=device)
    try:
        is_right = torch.allclose(torch.compile(F.silu)(x), F.silu(x))
    except Exception as error:  # after any error of the compiler, training continues without it
        # Search the entire message, because Triton gives the reason after the first line.
        match = re.search(r"ptxas (?:fatal|error).*", str(error))
        return f"torch.compile fails: {match[0] if match else first_line(error)}"
    return "" if is_right else "torch.compile gives wrong results"


def runs_with(assembler: str, device: torch.device) -> bool:
    """Test in a separate process whether the compiler works with this ptxas.

    A separate process is needed because the compiler's worker processes do not see changes of
    environment variables.
    """
    command = [sys.executable, "-c", ATTEMPT, str(device)]
    env = os.environ | dict.fromkeys(ASSEMBLERS, assembler)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, env=env, capture_output=True, timeout=300, check=True)
        return True
    return False


def assemblers() -> list[str]:
    """Return the path of every ptxas (NVIDIA's assembler) on this machine, without duplicates.

    The order is: the user's variables, PATH, CUDA_HOME, /usr/local (newest first), NVIDIA's wheels.
    """
    packages = Path(torch.__file__).parents[1]
    toolkits = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    for pattern in ("/usr/local/cuda*", f"{packages}/nvidia/*"):
        toolkits += sorted(glob(pattern), reverse=True)
    paths = [os.environ.get(name) for name in ASSEMBLERS]
    paths.append(shutil.which("ptxas"))
    paths += [f"{toolkit}/bin/ptxas" for toolkit in toolkits]

    files = (os.path.realpath(path) for path in paths if path and os.access(path, os.X_OK))
    return list(dict.fromkeys(files))


def use_persistent_cache() -> None:
    """Store compiled code in tunesmith's cache folder, unless TORCHINDUCTOR_CACHE_DIR is set.

    torch's default is a folder in /tmp, which is often emptied. It is only used if tunesmith's
    folder is not writable. The folder is the same for ranks of a launcher and for a single process.
    Nodes with a shared home directory have separate folders, because their chips may differ. In a
    Slurm job the folder is on the node's own disk, because file locks are slow on a shared disk.

    Code that was compiled by another version of tunesmith is not used.
    """
    # Add the digest of tunesmith's source to the cache key. torch's key only includes the forward
    # graph, so after a change of a backward function the old compiled code would be used.
    user_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = user_tag + source_digest()

    # Some modules of torch set TORCHINDUCTOR_CACHE_DIR to torch's own default when they are
    # imported. Therefore this value does not show a choice of the user.
    temporary = tempfile.gettempdir()
    torch_default = f"{temporary}/torchinductor_"
    # Do not change a value that differs from torch's default, because the user has set it.
    if os.environ.get(CACHE, torch_default).startswith(torch_default):
        name = f"compiled-{os.getuid()}"
        place = cache_folder(name)
        if "SLURM_JOB_ID" in os.environ:
            place = Path(temporary, f"tunesmith-{name}")
        with contextlib.suppress(OSError):  # the home directory is read-only
            os.environ[CACHE] = str(private_folder(place) / socket.gethostname())


def private_folder(folder: Path) -> Path:
    """Create the folder if it does not exist. Check that only this user can write to it.

    Raise MachineError if another user owns it or can write to it, because the code in it is
    executed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    is_open_to_others = stat.S_IMODE(status.st_mode) & 0o077
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or is_open_to_others:
        raise MachineError(
            "other users can write to this folder",
            where=folder,
            why="compiled code in this folder is executed",
            fix=f"remove it with `rm -r {shell_path(folder)}`, or choose another folder with "
            "`export TORCHINDUCTOR_CACHE_DIR=/a/folder/of/yours`",
        )
    return folder


def compile_layers(
    layers: Sequence[nn.Module], *, varied: bool, backend: str | Callable[..., object] = "inductor"
) -> None:
    """Compile each decoder layer in place at its first forward in training.

    Args:
        varied: whether micro batches differ in their number of tokens.
        backend: backend of torch.compile.
    """
    use_persistent_cache()
    shared = torch.compile(_forward, backend=backend)
    for layer in layers:
        compiled_layer = add_mixin(layer, CompiledLayer)
        compiled_layer.compiled = shared
        compiled_layer.varied = varied


class CompiledLayer(nn.Module):
    """A layer whose forward is compiled in training.

    Generation and validation run without compilation, because the shapes differ between batches and
    there is no backward that could be fused.
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
            # Only the first layer has an input without gradient, if the embeddings are frozen. Let
            # the input require a gradient, so that the layer uses the same graph as the other
            # layers. The unused gradient takes 0.1 % of the step, but a separate graph would double
            # the compilation time.
            args = (hidden.detach().requires_grad_(), *rest)

        mark_varying(documents.cu_seqlens, 0)
        if documents.repeated is not None:
            places, firsts, seconds = documents.repeated
            for tensor in (places, firsts, *seconds):
                mark_varying(tensor, 0)
        if documents.chunks is not None:
            mark_varying(documents.chunks.cu_seqlens, 0)

        if self.varied:
            for layout in (documents, documents.chunks):
                if layout is not None and layout.spans is not None:
                    mark_varying(layout.spans, 1)
            # Mark the second dimension of all tensors of shape [1, tokens, ...] as dynamic.
            length = hidden.shape[1]
            for tensor in _tensors((args, kwargs)):
                if tensor.dim() > 1 and tensor.shape[1] == length:
                    mark_varying(tensor, 1)
        return self.compiled(self, args, kwargs)


def _forward(layer: CompiledLayer, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    # Call the forward of the class to which the mixin was added. The forward of the mixin is not
    # compiled.
    return super(CompiledLayer, layer).forward(*args, **kwargs)


def compile_apart(name: str) -> Callable[..., object]:
    """Return a compiled forward that has its own graphs, for `CompiledLayer.compiled`.

    Each adapter shape needs its own graphs. The compiler stores graphs by the code and name of a
    function. If two shapes shared an entry, the second would make the shape dynamic. The kernels,
    and the rounding of the results, would then differ from those of a run with only one shape.
    """
    code = _forward.__code__.replace(co_name=name)
    return torch.compile(FunctionType(code, _forward.__globals__))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def compile_loss(loss_and_grad_fn: LossAndGradFn) -> LossAndGradFn:
    """Compile the loss of a chunk of logits to one or two kernels.

    Chunks have different numbers of positions, so this dimension is dynamic.
    """
    compiled: LossAndGradFn = torch.compile(loss_and_grad_fn)

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        for tensor in _tensors(args):
            mark_varying(tensor, 0)
        return compiled(*args)

    return run
