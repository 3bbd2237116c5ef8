"""Merge an adapter into its base, write a plain Transformers folder, and check that it answers alike.

    load -> logits of adapter and base -> add B A to each weight -> write beside OUTPUT -> reload with plain
    Transformers -> logits again -> check (merge_check.py) -> rename into place

A merge that fails the check is kept as `OUTPUT.rejected`. Peak memory is one model (it is freed before the folder is
read again), and one more in fp32 for the second half of a 16-bit merge's check, where there is room.
"""

import gc
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from tunesmith.adapter.lora import Lora, LoraLinear, disabled, merged_weight
from tunesmith.checkpoint.model_card import model_card
from tunesmith.config.schema import Adapter
from tunesmith.errors import CheckpointError, MachineError, UsageError, disk_fault
from tunesmith.host.files import existing_folder, follow_umask, refuse_full_disk
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
from tunesmith.model import spec
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.older_readers import write_for_older_readers
from tunesmith.model.safetensors_files import read_json
from tunesmith.model.save_tensors import SHARD
from tunesmith.quant.nf4 import Nf4Linear
from tunesmith.quant.schemes import NF4, scheme_of

MERGE_FILE = (
    "merge.json"  # the check, and the size of each file: the mark of a folder that a merge wrote
)
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


def merge(
    path: str | Path,
    output: str | Path,
    *,
    dtype: Dtype | None = None,
    force: bool = False,
    device: str | None = None,
) -> Merged:
    """Merge the adapter at `path` into its base, write it to `output`, and check that it answers alike.

    >>> tunesmith.merge("runs/my-run", "merged")

    Args:
        path: a run directory, a checkpoint, final/, or an adapter's folder.
        output: a folder that is new or empty; with `force` also one that an earlier merge wrote, and nothing else is in:
            it is replaced at the very end.
        dtype: of the written weights; None keeps the base's.

    Raises:
        UsageError: there is no adapter, or the output cannot be used.
        MachineError: no room on the disk.
        CheckpointError: the merged model answers differently; it is kept as `<output>.rejected`.
    """
    # A loop of links stays as it is
    location, goal = (
        locate_run(path),
        Path(os.path.realpath(output)),
    )
    if location.kind != "adapter":
        where = str(location.folder or path)
        why = (
            "it is a full fine-tune: a whole model already"
            if location.kind == "full"
            else "it is a plain model"
        )
        raise UsageError(
            f"{path} has no adapter to merge", where=where, why=why, fix=f"use {where}, or copy it"
        )
    if not goal.exists() and (old := _old(goal)).exists():
        old.rename(goal)  # a kill came between the two renames of `_move_into_place`
    _check_output(goal, location, force=force)
    chosen: Dtype = dtype or location.base.dtype
    config = fetch(location.base) / "config.json"
    needed = (
        spec.read_spec(read_json(config), where=str(config)).parameters
        * DTYPES[chosen].itemsize
        * ROOM
    )
    fix = "free some space, or write to another disk with --output"
    refuse_full_disk(goal, round(needed), what="the merged model", fix=fix)
    temporary = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        check = _merge_and_check(location, temporary, chosen, device)
        files = _file_sizes(temporary)
        about = {**asdict(check), "files": files}
        (temporary / MERGE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        follow_umask(temporary)
        _move_into_place(temporary, goal, check)
    except Exception as error:
        if not (full := disk_fault(error)):  # safetensors has errors of its own for it
            raise
        why, fix = (
            "nothing was written in place",
            "make room there (df -h), or name a folder on another disk",
        )
        raise CheckpointError(full, where=f"--output {output}", why=why, fix=fix) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if bars:
            hf_logging.enable_progress_bar()
    nf4 = scheme_of(location.base) is NF4
    note = (
        f"the base is in nf4: the adapter was merged into its dequantised {chosen} weights"
        if nf4
        else ""
    )
    return Merged(
        str(output),
        location.base.name,
        str(location.folder),
        chosen,
        sum(files.values()),
        note,
        check,
    )


def _check_output(output: Path, location: RunLocation, *, force: bool) -> None:
    """Refuse an output that cannot be written, would overwrite something, or holds the adapter or its base."""
    where = "--output"
    if output.exists() and not output.is_dir():
        raise UsageError(
            f"{output} is a file", where=where, fix="name a folder that is new or empty"
        )
    sources = [
        p.resolve()
        for p in (location.folder, Path(location.base.name))
        if p is not None and p.exists()
    ]
    if any(output == source or output in source.parents for source in sources):
        raise UsageError(
            f"{output} is where the adapter or its base lies",
            where=where,
            fix="name another folder",
        )
    if output == Path.cwd() or output in Path.cwd().parents:
        raise UsageError(
            f"{output} is the folder you are in", where=where, fix="name a folder in it"
        )
    for folder, replace in ((output, force), (Path(f"{output}.rejected"), True)):
        if foreign := _foreign_file(folder):
            why = "--force replaces only what an earlier merge wrote, and nothing has changed since"
            fix = "name a folder that is new or empty"
            raise UsageError(
                f"{folder} is not empty: it holds {foreign}", where=where, why=why, fix=fix
            )
        if not replace and (folder / MERGE_FILE).exists():
            fix = "name another folder, or add --force to replace it"
            raise UsageError(f"{output} holds an earlier merge", where=where, fix=fix)
    parent = existing_folder(output.parent)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(
            f"{parent} cannot be written", where=where, fix="name a folder that you may write"
        )


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by its relative path."""
    return {
        str(p.relative_to(folder)): p.lstat().st_size
        for p in sorted(folder.rglob("*"))
        if not p.is_dir()
    }


def _foreign_file(folder: Path) -> str | None:
    """A file in a folder that no merge wrote, or that has another size by now; None if there is none."""
    try:
        written = dict(json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return min((p.name for p in folder.iterdir()), default=None) if folder.is_dir() else None
    found = _file_sizes(folder).items()
    return next(
        (name for name, size in found if name != MERGE_FILE and written.get(name) != size), None
    )


def _merge_and_check(
    location: RunLocation, folder: Path, dtype: Dtype, device: str | None
) -> MergeCheck:
    loaded = load_run(location, device=device)
    model, chosen_device = loaded.model, loaded.model.device
    prompts, source = merge_check.probe_prompts(loaded)
    if dtype == "fp32":
        to_plain(model, torch.float32, merge_adapter=False)
    adapted = logits_of(model, prompts)
    with disabled(model):
        base = compare_logits(adapted, logits_of(model, prompts))
    to_plain(model, DTYPES[dtype], merge_adapter=True)
    folder.mkdir(parents=True)
    write_merged(loaded, folder, dtype)
    del loaded, model
    gc.collect()
    written = _reload(folder).to(chosen_device)
    again = logits_of(written, prompts)
    written.set_attn_implementation("eager")  # the same formula as sdpa, its sums in another order
    noise = compare_logits(again, logits_of(written, prompts))
    merged = compare_logits(adapted, again)
    exact, largest = None, largest_logit(adapted)
    if dtype != "fp32" and written.num_parameters() * EXACT_BYTES <= available_memory():
        # The same merge in fp32 on the CPU, and the written weights compared with it.
        model = load_run(location, device="cpu").model
        to_plain(model, torch.float32, merge_adapter=False)
        adapted = logits_of(model, prompts)
        to_plain(model, torch.float32, merge_adapter=True)
        found = compare_logits(adapted, logits_of(model, prompts))
        exact = ExactCheck(found, largest_logit(adapted), *merge_check.count_off(written, model))
    rules = merge_check.merge_rules(dtype, merged, base, noise, largest, exact)
    return MergeCheck(
        dtype, merged, base, noise, largest, sum(map(len, prompts)), source, exact, rules
    )


def _reload(folder: Path) -> PreTrainedModel:
    """The written folder as any Transformers user loads it; every weight must come from the files, and all of them."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}:
        what = "plain Transformers does not read the merged folder as it was written"
        raise CheckpointError(what, where=str(folder), why=str(wrong))
    return model.eval()


def _move_into_place(temporary: Path, goal: Path, check: MergeCheck) -> None:
    """Give the written folder its name: the goal, or `<goal>.rejected` if the check failed."""
    if not check.passed:
        rejected = Path(f"{goal}.rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        temporary.rename(rejected)
        kl = f"mean KL {check.merged.mean_kl:.3g} nats (base against adapter: {check.base.mean_kl:.3g})"
        what = f"the merged model answers differently: logits up to {check.merged.max_logit:.3g} apart, {kl}"
        why = "; ".join(text for text, holds in check.rules if not holds)
        fix = "merge with --dtype fp32, or serve the adapter beside its base"
        raise CheckpointError(what, where=str(rejected), why=why, fix=fix)
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
    """Cast a model to `dtype` in place; 4-bit layers become plain linear ones, and adapted ones if they are merged.

    The base's values stay those of the type that was trained: in fp32 this is the trained model in exact arithmetic.
    A merged weight is rounded once.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, Lora) and merge_adapter:
            model.set_submodule(name, _linear(merged_weight(module, dtype), module.bias))
        elif isinstance(module, Nf4Linear):
            plain = _linear(module.dense().to(dtype), module.bias)
            if isinstance(module, Lora):
                adapted = LoraLinear(plain, Adapter(rank=module.lora_A.shape[0]))
                adapted.lora_A, adapted.lora_B, adapted.scaling = (
                    module.lora_A,
                    module.lora_B,
                    module.scaling,
                )
                plain = adapted
            model.set_submodule(name, plain)
    for (
        parameter
    ) in model.parameters():  # tied ones stay tied, and buffers (rotary frequencies) as they are
        parameter.data = parameter.data.to(dtype)
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        # Training changed one of two tied matrices: an embedding trained in full, or an adapted head.
        model.config.tie_word_embeddings = False


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias.detach()}
    plain.load_state_dict(values, assign=True)
    return plain.requires_grad_(False)


def write_merged(loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Write the merged model as Transformers files: weights in shards, tokenizer with its template, settings, a card."""
    settings = loaded.weights / "generation_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    # The checkpoint's sampling defaults are copied unread: save_pretrained refuses some that models do ship.
    loaded.model.generation_config = GenerationConfig()
    loaded.model.save_pretrained(folder, max_shard_size=SHARD)
    loaded.tokenizer.save_pretrained(folder)
    write_for_older_readers(folder)
    known |= {
        "eos_token_id": sorted(loaded.template.end_ids),
        "pad_token_id": loaded.tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(
        json.dumps(known, indent=2) + "\n", encoding="utf-8"
    )
    for notice in sorted(loaded.weights.iterdir()):
        if notice.is_file() and notice.name.upper().startswith(
            ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
        ):
            shutil.copyfile(notice, folder / notice.name)
    location = loaded.location
    card = model_card(location.base, location.run, (location.folder or folder).parent, merged=dtype)
    (folder / "README.md").write_text(card, encoding="utf-8")
