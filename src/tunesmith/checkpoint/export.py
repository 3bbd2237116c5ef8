"""The files of a checkpoint: PEFT's adapter or a Transformers model, the tokenizer, the optimizer's state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.adapter import peft_files
from tunesmith.checkpoint.resume import DELETE, OPTIMIZER, Progress
from tunesmith.config.schema import Run
from tunesmith.data.template import Template
from tunesmith.errors import CheckpointError
from tunesmith.methods.base import TrainModel
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.save_tensors import save_sharded, save_tensors
from tunesmith.parallel.shard import gathered
from tunesmith.runtime.transfer import Snapshot

TokenizerFiles = Mapping[str, bytes]  # path in the folder -> contents
OptimizerState = Mapping[str, Tensor]


def tokenizer_files(tokenizer: PreTrainedTokenizerBase, template: Template, scratch: Path) -> TokenizerFiles:
    """The tokenizer's files, with the template in use as its chat template, so that inference prompts as training did.

    Make them once, in the main thread: others use and change the tokenizer, and serialising a large vocabulary in a
    background thread would hold the interpreter's lock. `scratch` is a folder for a temporary one, which `run_dir.sweep`
    removes after a kill.
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


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def gather_model_files(run: Run, model: TrainModel) -> None:
    """Take part in `write_model_files` of another rank."""
    if run.adapter.kind == "none":
        save_sharded(None, weights_of(model.model), DTYPES[run.model.dtype])
    else:
        _adapter(run, model)


def write_model_files(folder: Path, run: Run, model: TrainModel, tokenizer: TokenizerFiles) -> None:
    """Write the adapter (PEFT) or the whole model (Transformers), by `adapter.kind`, and the tokenizer into a folder."""
    if run.adapter.kind == "lora":
        peft_files.write_adapter(folder, *_adapter(run, model))
        _write_tokenizer(folder, tokenizer)
    else:
        save_sharded(folder, weights_of(model.model), DTYPES[run.model.dtype])
        write_config(folder, model, tokenizer)


def write_config(folder: Path, model: TrainModel, tokenizer: TokenizerFiles) -> None:
    """Write a whole model's files but its weights."""
    model.model.config.save_pretrained(folder)
    if model.model.generation_config is not None:
        model.model.generation_config.save_pretrained(folder)
    _write_tokenizer(folder, tokenizer)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model's checkpoint holds. A tied weight is there once, as the embedding: the name that bases have.
    Transformers 4.57 does not find it under the head's."""
    once, names = (dict(model.named_parameters(remove_duplicate=r)).keys() for r in (True, False))
    state = model.state_dict()
    return {name: state[name] for name in state if name not in names - once}


def _adapter(run: Run, model: TrainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors, whole, and its configuration; a collective call where ranks hold parts."""
    tensors, settings = peft_files.adapter_files(model.model, run.adapter, run.model.name, run.model.revision)
    return gathered(tensors), settings


def write_checkpoint(
    folder: Path, run: Run, model: TrainModel, tokenizer: TokenizerFiles, optimizer: OptimizerState, progress: Progress
) -> None:
    """Write all that a checkpoint holds into an existing, empty folder; `optimizer` is its state dict of tensors."""
    write_model_files(folder, run, model, tokenizer)
    write_optimizer(folder, optimizer)
    progress.write(folder)


def snapshot(
    run: Run, model: TrainModel, tokenizer: TokenizerFiles, optimizer: OptimizerState, progress: Progress
) -> Callable[[Path], None]:
    """Copy an adapter's checkpoint as it is now; the function returned writes the copy into a folder, from any thread, once.

    Tensors are copied on their own device, in stream order, so this does not wait for the device; it may have no room
    for them (torch.OutOfMemoryError).
    """
    tensors, settings = _adapter(run, model)
    progress = replace(progress)  # the caller changes its own while a thread writes this one
    adapter, moments = Snapshot(tensors), Snapshot(optimizer)

    def write(folder: Path) -> None:
        peft_files.write_adapter(folder, adapter.on_host(), settings)
        _write_tokenizer(folder, tokenizer)
        write_optimizer(folder, moments.on_host())
        progress.write(folder)

    return write


def write_optimizer(folder: Path, tensors: OptimizerState) -> None:
    """Write the optimizer's tensors to state/optimizer.safetensors."""
    path = folder / OPTIMIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)


def read_optimizer(folder: Path) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint, on the CPU; CheckpointError if they cannot be read."""
    try:
        return load_file(folder / OPTIMIZER)
    except (OSError, SafetensorError) as error:
        what = f"{folder.name} has no readable {OPTIMIZER}"
        raise CheckpointError(what, where=str(folder / OPTIMIZER), why=str(error), fix=DELETE) from error
