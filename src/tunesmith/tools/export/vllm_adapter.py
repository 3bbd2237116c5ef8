"""A run's adapter as vLLM reads it.

What vLLM does is read in its source, release 0.33.0: `lora/model_manager.py`, `lora/lora_model.py`
and the classes of the models.
"""

import shutil
from pathlib import Path

from tunesmith.adapter.peft_files import read_adapter
from tunesmith.checkpoint.manifest import CARD
from tunesmith.checkpoint.model_card import weights_file
from tunesmith.errors import ModelError, UsageError
from tunesmith.host.files import follow_umask, require_disk_space
from tunesmith.inference.load_run import locate_run, read_run_files, undeleted
from tunesmith.model.names import is_in_whole
from tunesmith.model.safetensors_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.tools.export.merge import add_files_to_card, write_generation_config
from tunesmith.tools.export.output import (
    OTHER_DISK,
    move_into_place,
    new_folder_place,
    part_folder,
)
from tunesmith.tools.export.record import card_of
from tunesmith.tools.export.tuned_weights import ExpertsUpdate, TunedModel, open_tuned_model

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be
# Its classes with `is_3d_moe_weight`: they read PEFT's stacked form of experts. Others read each
# expert by itself, under names of their own.
READ_STACKED = ("gpt_oss",)
STACKED_IN_WHOLE = ("qwen3_5_moe_text",)  # within the vision-language model alone
EXPORT_MERGED_FIX = "export the merged model: without --adapter"


def export_peft(path: str | Path, output: str | Path, *, trust_remote_code: bool = False) -> int:
    """Write a run's adapter to a folder of its own; returns vLLM's --max-lora-rank for it.

    Raises:
        UsageError: there is no adapter, or the output is not a new or empty folder.
        ModelError: vLLM refuses such an adapter, or would compute another one.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = new_folder_place(output, location)
    folder = location.folder
    if location.holds != "adapter" or folder is None:
        raise UsageError(f"{path} has no adapter", where="--adapter", fix="remove --adapter")
    adapter = read_adapter(folder)
    if adapter.modules_to_save:
        names = ", ".join(adapter.modules_to_save)
        raise _refusal(
            f"the adapter has fully trained modules: {names}",
            "vLLM only supports LoRA matrices",
        )
    # vLLM takes a few ranks only: the next larger one.
    ranks = [rank for rank in LORA_RANKS if rank >= adapter.rank]
    if not ranks:
        raise _refusal(
            f"the adapter has rank {adapter.rank}", f"vLLM serves ranks up to {LORA_RANKS[-1]}"
        )
    with undeleted(location):
        # Checks sums, and that base and adapter fit.
        tuned = open_tuned_model(read_run_files(location))
        _check_computed_alike(tuned)
        size = sum((folder / name).stat().st_size for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        require_disk_space(goal, size, what="the adapter", fix=OTHER_DISK)
        with part_folder(goal) as part:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                shutil.copyfile(folder / name, part / name)
            write_generation_config(tuned, part)
            (part / CARD).write_text(card_of(location), encoding="utf-8")
            add_files_to_card(part, weights_file(part, "PEFT, the LoRA alone"))
            follow_umask(part)
            move_into_place(part, goal)
    return ranks[0]


def _refusal(what: str, why: str) -> ModelError:
    return ModelError(what, where="--adapter", why=why, fix=EXPORT_MERGED_FIX)


def _check_computed_alike(tuned: TunedModel) -> None:
    """ModelError for an adapter that vLLM would take for another."""
    model_type = tuned.model.config.get_text_config().model_type
    adapted = {name: weight.update for name, weight in tuned.weights.items() if weight.update}
    is_stacked = model_type in READ_STACKED or (
        model_type in STACKED_IN_WHOLE and is_in_whole(tuned.model)
    )
    if not is_stacked and any(isinstance(update, ExpertsUpdate) for update in adapted.values()):
        raise _refusal(
            f"the adapter has experts, which vLLM does not read in PEFT's form for a {model_type}",
            "in the wrong format it loads wrong experts, or none, without an error",
        )
    if model_type == "llama4_text":
        for name in adapted:
            if name.endswith((".q_proj.weight", ".k_proj.weight")):
                raise _refusal(
                    "the adapter has q_proj or k_proj of a Llama 4",
                    "vLLM reorders their rows when it loads the base, but not the adapter's",
                )
