"""Measurement of the model types that support tensor parallelism: two ranks are compared with one.

    # print a line per type, and compare the types with the shipped table
    python benchmarks/parity/tensor_cuts.py
    # measure only some types
    python benchmarks/parity/tensor_cuts.py phi cohere
    # write the table and docs/models.md
    python benchmarks/parity/tensor_cuts.py --write

Layers are sharded by Transformers' plan for the type (`parallel/cuts.py`). If the plan does not
cover a layer, the reason is printed. Otherwise a tiny model of the type is trained for STEPS steps
in fp32, with full fine-tuning and with LoRA, by two ranks with tensor parallelism (gloo) and by one
process. Losses, the gradients of the first step, and the names and shapes of all parameters must be
equal. If a type differs from the table, the type is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch
from tunesmith.config.schema import Adapter, MethodConfig, Train
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.methods import make_method
from tunesmith.model.known.decoder import drop_other_parts
from tunesmith.model.known.model_types import ModelType, measured_with, read_model_types
from tunesmith.model.layers.fused import fuse_modules
from tunesmith.model.measuring.tiny_model import VOCAB, build_tiny_model
from tunesmith.optim.optimizer import Optimizer
from tunesmith.parallel.cuts import find_blocks
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.parallel.tensor import apply_tensor_parallel, reduce_gradients
from tunesmith.quant.linear_layers import set_bypassed
from tunesmith.train_model import TrainModel

# Folder of the tests' module `ranks`
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

STEPS = 5
LEARNING_RATE = 1e-3
ADAPTER = Adapter(rank=4, alpha=8.0)
LENGTHS = (
    5,
    12,
    3,
    20,
)  # tokens of the documents of a batch: longer and shorter than the tiny model's windows
# Maximum relative difference of losses, and of gradients relative to the largest value of each.
TOLERANCE = 1e-5
# A gradient tensor whose values are smaller than this fraction of the largest gradient is compared
# with this minimum, because its values are mostly rounding.
FLOOR = 1e-3
# Config values of published models, for types whose default config has layers that cannot be
# sharded
PUBLISHED: dict[str, dict[str, Any]] = {
    # Gemma 4 26B-A4B has experts, unlike Gemma 4 31B. It has no per-layer inputs. In layers without
    # a sliding window, the keys are also the values.
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
}


def build(entry: ModelType, adapter: Adapter | None) -> TrainModel:
    """Build the tiny model of a type, always with the same weights.

    Attach the adapter if one is given. Otherwise all weights are trained.
    """
    config = families.default_config(entry.model_type)
    if not entry.entire:
        config = config.get_text_config()
    config.update(PUBLISHED.get(entry.model_type, {}))
    twin = build_tiny_model(config)
    if entry.entire:
        drop_other_parts(twin)
    twin.requires_grad_(True)
    set_bypassed(twin, entry.support.dead_targets)
    if adapter is not None:
        lora.attach_lora(twin, adapter, seed=1)
        torch.manual_seed(5)
        for _, layer in lora.loras(twin):
            nn.init.normal_(
                layer.lora_B, std=0.1
            )  # if lora_B were 0, the gradient of lora_A would be 0
    fuse_modules(twin, project=lora.project)
    options = {"attention_backend": "batched_matmul", "recurrent": entry.support.recurrent}
    return TrainModel(twin, make_method(MethodConfig()), **options).train()


def make_batch() -> Batch:
    """Return a batch of documents with LENGTHS tokens. Every third token has no label."""
    torch.manual_seed(3)
    count = sum(LENGTHS)
    ids, targets = torch.randint(3, VOCAB, (2, 1, count))
    targets[0, ::3] = -100
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    edges = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    supervised = int((targets != -100).sum())
    return Batch(ids, positions, targets, edges, max(LENGTHS), count, supervised, len(LENGTHS))


def backward(root: TrainModel) -> float:
    """Add the gradients of the batch to the parameters. Return the mean loss."""
    batch = make_batch()
    with root.step_context(batch):
        output = root(batch)
        loss = output.loss / output.denominator
        loss.backward()
    return float(loss)


def train(root: TrainModel, partial: frozenset[str], mesh: Mesh) -> dict[str, Any]:
    """Train. Return the gradients of the first step, all losses, and the parameters at the end."""
    from ranks import gathered

    backward(root)
    first = {name: p.grad for name, p in root.trained_parameters() if p.grad is not None}
    reduce_gradients(first, partial, mesh)
    gradients = {name: gathered(gradient).clone() for name, gradient in first.items()}
    for _, parameter in root.trained_parameters():
        parameter.grad = None
    settings = Train(learning_rate=LEARNING_RATE, weight_decay=0.1, compile="off")
    optimizer = Optimizer(root.trained_parameters(), settings)
    losses = []
    for step in range(STEPS):
        optimizer.start_step(LEARNING_RATE, step)
        losses.append(backward(root))
        reduce_gradients(optimizer.gradients(), partial, mesh)
        optimizer.step()
    parameters = {name: gathered(p.detach()) for name, p in root.model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "parameters": parameters}


def on_ranks(entry: ModelType, adapter: Adapter | None) -> float:
    """Return the largest difference between two ranks and one, in losses and gradients.

    This function runs on both ranks.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with join_ranks():
        mesh = Mesh.of(MeshShape(tensor=2), "cpu")
        root = build(entry, adapter)
        partial = apply_tensor_parallel(root, mesh)
        cut = train(root, partial, mesh)
        alone = train(build(entry, adapter), frozenset(), Mesh())
    assert _shapes(cut["parameters"]) == _shapes(alone["parameters"])
    assert cut["gradients"].keys() == alone["gradients"].keys()
    largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
    errors = []
    for name, expected in alone["gradients"].items():
        scale = max(float(expected.abs().max()), FLOOR * largest)
        errors.append(float((cut["gradients"][name] - expected).abs().max()) / scale)
    for loss, expected in zip(cut["losses"], alone["losses"], strict=True):
        errors.append(abs(loss - expected) / abs(expected))
    return max(errors)


