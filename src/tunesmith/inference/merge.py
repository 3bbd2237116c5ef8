"""Merge an adapter into its base, write a plain Transformers folder, and check that it answers
alike.

    load -> logits of adapter and base -> add B A to each weight -> write beside OUTPUT
    -> reload with plain Transformers -> logits again -> check (merge_check.py) -> rename into place

A merge that fails the check is kept as `OUTPUT.rejected`. Peak memory is one model (it is freed
before the folder is read again), and one more in fp32 for the second half of a 16-bit merge's
check, where there is room.
"""

import gc
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from tunesmith.adapter.lora import Lora, LoraLinear, disabled, merged_weight
from tunesmith.checkpoint.contents import weights_of
from tunesmith.checkpoint.model_card import model_card
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import CheckpointError, MachineError, UsageError, disk_fault
from tunesmith.host.files import existing_folder, follow_umask, require_disk_space
from tunesmith.host.logger import lines_by_default
from tunesmith.host.memory import available_memory
from tunesmith.hub.fetch import fetch
from tunesmith.inference import merge_check
from tunesmith.inference.load_run import Dtype, LoadedModel, RunLocation, load_run, locate_run
from tunesmith.inference.merge_check import (
    ExactCheck,
    MergeCheck,
    compare_logits,
    largest_logit,
    logits_of,
)
from tunesmith.model.composite import COMPOSITES
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.older_readers import write_for_older_readers
from tunesmith.model.safetensors_files import read_headers, read_json
from tunesmith.model.save_tensors import save_sharded
from tunesmith.model.stored_form import in_stored_form, write_model_config
from tunesmith.quant.nf4 import Nf4Linear
from tunesmith.quant.schemes import NF4, scheme_of

# The check, and the size of each file: the mark of a folder that a merge wrote.
MERGE_FILE = "merge.json"
ROOM = 1.1  # of the weights: the rest of the folder, and an untied head
EXACT_BYTES = 8  # a parameter: written, fp32, and what comparing takes


@dataclass(frozen=True)
class Merged:
    """A finished merge: the folder, what it was made from, a note about it, and the check."""

    output: str
    base: str
    adapter: str
    dtype: str
    bytes: int
    note: str
    merge_check: MergeCheck


