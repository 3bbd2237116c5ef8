"""The parts of a causal LM: its decoder, its layers, and what it does to its logits.

All of it is read off the model, on meta or not, so that a family needs no row of a table to run. Of
a vision-language model in whole the decoder is what holds its text model and its vision part.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # slow, and a plan needs none

# Keys of the config that cap the logits, c * tanh(logits / c), and that scale them before the cap.
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# Families that multiply by what others divide by.
MULTIPLIES_BY_SCALING = ("hyperclovax",)

# Of the largest logit, in fp32: what a product of another order rounds away is a thousandth of it.
LOGITS_ERROR = 1e-3
# Logits are scaled to this, or to three times the cap, where they are compared: those of
# a random model are far below a cap of 30, and would look the same without it.
LARGE_LOGIT = 100.0


@dataclass(frozen=True)
class Head:
    """The end of a causal LM, after its last linear layer: cap(scale * (W h + b))."""

    softcap: float | None = None  # c in c * tanh(logits / c); None: no cap
    scale: float = 1.0

    def logits(self, raw: Tensor) -> Tensor:
        """The model's logits from those of its last linear layer, of any shape."""
        scaled = raw * self.scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


def find_decoder(causal_lm: "PreTrainedModel") -> "PreTrainedModel":
    """The model without its head, which returns the last hidden states.

    It is not always Transformers' `base_model`: where the `base_model_prefix` of the class is not
    the name of the decoder (llama4_text), that is the causal LM itself. Of an entire model without
    its other parts it is the text model. ModelError where there is none.
    """
    from transformers import PreTrainedModel

    if is_whole(causal_lm) and not any(vision_parameters(causal_lm)):
        return cast("PreTrainedModel", find_text_part(causal_lm)[1])
    embedding = causal_lm.get_input_embeddings()
    # Outermost first: a decoder may hold another model (OPT).
    for module in causal_lm.modules():
        if module is causal_lm or not isinstance(module, PreTrainedModel):
            continue
        if any(part is embedding for part in module.modules()):
            return module
    raise ModelError(
        f"{type(causal_lm).__name__} has no decoder separate from its head",
        why="hidden states are computed first, and the head chunk by chunk in the loss",
        fix="take a causal language model of Transformers",
    )


def is_whole(model: nn.Module) -> bool:
    """Return whether a model has the class of a vision-language model.

    Its other parts may have been dropped.
    """
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and model.config.get_text_config() is not model.config


