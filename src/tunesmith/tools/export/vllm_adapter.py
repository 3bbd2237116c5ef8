"""A run's adapter as vLLM reads it.

Of most mixtures that is one expert after the other, where PEFT's file has them stacked: the rows of
B go to gate and up, which get the same A. What vLLM does is read in its source, release 0.33.0:
`lora/model_manager.py`, `lora/lora_model.py` and the classes of the models.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.adapter.peft_files import PREFIX, last_part, read_adapter
from tunesmith.checkpoint.manifest import CARD
from tunesmith.checkpoint.model_card import weights_file
from tunesmith.errors import ModelError, UsageError
from tunesmith.host.files import follow_umask, require_disk_space
from tunesmith.inference.load_run import locate_run, read_run_files, undeleted
from tunesmith.model.experts import Experts, find_experts
from tunesmith.model.names import is_in_whole, name_in_whole
from tunesmith.model.safetensors_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from tunesmith.model.save_tensors import save_tensors
from tunesmith.model.weights import StoredTensor
from tunesmith.tools.export.merge import add_files_to_card, write_generation_config
from tunesmith.tools.export.output import (
    OTHER_DISK,
    move_into_place,
    new_folder_place,
    part_folder,
)
from tunesmith.tools.export.record import card_of
from tunesmith.tools.export.tuned_weights import (
    ExpertsUpdate,
    LoraUpdate,
    TunedModel,
    open_tuned_model,
)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be
# The projections of an expert: the two halves of the first stack, and the second stack.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
EXPERT_PROJECTIONS = {GATE: GATE, UP: UP, DOWN: DOWN}
# As Mixtral's checkpoints call them, and those of models that follow it.
MIXTRALS = {GATE: "w1", UP: "w3", DOWN: "w2"}
# Types whose checkpoints have the experts in another module than Transformers' classes.
STORED_PARENTS = {"mixtral": "block_sparse_moe", "minimax_m2": "block_sparse_moe"}
# How vLLM calls the projections of an expert (`get_expert_mapping`), by the type of the text model.
READ_SINGLE: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        (
            "afmoe",
            "axk1",
            "deepseek_v2",
            "deepseek_v3",
            "ernie4_5_moe",
            "exaone_moe",
            "gemma4_text",
            "glm4_moe",
            "glm4_moe_lite",
            "granitemoe",
            "granitemoehybrid",
            "granitemoeshared",
            "hy_v3",
            "jamba",
            "laguna",
            "nemotron_h",
            "olmoe",
            "qwen2_moe",
            "qwen3_5_moe_text",
            "qwen3_moe",
            "qwen3_next",
        ),
        EXPERT_PROJECTIONS,
    ),
    **dict.fromkeys(("lfm2_moe", "minimax_m2", "mixtral"), MIXTRALS),
}
# Its classes with `is_3d_moe_weight`: they read PEFT's stacked form.
READ_STACKED = ("gpt_oss",)
STACKED_IN_WHOLE = ("qwen3_5_moe_text",)  # within the vision-language model alone
# Its classes without `SupportsLoRA`.
WITHOUT_LORA = (
    "cohere2_moe",
    "dbrx",
    "deepseek_v32",
    "deepseek_v4",
    "flint",
    "glm_moe_dsa",
    "kimi_linear",
    "mimo_v2_flash",
)
EXPORT_MERGED_FIX = "export the merged model: without --adapter"


class Factor(NamedTuple):
    """A factor as it is written: a part of a stored tensor."""

    stored: StoredTensor
    part: tuple[slice | int, ...]


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
        is_single = _reads_single(tuned)
        size = sum((folder / name).stat().st_size for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        if is_single:
            size *= 2  # a factor A is written for gate and up
        require_disk_space(goal, size, what="the adapter", fix=OTHER_DISK)
        with part_folder(goal) as part:
            if is_single:
                _write_single(part, folder, dict(_single_factors(tuned)))
            else:
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


def _reads_single(tuned: TunedModel) -> bool:
    """Tell whether vLLM reads the experts of this adapter one by one; False too if it has none.

    ModelError for an adapter that vLLM does not serve, or would take for another.
    """
    model_type = tuned.model.config.get_text_config().model_type
    if model_type in WITHOUT_LORA:
        raise _refusal(
            f"vLLM does not support LoRA for {model_type}", "its class lacks SupportsLoRA"
        )
    adapted = [name for name, weight in tuned.weights.items() if weight.update]
    if model_type == "llama4_text":
        _check_llama4(adapted)
    if not any(isinstance(weight.update, ExpertsUpdate) for weight in tuned.weights.values()):
        return False
    is_stacked = model_type in STACKED_IN_WHOLE and is_in_whole(tuned.model)
    if model_type in READ_STACKED or is_stacked:
        return False
    if model_type not in READ_SINGLE:
        raise _refusal(
            "the adapter has experts, and the format in which vLLM reads those of a "
            f"{model_type} is unknown",
            "in the wrong format it loads wrong experts, or none, without an error",
        )
    return True


def _check_llama4(adapted: Iterable[str]) -> None:
    """ModelError for layers of a Llama 4 that vLLM computes otherwise than the adapter has it."""
    for name in adapted:
        if ".experts." in name:
            raise _refusal(
                "the adapter has experts of a Llama 4",
                "its routing weights scale an expert's input, and vLLM scales the adapter's output",
            )
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            raise _refusal(
                "the adapter has q_proj or k_proj of a Llama 4",
                "vLLM reorders their rows when it loads the base, but not the adapter's",
            )


def _single_factors(tuned: TunedModel) -> Iterator[tuple[str, Factor]]:
    """The factors of all layers, by their names in the file."""
    for name, weight in tuned.weights.items():
        update = weight.update
        if isinstance(update, LoraUpdate):
            layer = PREFIX + name_in_whole(tuned.model, name.removesuffix(".weight"))
            yield f"{layer}.lora_A.weight", Factor(update.lora_A, ())
            yield f"{layer}.lora_B.weight", Factor(update.lora_B, ())
        elif isinstance(update, ExpertsUpdate):
            yield from _factors_of_stack(tuned.model, name, update)


def _factors_of_stack(
    model: PreTrainedModel, name: str, update: ExpertsUpdate
) -> Iterator[tuple[str, Factor]]:
    """The factors of each expert of the stack of this name."""
    single_names = READ_SINGLE[model.config.get_text_config().model_type]
    module, _, stack = name.rpartition(".")
    prefix = PREFIX + _stored_module(model, module)
    parts = _parts_of_stack(find_experts(model)[module], stack)
    rank = update.lora_A.shape[0] // update.experts
    for expert in range(update.experts):
        # A of all experts is one matrix, expert after expert; of B they are the last dimension.
        part_of_a = slice(expert * rank, (expert + 1) * rank)
        for projection, rows in parts.items():
            layer = f"{prefix}.{expert}.{single_names[projection]}"
            yield f"{layer}.lora_A.weight", Factor(update.lora_A, (part_of_a,))
            yield f"{layer}.lora_B.weight", Factor(update.lora_B, (rows, slice(None), expert))


def _stored_module(model: PreTrainedModel, name: str) -> str:
    """The name that the experts' module of this name has in a file of the one-by-one form."""
    whole = name_in_whole(model, name)
    block = STORED_PARENTS.get(model.config.get_text_config().model_type)
    if block is None:
        return whole
    parent = whole.removesuffix(".mlp.experts")
    return f"{parent}.{block}.experts"


