"""The files of a checkpoint.

These are a PEFT adapter or a Transformers model, the tokenizer and the optimizer state.
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
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.formats.stored import StoredTensor
from tunesmith.model.arch.tokenizer import GENERATION_CONFIG, generation_config_text
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.weights.older_readers import write_for_older_readers
from tunesmith.model.weights.save_tensors import gathered, save_sharded, save_tensors
from tunesmith.model.weights.stored_form import PROCESSORS, in_stored_form, write_model_config
from tunesmith.model.weights.stored_tensors import stored_tensors
from tunesmith.runtime.transfer import Snapshot
from tunesmith.tokens.text.template import Template
from tunesmith.train_model import TrainModel

TokenizerFiles = Mapping[str, bytes]  # path in the checkpoint -> content of the file
OptimizerState = Mapping[str, Tensor]


def tokenizer_files(
    tokenizer: PreTrainedTokenizerBase, template: Template, base: Path
) -> TokenizerFiles:
    """Return the tokenizer's files and generation_config.json by path.

    The chat template is the same as in training, and generation_config.json lists all tokens that
    end an answer. Inference therefore renders the same prompts as training and stops at the end of
    an answer. For a model with images, the files of the base's image processor are included,
    because Transformers expects them next to the tokenizer.

    Call this once, in the main thread, for two reasons. A background thread could read the
    tokenizer while other code changes it. Also, serializing a large vocabulary in a background
    thread would hold the GIL and block training.

    Args:
        base: the base model's folder.
    """
    original_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.jinja
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer.save_pretrained(folder)
            write_for_older_readers(folder)
            text = generation_config_text(base, tokenizer, template.end_ids)
            (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")

            files = [path for path in folder.rglob("*") if path.is_file()]
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
    """Write the model and the tokenizer into a folder.

    The model is a PEFT adapter, or the entire Transformers model if `adapter.kind` is "none". If
    the weights are sharded, this is a collective call: ranks that write no files pass None as the
    folder.
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
    """Write all files of an entire model except its weights."""
    write_model_config(model.model, folder)
    _write_tokenizer(folder, tokenizer)
    write_for_older_readers(folder)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a model's checkpoint contains.

    A tied weight is included once, under the name of the embedding, as in published base models.
    Transformers 4.57 cannot load a tied weight under the name of the output head.
    """
    # A tied weight has several names. `names` has only the first of them, and `names_of_tied` has
    # the others.
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
    """Write all files of a checkpoint into an existing, empty folder.

    Args:
        optimizer: tensors of the optimizer's state dict.
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
    """Return a function that writes an adapter's checkpoint into a folder. Call it only once.

    This is a collective call if tensors are sharded. If tensors are copied, each copy is made on
    the tensor's device in stream order, so this function does not wait for the copies. Sharded
    tensors are gathered one after the other, into the host memory of rank 0.

    Args:
        copy: copy the current state, so that any thread can call the returned function later. If
            the state is not copied, the returned function must be called before the next step.

    Returns:
        The function, and whether the tensors were copied. They are not copied if the device does
        not have enough memory.
    """
    tensors, settings = peft_files.adapter_files(
        model.model, run.adapter, run.model.name, run.model.revision
    )

    # Copy `progress`, because the caller changes the object while a thread writes this checkpoint.
    progress = replace(progress)

    # All ranks gather the sharded tensors in the same order, because each gather is a collective.
    gathered_tensors = gathered(tensors)
    gathered_moments = gathered(optimizer)
    local_tensors: dict[str, Tensor] = {
        name: tensors[name] for name in tensors.keys() - gathered_tensors
    }
    local_moments = {name: optimizer[name] for name in optimizer.keys() - gathered_moments}

    snapshots: list[Snapshot] = []
    if copy:
        # If the memory is too small for copies, `snapshots` is empty, and `save` must be called
        # before the next step.
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
def read_optimizer(folder: Path) -> Iterator[Mapping[str, StoredTensor]]:
    """Yield the optimizer's tensors of a checkpoint.

    Raise CheckpointError if the file cannot be read.
    """
    try:
        with stored_tensors(folder / OPTIMIZER) as tensors:
            yield tensors
    except ModelError as error:
        raise CheckpointError(
            f"{folder.name} has no readable {OPTIMIZER}",
            where=folder / OPTIMIZER,
            why=f"{error.what} {error.why}",
            fix=DELETE,
        ) from error
