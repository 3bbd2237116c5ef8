"""Functions that build the model of a recipe. `build_model` applies all changes to the model in the
correct order.
"""

import os
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
from tunesmith.batches.batch import Batch
from tunesmith.checkpoint.contents import weights_of
from tunesmith.checkpoint.sharded import is_sharded, read_shards
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import RecipeError
from tunesmith.formats.scaled_matmul import SCALING_RECIPES
from tunesmith.hub.model_files import ModelFiles
from tunesmith.loss import loss_and_grad
from tunesmith.model.arch import load
from tunesmith.model.known.decoder import find_text_model
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.layers import fused
from tunesmith.model.measuring.support import Support
from tunesmith.model.weights import random_init
from tunesmith.model.weights.weights import load_weights
from tunesmith.optim.adamw import check_blocks
from tunesmith.optim.weight_gradients import accumulate_in_fp32
from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.parallel.shard import shard_model
from tunesmith.parallel.tensor import apply_tensor_parallel
from tunesmith.planning.calibrate import MemoryMeter, calibrate_recompute
from tunesmith.planning.memory import USABLE_SHARE
from tunesmith.planning.run_plan import RunPlan, StagedLayers
from tunesmith.quant.linear_layers import load_hooks, set_bypassed
from tunesmith.quant.llama4_experts import choose_top_k
from tunesmith.quant.replace import check_plain, convert_to_eight_bit, eight_bit_names
from tunesmith.quant.schemes import scheme_of
from tunesmith.runtime import compilation
from tunesmith.runtime.device import prepare_allocator
from tunesmith.runtime.host import bound_shape_caches, keep_freed_pages
from tunesmith.runtime.recompute import OffloadedLayer, recompute_layers
from tunesmith.runtime.stream import LayerStream
from tunesmith.train_model import Method, TrainModel
from tunesmith.units import ceil_div

# The number of rows of embedding and output layer is rounded up to a multiple of this number,
# because the matmul of the output layer is then faster on tensor cores.
VOCABULARY_MULTIPLE = 64


def define_model(run: Run, files: ModelFiles) -> PreTrainedModel:
    """Build the model of a recipe on the meta device. The weights are not loaded.

    The model has the quantized layers, the adapter and the fused modules of the recipe.
    """
    # `read_model_files` replaces the value `auto` by the storage format of the base. Therefore
    # `auto` is only left if the base is not quantized.
    assert run.model.quantize != "auto" or files.model.quantize == "none"
    model = build_unchanged(run, files)
    # Mark layers whose weight other code uses without calling the layer's forward. Marked layers
    # are neither quantized nor adapted, so mark them before both steps.
    set_bypassed(model, files.support.dead_targets)
    if run.adapter.kind == "lora":
        # Replace Llama 4's stacks of experts before quantization, because the quantization schemes
        # do not support them.
        choose_top_k(model)
    # Quantize before `attach_lora`, because the adapter is attached to the quantized layers.
    scheme_of(run.model).replace_linears(model, DTYPES[run.model.dtype], files.form)
    if run.adapter.kind == "lora":
        lora.attach_lora(model, run.adapter, seed=run.train.seed)
    _, text = find_text_model(model)
    fused.fuse_modules(text, project=lora.project)
    return model


def build_unchanged(run: Run, files: ModelFiles) -> PreTrainedModel:
    """Build Transformers' model on the meta device, and resize the embedding to
    `embedding_rows`.
    """
    rows = embedding_rows(run, files)
    return load.build_on_meta(files.config, run.model, rows=rows, full_config=files.full_config)


def embedding_rows(run: Run, files: ModelFiles) -> int:
    """Return the number of rows of the embedding and of the output layer.

    If tokens were added and the entire model is trained, the number is rounded up to a multiple of
    64, which makes the matmul of the output layer fast. With an adapter the number is the size of
    the tokenizer, because the base is resized to this size before PEFT loads the adapter.
    """
    rows = files.vocab_rows
    if run.adapter.kind == "none" and rows > files.config.vocab_size:
        rows = ceil_div(rows, VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return rows


def count_trained(run: Run, model: nn.Module) -> int:
    """Count the trained parameters of a model from `define_model`. Tied weights count once."""
    if run.adapter.kind == "lora":
        return lora.count_adapter_parameters(model, run.adapter)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_model(
    run: Run,
    files: ModelFiles,
    plan: RunPlan,
    *,
    method: Method | None = None,
    model: PreTrainedModel | None = None,
    weights: Path | Literal["random"] | None = None,
    adapter: Path | None = None,
    probe: Batch | None = None,
    mesh: Mesh = ALONE,
    ranks: Ranks = ONE_PROCESS,
) -> tuple[TrainModel, RunPlan]:
    """Build the model of a recipe with its weights, ready for the first step.

    Args:
        run: the recipe.
        files: the files of the base model.
        plan: the plan of the run for this machine.
        method: the method that computes the loss. None if no loss is computed.
        model: the model from `define_model`, on the meta device. It is changed in place. None
            calls `define_model`.
        weights: the folder of the safetensors files. None means `files.folder`. If "random", the
            weights are initialized randomly, which is enough to measure the speed.
        adapter: the checkpoint folder with the adapter to resume from.
        probe: one of the largest micro batches of the run, on the plan's device. A trial step with
            this batch determines the number of recomputed layers. The batch must be the same when
            the run is resumed.
        mesh, ranks: the ranks that share the model. With several ranks this is a collective call.

    Returns:
        The root module, and the plan. If the trial step with `probe` changed the number of
        recomputed layers, the plan has the new number.

    Raises:
        ModelError, RecipeError: if the files of the model do not fit the recipe.
        MachineError: if the GPU's memory is too small.
    """
    device = torch.device(plan.device)
    if device.type == "cpu":
        keep_freed_pages()
        bound_shape_caches()
    if device.type == "cuda" and run.model.vision:
        # Prevent Transformers from counting the placeholder tokens on the device, because the host
        # would wait for this count. The host counts the placeholders of each row instead.
        os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    prepare_allocator(device)  # inference does not call `choose_device`, which does the same
    model = model or define_model(run, files)
    # Convert to fp8 here and not in `define_model`, because only the plan knows the scaling recipe
    # for the machine.
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
        method,
        attention_backend=plan.attention,
        recurrent=files.support.recurrent,
        loss_and_grad_fn=loss_fn,
        bidirectional_pictures=files.support.bidirectional_pictures,
    )
    # Apply tensor parallelism before the layers are wrapped, because it changes modules inside
    # the layers.
    root.partial_gradients = apply_tensor_parallel(root, mesh)
    recompute_layers(root.layers, plan.recomputed_layers)
    # Compile after `recompute_layers`, because the mixin that is added last runs first. The
    # compiled graph then includes the recomputation.
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
        # Compute the budget from the memory that was free before the model was built, because
        # `calibrate_recompute` counts the model's memory too.
        budget = int(plan.memory.free * USABLE_SHARE)
        meter = MemoryMeter(device)
        shares = max(mesh.shape.shard, mesh.shape.tensor) > 1
        plan = calibrate_recompute(
            root, plan, probe, meter, budget=budget, ranks=ranks, shares=shares
        )
    if stream is not None:
        staged, rate = stream.measure_staging()
        if staged:
            warning = StagedLayers(staged, rate)
            plan = replace(plan, warnings=(*plan.warnings, warning))
    return root, plan


