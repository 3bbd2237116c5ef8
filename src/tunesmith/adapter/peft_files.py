"""PEFT's files, `adapter_config.json` and `adapter_model.safetensors`, written and read.

What an adapter asks for and is not computed here (DoRA, a rank by layer, ...) is refused by name, never ignored.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError, first_line
from tunesmith.host_files import refuse_special_files
from tunesmith.model.safetensors_files import read_header, read_json
from tunesmith.model.save_tensors import save_tensors
from tunesmith.model.weights import StoredTensor, stored_tensors
from tunesmith.private import local_slices
from tunesmith.sharded import local_part

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# Options of PEFT's LoraConfig that change the result, and which of their values mean plain LoRA.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda v: v == "LORA",
    "task_type": lambda v: v in (None, "CAUSAL_LM"),
    "bias": lambda v: v in (None, "none"),
    "fan_in_fan_out": lambda v: not v,
    **{
        name: lambda v: not v
        for name in (
            "use_dora", "rank_pattern", "alpha_pattern", "use_qalora", "lora_bias", "layers_to_transform",
            "layers_pattern", "exclude_modules", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
            "layer_replication", "megatron_config", "corda_config", "eva_config", "arrow_config", "use_bdlora",
        )
    },
    # These prepare the base weight; PEFT stores an adapter that was converted back under the plain name.
    "init_lora_weights": lambda v: v in (None, True, False, "gaussian", "orthogonal", "eva", "olora"),
}  # fmt: skip

# What every plain LoRA's configuration says; PEFT's defaults for the rest mean the same. Written by hand: `import peft`
# takes a second, in which the training thread hardly gets the interpreter.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layers_pattern": None,
    "auto_mapping": None,
}


def adapter_files(
    model: nn.Module, adapter: Adapter, base_name: str, revision: str | None
) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """The contents of PEFT's two files: the trained parameters, not copied, and the configuration, by PEFT's names.

    `base_name` is the base model's Hub id or the folder that the recipe names.
    """
    adapted, saved = {name for name, _ in lora.loras(model)}, {name for name, _, _ in lora.saved_parameters(model)}
    targets, to_save = ({name.rsplit(".", 1)[-1] for name in names} for names in (adapted, saved))
    # Last names, but full ones where PEFT would match other modules by a last name too.
    own = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    targets = targets if {name for name in own if name.rsplit(".", 1)[-1] in targets} == adapted else adapted
    to_save = to_save if {n for n, _ in model.named_modules() if n.endswith(tuple(to_save))} == saved else saved
    settings = PLAIN | {
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(to_save) or None,
    }
    return _peft_tensors(model), settings


def write_adapter(folder: Path | None, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write PEFT's two files, as of `adapter_files`, to `folder`, an existing one; None: as in `save_tensors`."""
    save_tensors(folder / WEIGHTS if folder else None, tensors, {"format": "pt"})
    if folder:
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by PEFT's names."""
    layers = dict(lora.loras(model))
    tensors = {f"{PREFIX}{name}.lora_A.weight": layer.lora_A for name, layer in layers.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": layer.lora_B for name, layer in layers.items()}
    saved = lora.saved_parameters(model)
    return tensors | {f"{PREFIX}{name}.{key}": module.get_parameter(key) for name, module, key in saved}


def find_adapter(name: str) -> Path:
    """The folder of an adapter: `name` itself, or what the Hub (or its cache) has under that id, else a ModelError."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = f"the adapter {name!r} is neither a folder nor an adapter on the Hub that can be read"
        fix = "name a folder with adapter_config.json, or a Hub id; for a private one set HF_TOKEN"
        raise ModelError(what, where="adapter.from", why=first_line(error), fix=fix) from error


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder by its `adapter_config.json`; ModelError where that is missing, broken or not plain LoRA."""
    refuse_special_files(folder)
    file = folder / CONFIG
    if not file.exists():
        raise ModelError(f"there is no {CONFIG}", where=str(folder), fix="name a PEFT adapter's folder")
    raw = read_json(file, again="copy the adapter again")
    for name, neutral in NEUTRAL.items():
        if name in raw and not neutral(raw[name]):
            what = f"the adapter has {name} = {json.dumps(raw[name])}, which is not supported"
            why = "only plain LoRA and rsLoRA of one rank are computed here"
            fix = "merge it into its base with PEFT, and start from the merged model"
            raise ModelError(what, where=str(file), why=why, fix=fix)
    try:
        target = raw["target_modules"]
        values = {"rank": raw["r"], "alpha": raw["lora_alpha"], "dropout": raw.get("lora_dropout") or 0.0}
        values |= {"rslora": bool(raw.get("use_rslora")), "modules_to_save": raw.get("modules_to_save") or []}
        values["target"] = target if isinstance(target, str) else sorted(target)
        return TypeAdapter(Adapter).validate_json(json.dumps(values))  # held to the recipe's types and bounds
    except (KeyError, TypeError, ValueError) as error:
        why = f"a value is missing or wrong: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{first['loc'][0]} is {str(first['input'])[:80]!r}: {first['msg']}"
        what, fix = "the adapter's configuration cannot be read", "name a PEFT adapter's folder, or copy it again"
        raise ModelError(what, where=str(file), why=why, fix=fix) from error


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Load PEFT's two files into the model's adapter; ModelError where scaling, layers, shapes or names differ from its."""
    adapter = read_adapter(folder)
    theirs = adapter.alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
    for name, module in lora.loras(model):
        if abs(module.scaling - theirs) > 1e-9 * abs(theirs):
            what = f"the adapter scales its update by {theirs:g}, the recipe by {module.scaling:g}"
            fix = f"set adapter.rank: {adapter.rank}, adapter.alpha: {adapter.alpha:g}, adapter.rslora: "
            raise ModelError(what, where=f"{folder / CONFIG}, layer {name}", fix=fix + str(adapter.rslora).lower())
    file, own = folder / WEIGHTS, _peft_tensors(model)
    try:
        read_header(file)
    except ModelError as error:
        what, fix = "the adapter's weights cannot be read", "copy the adapter again"
        raise ModelError(what, where=str(file), why=f"{error.what}. {error.why}", fix=fix) from error
    with stored_tensors(file) as stored:
        names = {n for n in stored if n in own or not _is_base(model, n, stored[n])}
        for what, wrong in (
            ("are missing in the adapter", own.keys() - names),
            ("are in the adapter and not in the recipe's target or modules_to_save", names - own.keys()),
            ("have another shape", {n for n in names & own.keys() if stored[n].shape != own[n].shape}),
        ):
            if wrong:
                shown = ", ".join(n.removeprefix(PREFIX) for n in sorted(wrong)[:3])
                listed = f"{len(wrong)} tensors {what}: {shown}{', ...' if len(wrong) > 3 else ''}"
                why = "adapter and model do not fit each other"
                fix = "take the base model, target, rank and modules_to_save that the adapter was made with"
                raise ModelError(listed, where=str(file), why=why, fix=fix)
        for name in names:
            stored[name].into_part(own[name])


def _is_base(model: nn.Module, name: str, stored: StoredTensor) -> bool:
    """Whether a stored tensor is a copy of a base weight: PEFT adds embedding and head when one of them carries an adapter."""
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    own = dict(model.named_parameters(remove_duplicate=False)).get(name)
    if own is None or own.shape != stored.shape:
        return False
    return torch.equal(local_part(own).cpu(), stored[local_slices(own)].to(own.dtype))
