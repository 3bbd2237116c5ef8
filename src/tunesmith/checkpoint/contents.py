"""The files of a checkpoint.

PEFT's adapter or a Transformers model, the tokenizer, the optimizer's state.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.adapter import peft_files
from tunesmith.checkpoint.resume import DELETE, OPTIMIZER, Progress
from tunesmith.checkpoint.writer import SaveFunction
from tunesmith.config.schema import Run
from tunesmith.data.text.template import Template
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.methods.base import TrainModel
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.older_readers import write_for_older_readers
from tunesmith.model.save_tensors import gathered, save_sharded, save_tensors
from tunesmith.model.stored_form import PROCESSORS, in_stored_form, write_model_config
from tunesmith.model.tokenizer import GENERATION_CONFIG, generation_config_text
from tunesmith.model.weights import StoredTensor, stored_tensors
from tunesmith.runtime.transfer import Snapshot

TokenizerFiles = Mapping[str, bytes]  # path in the folder -> contents
OptimizerState = Mapping[str, Tensor]


def tokenizer_files(
    tokenizer: PreTrainedTokenizerBase, template: Template, base: Path
) -> TokenizerFiles:
    """The tokenizer's files, with the template in use as its chat template, and the settings of
    generation, with all tokens that end an answer.

    With pictures also the base's files of their processor, as Transformers looks for them here.
    So inference prompts as training did, and stops where answers ended. Make them once, in the main
    thread: others use and change the tokenizer, and serializing a large vocabulary in a background
    thread would hold the interpreter's lock.

    base: the base's folder.
    """
    original_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.jinja
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            write_for_older_readers(Path(folder))
            text = generation_config_text(base, tokenizer, template.end_ids)
            (Path(folder) / GENERATION_CONFIG).write_text(text, encoding="utf-8")
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
            if template.pictures is not None:
                contents |= {path.name: path.read_bytes() for path in base.glob(PROCESSORS)}
            return contents
    finally:
        tokenizer.chat_template = original_template


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_model_files(
    folder: Path | None, run: Run, model: TrainModel, tokenizer: TokenizerFiles
) -> None:
    """Write the adapter (PEFT) or the whole model (Transformers), and the tokenizer, into a folder.

    Which of both, `adapter.kind` says. Where ranks hold parts all of them call it, and those that
    write nothing give no folder.
    """
    if run.adapter.kind == "none":
        tensors = in_stored_form(model.model, weights_of(model.model))
        save_sharded(folder, tensors, DTYPES[run.model.dtype])
        if folder:
            write_config(folder, model, tokenizer)
        return
    adapter_tensors, settings = peft_files.adapter_files(
        model.model, run.adapter, run.model.name, run.model.revision
    )
    peft_files.write_adapter(folder, adapter_tensors, settings)
    if folder:
        _write_tokenizer(folder, tokenizer)


def write_config(folder: Path, model: TrainModel, tokenizer: TokenizerFiles) -> None:
    """Write a whole model's files but its weights."""
    write_model_config(model.model, folder)
    _write_tokenizer(folder, tokenizer)
    write_for_older_readers(folder)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect the weights that a model's checkpoint holds.

    A tied weight is there once, as the embedding: the name that bases have. Transformers 4.57 does
    not find it under the head's.
    """
    # Tied weights by their first name only; the second set has all names.
    names = {name for name, _ in model.named_parameters()}
    names_of_tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return {
        name: tensor for name, tensor in model.state_dict().items() if name not in names_of_tied
    }


def write_checkpoint(
    run: Run,
    model: TrainModel,
    tokenizer: TokenizerFiles,
    optimizer: OptimizerState,
    progress: Progress,
    folder: Path,
) -> None:
    """Write all that a checkpoint holds into an existing, empty folder.

    optimizer: its state dict of tensors.
    """
    write_model_files(folder, run, model, tokenizer)
    write_optimizer(folder, optimizer)
    progress.write(folder)


def adapter_save_function(
    run: Run,
    model: TrainModel,
    tokenizer: TokenizerFiles,
    optimizer: OptimizerState,
    progress: Progress,
    copy: bool,
) -> tuple[SaveFunction, bool]:
    """Return what writes an adapter's checkpoint into a folder, once.

    A collective call where ranks hold parts. Tensors are copied on their own device, in stream
    order, so this does not wait for it; of those that ranks share, rank 0 gets one after the other
    into its host's memory.

    Args:
        copy: write the state of this moment, from any thread; else it must be called before the
            next step.

    Returns:
        The function, and whether tensors were copied, for which the device may have no room.
    """
    tensors, settings = peft_files.adapter_files(
        model.model, run.adapter, run.model.name, run.model.revision
    )
    # The caller changes its own while a thread writes this one.
    progress = replace(progress)
    # On all ranks, in the same order: what is sharded is gathered in collectives.
    gathered_tensors = gathered(tensors)
    gathered_moments = gathered(optimizer)
    local_tensors: dict[str, Tensor] = {
        name: tensors[name] for name in tensors.keys() - gathered_tensors
    }
    local_moments = {name: optimizer[name] for name in optimizer.keys() - gathered_moments}
    snapshots: list[Snapshot] = []
    if copy:
        # Without room for copies the function must be called before the next step.
        with suppress(torch.OutOfMemoryError):
            snapshots = [Snapshot(local_tensors), Snapshot(local_moments)]

    def save(folder: Path) -> None:
        tensors_to_save = local_tensors
        moments_to_save = local_moments
        if snapshots:
            tensors_to_save, moments_to_save = (snapshot.on_host() for snapshot in snapshots)
        peft_files.write_adapter(folder, gathered_tensors | tensors_to_save, settings)
        _write_tokenizer(folder, tokenizer)
        write_optimizer(folder, gathered_moments | moments_to_save)
        progress.write(folder)

    return save, bool(snapshots)


def write_optimizer(folder: Path, tensors: OptimizerState) -> None:
    """Write the optimizer's tensors to state/optimizer.safetensors."""
    path = folder / OPTIMIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)


@contextmanager
def read_optimizer(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The optimizer's tensors of a checkpoint, to be read in the block.

    CheckpointError if they cannot be.
    """
    try:
        with stored_tensors(folder / OPTIMIZER) as tensors:
            yield tensors
    except ModelError as error:
        raise CheckpointError(
            f"{folder.name} has no readable {OPTIMIZER}",
            where=str(folder / OPTIMIZER),
            why=f"{error.what} {error.why}",
            fix=DELETE,
        ) from error