def _check_eager(run: Run, model: PreTrainedModel, support: Support) -> None:
    """Raise RecipeError if the model does not support `model.attention: eager`.

    In some models, eager attention cannot separate packed documents, because it does not read their
    positions. In other models, it does not know which tokens are images.
    """
    if support.bidirectional_pictures:
        raise RecipeError(
            "model.attention: eager does not support this model",
            where="model.attention",
            why="the tokens of an image must attend to each other in both directions in a "
            f"{model.config.model_type} model, and eager attention does not know which tokens "
            "belong to an image",
            fix="set model.attention=auto",
        )
    if support.packs_eager or support.state == "padded" or not run.data.pack:
        return
    layers = "layers"
    if support.recurrent:
        layers = "recurrent layers"
    raise RecipeError(
        "with model.attention: eager, packed documents would influence each other in the "
        f"{layers} of this {model.config.model_type} model",
        where="model.attention",
        why="in a test with a small model of the same type, a document gave different results if "
        "it was packed with other documents",
        fix="set model.attention=auto, or data.pack=false",
    )


def allocate(run: Run, root: TrainModel, plan: RunPlan, mesh: Mesh) -> LayerStream | None:
    """Shard a model on the meta device, and allocate this rank's shards on the device or the host.

    Returns:
        The stream that copies layers from the host to the device. It must be attached after the
        weights are loaded. None if all layers are on the device.
    """
    device = torch.device(plan.device)
    on_host = "parameters" in plan.cpu_offload and mesh.shape.world > 1
    if "activations" in plan.cpu_offload:
        # Add the mixin after the layers are compiled.
        for layer in root.layers:
            fused.add_mixin(layer, OffloadedLayer)
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
    # FSDP pads its shards in this call and replaces their tensors. Code that runs before must
    # therefore not keep references to these tensors.
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
    """Load or initialize the weights of a model whose parameters are allocated. The base is loaded
    before the adapter.

    Args:
        weights: the folder of the weights, or "random".
        device: the device on which random weights are drawn. None means that each weight is drawn
            on the device of its parameter.
    """
    if weights == "random":
        # Draw random parameters in the shapes of an unquantized checkpoint. The hooks from
        # `load_hooks` then quantize them.
        stored = build_unchanged(run, files)
        shapes = dict(stored.named_parameters())
        random_init.init_random_weights(
            model, shapes, seed=run.train.seed, convert=load_hooks(model), device=device
        )
    elif is_sharded(weights):
        tensors = weights_of(model).items()
        read_shards(weights, {f"model.{name}": tensor for name, tensor in tensors}, ranks)
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
    """Return a function that creates a context manager. In its block, the model computes as the
    reference model.

    The reference is the model before training. With an adapter, the reference is the base without
    the adapter. If the recipe has `adapter.from`, it is the base with the adapter's initial values.
    Therefore call this function before the adapter of a resumed run is loaded. Return None if the
    method needs no reference. Also return None if all weights are trained, because
    `training/reference.py` then computes the reference's log-probabilities before training.
    """
    if not run.uses_reference or run.adapter.kind == "none":
        return None
    if run.adapter.from_ is None:
        return partial(lora.disabled, root.model)
    return lora.keep_trained_values(root.model)


def init_adapter(run: Run, model: nn.Module) -> None:
    """Initialize the adapter of a model, randomly or with the weights of `adapter.from`."""
    lora.init_lora(model, run.adapter, seed=run.train.seed)
    if run.adapter.from_ is not None:
        peft_files.load_adapter(model, find_adapter(run.adapter.from_))
