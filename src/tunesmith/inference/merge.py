"""Put an adapter into its base, write a plain Transformers folder, and prove that it answers alike.

    open -> ask (adapter, base, noise) -> fold B A into each weight -> write beside the goal -> reload with plain
    Transformers -> ask again -> judge (proof.py) -> rename into place

A merge that fails is kept as `DIR.rejected` and never under the name that was asked for. Peak memory is one model
(modules are folded one by one, and the model is freed before the folder is read again), and one more in fp32 for the
second half of a 16-bit merge's proof, where there is room.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from tunesmith.adapter.lora import Lora, LoraLinear, disabled, loras, saved_parameters
from tunesmith.config.schema import Adapter
from tunesmith.errors import CheckpointError, MachineError, UsageError
from tunesmith.hub.fetch import fetch
from tunesmith.inference import merge_check
from tunesmith.inference.load_run import load_run, locate_run
from tunesmith.inference.merge_check import ExactCheck, MergeCheck
from tunesmith.model import spec
from tunesmith.model.load import DTYPES
from tunesmith.model.safetensors_files import read_json
from tunesmith.quant.nf4 import Nf4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tunesmith.inference.load_run import LoadedModel, RunLocation

SHARD = "5GB"
ROOM = 1.1  # of the weights: the rest of the folder, and a head that stands for itself
EXACT_BYTES = 8  # a parameter: written, fp32, and what comparing takes


@dataclass(frozen=True)
class Merged:
    """A finished merge: where it lies, what it is, what is to be known about it, and the proof."""

    output: str
    base: str
    adapter: str
    dtype: str
    bytes: int
    note: str
    merge_check: MergeCheck

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def check_output(output: Path, place: RunLocation, *, force: bool) -> None:
    """Refuse a goal that would overwrite something, or the very thing that is merged.

    Raises:
        UsageError: it is a file, holds files and `force` is not set, or is or holds the adapter or the base.
        MachineError: it cannot be written there.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file", where="--output", fix="name a folder that is new or empty")
    sources = [p.resolve() for p in (place.folder, Path(place.base.name)) if p is not None and p.exists()]
    goal = output.resolve()
    if any(goal == s or goal in s.parents for s in sources):
        raise UsageError(f"{output} is where the adapter or its base lies", where="--output", fix="name another folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UsageError(
            f"{output} is not empty", where="--output", fix="name another folder, or add --force to replace it"
        )
    parent = _existing(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent} cannot be written", where="--output", fix="name a folder that you may write")


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in path.parents if p.is_dir())


def check_room(output: Path, needed: int) -> None:
    """Refuse a disk that has less than `needed` bytes left, before anything is loaded."""
    parent = _existing(output)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise MachineError(
            f"not enough room for the merged model: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free",
            where=str(parent),
            fix="free some space, or write to another disk with --output",
        )


def widen(model: PreTrainedModel) -> None:
    """Bring a model to fp32 in place, adapter and all; 4-bit layers become plain ones that hold their dense weights.

    The base's values stay what they were in the type that was trained, so this is the trained model in exact arithmetic.
    """
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Nf4Linear)]:
        plain = _linear(module.dense().float(), module.bias)
        if isinstance(module, Lora):
            adapted = LoraLinear(plain, Adapter(rank=module.lora_A.shape[0]))
            adapted.lora_A, adapted.lora_B, adapted.scaling = module.lora_A, module.lora_B, module.scaling
            plain = adapted
        model.set_submodule(name, plain)
    _cast(model, torch.float32)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """All parameters to a type; tied ones stay tied, and buffers (rotary frequencies) as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def summed(module: Lora) -> torch.Tensor:
    """weight + scaling B A in fp32, [out_features, in_features], not rounded."""
    return module.dense().detach().float() + module.update().detach()


def fold(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Turn each adapted or 4-bit layer into a plain linear one, in place, its sum rounded once; all weights to `dtype`.

    Returns:
        how many layers had an adapter.
    """
    count = sum(1 for _ in loras(model))
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, Lora | Nf4Linear)]:
        weight = summed(module) if isinstance(module, Lora) else module.dense()
        model.set_submodule(name, _linear(weight.to(dtype), module.bias))
    _cast(model, dtype)
    ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())]
    if any(True for _ in saved_parameters(model)) and ends[0] is not ends[1]:
        # An embedding trained in full left the head that was tied to it as it was: two matrices now, not one.
        model.config.tie_word_embeddings = False
    return count


