"""From a memory plan to a model that is ready for its first step: built, held in fp8 if that is asked, and fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tunesmith.adapter import peft_io
from tunesmith.config.schema import Run
from tunesmith.data.batch import Batch
from tunesmith.method.base import TrainModel
from tunesmith.parallel import eight_bits
from tunesmith.parallel.apply import Weights, prepare
from tunesmith.parallel.choices import Choice
from tunesmith.parallel.fit import CudaMeter, fit
from tunesmith.parallel.memory import USABLE, MemoryPlan, has_own_memory, later_bytes


def ready(
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
        return prepare(run, files, device=device, recomputed=memory.recomputed, varied=varied, weights=weights)

    model = make()
    base = Choice("base", run.model.quantize if run.model.quantize != "none" else run.model.dtype, "as the recipe says")
    if run.model.quantize == "fp8":
        base = eight_bits.hold(model, probes)
        if not base.taken.startswith("fp8"):
            say(f"warning: the base stays in bf16: {base.why}")
            del model
            model = make()
    if adapter is not None:
        peft_io.load(model.model, adapter)
    if run.train.recompute != "auto" or not has_own_memory(device):
        return model, base, memory.recomputed
    budget = int(memory.free_bytes * USABLE)
    count = fit(model, probes[0], memory, CudaMeter(device), budget=budget, later=later_bytes(run, trained))
    return model, base, count
