"""From a memory plan to a model that is ready for its first step: built, held in fp8 if that is asked, and fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tunesmith import fp8_base
from tunesmith.adapter import peft_files
from tunesmith.build_model import Weights, build_model
from tunesmith.config.schema import Run
from tunesmith.data.batch import Batch
from tunesmith.methods.base import TrainModel
from tunesmith.runtime.calibrate import CudaMeter, calibrate_recompute
from tunesmith.runtime.choices import Choice
from tunesmith.runtime.memory_plan import USABLE, MemoryPlan, is_discrete, optimizer_bytes


def fit_model(
    run: Run,
    files: Path,
    adapter: Path | None,
    probes: Sequence[Batch],
    memory: MemoryPlan,
    *,
    trained: int,
    varied: bool,
    weights: Weights,
    say: Callable[[str], None],
) -> tuple[TrainModel, Choice, int]:
    """Build the model and let it settle on this machine.

    Args:
        run: the resolved recipe.
        files: folder of the model's files.
        adapter: folder of the checkpoint whose adapter is gone on with, or None.
        probes: the first micro batches of the run, on the device that the model goes to. The same at every start: what
            is decided on them must not differ when a run goes on.
        memory: the plan to begin with.
        trained: parameters that are trained.
        varied, weights: as `apply.prepare`.
        say: takes one line for the user.

    Returns:
        the model; how its base is held, and why; how many layers are run again in the backward.

    Raises:
        MachineError: it does not fit.
    """
    device = probes[0].input_ids.device

    def make() -> TrainModel:
        torch.manual_seed(run.train.seed)
        return build_model(run, files, device=device, recomputed=memory.recomputed, varied=varied, weights=weights)

    model = make()
    base = Choice("base", run.model.quantize if run.model.quantize != "none" else run.model.dtype, "as the recipe says")
    if run.model.quantize == "fp8":
        base = fp8_base.quantize_base_fp8(model, probes)
        if not base.taken.startswith("fp8"):
            say(f"warning: the base stays in bf16: {base.why}")
            del model
            model = make()
    if adapter is not None:
        peft_files.load_adapter(model.model, adapter)
    if run.train.recompute != "auto" or not is_discrete(device):
        return model, base, memory.recomputed
    budget = int(memory.free_bytes * USABLE)
    count = calibrate_recompute(
        model, probes[0], memory, CudaMeter(device), budget=budget, later=optimizer_bytes(run, trained)
    )
    return model, base, count