def find_text_part(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the text model without its head in a vision-language model in whole.

    Of any other model it is the model itself, under "".
    """
    if not is_whole(model):
        return "", model
    return find_innermost(cast("PreTrainedModel", model))


def find_innermost(model: "PreTrainedModel") -> tuple[str, nn.Module]:
    """Return name and module of the innermost model that holds the embedding."""
    from transformers import PreTrainedModel

    embedding = model.get_input_embeddings()
    found: tuple[str, nn.Module] = "", model
    # A module comes after the module that it is in.
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and embedding in list(part.modules()):
            found = name, part
    return found


def name_of_head(model: "PreTrainedModel") -> str:
    """Return the name of the output layer, which may be that of a causal LM inside the model; ""
    if there is none.
    """
    from transformers import PreTrainedModel

    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            head = part.get_output_embeddings()
            inner = next(inner for inner, module in part.named_modules() if module is head)
            return f"{name}.{inner}".removeprefix(".")
    return ""


def drop_other_parts(model: "PreTrainedModel") -> None:
    """Remove the towers and projectors from an entire model, so that its text model is left."""
    _keep_modules(model, [find_innermost(model)[0], name_of_head(model)])


def _keep_modules(module: nn.Module, kept: list[str]) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        setattr(module, name, None)
    for name, child in list(module.named_children()):
        inside = [inner.removeprefix(f"{name}.") for inner in kept if inner.startswith(f"{name}.")]
        if inside:
            _keep_modules(child, inside)
        elif name not in kept:
            setattr(module, name, None)


def is_in_text(model: nn.Module) -> Callable[[str], bool]:
    """Return what tells of a name in a model whether that part is of the text model, head and all.

    Everything is where the model is no vision-language model in whole.
    """
    prefix, _ = find_text_part(model)
    if not prefix:
        return lambda name: True
    head = name_of_head(cast("PreTrainedModel", model))
    inside = (f"{prefix}.", f"{head}.")
    return lambda name: f"{name}.".startswith(inside)


def vision_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a vision-language model in whole that are not of its text part, by
    name.
    """
    is_text = is_in_text(model)
    for name, parameter in model.named_parameters():
        if not is_text(name):
            yield name, parameter


def find_projector(model: nn.Module) -> tuple[str, ...]:
    """Name the modules of a vision-language model in whole between its tower and its text model.

    They are what stands beside both, or the tower's last part, of the families in which it is one.
    Empty where there are none.
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
            # Qwen's and GLM's towers end in one, and Qwen3-VL's has more of them in its middle.
            for inner, module in part.named_children():
                if isinstance(module, nn.ModuleList) and "merger" in inner:
                    # PEFT cannot copy a list.
                    names += [f"{prefix}.{name}.{inner}.{number}" for number in range(len(module))]
                elif "merger" in inner:
                    names.append(f"{prefix}.{name}.{inner}")
        elif "audio" not in name and next(part.parameters(), None) is not None:
            names.append(f"{prefix}.{name}")
    return tuple(names)


def trained_projector(model: nn.Module) -> list[nn.Module]:
    """List the modules of the projector that is trained; none where it is frozen."""
    projector = [model.get_submodule(name) for name in find_projector(model)]
    return [module for module in projector if next(module.parameters()).requires_grad]


def find_layers(causal_lm: "PreTrainedModel") -> str:
    """Dotted name of the list of decoder layers in the causal LM: "model.layers", "transformer.h".

    ModelError where none has as many entries as the config has layers.
    """
    from transformers import PreTrainedModel

    config = find_decoder(causal_lm).config.get_text_config()
    # Where a config has both, the other counts the sublayers (LongCat's two attentions of a layer).
    count = config.to_dict().get("num_layers", config.num_hidden_layers)
    largest = 0
    layers = ""
    # Models without the embedding, which see or hear.
    others: tuple[str, ...] = ()
    embedding = causal_lm.get_input_embeddings()
    prefix, text = find_text_part(causal_lm)
    for name, module in text.named_modules(prefix=prefix):
        if isinstance(module, PreTrainedModel) and embedding not in list(module.modules()):
            others += (f"{name}.",)
        if not isinstance(module, nn.ModuleList) or len(module) != count or name.startswith(others):
            continue
        # Other lists may be as long by chance; the layers are what is largest.
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > largest:
            largest = size
            layers = name
    if not layers:
        raise ModelError(
            f"no list of {count} layers in {type(causal_lm).__name__}",
            why="layers are recomputed, compiled and sharded one by one",
            fix="take a causal language model of Transformers",
        )
    return layers


def find_head(causal_lm: "PreTrainedModel") -> Head:
    """Read from its config what the model does to its logits; `head_fits` proves it."""
    config = find_decoder(causal_lm).config.get_text_config()

    def stated(keys: tuple[str, ...]) -> list[float]:
        # Attributes and not `to_dict`: MiniCPM3 computes its divisor in a property.
        values = [getattr(config, key, None) for key in keys]
        return [value for value in values if value]

    softcaps = stated(CAPS)
    if config.model_type in MULTIPLIES_BY_SCALING:
        scale = math.prod(stated(DIVISORS), start=1.0)
    else:
        divisors = [1.0 / divisor for divisor in stated(DIVISORS)]
        scale = math.prod([*stated(MULTIPLIERS), *divisors], start=1.0)
    return Head(softcaps[-1] if softcaps else None, scale)


@torch.no_grad()
def head_fits(causal_lm: "PreTrainedModel", head: Head) -> bool:
    """Check whether the model's own logits are those of `head` on its last hidden states.

    Args:
        causal_lm: a small model with weights, in fp32 and in eval mode, with an attention that
            takes rows without documents.
    """
    output_layer = causal_lm.get_output_embeddings()
    if output_layer is None:
        return False
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))
    hidden = find_decoder(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state
    raw = output_layer(hidden)
    largest = LARGE_LOGIT
    # Large enough to reach the flat part of tanh.
    if head.softcap is not None:
        largest = 3 * head.softcap
    gain = largest / (raw * head.scale).abs().max()
    # The head's output is scaled by a hook: the model applies its cap and factor to that.
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
