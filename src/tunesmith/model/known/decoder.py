"""The parts of a causal LM: its decoder, its layers, and the computation after its output layer.

The parts are found by inspecting the model, which may be on the meta device. Therefore a model
family does not need an entry in a table. The decoder of an entire vision-language model contains
both the text model and the vision part.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # only for type checking: the import is slow

# Config keys for the cap of the logits, c * tanh(logits / c), and for the scale of the logits,
# which is applied before the cap.
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# Model types that multiply the logits by the value of a key in DIVISORS. Other types divide the
# logits by this value.
MULTIPLIES_BY_SCALING = ("hyperclovax",)

# Maximum error in fp32 as a fraction of the largest logit. A different summation order of the
# matmuls causes only a thousandth of this error.
LOGITS_ERROR = 1e-3
# Magnitude to which the logits are scaled for the comparison. If the logits have a cap, three times
# the cap is used instead. Unscaled logits of a random model are so small that a cap of 30 would
# have no effect.
LARGE_LOGIT = 100.0


@dataclass(frozen=True)
class Head:
    """The computation of a causal LM after its output layer: cap(scale * (W h + b))."""

    softcap: float | None = None  # c in c * tanh(logits / c); None: no cap
    scale: float = 1.0

    def logits(self, raw: Tensor) -> Tensor:
        """Compute the model's logits from `raw`, the output of its last linear layer.

        The shape is unchanged.
        """
        scaled = raw * self.scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


def find_decoder(causal_lm: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model without its head. Its forward returns the last hidden states.

    This can differ from Transformers' `base_model`, which is the causal LM itself if the class's
    `base_model_prefix` is not the name of the decoder (llama4_text). If the vision part of a
    vision-language model was dropped, return its text model. Raise ModelError if there is no
    decoder.
    """
    from transformers import PreTrainedModel

    if has_vision_language_class(causal_lm) and not any(vision_parameters(causal_lm)):
        return cast("PreTrainedModel", find_text_model(causal_lm)[1])
    embedding = causal_lm.get_input_embeddings()
    # Search from the outside to the inside, because a decoder may contain another model (OPT).
    for module in causal_lm.modules():
        if module is causal_lm or not isinstance(module, PreTrainedModel):
            continue
        if any(part is embedding for part in module.modules()):
            return module
    raise ModelError(
        f"{type(causal_lm).__name__} has no decoder that is separate from its output head",
        why="the decoder runs first, and then the output head and the loss run in chunks, so the "
        "decoder and the head must be separate modules",
        fix="use a causal language model of Transformers",
    )


def has_vision_language_class(model: nn.Module) -> bool:
    """Return whether the model has the class of a vision-language model.

    Its vision and audio parts may have been dropped.
    """
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and model.config.get_text_config() is not model.config


def find_text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the name and module of a vision-language model's text model, without the head.

    For any other model, return the model itself with the name "".
    """
    if not has_vision_language_class(model):
        return "", model
    return find_innermost(cast("PreTrainedModel", model))


def find_innermost(model: "PreTrainedModel") -> tuple[str, nn.Module]:
    """Return the name and module of the innermost model that contains the input embedding."""
    from transformers import PreTrainedModel

    embedding = model.get_input_embeddings()
    found: tuple[str, nn.Module] = "", model
    # `named_modules` yields outer modules first, so the last match is the innermost.
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and embedding in list(part.modules()):
            found = name, part
    return found


def name_of_head(model: "PreTrainedModel") -> str:
    """Return the name of the output layer, or "" if there is none.

    The layer may belong to a causal LM inside the model.
    """
    from transformers import PreTrainedModel

    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            head = part.get_output_embeddings()
            inner = next(inner for inner, module in part.named_modules() if module is head)
            return f"{name}.{inner}".removeprefix(".")
    return ""


def drop_other_parts(model: "PreTrainedModel") -> None:
    """Remove the towers and projectors of a vision-language model. Keep only its text model."""
    _keep_modules(model, [find_innermost(model)[0], name_of_head(model)])


def _keep_modules(module: nn.Module, kept: list[str]) -> None:
    """Remove all parameters and modules except those in `kept`, and the modules around them."""
    for name, _ in list(module.named_parameters(recurse=False)):
        setattr(module, name, None)
    for name, child in list(module.named_children()):
        prefix = f"{name}."
        inside = [inner.removeprefix(prefix) for inner in kept if inner.startswith(prefix)]
        if inside:
            _keep_modules(child, inside)
        elif name not in kept:
            setattr(module, name, None)


def is_in_text(model: nn.Module) -> Callable[[str], bool]:
    """Return a function that checks whether a name belongs to the text model or to its head.

    For models without other parts, the function returns True for every name.
    """
    prefix, _ = find_text_model(model)
    if not prefix:
        return lambda name: True
    head = name_of_head(cast("PreTrainedModel", model))
    inside = (f"{prefix}.", f"{head}.")
    return lambda name: f"{name}.".startswith(inside)


def vision_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a vision-language model that are not in its text model.

    Each parameter is yielded with its name.
    """
    is_text = is_in_text(model)
    for name, parameter in model.named_parameters():
        if not is_text(name):
            yield name, parameter


