"""From a recipe to the model that is trained: the whole order of changes, in one function that reads as a list."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from tunesmith.adapter import lora, peft_files
from tunesmith.config.schema import Run
from tunesmith.methods import METHODS
from tunesmith.methods.base import TrainModel
from tunesmith.model import architectures, attention, fused, load, random_init, spec
from tunesmith.quant import nf4
from tunesmith.runtime import compilation, recompute
from tunesmith.runtime.host import bound_product_caches, keep_freed_pages

Weights = Literal["stored", "random"]


def build_model(
    run: Run,
    folder: Path,
    *,
    device: torch.device,
    recomputed: int = 0,
    varied: bool = True,
    weights: Weights = "stored",
) -> TrainModel:
    """Build the model of a recipe, with weights, ready to be trained.

    Args:
        run: the resolved recipe.
        folder: where the model's config and safetensors files are.
        device: where the weights go.
        recomputed: decoder layers that are run again in the backward.
        varied: whether micro batches differ in their number of tokens, as `compiled.compile_layers` wants to know.
        weights: those of the files, or random ones of the same shape, drawn on the device: for measuring speed.

    Returns:
        The root module. What the recipe does not train has `requires_grad` False. A base to be held in fp8 is still
        dense: `adapter.lora.to_fp8` is for when its loss has been measured.

    Raises:
        ModelError, RecipeError: the files or the recipe do not fit each other.
    """
    if device.type == "cpu":
        keep_freed_pages()
        bound_product_caches()
    config = load.load_config(folder, run.model)
    tokenizer = load.load_tokenizer(folder, run.model)
    model = load.build_on_meta(config, run.model, rows=load.vocab_rows(config, tokenizer))
    checkpoint = dict(model.named_parameters())  # on meta: names and shapes, before an adapter adds its own
    quirk = architectures.architecture_of(config)
    layers = list(model.get_submodule(quirk.layers).children())

    if run.model.quantize == "nf4":
        nf4.replace_linears(model, load.DTYPES[run.model.dtype])
    if run.adapter.kind == "lora":
        lora.attach_lora(model, run.adapter, seed=run.train.seed)
    fused.fuse_modules(model, project=lora.project)
    recompute.recompute_layers(layers, recomputed)
    if fast := compilation.should_compile(run.train.compile, device):
        compilation.compile_layers(layers, varied=varied)
    load.materialise(model, device)
    if weights == "random":
        random_init.init_random_weights(model, checkpoint, seed=run.train.seed, convert=nf4.load_hooks(model))
    else:
        load.load_weights(model, folder, skip=_made_here(model), convert=nf4.load_hooks(model))
    if run.adapter.kind == "lora":
        lora.init_lora(model, run.adapter, seed=run.train.seed)
        if run.adapter.from_ is not None:
            peft_files.load_adapter(model, peft_files.find_adapter(run.adapter.from_))
    root = TrainModel(
        model,
        METHODS[run.method],
        layers=quirk.layers,
        attention_backend=attention_backend(run, config, device).name,
        softcap=quirk.final_softcap,
        logit_scale=quirk.logit_scale,
    )
    if fast:
        root.score = compilation.compile_score(root.score)
    return root


def attention_backend(run: Run, config: PretrainedConfig, device: torch.device) -> attention.AttentionBackend:
    """How attention is computed in a run, and why."""
    if run.model.attention == "eager":
        return attention.EAGER
    width = spec.read_spec(
        config.to_dict(), where=run.model.name, trust_remote_code=run.model.trust_remote_code
    ).head_dim
    soft = architectures.architecture_of(config).attention_softcap is not None
    return attention.select_attention_backend(device, load.DTYPES[run.model.dtype], width, soft=soft)


def _made_here(model: nn.Module) -> Callable[[str], bool]:
    """Says by name which parameters no checkpoint of the base holds: those of the adapter."""
    names = set(itertools.chain.from_iterable((f"{n}.lora_A", f"{n}.lora_B") for n, _ in lora.loras(model)))
    return names.__contains__