def _shapes(parameters: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in parameters.items()}


def measure_type(entry: ModelType) -> tuple[float | None, str]:
    """Return the largest difference between two ranks and one.

    If tensor parallelism does not work for the type, return None and the reason.
    """
    from ranks import run_ranks

    try:
        find_blocks(build(entry, None).model)
    except ModelError as error:
        return None, error.why
    try:
        error = max(max(run_ranks(2, on_ranks, entry, adapter)) for adapter in (None, ADAPTER))
    except AssertionError as fault:  # raised by a rank
        return None, str(fault).strip().splitlines()[-1]
    if error > TOLERANCE:
        return None, f"two ranks differ by {error:.1e} from one"
    return float(f"{error:.1e}"), "cut"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "types", nargs="*", metavar="TYPE", help="model types to measure (default: all)"
    )
    parser.add_argument("--write", action="store_true", help="write the table and docs/models.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    table = read_model_types()
    changes = []
    for name in options.types or sorted(table):
        entry = table[name]
        # A multimodal type whose text model has its own class gets the results of the text model.
        # Types with padded rows are not measured: they use Transformers' own attention.
        is_of_text = bool(entry.text) and not entry.entire
        if entry.support.state not in ("tuned", "packed") or is_of_text:
            continue
        if name not in CONFIG_MAPPING:  # needs a newer version of Transformers
            continue
        try:
            error, why = measure_type(entry)
        except TunesmithError as fault:
            error, why = None, fault.what
        print(f"{name:24} {'' if error is None else f'{error:.1e}':8} {why}", flush=True)
        if (error is None) != (entry.tensor is None):
            changes.append(f"{name}: {why}")
        table[name] = replace(entry, tensor=error, uncut=why if error is None else "")
    cut = sum(entry.tensor is not None for entry in table.values())
    print(f"{cut} of {len(table)} types support tensor parallelism")
    if options.write:
        families.write(list(table.values()), measured_with())
        return
    for change in changes:
        print(f"changed: {change}", file=sys.stderr)
    sys.exit(bool(changes))


if __name__ == "__main__":
    main()