def find_projector(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules between the vision tower and the text model.

    The projector is a sibling of both. In some families, it consists of the last modules of the
    tower. Return an empty tuple if the model has no projector.
    """
    from transformers import PreTrainedModel

    if not any(vision_parameters(model)):
        return ()
    assert isinstance(model, PreTrainedModel)
    decoder = find_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = []
    for name, part in decoder.named_children():
        if isinstance(part, PreTrainedModel):
            # The towers of Qwen and GLM end in a module called "merger", which is the projector.
            # Qwen3-VL's tower has a list of further mergers.
            for inner, module in part.named_children():
                if isinstance(module, nn.ModuleList) and "merger" in inner:
                    # Name each module of the list, because PEFT cannot copy a ModuleList.
                    names += [f"{prefix}.{name}.{inner}.{number}" for number in range(len(module))]
                elif "merger" in inner:
                    names.append(f"{prefix}.{name}.{inner}")
        elif "audio" not in name and next(part.parameters(), None) is not None:
            names.append(f"{prefix}.{name}")
    return tuple(names)


def trained_projector(model: nn.Module) -> list[nn.Module]:
    """Return the trained modules of the projector. The list is empty if the projector is frozen."""
    projector = [model.get_submodule(name) for name in find_projector(model)]
    return [module for module in projector if next(module.parameters()).requires_grad]


def find_layers(causal_lm: "PreTrainedModel") -> str:
    """Return the dotted name of the list of decoder layers, for example "model.layers".

    Raise ModelError if no list has as many entries as the config has layers.
    """
    from transformers import PreTrainedModel

    config = find_decoder(causal_lm).config.get_text_config()
    # Prefer `num_layers`. LongCat's config has both keys, but its `num_hidden_layers` counts the
    # attentions, and each layer has two.
    count = config.to_dict().get("num_layers", config.num_hidden_layers)
    largest = 0
    layers = ""
    # Name prefixes of models without the text embedding, for example vision and audio towers.
    others: tuple[str, ...] = ()
    embedding = causal_lm.get_input_embeddings()
    prefix, text = find_text_model(causal_lm)
    for name, module in text.named_modules(prefix=prefix):
        if isinstance(module, PreTrainedModel) and embedding not in list(module.modules()):
            others += (f"{name}.",)
        if not isinstance(module, nn.ModuleList) or len(module) != count or name.startswith(others):
            continue
        # Another list may have the same length by chance. Therefore use the list with the most
        # parameters.
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > largest:
            largest = size
            layers = name
    if not layers:
        raise ModelError(
            f"cannot find the module list that contains the {count} layers of "
            f"{type(causal_lm).__name__}",
            why="the layers of this list are recomputed, compiled and sharded one by one",
            fix="use a causal language model of Transformers",
        )
    return layers


def find_head(causal_lm: "PreTrainedModel") -> Head:
    """Read the cap and the scale of the logits from the config. `head_fits` verifies the result."""
    config = find_decoder(causal_lm).config.get_text_config()

    def stated(keys: tuple[str, ...]) -> list[float]:
        # Use getattr instead of `to_dict`, because MiniCPM3 computes its divisor in a property.
        values = [getattr(config, key, None) for key in keys]
        return [value for value in values if value]

    softcaps = stated(CAPS)
    softcap = softcaps[-1] if softcaps else None
    if config.model_type in MULTIPLIES_BY_SCALING:
        scale = math.prod(stated(DIVISORS), start=1.0)
    else:
        divisors = [1.0 / divisor for divisor in stated(DIVISORS)]
        scale = math.prod([*stated(MULTIPLIERS), *divisors], start=1.0)
    return Head(softcap, scale)


@torch.no_grad()
def head_fits(causal_lm: "PreTrainedModel", head: Head) -> bool:
    """Return whether the model's logits equal `head` applied to its last hidden states.

    Args:
        causal_lm: a small fp32 model with weights, in eval mode, whose attention supports rows
            without `documents`.
    """
    output_layer = causal_lm.get_output_embeddings()
    if output_layer is None:
        return False
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))
    hidden = find_decoder(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state
    raw = output_layer(hidden)
    # Logits of 3 * softcap are in the flat part of tanh, so that a missing cap in `head` is
    # detected.
    largest = 3 * head.softcap if head.softcap is not None else LARGE_LOGIT
    gain = largest / (raw * head.scale).abs().max()
    # Scale the output layer's result with a hook. The model then applies its cap and scale to the
    # scaled result.
    hook = output_layer.register_forward_hook(lambda _module, _inputs, output: output * gain)
    try:
        logits = causal_lm(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    expected = head.logits(raw * gain)
    if logits.shape != expected.shape:
        return False
    error = (logits - expected).abs().max()
    return bool(error <= LOGITS_ERROR * expected.abs().max())
