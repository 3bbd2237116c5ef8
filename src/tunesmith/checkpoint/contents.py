"""The files of a checkpoint: PEFT's adapter or a Transformers model, the tokenizer, the optimizer's state."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.adapter import peft_files
from tunesmith.checkpoint.manifest import Fill
from tunesmith.checkpoint.resume import DELETE, OPTIMIZER, Progress
from tunesmith.config.schema import Run
from tunesmith.data.template import Template
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.methods.base import TrainModel
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.older_readers import write_for_older_readers
from tunesmith.model.save_tensors import gathered, save_sharded, save_tensors
from tunesmith.model.weights import StoredTensor, stored_tensors
from tunesmith.runtime.transfer import Snapshot

TokenizerFiles = Mapping[str, bytes]  # path in the folder -> contents
OptimizerState = Mapping[str, Tensor]


def tokenizer_files(
    tokenizer: PreTrainedTokenizerBase, template: Template, scratch: Path
) -> TokenizerFiles:
    """The tokenizer's files, with the template in use as its chat template, so that inference prompts as training did.

    Make them once, in the main thread: others use and change the tokenizer, and serialising a large vocabulary in a
    background thread would hold the interpreter's lock. `scratch` is a folder for a temporary one, which `run_dir.sweep`
    removes after a kill.
    """
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.jinja
        with tempfile.TemporaryDirectory(
            dir=scratch, prefix=".tokenizer-", suffix=".partial"
        ) as folder:
            tokenizer.save_pretrained(folder)
            write_for_older_readers(Path(folder))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    finally:
        tokenizer.chat_template = before


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_model_files(
    folder: Path | None, run: Run, model: TrainModel, tokenizer: TokenizerFiles
) -> None:
    """Write the adapter (PEFT) or the whole model (Transformers), by `adapter.kind`, and the tokenizer into a folder.

    Where ranks hold parts all of them call it, and those that write nothing give no folder.
    """
    if run.adapter.kind == "none":
        save_sharded(folder, weights_of(model.model), DTYPES[run.model.dtype])
        if folder:
            write_config(folder, model, tokenizer)
        return
    base = run.model.name, run.model.revision
    peft_files.write_adapter(folder, *peft_files.adapter_files(model.model, run.adapter, *base))
    if folder:
        _write_tokenizer(folder, tokenizer)


def write_config(folder: Path, model: TrainModel, tokenizer: TokenizerFiles) -> None:
    """Write a whole model's files but its weights."""
    model.model.config.save_pretrained(folder)
    if model.model.generation_config is not None:
        model.model.generation_config.save_pretrained(folder)
    _write_tokenizer(folder, tokenizer)
    write_for_older_readers(folder)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model's checkpoint holds. A tied weight is there once, as the embedding: the name that bases have.
    Transformers 4.57 does not find it under the head's."""
    once, names = (dict(model.named_parameters(remove_duplicate=r)).keys() for r in (True, False))
    state = model.state_dict()
    return {name: state[name] for name in state if name not in names - once}


def write_checkpoint(
    run: Run,
    model: TrainModel,
    tokenizer: TokenizerFiles,
    optimizer: OptimizerState,
    progress: Progress,
    folder: Path,
) -> None:
    """Write all that a checkpoint holds into an existing, empty folder; `optimizer` is its state dict of tensors."""
    write_model_files(folder, run, model, tokenizer)
    write_optimizer(folder, optimizer)
    progress.write(folder)


def fill_adapter(
    run: Run,
    model: TrainModel,
    tokenizer: TokenizerFiles,
    optimizer: OptimizerState,
    progress: Progress,
    copy: bool,
) -> tuple[Fill, bool]:
    """What writes an adapter's checkpoint into a folder, once; a collective call where ranks hold parts.

    With `copy` it writes the state of this moment, from any thread; else it must be called before the next step. Tensors
    are copied on their own device, in stream order, so this does not wait for it; of those that ranks share, rank 0 gets one
    after the other into its host's memory. Returned too: whether they were copied, for which the device may have no room.
    """
    tensors, settings = peft_files.adapter_files(
        model.model, run.adapter, run.model.name, run.model.revision
    )
    progress = replace(progress)  # the caller's changes while a thread writes this one
    whole = [gathered(tensors), gathered(optimizer)]
    rest = [
        {n: of[n] for n in of.keys() - own}
        for of, own in zip((tensors, optimizer), whole, strict=True)
    ]
    copies: list[Snapshot] = []
    with suppress(torch.OutOfMemoryError):
        copies = [Snapshot(of) for of in rest] if copy else []

    def fill(folder: Path) -> None:
        others = [copied.on_host() for copied in copies] or rest
        adapter, moments = (own | other for own, other in zip(whole, others, strict=True))
        peft_files.write_adapter(folder, adapter, settings)
        _write_tokenizer(folder, tokenizer)
        write_optimizer(folder, moments)
        progress.write(folder)

    return fill, bool(copies)


def write_optimizer(folder: Path, tensors: OptimizerState) -> None:
    """Write the optimizer's tensors to state/optimizer.safetensors."""
    path = folder / OPTIMIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)


@contextmanager
def read_optimizer(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The optimizer's tensors of a checkpoint, to be read in the block; CheckpointError if they cannot be."""
    try:
        with stored_tensors(folder / OPTIMIZER) as tensors:
            yield tensors
    except ModelError as error:
        what, why = f"{folder.name} has no readable {OPTIMIZER}", f"{error.what} {error.why}"
        raise CheckpointError(what, where=str(folder / OPTIMIZER), why=why, fix=DELETE) from error
