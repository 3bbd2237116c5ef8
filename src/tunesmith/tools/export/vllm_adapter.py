"""Export of a run's adapter for vLLM.

The rules are from the source of vLLM 0.33.0: `lora/model_manager.py`, `lora/lora_model.py` and the
model classes.
"""

import shutil
from pathlib import Path

from tunesmith.adapter.peft_files import read_adapter
from tunesmith.answers.load_run import locate_run, raise_if_deleted, read_run_files
from tunesmith.checkpoint.manifest import CARD
from tunesmith.errors import ModelError, UsageError
from tunesmith.host.files import follow_umask, require_disk_space
from tunesmith.model.weights.names import is_vision_language
from tunesmith.model.weights.safetensors_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith.tools.export.merge import write_generation_config
from tunesmith.tools.export.output import (
    OTHER_DISK,
    check_new_folder,
    move_into_place,
    part_folder,
)
from tunesmith.tools.export.record import make_card
from tunesmith.tools.export.tuned_weights import ExpertsUpdate, TunedModel, open_tuned_model

# Values that vLLM accepts for --max-lora-rank.
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Model types whose vLLM class reads LoRA of experts in PEFT's format, in which all experts are
# stacked. These classes set `is_3d_moe_weight`. The classes of other model types expect separate
# tensors for each expert, with other names.
READ_STACKED = ("gpt_oss",)
# Model types for which vLLM has a text class and a vision-language class, but only the
# vision-language class sets `is_3d_moe_weight`.
READ_STACKED_WITH_VISION = ("qwen3_5_moe_text",)
EXPORT_MERGED_FIX = "export the merged model, without --adapter"


def export_peft(path: str | Path, output: str | Path, *, trust_remote_code: bool = False) -> int:
    """Write a run's adapter to a folder for vLLM. Return the value for vLLM's --max-lora-rank.

    Raises:
        UsageError: there is no adapter, or the output is not a new or empty folder.
        ModelError: vLLM refuses this adapter, or would load wrong weights.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = check_new_folder(output, location)
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
    # vLLM accepts only a few values of --max-lora-rank. Use the smallest value that is at least the
    # adapter's rank.
    ranks = [rank for rank in VLLM_LORA_RANKS if rank >= adapter.rank]
    if not ranks:
        raise _refusal(
            f"the adapter has rank {adapter.rank}",
            f"vLLM supports ranks up to {VLLM_LORA_RANKS[-1]}",
        )
    with raise_if_deleted(location):
        # This also verifies the checksums, and that base and adapter match.
        tuned = open_tuned_model(read_run_files(location))
        _check_vllm_support(tuned)
        size = sum((folder / name).stat().st_size for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        require_disk_space(goal, size, what="the adapter", fix=OTHER_DISK)
        with part_folder(goal) as part:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                shutil.copyfile(folder / name, part / name)
            write_generation_config(tuned, part)
            (part / CARD).write_text(make_card(location), encoding="utf-8")
            follow_umask(part)
            move_into_place(part, goal)
    return ranks[0]


def _refusal(what: str, why: str) -> ModelError:
    return ModelError(what, where="--adapter", why=why, fix=EXPORT_MERGED_FIX)


def _check_vllm_support(tuned: TunedModel) -> None:
    """Raise ModelError if vLLM would load wrong weights from the adapter."""
    model_type = tuned.model.config.get_text_config().model_type
    adapted = {name: weight.update for name, weight in tuned.weights.items() if weight.update}
    is_stacked = model_type in READ_STACKED or (
        model_type in READ_STACKED_WITH_VISION and is_vision_language(tuned.model)
    )
    if not is_stacked and any(isinstance(update, ExpertsUpdate) for update in adapted.values()):
        raise _refusal(
            f"the adapter trains experts, and vLLM cannot read PEFT's format of experts for the "
            f"model type {model_type}",
            "vLLM would load wrong experts, or no experts, without an error",
        )
    if model_type == "llama4_text":
        for name in adapted:
            if name.endswith((".q_proj.weight", ".k_proj.weight")):
                raise _refusal(
                    "the adapter trains q_proj or k_proj of a Llama 4 model",
                    "vLLM reorders the rows of these weights in the base model, but not in the"
                    " adapter",
                )