@lines_by_default()
def merge(
    path: str | Path,
    output: str | Path,
    *,
    dtype: Dtype | None = None,
    force: bool = False,
    device: str | None = None,
) -> Merged:
    """Merge the adapter at `path` into its base, write it to `output`, and check that it answers
    alike.

    >>> tunesmith.merge("runs/my-run", "merged")

    Args:
        path: a run directory, a checkpoint, final/, or an adapter's folder.
        output: a folder that is new or empty; with `force` also one that an earlier merge wrote,
            and nothing else is in: it is replaced at the very end.
        dtype: of the written weights; None keeps the base's.

    Raises:
        UsageError: there is no adapter, or the output cannot be used.
        MachineError: no room on the disk.
        CheckpointError: the merged model answers differently; it is kept as `<output>.rejected`.
    """
    location = locate_run(path)
    # Not Path.resolve, which raises for a loop of links; this leaves it as it is.
    goal = Path(os.path.realpath(output))
    if location.kind != "adapter":
        where = str(location.folder or path)
        why = "it is a plain model"
        if location.kind == "full":
            why = "it is a full fine-tune: a whole model already"
        fix = f"use {where}, or copy it"
        raise UsageError(f"{path} has no adapter to merge", where=where, why=why, fix=fix)
    # A kill came between the two renames of `_move_into_place`.
    if not goal.exists() and _old(goal).exists():
        _old(goal).rename(goal)
    _check_output(goal, location, force=force)
    dtype = dtype or location.base.dtype
    _check_room(goal, location.base, dtype)
    temporary = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        check = _merge_and_check(location, temporary, dtype, device)
        sizes = _file_sizes(temporary)
        text = json.dumps({**asdict(check), "files": sizes}, indent=2)
        (temporary / MERGE_FILE).write_text(text + "\n", encoding="utf-8")
        follow_umask(temporary)
        _move_into_place(temporary, goal, check)
    except Exception as error:
        # safetensors has errors of its own for a full disk.
        fault = disk_fault(error)
        if not fault:
            raise
        raise CheckpointError(
            fault,
            where=f"--output {output}",
            why="nothing was written in place",
            fix="make room there (df -h), or name a folder on another disk",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if had_bars:
            hf_logging.enable_progress_bar()
    note = ""
    if scheme_of(location.base) is NF4:
        note = f"the base is in nf4: the adapter was merged into its dequantised {dtype} weights"
    return Merged(
        output=str(output),
        base=location.base.name,
        adapter=str(location.folder),
        dtype=dtype,
        bytes=sum(sizes.values()),
        note=note,
        merge_check=check,
    )


def _check_room(goal: Path, base: Model, dtype: Dtype) -> None:
    """MachineError where the disk has no room for the merged model."""
    folder = fetch(base)
    config = read_json(folder / "config.json")
    parameters = model_spec(config, where=f"{folder}/config.json").parameters
    if config["model_type"] in COMPOSITES:
        # Images and sound are copied.
        entries = chain.from_iterable(read_headers(folder).values())
        parameters = sum(math.prod(entry.shape) for entry in entries)
    needed = round(parameters * DTYPES[dtype].itemsize * ROOM)
    fix = "free some space, or write to another disk with --output"
    require_disk_space(goal, needed, what="the merged model", fix=fix)


def _check_output(output: Path, location: RunLocation, *, force: bool) -> None:
    """UsageError for an output that would overwrite something, or holds the adapter or its base;
    MachineError for one that cannot be written."""

    def unusable(what: str, fix: str, why: str = "") -> UsageError:
        return UsageError(what, where="--output", why=why, fix=fix)

    if output.exists() and not output.is_dir():
        raise unusable(f"{output} is a file", "name a folder that is new or empty")
    for source in (location.folder, Path(location.base.name)):
        if source is None or not source.exists():
            continue
        source_path = source.resolve()
        if output == source_path or output in source_path.parents:
            raise unusable(f"{output} is where the adapter or its base lies", "name another folder")
    if output == Path.cwd() or output in Path.cwd().parents:
        raise unusable(f"{output} is the folder you are in", "name a folder in it")
    for folder in (output, Path(f"{output}.rejected")):
        foreign = _foreign_file(folder)
        if foreign:
            raise unusable(
                f"{folder} is not empty: it holds {foreign}",
                "name a folder that is new or empty",
                "--force replaces only what an earlier merge wrote, and nothing has changed since",
            )
        # A rejected merge is replaced in any case.
        if folder == output and not force and (folder / MERGE_FILE).exists():
            fix = "name another folder, or add --force to replace it"
            raise unusable(f"{output} holds an earlier merge", fix)
    parent = existing_folder(output.parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(
            f"{parent} cannot be written", where="--output", fix="name a folder that you may write"
        )


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by its relative path."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {str(file.relative_to(folder)): file.lstat().st_size for file in files}


def _foreign_file(folder: Path) -> str | None:
    """A file in a folder that no merge wrote, or that has another size by now; None if there is
    none."""
    try:
        sizes = dict(json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return min((p.name for p in folder.iterdir()), default=None) if folder.is_dir() else None
    for name, size in _file_sizes(folder).items():
        if name != MERGE_FILE and sizes.get(name) != size:
            return name
    return None


def _merge_and_check(
    location: RunLocation, folder: Path, dtype: Dtype, device: str | None
) -> MergeCheck:
    """Write the merged model to `folder` and compare its logits with the adapter's."""
    loaded = load_run(location, device=device)
    model = loaded.model
    prompts, probes = merge_check.probe_prompts(loaded)
    if dtype == "fp32":
        to_plain(model, torch.float32, merge_adapter=False)
    adapted = logits_of(model, prompts)
    with disabled(model):
        base = compare_logits(adapted, logits_of(model, prompts))
    to_plain(model, DTYPES[dtype], merge_adapter=True)
    folder.mkdir(parents=True)
    write_merged(loaded, folder, dtype)
    model_device = model.device
    # One model at a time.
    del loaded, model
    gc.collect()
    written = _reload(folder).to(model_device)
    written_logits = logits_of(written, prompts)
    # The same formula as sdpa, its sums in another order.
    written.set_attn_implementation("eager")
    noise = compare_logits(written_logits, logits_of(written, prompts))
    merged = compare_logits(adapted, written_logits)
    exact = None
    if dtype != "fp32" and written.num_parameters() * EXACT_BYTES <= available_memory():
        exact = _check_exactly(location, written, prompts)
    largest = largest_logit(adapted)
    return MergeCheck(
        dtype=dtype,
        merged=merged,
        base=base,
        noise=noise,
        largest=largest,
        positions=sum(map(len, prompts)),
        probes=probes,
        exact=exact,
        rules=merge_check.merge_rules(dtype, merged, base, noise, largest, exact),
    )


def _check_exactly(
    location: RunLocation, written: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> ExactCheck:
    """Repeat the merge in fp32 on the CPU, and compare the written weights with it."""
    model = load_run(location, device="cpu").model
    to_plain(model, torch.float32, merge_adapter=False)
    adapted = logits_of(model, prompts)
    to_plain(model, torch.float32, merge_adapter=True)
    difference = compare_logits(adapted, logits_of(model, prompts))
    return ExactCheck(difference, largest_logit(adapted), *merge_check.count_off(written, model))


def _reload(folder: Path) -> PreTrainedModel:
    """The written folder as any Transformers user loads it; every weight must come from the files,
    and all of them."""
    auto_class: Any = AutoModelForCausalLM
    if read_json(folder / "config.json")["model_type"] in COMPOSITES:
        auto_class = AutoModelForImageTextToText
    model, info = auto_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong_keys = {}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            wrong_keys[kind] = sorted(map(str, info[kind]))
    if wrong_keys:
        raise CheckpointError(
            "plain Transformers does not read the merged folder as it was written",
            where=str(folder),
            why=str(wrong_keys),
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def _move_into_place(temporary: Path, goal: Path, check: MergeCheck) -> None:
    """Give the written folder its name: the goal, or `<goal>.rejected` if the check failed."""
    if not check.passed:
        rejected = Path(f"{goal}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        temporary.rename(rejected)
        raise CheckpointError(
            "the merged model answers differently: "
            f"logits up to {check.merged.max_logit:.3g} apart, "
            f"mean KL {check.merged.mean_kl:.3g} nats "
            f"(base against adapter: {check.base.mean_kl:.3g})",
            where=str(rejected),
            why="; ".join(text for text, holds in check.rules if not holds),
            fix="merge with --dtype fp32, or serve the adapter beside its base",
        )
    old = _old(goal)
    if goal.exists():
        shutil.rmtree(old, ignore_errors=True)
        goal.rename(old)
    temporary.rename(goal)
    shutil.rmtree(old, ignore_errors=True)


def _old(goal: Path) -> Path:
    """Where an earlier merge stands while the new one takes its name."""
    return goal.with_name(f".{goal.name}.old")


def to_plain(model: PreTrainedModel, dtype: torch.dtype, *, merge_adapter: bool) -> None:
    """Cast a model to `dtype` in place; 4-bit layers become plain linear ones, and adapted ones if
    they are merged.

    The base's values stay those of the type that was trained: in fp32 this is the trained model in
    exact arithmetic. A merged weight is rounded once.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Lora) and merge_adapter:
            model.set_submodule(name, _linear(merged_weight(module, dtype), module.bias))
        elif isinstance(module, Nf4Linear):
            plain = _linear(module.dense().to(dtype), module.bias)
            if isinstance(module, Lora):
                plain = LoraLinear(plain, Adapter(rank=module.lora_A.shape[0]))
                plain.lora_A = module.lora_A
                plain.lora_B = module.lora_B
                plain.scaling = module.scaling
            model.set_submodule(name, plain)
    # Tied ones stay tied, and buffers (rotary frequencies) as they are.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    # Training changed one of two tied matrices: an embedding trained in full, or an adapted head.
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        model.config.tie_word_embeddings = False


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    values = {"weight": weight}
    if bias is not None:
        values["bias"] = bias.detach()
    plain.load_state_dict(values, assign=True)
    return plain.requires_grad_(False)


def write_merged(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Write the merged model as Transformers files: weights in shards, tokenizer with its template,
    settings, a card."""
    settings_file = loaded.weights / "generation_config.json"
    settings = {}
    if settings_file.is_file():
        settings = json.loads(settings_file.read_text(encoding="utf-8"))
    # The checkpoint's sampling defaults are copied unread: save_pretrained refuses some that models
    # do ship.
    loaded.model.generation_config = GenerationConfig()
    model = loaded.model
    model.config.dtype = DTYPES[dtype]
    save_sharded(folder, in_stored_form(model, weights_of(model)))
    write_model_config(model, folder)
    loaded.tokenizer.save_pretrained(folder)
    write_for_older_readers(folder)
    settings["eos_token_id"] = sorted(loaded.template.end_ids)
    settings["pad_token_id"] = loaded.tokenizer.pad_token_id
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    notices = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    for file in sorted(loaded.weights.iterdir()):
        if file.is_file() and file.name.upper().startswith(notices):
            shutil.copyfile(file, folder / file.name)
    location = loaded.location
    card = model_card(location.base, location.run, (location.folder or folder).parent, merged=dtype)
    (folder / "README.md").write_text(card, encoding="utf-8")
