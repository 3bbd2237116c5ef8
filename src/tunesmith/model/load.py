"""From a folder to a model without weights: its config, the model on meta, its memory.

`build_on_meta` builds the modules without memory for their matrices; `materialize` gives each
parameter its memory, which `weights.load_weights` or `random_init` initialises. `to_empty` would
break tied weights and leave the buffers (rotary frequencies), which are in no checkpoint,
uninitialised.
"""

import copy
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
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
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.decoder import drop_other_parts, find_projector, vision_parameters
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.gpu_kernels import keep_kernels_to_gpus
from tunesmith.model.names import ENTIRE_NAMES, EntireNames, has_own_class, text_part
from tunesmith.model.safetensors_files import (
    ENDS_AND_MIDDLE,
    read_headers,
    read_model_config,
    sampled_digest,
)
from tunesmith.model.shipped import check_quantize
from tunesmith.model.spec import check_supported, read_spec


def load_config(folder: Path, model: Model) -> PretrainedConfig:
    """The model's configuration; ModelError where it is missing, broken, or of a kind that the
    recipe cannot train.

    Of a vision-language model it is that of the text model, as `text_part` describes.
    """
    text, _ = load_configs(folder, model)
    return text


def load_configs(folder: Path, model: Model) -> tuple[PretrainedConfig, PretrainedConfig | None]:
    """`load_config`, and the configuration of the entire model that the text model is part of.

    It is None if the text model is all of it.
    """
    file = folder / "config.json"
    stated = read_model_config(folder)
    check_supported(stated, str(file), vision=model.vision)
    check_quantize(model.quantize, stated, str(file))
    runs_own_code = model.trust_remote_code and "auto_map" in stated
    if stated["model_type"] in ARCHITECTURES or runs_own_code:
        # As it stands there, without the defaults of Transformers.
        read_spec(stated, where=str(file), trust_remote_code=model.trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        if "quantization_config" in stated:
            config.quantization_config = stated["quantization_config"]
        text = text_part(config)
    # Transformers raises many kinds here, its own strict-dataclass errors among them.
    except Exception as error:
        fix = "fix that key, or fetch it again: tunesmith fetch MODEL"
        if "auto_map" in stated and not model.trust_remote_code:
            fix = (
                "review its code, then set model.trust_remote_code: true; for a command that "
                "takes a run add --trust-remote-code"
            )
        raise ModelError(
            "Transformers cannot read the config", where=str(file), why=one_line(error), fix=fix
        ) from error
    if text is config and not model.vision:
        return text, None
    if text is not config and text.tie_word_embeddings:
        text.tie_word_embeddings = not _stores_other_head(folder)
    is_of_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if model.vision and (text is config or not is_of_pictures):
        raise ModelError(
            "model.vision is true, and this model has no vision part",
            where=str(file),
            why=f"Transformers has no class of a {config.model_type} that takes pictures and text",
            fix="model.vision=false, or a vision-language model",
        )
    config.tie_word_embeddings = text.tie_word_embeddings
    return text, config


def _stores_other_head(folder: Path) -> bool:
    """Tell whether a vision-language checkpoint holds a head that is not the embedding; False where
    its weights are not there.

    Mistral Small 3.1 says nothing of tied weights, which means tied by default, and has a head of
    its own. Transformers does not tie it then.
    """
    ends = {}
    with suppress(ModelError):  # the files of the tokenizer alone
        for entry in chain.from_iterable(read_headers(folder).values()):
            last = ".".join(entry.name.split(".")[-2:])
            if last in ("embed_tokens.weight", "lm_head.weight"):
                # Without their names: equal contents then have equal digests.
                ends[last] = sampled_digest([replace(entry, name="")], ENDS_AND_MIDDLE)
    return len(set(ends.values())) == 2


def one_line(error: BaseException) -> str:
    """Another library's error with its type, in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# Elements from which on a tensor of zeros is a matrix: Llama 4's stacks of experts begin as zeros,
# of 2.7 GB a layer in Scout. Buffers are far smaller.
MIN_MATRIX_ELEMENTS = 1 << 26
# Modules whose functions fill a tensor in place
INITIALIZERS = ("torch.nn.init", "transformers.initialization")


class _MatricesOnMeta(TorchFunctionMode):
    """Allocate `torch.empty` and large `torch.zeros` (the modules' matrices) on meta, and compute
    everything else for real.

    `torch.device("meta")` would lose the rotary frequencies and scales of embeddings, which
    constructors compute and no checkpoint holds.
    """

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, FunctionType) and func.__module__ in INITIALIZERS:
            tensor = kwargs.get("tensor")
            # Nothing to fill; to find that out takes Torch most of the time of a construction.
            if tensor is not None and tensor.is_meta:
                return tensor
        is_matrix = func is torch.empty
        if func is torch.zeros and args:
            # Counted on meta: the tensor itself may take gigabytes.
            is_matrix = torch.empty(*args, device="meta").numel() >= MIN_MATRIX_ELEMENTS
        if is_matrix and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(
    config: PretrainedConfig,
    model: Model,
    *,
    rows: int | None = None,
    whole: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Build the model: every parameter on meta, in the recipe's dtype; every buffer real, on the
    CPU.

    `rows` are those of embedding and head (`tokenizer.vocab_rows`); None: the config's. ModelError
    where Transformers refuses the config.

    whole: of the entire model that `config` is the text part of. With `model.vision` it is built
    with all its parts, and all but the text part, and the projector that the recipe trains, is
    frozen. Without, a text model of its own class in Transformers is built, else the class of the
    entire model without its other parts.
    """
    is_entire = whole is not None and (model.vision or not has_own_class(config))
    # The caller's config stays as it is.
    outer = copy.deepcopy(whole if whole is not None and is_entire else config)
    config = outer.get_text_config()
    if rows is not None:
        config.vocab_size = rows
    for part in (outer, config):
        if "quantization_config" in vars(part):
            # Our own layers hold such weights, not Transformers' quantizer.
            del part.quantization_config
    factory = auto_class_of(outer)
    is_eager = model.attention == "eager" and not model.vision
    try:
        with _MatricesOnMeta():
            causal_lm: PreTrainedModel = factory.from_config(
                outer,
                dtype=DTYPES[model.dtype],
                attn_implementation="eager" if is_eager else None,
                trust_remote_code=model.trust_remote_code,
            )
    # Code of 190 model types, on a config that may be absurd.
    except Exception as error:
        raise ModelError(
            f"Transformers cannot build this {config.model_type}",
            where=f"{config.name_or_path}/config.json" if config.name_or_path else "",
            why=one_line(error),
            fix="fix the value in config.json, or fetch the model again: tunesmith fetch MODEL",
        ) from error
    # What constructors initialize otherwise (ones, random values) is still real.
    replace_parameters(causal_lm, lambda parameter: parameter.to("meta"))
    if is_entire and not model.vision:
        drop_other_parts(causal_lm)
    elif whole is not None and not is_entire:
        vars(causal_lm)[ENTIRE_NAMES] = EntireNames.find(causal_lm, _shell(whole, config))
    for _, parameter in vision_parameters(causal_lm):
        parameter.requires_grad_(False)
    if model.train_projector:
        projector = find_projector(causal_lm)
        if not projector:
            raise ModelError(
                f"no projector was found in this {causal_lm.config.model_type}",
                where="model.train_projector",
                why="it stands beside the vision tower and the text model, or is the tower's "
                "merger",
                fix="model.train_projector=false",
            )
        for name in projector:
            causal_lm.get_submodule(name).requires_grad_(True)
    keep_kernels_to_gpus(causal_lm)
    return causal_lm


def _shell(whole: PretrainedConfig, text: PretrainedConfig) -> PreTrainedModel:
    """Build the class of an entire model without memory, to see its names."""
    outer = copy.deepcopy(whole)
    outer.get_text_config().vocab_size = text.vocab_size
    with torch.device("meta"):
        shell: PreTrainedModel = auto_class_of(outer).from_config(outer)
    return shell


def auto_class_of(config: PretrainedConfig) -> Any:
    """Return the class of Transformers that chooses the class of a model, entire ones included."""
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def replace_parameters(
    model: nn.Module,
    change: Callable[[torch.Tensor], torch.Tensor],
    skip: Collection[nn.Parameter] = (),
) -> None:
    """Replace each parameter by `change(parameter)`, once for those that several modules share."""
    changed = {parameter: parameter for parameter in skip}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            # By the parameter itself: tied ones become one new parameter.
            if old not in changed:
                data = old.detach()
                new = change(data)
                changed[old] = old
                if new is not data:
                    changed[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, name, changed[old])


def widen(model: nn.Module, skip: Collection[nn.Parameter] = ()) -> None:
    """Make every 16-bit parameter of a model on meta fp32, but for those of `skip`: the shards of a
    model trained in full are its masters.
    """

    def fp32(parameter: torch.Tensor) -> torch.Tensor:
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
    """Give every parameter on meta its memory on `device`, uninitialised; move the real ones and
    all buffers there.

    Parameters that FSDP shards go to `shards` instead, if there is one, and those of `skip` stay
    where they are. All keep their dtype, shared ones stay shared, and buffers keep the values that
    their module computed (rotary frequencies: fp32).
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        place = device
        # A mesh of one dimension is a tensor group's alone.
        if shards and isinstance(tensor, DTensor) and tensor.device_mesh.ndim > 1:
            place = shards
        if tensor.is_meta:
            return torch.empty_like(tensor, device=place)
        return tensor.to(place)

    replace_parameters(model, real, skip)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # A registered buffer stays one, and as persistent as it was.
            setattr(module, name, real(buffer))
