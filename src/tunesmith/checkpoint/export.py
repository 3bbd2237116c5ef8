"""Write what was trained in the form that others read: PEFT's adapter files, or a whole Transformers folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerBase

from tunesmith.adapter import peft_files
from tunesmith.checkpoint.resume import DELETE, OPTIMIZER, Progress
from tunesmith.config.schema import Run
from tunesmith.data.template import Template
from tunesmith.errors import CheckpointError
from tunesmith.methods.base import TrainModel
from tunesmith.runtime.transfer import Snapshot

SHARD = "5GB"

Files = Mapping[str, bytes]  # contents by name


def tokenizer_files(tokenizer: PreTrainedTokenizerBase, template: Template, scratch: Path) -> Files:
    """The tokenizer's files, with the template in use as its chat template: the prompt in use is the one trained.

    They are the same in every checkpoint, so they are made once. A thread could not make them: the tokenizer's other
    users may change it meanwhile, and a large vocabulary would keep the interpreter from the training.

    Args:
        scratch: a folder to write into and clear again; `state.sweep` takes away what a kill leaves there.
    """
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.jinja
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".tokenizer-", suffix=".partial") as folder:
            tokenizer.save_pretrained(folder)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    finally:
        tokenizer.chat_template = before


def _write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_model(folder: Path, run: Run, model: TrainModel, tokenizer: Files) -> None:
    """Write the adapter (PEFT) or the whole model (Transformers), and the tokenizer.

    Args:
        folder: an existing, empty folder.
        run: its `adapter.kind` says which form.
        model: the trained model; its weights are read, not copied.
        tokenizer: from `tokenizer_files`.
    """
    if run.adapter.kind == "lora":
        peft_files.write_adapter(folder, *_adapter(run, model))
    else:
        save_torch_state_dict(model.model.state_dict(), folder, max_shard_size=SHARD, shared_tensors_to_discard=None)
        model.model.config.save_pretrained(folder)
        if model.model.generation_config is not None:
            model.model.generation_config.save_pretrained(folder)
    _write_files(folder, tokenizer)


def _adapter(run: Run, model: TrainModel) -> tuple[dict[str, Parameter], dict[str, Any]]:
    return peft_files.adapter_files(model.model, run.adapter, run.model.name, run.model.revision)


def write_checkpoint(
    folder: Path,
    run: Run,
    model: TrainModel,
    tokenizer: Files,
    optimizer: Mapping[str, Tensor],
    progress: Progress,
) -> None:
    """Write all that a checkpoint holds, as it is while this runs; `optimizer` is its state, the rest as above."""
    write_model(folder, run, model, tokenizer)
    write_optimizer(folder, optimizer)
    progress.write(folder)


def snapshot(
    run: Run,
    model: TrainModel,
    tokenizer: Files,
    optimizer: Mapping[str, Tensor],
    progress: Progress,
) -> Callable[[Path], None]:
    """An adapter's checkpoint as it is now: what is returned writes it into a folder, from any thread, once.

    Tensors are copied where they lie, in the order of the device's work, so that this waits for nothing. Until they are
    written the copies take there what adapter and optimizer state take.

    Raises:
        torch.OutOfMemoryError: there is no room for the copies.
    """
    tensors, settings = _adapter(run, model)
    adapter, moments = Snapshot(tensors), Snapshot(optimizer)

    def write(folder: Path) -> None:
        peft_files.write_adapter(folder, adapter.on_host(), settings)
        _write_files(folder, tokenizer)
        write_optimizer(folder, moments.on_host())
        progress.write(folder)

    return write


def write_optimizer(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the optimizer's tensors to state/optimizer.safetensors."""
    path = folder / OPTIMIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """Read the optimizer's tensors of a checkpoint, onto the CPU; CheckpointError if they cannot be read."""
    try:
        return load_file(folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder.name} has no readable {OPTIMIZER}", where=str(folder / OPTIMIZER), why=str(error), fix=DELETE
        ) from error
