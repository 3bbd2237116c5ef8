"""Creation of a model from its folder without reading weights: config, modules on meta, and memory.

`build_on_meta` builds the modules without memory for their matrices. `materialize` allocates the
parameters, which `weights.load_weights` or `random_init` then initialize. `nn.Module.to_empty` is
not used: it would untie tied weights and leave buffers that are not in the checkpoint (rotary
frequencies) uninitialized.
"""

import copy
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.arch.check_config import check_config
from tunesmith.model.arch.spec import one_line
from tunesmith.model.arch.text_config import has_own_class, text_part
from tunesmith.model.known.decoder import drop_other_parts, find_projector, vision_parameters
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.layers.gpu_kernels import keep_kernels_to_gpus
from tunesmith.model.weights.names import ENTIRE_NAMES, EntireNames
from tunesmith.model.weights.safetensors_files import (
    ENDS_AND_MIDDLE,
    Config,
    read_all_entries,
    sampled_digest,
)


def load_configs(
    folder: Path, model: Model, stated: Config | None = None
) -> tuple[PretrainedConfig, PretrainedConfig | None]:
    """Return the config of the text model, and the config of the entire vision-language model.

    The second config is None if the text model is the entire model. Raise ModelError if the config
    is missing or broken, if the model is not supported, or if the recipe's `model` section does not
    fit the model.

    Args:
        stated: the result of `check_config`, or None to check the config here.
    """
    file = folder / "config.json"
    if stated is None:
        stated = check_config(folder, model)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        if "quantization_config" in stated:
            config.quantization_config = stated["quantization_config"]
        text = text_part(config)
    # Transformers raises many types of errors here, for example its own strict-dataclass errors.
    except Exception as error:
        fix = "correct this key, or fetch the model again: tunesmith fetch MODEL"
        if "auto_map" in stated and not model.trust_remote_code:
            fix = (
                "review its code, then set model.trust_remote_code: true; for a command that "
                "takes a run add --trust-remote-code"
            )
        raise ModelError(
            "Transformers cannot read the config", where=file, why=one_line(error), fix=fix
        ) from error
    if text is config and not model.vision:
        return text, None
    if text is not config and text.tie_word_embeddings:
        text.tie_word_embeddings = not _stores_other_head(folder)
    supports_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if model.vision and (text is config or not supports_pictures):
        raise ModelError(
            "model.vision is true, but this model has no vision part",
            where=file,
            why=f"Transformers has no class for {config.model_type} with pictures and text",
            fix="set model.vision=false, or use a vision-language model",
        )
    config.tie_word_embeddings = text.tie_word_embeddings
    return text, config


def _stores_other_head(folder: Path) -> bool:
    """Return whether a vision-language checkpoint has a head that differs from the embedding.

    Return False if the weights are not in the folder. Mistral Small 3.1's config does not mention
    tied weights, and by default the head is tied. But its checkpoint has a separate head, therefore
    Transformers does not tie this head.
    """
    ends = {}
    with suppress(ModelError):  # the folder may contain only the tokenizer
        for entry in read_all_entries(folder):
            parts = entry.name.split(".")
            last = ".".join(parts[-2:])
            if last in ("embed_tokens.weight", "lm_head.weight"):
                # Omit the names, so that tensors with equal contents have equal digests.
                ends[last] = sampled_digest([replace(entry, name="")], ENDS_AND_MIDDLE)
    return len(set(ends.values())) == 2


# Minimum number of elements for which a tensor of zeros is allocated on meta. Llama 4 creates its
# stacks of experts as zeros (2.7 GB per layer in Scout). Buffers are much smaller.
MIN_MATRIX_ELEMENTS = 1 << 26
# Python modules whose functions initialize a tensor in place.
INITIALIZERS = ("torch.nn.init", "transformers.initialization")