def _parts_of_stack(experts: Experts, stack: str) -> dict[str, slice]:
    """The projections in a stack of experts, and the rows of each in an expert's B."""
    rows = slice(None)
    if stack == "down_proj":
        return {DOWN: rows}
    if not experts.has_gate:
        return {UP: rows}
    # Interleaved, or one after the other: as halves of what is left.
    if not experts.is_concatenated:
        return {GATE: slice(0, None, 2), UP: slice(1, None, 2)}
    width = experts.stack(stack).shape[2] // 2
    return {GATE: slice(0, width), UP: slice(width, 2 * width)}


def _write_single(part: Path, folder: Path, factors: Mapping[str, Factor]) -> None:
    """Write PEFT's two files with the factors, to `part`; `folder` has the run's own."""
    # A and B of a layer's two stacks, whose experts take turns in the file.
    read_whole = lru_cache(maxsize=4)(StoredTensor.read)
    tensors = {}
    factor_of = {}
    for name, factor in factors.items():
        stored = factor.stored
        values = torch.empty(stored.shape, dtype=stored.dtype, device="meta")[factor.part]
        tensors[name] = values
        factor_of[id(values)] = factor

    def read(values: Tensor, rows: slice) -> Iterator[Tensor]:
        stored, part = factor_of[id(values)]
        yield read_whole(stored)[part][rows]

    save_tensors(part / ADAPTER_WEIGHTS, tensors, {"format": "pt"}, read=read)
    settings = read_json(folder / ADAPTER_CONFIG, again="copy the adapter again")
    settings.pop("target_parameters", None)
    targets = set()
    for name in factors:
        targets.add(last_part(name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")))
    settings["target_modules"] = sorted(targets)
    text = json.dumps(settings, indent=2, sort_keys=True)
    (part / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
