"""From a folder to a model: config, tokenizer, the model on meta, its memory, its weights.

The order is that of a model's path: `on_meta` builds the modules without memory for their matrices; adapters,
recomputation and sharding then change them; `materialise` gives each parameter its memory; `load_weights` fills it from
safetensors, tensor by tensor, so that peak memory is the model and one slice.

`to_empty` is not used: it gives tied weights two memories and leaves buffers such as the rotary frequencies garbage
(they are in no checkpoint). Here buffers are computed for real when the model is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model import spec
from tunesmith.model.safetensors_files import read_json
from tunesmith.model.tokenizer import eos_ids, load_tokenizer, set_padding, vocab_rows
from tunesmith.model.weights import Hook, Stored, load_weights

__all__ = [
    "DTYPES",
    "Hook",
    "Stored",
    "build_on_meta",
    "eos_ids",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "materialise",
    "set_padding",
    "vocab_rows",
]  # fmt: skip

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_config(folder: Path, model: Model) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: it is missing, broken, of a kind that cannot be trained, or already quantised against the recipe.
    """
    file = folder / "config.json"
    raw = read_json(file)
    found = spec.read_spec(raw, where=str(file), trust_remote_code=model.trust_remote_code)
    if found.quantised and model.quantize != "nf4":
        raise ModelError(
            "the checkpoint is already in bitsandbytes nf4",
            where=str(file),
            why=f"the recipe says model.quantize: {model.quantize}",
            fix="set model.quantize: nf4, or take the unquantised model",
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # Transformers raises many kinds here, its own strict-dataclass errors among them
        raise ModelError(
            "Transformers cannot read the config",
            where=str(file),
            why=_first_line(error),
            fix="correct the named key, or fetch the model again: tunesmith fetch MODEL",
        ) from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class _MatricesOnMeta(TorchFunctionMode):
    """Allocate what modules make with `torch.empty` (their matrices) on meta, and compute everything else for real.

    Under `torch.device("meta")` the rotary frequencies and scales of embeddings would be lost as well: they are
    computed in the modules' constructors, and no checkpoint holds them.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(
    config: PretrainedConfig, model: Model, *, attention: str | None = None, rows: int | None = None
) -> PreTrainedModel:
    """Build the model: every parameter on meta, in the recipe's dtype; every buffer real, on the CPU.

    Args:
        config: from `config_of`; it is copied.
        model: the recipe's block.
        attention: name of the attention to use (Transformers' `attn_implementation`); None: eager where
            the recipe says so, else the best of Transformers' own.
        rows: rows of embedding and head; None: the config's vocabulary. See `vocab_rows`.

    Raises:
        ModelError: Transformers refuses the config.
    """
    config = copy.deepcopy(config)
    if rows is not None:
        config.vocab_size = rows
    if "quantization_config" in config.to_dict():
        del config.quantization_config  # the adapter's nf4 layers hold such weights, not Transformers' quantiser
    if attention is None and model.attention == "eager":
        attention = "eager"
    try:
        with _MatricesOnMeta():
            built = AutoModelForCausalLM.from_config(
                config,
                dtype=DTYPES[model.dtype],
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"Transformers cannot build this {config.model_type}",
            where=f"{config.name_or_path}/config.json",
            why=_first_line(error),
            fix="correct the value there, or fetch the model again: tunesmith fetch MODEL",
        ) from error
    _replace(built, lambda p: p.to("meta"))
    return built


def _replace(model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put `change(parameter)` in each parameter's place, once for those that several modules share."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in made:
                data = old.detach()
                new = change(data)
                made[old] = old if new is data else nn.Parameter(new, requires_grad=old.requires_grad)
            if made[old] is not old:
                setattr(module, name, made[old])


def materialise(model: nn.Module, device: torch.device) -> list[str]:
    """Give every parameter on meta its memory on `device`, uninitialised; move the real ones and all buffers there.

    Parameters keep their dtype, shared ones stay shared, and buffers keep the values and the dtype that their module
    computed (rotary frequencies: fp32).

    Returns:
        names of the parameters and buffers whose memory holds nothing yet: `load_weights` or an adapter must fill them.
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    empty = [n for n, p in model.named_parameters(remove_duplicate=False) if p.is_meta]
    empty += [n for n, b in model.named_buffers() if b.is_meta]
    _replace(model, real)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, real(buffer))  # a registered buffer stays one, and as persistent as it was
    return sorted(empty)
