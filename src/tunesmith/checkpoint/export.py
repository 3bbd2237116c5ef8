"""Write what was trained in the form that others read: PEFT's adapter files, or a whole Transformers folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.adapter import peft_io
from tunesmith.checkpoint.resume import DELETE, OPTIMIZER
from tunesmith.config.schema import Run
from tunesmith.data.chat import Template
from tunesmith.errors import CheckpointError
from tunesmith.method.base import TrainModel

SHARD = "5GB"


def write_model(
    folder: Path, run: Run, model: TrainModel, tokenizer: PreTrainedTokenizerBase, template: Template
) -> None:
    """Write the adapter (PEFT) or the whole model (Transformers), and the tokenizer with the template that was trained.

    Args:
        folder: an existing, empty folder.
        run: its `adapter.kind` says which form.
        model: the trained model; its weights are read, not copied.
        tokenizer: the Transformers tokenizer in use.
        template: its Jinja text becomes the saved chat template, so that the prompt in use is the one that was trained.
    """
    if run.adapter.kind == "lora":
        peft_io.save(model.model, folder, run.adapter, run.model.name, run.model.revision)
    else:
        save_torch_state_dict(model.model.state_dict(), folder, max_shard_size=SHARD, shared_tensors_to_discard=None)
        model.model.config.save_pretrained(folder)
        if model.model.generation_config is not None:
            model.model.generation_config.save_pretrained(folder)
    save_tokenizer(folder, tokenizer, template)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Write the tokenizer, with the template in use as its chat template."""
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.jinja
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = before


def write_optimizer(folder: Path, tensors: dict[str, Tensor]) -> None:
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
