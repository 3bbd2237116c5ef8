"""From a recipe to its model: the whole order of changes, in one function that reads as a list."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.adapter import lora, peft_files
from tunesmith.checkpoint.sharded import is_sharded, read_sharded_weights
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Run
from tunesmith.data.batches.batch import Batch
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import RecipeError
from tunesmith.formats.scaled_matmul import SCALING_RECIPES
from tunesmith.hub.model_files import ModelFiles
from tunesmith.loss import loss_and_grad
from tunesmith.methods import make_method
from tunesmith.methods.base import TrainModel
from tunesmith.model import fused, load, random_init
from tunesmith.model.decoder import find_text_part
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.support import Support
from tunesmith.model.vision import skip_device_checks
from tunesmith.model.weights import load_weights
from tunesmith.optim.adamw import check_blocks
from tunesmith.optim.weight_gradients import accumulate_in_fp32
from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.parallel.shard import shard_model
from tunesmith.parallel.tensor import apply_tensor_parallel
from tunesmith.planning.calibrate import MemoryMeter, calibrate_recompute
from tunesmith.planning.memory import USABLE_SHARE
from tunesmith.planning.run_plan import RunPlan
from tunesmith.quant.linear_layers import load_hooks, set_bypassed
from tunesmith.quant.llama4_experts import choose_top_k
from tunesmith.quant.replace import check_plain, convert_to_eight_bit, eight_bit_names
from tunesmith.quant.schemes import scheme_of
from tunesmith.runtime import compilation
from tunesmith.runtime.device import prepare_allocator
from tunesmith.runtime.host import bound_shape_caches, keep_freed_pages
from tunesmith.runtime.recompute import offload_inputs, recompute_layers
from tunesmith.runtime.stream import LayerStream
from tunesmith.units import ceil_div

Weights = Literal["stored", "random"]

# Tensor cores want the vocabulary, a dimension of the head's product, in multiples of this.
VOCABULARY_MULTIPLE = 64


def define_model(run: Run, files: ModelFiles) -> PreTrainedModel:
    """The model on meta, as the recipe trains it.

    Quantized layers, adapter and fused modules, but no weights.
    """
    # `read_model_files` says what `auto` means with a base; of one in codes the recipe has it now.
    assert run.model.quantize != "auto" or files.model.quantize == "none"
    model = build_unchanged(run, files)
    # First: what other code reads past the forward is neither quantized nor adapted.
    set_bypassed(model, files.support.dead_targets)
    if run.adapter.kind == "lora":
        # First: Llama 4's own stacks are no experts that a scheme knows.
        choose_top_k(model)
    # Before the adapter, which is added to the quantized layers.
    scheme_of(run.model).replace_linears(model, DTYPES[run.model.dtype], files.form)
    if run.adapter.kind == "lora":
        lora.attach_lora(model, run.adapter, seed=run.train.seed)
    _, text = find_text_part(model)
    fused.fuse_modules(text, project=lora.project)
    return model


def build_unchanged(run: Run, files: ModelFiles) -> PreTrainedModel:
    """The model on meta as Transformers has it, with the rows of the recipe."""
    rows = embedding_rows(run, files)
    return load.build_on_meta(files.config, run.model, rows=rows, whole=files.whole)


def embedding_rows(run: Run, files: ModelFiles) -> int:
    """Rows of embedding and head.

    Where tokens were added, a multiple of 64 in a model trained in full, which the head's product
    is fast with; with an adapter as many as the tokenizer has tokens: to so many PEFT and its users
    resize the base.
    """
    rows = files.vocab_rows
    if run.adapter.kind == "none" and rows > files.config.vocab_size:
        rows = ceil_div(rows, VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return rows


def count_trained(run: Run, model: nn.Module) -> int:
    """Trained parameters of a model from `define_model`, on meta or not; tied ones once."""
    if run.adapter.kind == "lora":
        return lora.count_adapter_parameters(model, run.adapter)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(
    run: Run,
    files: ModelFiles,
    plan: RunPlan,
    *,
    model: PreTrainedModel | None = None,
    weights: Path | Literal["random"] | None = None,
    adapter: Path | None = None,
    probe: Batch | None = None,
    mesh: Mesh = ALONE,
    ranks: Ranks = ONE_PROCESS,
) -> tuple[TrainModel, RunPlan]:
    """Build the model of a recipe, with its weights, ready for its first step.

    Args:
        model: from `define_model`, on meta; it is changed in place. None makes it.
        weights: folder of the safetensors files, None for `files.folder`; `random` draws them, to
            measure speed.
        adapter: folder of the checkpoint whose adapter training resumes from.
        probe: a micro batch of the run, one of the largest, on the plan's device, the same at every
            start: recompute is calibrated on it.
        mesh, ranks: those that share the model; building it is then a collective call.

    Returns:
        The root module, and the plan, corrected by what was measured on `probe`.

    Raises:
        ModelError, RecipeError: files and recipe do not fit each other.
        MachineError: the GPU's memory is too small.
    """
    device = torch.device(plan.device)
    if device.type == "cpu":
        keep_freed_pages()
        bound_shape_caches()
    if device.type == "cuda" and run.model.vision:
        skip_device_checks()
    prepare_allocator(device)  # inference names a device without `choose_device`
    model = model or define_model(run, files)
    # By the plan: the scaling recipe of fp8 depends on the machine.
    if plan.base in SCALING_RECIPES:
        skip = lora.modules_to_save(model, run.adapter)
        check_plain(model, eight_bit_names(model, skip), files.form)
        convert_to_eight_bit(model, plan.base, skip=skip)
    if plan.attention == "eager":
        _check_eager(run, model, files.support)
    varied = plan.compiled and plan.layout.row_length is None
    loss_fn = compilation.compile_loss(loss_and_grad) if plan.compiled else loss_and_grad
    root = TrainModel(
        model,
        make_method(run.method),
        attention_backend=plan.attention,
        recurrent=files.support.recurrent,
        loss_and_grad_fn=loss_fn,
        both_ways=files.support.both_ways,
    )
    # Before what wraps the layers: it changes the modules inside them.
    root.partial_gradients = apply_tensor_parallel(root, mesh)
    recompute_layers(root.layers, plan.recomputed_layers)
    # After recompute: the mixin that is added last runs first, so the graph holds the
    # recomputation.
    if plan.compiled:
        compilation.compile_layers(root.layers, varied=varied)
    if plan.fp32_gradients:
        accumulate_in_fp32(model.get_submodule(root.layers_name))
    stream = allocate(run, root, plan, mesh)
    fill_parameters(
        run, files, model, weights or files.folder, ranks, device=device if stream else None
    )
    root.reference = reference_of(run, root)
    if adapter is not None:
        peft_files.load_adapter(model, adapter)
    if stream is not None:
        stream.attach()
    if probe is not None and run.train.recompute == "auto" and device.type == "cuda":
        # Of what was free before anything was built: the trial counts all that is allocated.
        budget = int(plan.memory.free * USABLE_SHARE)
        meter = MemoryMeter(device)
        shares = max(mesh.shape.shard, mesh.shape.tensor) > 1
        plan = calibrate_recompute(
            root, plan, probe, meter, budget=budget, ranks=ranks, shares=shares
        )
    staging = stream.describe_staging() if stream else ""
    if staging:
        plan = replace(plan, warnings=(*plan.warnings, f"warning: {staging}"))
    return root, plan


def _check_eager(run: Run, model: PreTrainedModel, support: Support) -> None:
    """RecipeError for Transformers' own attention on a model in which it does not tell packed
    documents apart by their positions, or pictures from text.
    """
    if support.both_ways:
        raise RecipeError(
            "model.attention: eager does not know where pictures are",
            where="model.attention",
            why=f"their tokens see each other both ways in a {model.config.model_type}",
            fix="model.attention=auto",
        )
    if support.packs_eager or support.state == "padded" or not run.data.pack:
        return
    layers = "layers"
    if support.recurrent:
        layers = "recurrent layers"
    raise RecipeError(
        "model.attention: eager does not keep packed documents apart in the "
        f"{layers} of this {model.config.model_type}",
        where="model.attention",
        why="a small model of its class gave different results for packed documents than "
        "for single ones",
        fix="model.attention=auto, or data.pack=false",
    )


def allocate(run: Run, root: TrainModel, plan: RunPlan, mesh: Mesh) -> LayerStream | None:
    """Shard a model on meta, and give this rank's part its memory, on the device or the host.

    Returns the stream of the layers that go from one to the other, to be attached when they are
    loaded; None where there are none.
    """
    device = torch.device(plan.device)
    on_host = "parameters" in plan.cpu_offload and mesh.shape.world > 1
    if "activations" in plan.cpu_offload:
        offload_inputs(root.layers)
    shard_model(root, mesh, run, DTYPES[run.model.dtype], offload=on_host)
    if run.train.optimizer == "adamw-8bit":
        check_blocks(root.trained_parameters())
    if plan.streamed_layers:
        trained = set()
        for module in lora.modules_to_save(root.model, run.adapter):
            trained |= set(module.parameters())
        stream = LayerStream(root.layers, plan.streamed_layers, device, stays=trained)
        load.materialize(root.model, device, skip=stream.parameters)
        return stream
    load.materialize(root.model, device, shards=torch.device("cpu") if on_host else None)
    # FSDP adds its padding to the shards now: tensors that refer to them earlier would be left
    # behind.
    root.to(None if on_host else device)
    return None


def fill_parameters(
    run: Run,
    files: ModelFiles,
    model: nn.Module,
    weights: Path | Literal["random"],
    ranks: Ranks,
    device: torch.device | None = None,
) -> None:
    """Give a materialized model its values: the base's weights, then those of the adapter.

    device: where random ones are drawn; None: where each parameter is.
    """
    if weights == "random":
        # The parameters as in a checkpoint.
        stored = build_unchanged(run, files)
        shapes = dict(stored.named_parameters())
        random_init.init_random_weights(
            model, shapes, seed=run.train.seed, convert=load_hooks(model), device=device
        )
    elif is_sharded(weights):
        read_sharded_weights(model, weights, ranks)
    else:
        grow_from = int(files.config.vocab_size) if run.model.added_tokens else None
        load_weights(
            model,
            weights,
            skip=lora.is_adapter_weight,
            convert=load_hooks(model),
            grow_from=grow_from,
            ranks=ranks,
        )
    if run.adapter.kind == "lora":
        init_adapter(run, model)


def reference_of(run: Run, root: TrainModel) -> Callable[[], AbstractContextManager[None]] | None:
    """Return what puts the model that training begins from in place, for a method that compares
    with it; before a resumed adapter is read.

    With an adapter that is the base without it, or the adapter of `adapter.from` as it came. Of a
    model trained in full nothing of it is left; its numbers are computed before training
    (`training/reference.py`).
    """
    if not root.method.needs_reference or run.adapter.kind == "none":
        return None
    if run.adapter.from_ is None:
        return partial(lora.disabled, root.model)
    return lora.TrainedValues(root.model).in_place


def init_adapter(run: Run, model: nn.Module) -> None:
    """Give the adapter of a model its first values: random ones, or those of `adapter.from`."""
    lora.init_lora(model, run.adapter, seed=run.train.seed)
    if run.adapter.from_ is not None:
        peft_files.load_adapter(model, find_adapter(run.adapter.from_))
