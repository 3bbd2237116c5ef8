"""The session: all objects that a training needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from tunesmith.batches.loader import GlobalBatch, Loader
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import UsageError
from tunesmith.host.chips import Peak
from tunesmith.hub.model_files import ModelFiles
from tunesmith.methods import METHODS
from tunesmith.metrics import hardware
from tunesmith.model.arch.spec import attention_weight, flops
from tunesmith.optim.optimizer import Optimizer
from tunesmith.parallel.mesh import ALONE, Mesh
from tunesmith.planning.measured_layers import count_active_adapter, count_adapter
from tunesmith.planning.run_plan import RunPlan
from tunesmith.runtime.transfer import DevicePrefetcher
from tunesmith.train_model import Method, StopRequests, TrainModel, ValidationResult
from tunesmith.training.validation_loss import validation_loss


@dataclass
class Session:
    """The objects that a running training needs, such as the model, the data, the plan and the
    optimizer.
    """

    recipe: Run  # the recipe that config.yaml stores
    run: Run  # the recipe for training, adapted to the model and the machine
    files: ModelFiles  # files of the base model and of its tokenizer
    data: TrainingData
    model: TrainModel
    optimizer: Optimizer
    plan: RunPlan  # choices for this machine, with the reason of each
    total_steps: int | None  # optimizer steps of the whole run, or None if a time limit ends it
    hashes: Mapping[str, Any]  # hashes of base and data, named as in `Progress`
    peak: Peak  # peak FLOP/s of one rank, the reference for MFU
    ranks: Ranks = ONE_PROCESS
    mesh: Mesh = ALONE  # how the ranks divide the work

    @property
    def device(self) -> torch.device:
        return torch.device(self.plan.device)

    def flops(self, examples: Sequence[int], supervised: int) -> float:
        """Compute the floating-point operations of a step on these examples.

        Args:
            supervised: number of positions with a label.
        """
        run = self.run
        tokens = self.data.train
        spec = self.files.spec
        count = partial(flops, spec, trained="full", forwards=run.extra_forwards)
        if run.adapter.kind == "lora":
            adapter = sum(p.numel() for p in self.optimizer.params.values())
            # Do not count the projector, because text tokens do not pass through it.
            if run.model.train_projector:
                adapter -= spec.projector_parameters
            # Count only the adapters of the experts that a token uses.
            adapter -= count_adapter(spec, run.adapter)
            adapter += count_active_adapter(spec, run.adapter)
            count = partial(count, trained="lora", adapter_parameters=adapter)
        indices = list(examples)
        document_flops = count(tokens.document_lengths(examples), supervised)
        # If the two sequences of a pair share tokens, these tokens are computed only once, so
        # subtract them.
        shared_flops = count(tokens.shared[indices], 0)
        picture_tokens = int(tokens.picture_tokens[indices].sum())
        return document_flops - shared_flops + spec.picture_flops * picture_tokens

    def memory_gib(self) -> float:
        """Return the peak memory since the run was started or resumed, in GiB.

        At its end, the memory trial resets the allocator's statistics, so the peak of the trial is
        taken from the plan.
        """
        return max(hardware.memory_gib(self.device), self.plan.trial_peak / 2**30)

    @property
    def method(self) -> Method:
        assert self.model.method is not None
        return self.model.method

    @property
    def share(self) -> tuple[int, int]:
        """The number of this data rank, and the number of data ranks."""
        return self.mesh.data_rank, self.mesh.shape.data

    def held_out_loss(self, stop: StopRequests) -> ValidationResult | None:
        """Return the method's mean loss over the held-out rows, or None if a stop interrupted it.

        This is a collective call.
        """
        assert self.data.validation is not None
        micro_batch = self.plan.layout.micro_batch
        tokens = micro_batch.amount
        if micro_batch.unit != "tokens":
            tokens = self.run.row_tokens * 4
        return validation_loss(
            self.model,
            self.data.validation,
            micro_tokens=tokens,
            pad_id=self.files.pad_id,
            device=self.device,
            mesh=self.mesh,
            cancelled=stop.cancels_validation,
            scored=self.ranks.heartbeat.progress,
        )

    def loader(self, start_step: int) -> Loader:
        """Return a loader of global batches on the device that begins with step `start_step` (from
        0).
        """
        return make_loader(
            self.data, self.files, self.plan, start_step, self.total_steps, self.mesh
        )


def make_loader(
    data: TrainingData,
    files: ModelFiles,
    plan: RunPlan,
    start: int = 0,
    stop: int | None = None,
    mesh: Mesh = ALONE,
) -> Loader:
    """Return a loader of global batches in the plan's layout, for steps `start` to `stop` - 1.

    The batches that the loader yields contain only this rank's part and are on the device.
    """
    device = torch.device(plan.device)
    layout = plan.layout.multiple_of(plan.mesh.tensor)
    trained: Literal["full", "lora"] = "full" if data.run.adapter.kind == "none" else "lora"
    return Loader(
        data.train,
        data.schedule,
        **vars(layout),
        pad_id=files.pad_id,
        start_step=start,
        stop_step=stop,
        share=(mesh.data_rank, mesh.shape.data),
        attention_weight=attention_weight(files.spec, trained=trained),
        mismatches=METHODS[data.run.method.name].needs_mismatched,
        # Do not load pictures ahead of time, because the pixels of a step may take gigabytes.
        ahead=0 if data.train.pictures is not None else Loader.ahead,
        prefetcher=DevicePrefetcher(device) if device.type == "cuda" else None,
    )


def check_one_micro_batch(run: Run, batch: GlobalBatch) -> None:
    """Raise UsageError if a step has several micro batches but `train.optimizer_in_backward` is
    set.

    With this option, the first backward already updates the weights, so the gradients of several
    micro batches cannot be accumulated.
    """
    key = "train.optimizer_in_backward"
    if run.train.optimizer_in_backward and len(batch.micro) > 1:
        raise UsageError(
            f"step {batch.step + 1} takes {len(batch.micro)} micro batches, but {key} requires one",
            where=key,
            why="each parameter is updated as soon as its gradient is computed, "
            "so gradients cannot be accumulated",
            fix=f"set a smaller train.global_batch, or {key}=false",
        )