def write(opened: LoadedModel, folder: Path, dtype: str) -> None:
    """Write the folded model as Transformers files: weights in shards, tokenizer with its template, settings, a card."""
    model, base_folder = opened.model, opened.folder
    settings = base_folder / "generation_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    # The checkpoint's sampling defaults go along unread: save_pretrained refuses some that models do ship.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=SHARD)
    opened.tokenizer.save_pretrained(folder)
    known |= {"eos_token_id": sorted(opened.template.stops), "pad_token_id": opened.tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for notice in sorted(base_folder.iterdir()):
        if notice.is_file() and notice.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
            shutil.copyfile(notice, folder / notice.name)
    (folder / "README.md").write_text(card(opened, dtype), encoding="utf-8")


def card(opened: LoadedModel, dtype: str) -> str:
    """A short model card: what it was made from, how, and whose licence stands."""
    base, run = opened.base_name, opened.run
    licence = _licence(opened.folder)
    shown = base if not Path(base).exists() else Path(base).name
    head = ["---", *([f"license: {licence}"] if licence else []), "library_name: transformers"]
    head += [*([f"base_model: {shown}"] if shown == base else []), "pipeline_tag: text-generation", "---", ""]
    body = [
        f"# {shown}, fine-tuned",
        "",
        f"`{shown}` with a LoRA adapter folded into its weights ({dtype}), written by tunesmith.",
        "",
    ]
    if run is not None:
        kept = f"rank {run.adapter.rank}, alpha {run.adapter.alpha:g}, on {run.adapter.target}"
        body += [
            f"- adapter: {kept}",
            f"- trained for {run.train.duration} at a learning rate of {run.train.learning_rate:g}",
        ]
        if run.model.quantize != "none":
            body += [f"- trained over a {run.model.quantize} base; folded into that base's dequantised {dtype} weights"]
    what = f"`{licence}`, the licence of the base model" if licence else "the licence of the base model"
    body += [f"- licence: {what}, holds for this model too; read it before you pass the weights on", ""]
    return "\n".join(head + body)


def _licence(base_folder: Path) -> str:
    """What the base's own card says, without a YAML reader: the line `license: apache-2.0` of its front matter."""
    readme = base_folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    front = text.split("---")[1] if text.startswith("---") and text.count("---") >= 2 else ""
    found = [line.partition(":")[2].strip() for line in front.splitlines() if line.startswith("license:")]
    return found[0] if found else ""


def _reload(folder: Path, device: torch.device) -> PreTrainedModel:
    """The written folder as any Transformers user loads it; every weight must come from the files.

    Raises:
        CheckpointError: weights are missing from the files, or the files hold some that the model does not know.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="sdpa", output_loading_info=True
    )
    odd = {
        name: sorted(map(str, info[name]))
        for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[name]
    }
    if odd:
        raise CheckpointError(
            "plain Transformers does not read the merged folder as it was written", where=str(folder), why=str(odd)
        )
    return model.to(device).eval()


def merge(
    path: str | Path,
    output: str | Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    force: bool = False,
    device: str | None = None,
) -> Merged:
    """Merge the adapter at `path` into its base and write it to `output`; prove that it answers alike.

    Args:
        path: a run directory, a checkpoint, final/, or an adapter's folder.
        output: a folder that is new or empty (or holds anything, with `force`: it is replaced at the very end).
        dtype: of the written weights; None keeps the base's.

    Raises:
        UsageError: there is no adapter, or the output cannot be taken.
        MachineError: no room on the disk.
        CheckpointError: the merged model answers differently; it is kept as `<output>.rejected`.
    """
    place, goal = locate_run(path), Path(output)
    if place.kind != "adapter":
        whole = "a full fine-tune: it is a whole model already" if place.kind == "full" else "a plain model"
        raise UsageError(
            f"{path} has no adapter to merge",
            where=str(place.folder or path),
            why=f"this is {whole}",
            fix=f"use {place.folder or path} as it is, or copy it",
        )
    check_output(goal, place, force=force)
    chosen = dtype or place.base.dtype
    config = fetch(place.base) / "config.json"
    parameters = spec.read_spec(read_json(config), where=str(config)).parameters
    check_room(goal, round(parameters * DTYPES[chosen].itemsize * ROOM))
    opened = load_run(path, device=device, place=place)
    temp = goal.with_name(f".{goal.name}.{os.getpid()}.part")
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        found = _merge(opened, temp, chosen)
        (temp / "merge.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
        size = sum(p.stat().st_size for p in temp.rglob("*") if p.is_file())
        _settle(temp, goal, found)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if bars:
            hf_logging.enable_progress_bar()
    nf4 = place.base.quantize == "nf4"
    note = f"the base was held in nf4: the adapter went into its dequantised {chosen} weights" if nf4 else ""
    return Merged(str(goal), place.base.name, str(place.folder), chosen, size, note, found)


def _merge(opened: LoadedModel, temp: Path, dtype: str) -> MergeCheck:
    model, device, place = opened.model, opened.model.device, opened.place
    prompts, source = merge_check.probes_of(opened)
    if dtype == "fp32":
        widen(model)
    adapted = merge_check.logits_of(model, prompts)
    with disabled(model):
        base = merge_check.difference(adapted, merge_check.logits_of(model, prompts))
    fold(model, DTYPES[dtype])
    temp.mkdir(parents=True)
    write(opened, temp, dtype)
    del opened, model
    gc.collect()
    written = _reload(temp, device)
    again = merge_check.logits_of(written, prompts)
    with merge_check.eager(written):
        noise = merge_check.difference(again, merge_check.logits_of(written, prompts))
    merged = merge_check.difference(adapted, again)
    largest, positions = merge_check.largest_of(adapted), sum(map(len, prompts))
    exact = None if dtype == "fp32" else _exact(place, written, prompts)
    rules = merge_check.check_rules(dtype, merged, base, noise, largest, exact)
    return MergeCheck(dtype, merged, base, noise, largest, positions, source, exact, rules)


def _exact(place: RunLocation, written: PreTrainedModel, prompts: list[list[int]]) -> ExactCheck | None:
    """The same merge in fp32 on the CPU, and the written weights beside it; None where there is no room for it."""
    parameters = sum(p.numel() for p in written.parameters())
    if parameters * EXACT_BYTES > merge_check.memory_available():
        return None
    model = load_run(place.folder or "", device="cpu", place=place).model
    widen(model)
    adapted = merge_check.logits_of(model, prompts)
    fold(model, torch.float32)
    found = merge_check.difference(adapted, merge_check.logits_of(model, prompts))
    return ExactCheck(found, merge_check.largest_of(adapted), *merge_check.rounded_once(written, model))


def _settle(temp: Path, goal: Path, found: MergeCheck) -> None:
    """Give the written folder its name: the goal, or `<goal>.rejected` if the proof failed."""
    if not found.passed:
        rejected = goal.with_name(goal.name + ".rejected")
        shutil.rmtree(rejected, ignore_errors=True)
        temp.rename(rejected)
        raise CheckpointError(
            f"the merged model answers differently: logits up to {found.merged.max_logit:.3g} apart, "
            f"mean KL {found.merged.mean_kl:.3g} nats (base against adapter: {found.base.mean_kl:.3g})",
            where=str(rejected),
            why="; ".join(text for text, holds in found.rules if not holds),
            fix="merge with --dtype fp32, or serve the adapter beside its base",
        )
    old = goal.with_name(f".{goal.name}.{os.getpid()}.old")
    if goal.exists():
        goal.rename(old)
    temp.rename(goal)
    shutil.rmtree(old, ignore_errors=True)