class _MatricesOnMeta(TorchFunctionMode):
    """A mode that allocates the results of `torch.empty` and of large `torch.zeros` on meta.

    Modules allocate their matrices with these functions. `torch.device("meta")` is not used,
    because it would lose buffers that constructors compute and that are not in checkpoints (rotary
    frequencies, scales of embeddings).
    """

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, FunctionType) and func.__module__ in INITIALIZERS:
            tensor = kwargs.get("tensor")
            # Skip initializers of meta tensors, because torch would spend most of the construction
            # time in them.
            if tensor is not None and tensor.is_meta:
                return tensor
        is_matrix = func is torch.empty
        if func is torch.zeros and args:
            # Count the elements on meta, because the real tensor may need gigabytes.
            is_matrix = torch.empty(*args, device="meta").numel() >= MIN_MATRIX_ELEMENTS
        if is_matrix and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(
    config: PretrainedConfig,
    model: Model,
    *,
    rows: int | None = None,
    full_config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Build a model with parameters on meta in the recipe's dtype, and real buffers on the CPU.

    Args:
        config: the config of the text model.
        rows: number of rows of the embedding and the head (`tokenizer.vocab_rows`). None: the
            config's vocabulary size.
        full_config: the config of the entire model that contains the text model, or None. With
            `model.vision`, the entire model is built. Its other parts are frozen, except the
            projector if the recipe trains it. Without `model.vision`, the text model's own class is
            built if Transformers has one, else the class of the entire model without the other
            parts.

    Raises:
        ModelError: if Transformers cannot build a model from the config.
    """
    is_entire = full_config is not None and (model.vision or not has_own_class(config))
    # Copy the config, because it is changed below.
    outer = copy.deepcopy(full_config if full_config is not None and is_entire else config)
    config = outer.get_text_config()
    if rows is not None:
        config.vocab_size = rows
    for part in (outer, config):
        if "quantization_config" in vars(part):
            # Prevent Transformers from creating its quantizer's layers, because quantized weights
            # are stored in our own layers.
            del part.quantization_config
    factory = auto_class_of(outer)
    attention = "eager" if model.attention == "eager" and not model.vision else None
    try:
        with _MatricesOnMeta():
            causal_lm: PreTrainedModel = factory.from_config(
                outer,
                dtype=DTYPES[model.dtype],
                attn_implementation=attention,
                trust_remote_code=model.trust_remote_code,
            )
    # The code of 190 model types can raise any exception for unusual configs.
    except Exception as error:
        raise ModelError(
            f"Transformers cannot build this {config.model_type} model",
            where=f"{config.name_or_path}/config.json" if config.name_or_path else "",
            why=one_line(error),
            fix="fix the value in config.json, or fetch the model again: tunesmith fetch MODEL",
        ) from error
    # Move the remaining parameters to meta. Their constructors use other functions, for example
    # torch.ones, or small torch.zeros.
    replace_parameters(causal_lm, lambda parameter: parameter.to("meta"))
    if is_entire and not model.vision:
        drop_other_parts(causal_lm)
    elif full_config is not None and not is_entire:
        vars(causal_lm)[ENTIRE_NAMES] = EntireNames.find(causal_lm, _shell(full_config, config))
    for _, parameter in vision_parameters(causal_lm):
        parameter.requires_grad_(False)
    if model.train_projector:
        projector = find_projector(causal_lm)
        if not projector:
            raise ModelError(
                f"no projector was found in this {causal_lm.config.model_type}",
                where="model.train_projector",
                why="the projector must be a module next to the vision encoder and the text "
                "model, or the module `merger` inside the vision encoder",
                fix="set model.train_projector=false",
            )
        for name in projector:
            causal_lm.get_submodule(name).requires_grad_(True)
    keep_kernels_to_gpus(causal_lm)
    return causal_lm


def _shell(full_config: PretrainedConfig, text: PretrainedConfig) -> PreTrainedModel:
    """Build an entire vision-language model on meta, to read the names of its parameters."""
    outer = copy.deepcopy(full_config)
    outer.get_text_config().vocab_size = text.vocab_size
    with torch.device("meta"):
        shell: PreTrainedModel = auto_class_of(outer).from_config(outer)
    return shell


def auto_class_of(config: PretrainedConfig) -> Any:
    """Return the auto class of Transformers that builds models of this config."""
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def replace_parameters(
    model: nn.Module,
    change: Callable[[Tensor], Tensor],
    skip: Collection[nn.Parameter] = (),
) -> None:
    """Replace each parameter by `change(parameter)`. Shared parameters stay shared."""
    changed = {parameter: parameter for parameter in skip}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            # Use the parameter as the key, so that tied parameters become one new parameter.
            if old not in changed:
                data = old.detach()
                new = change(data)
                changed[old] = old
                if new is not data:
                    changed[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, name, changed[old])


def widen(model: nn.Module, skip: Collection[nn.Parameter]) -> None:
    """Convert all 16-bit parameters of a model on meta to fp32, except those in `skip`.

    With full fine-tuning under FSDP, the fp32 shards are the master weights.
    """

    def fp32(parameter: Tensor) -> Tensor:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            return parameter.float()
        return parameter

    replace_parameters(model, fp32, skip)


def materialize(
    model: nn.Module,
    device: torch.device,
    shards: torch.device | None = None,
    skip: Collection[nn.Parameter] = (),
) -> None:
    """Allocate all meta parameters on `device`, and move all other tensors to `device`.

    The allocated parameters are not initialized.

    If `shards` is given, parameters that FSDP shards are allocated on the device `shards` instead.
    Parameters in `skip` are not changed. Dtypes and sharing are preserved, and buffers keep the
    values that their module computed (for example fp32 rotary frequencies).
    """

    def real(tensor: Tensor) -> Tensor:
        place = device
        # A mesh with one dimension is used only for tensor parallelism, not for FSDP.
        if shards and isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1:
            place = shards
        if tensor.is_meta:
            return torch.empty_like(tensor, device=place)
        return tensor.to(place)

    replace_parameters(model, real, skip)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # setattr on a registered buffer keeps it registered, and keeps whether it is
            # persistent.
            setattr(module, name, real(buffer))
