"""Base model that is loaded once and shared by many runs, one after the other.

Each run creates a new adapter, a new optimizer and a new order of the data. The random numbers of a
run depend only on its seed, and on names, steps and micro batches. Therefore an adapter that is
trained on a shared base is bit for bit equal to an adapter that is trained in a separate process.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from tunesmith.adapter import lora, peft_files
from tunesmith.adapter.low_rank import lora_scaling
from tunesmith.batches.schedule import BatchSchedule
from tunesmith.build_model import init_adapter, reference_of
from tunesmith.checkpoint.resume import Start, check_unchanged, find_resumed
from tunesmith.config.schema import Adapter, Run
from tunesmith.distributed.ranks import Ranks
from tunesmith.presentation.data import resume_lines
from tunesmith.runtime import compilation
from tunesmith.runtime.device import free_device_memory
from tunesmith.runtime.host import keep_threads
from tunesmith.start.build import build
from tunesmith.start.lines import choices_line, trained_text
from tunesmith.start.request import Request
from tunesmith.start.session import make_optimizer
from tunesmith.training.session import Session

log = logging.getLogger(__name__)


class SharedBase:
    """A base model that is loaded, quantized and prepared for training only once.

    All runs use the plan of the run `widest`, which needs the most memory. The other runs may
    differ from `widest` only in the keys of `space.VARIED`.
    """

    def __init__(self, widest: Run, ranks: Ranks) -> None:
        self.widest = widest
        self.ranks = ranks
        self.compiled: dict[tuple[int, float, float], Callable[..., object]] = {}

    @cached_property
    def first(self) -> Session:
        """Session of the run `widest`. The first access to this property loads the base model."""
        return build(Request(self.widest), self.ranks)

    def build(
        self,
        run: Run,
        start: Start,
        ranks: Ranks,
    ) -> Session:
        """Build the Session of a run. The Session of the previous run can no longer be used."""
        first = self.first
        root = first.model
        # Use the settings of the loaded base model, in which `auto` is already replaced by actual
        # values.
        recipe = replace(run, model=first.recipe.model)
        # The model may be unable to separate packed examples.
        run = replace(
            recipe, model=first.run.model, data=replace(run.data, pack=first.run.data.pack)
        )
        with ranks.raise_on_all_ranks():
            check_unchanged(start, run, first.hashes)
            tokens = first.data.train
            schedule = BatchSchedule(run, tokens)
            for text in resume_lines(find_resumed(start, run, schedule), run.train):
                log.info(text)
            # Set the seed, so that the adapter gets the same initial values as in a separate run.
            torch.manual_seed(run.train.seed)
            # Replace only the adapter. The base model stays in memory.
            for _, layer in lora.low_ranks(root.model):
                layer.add_lora(run.adapter, layer.lora_A.device)
            init_adapter(run, root.model)
            root.reference = reference_of(run, root)
            if start.checkpoint:
                peft_files.load_adapter(root.model, start.checkpoint)
        self._use_graphs_of(run.adapter)
        if first.device.type == "cuda":
            # Free the memory of the previous run.
            free_device_memory()
        optimizer = make_optimizer(run, root, start, ranks)
        trained = sum(parameter.numel() for _, parameter in root.trained_parameters())
        log.info(f"model: {trained_text(root.model, trained)}")
        log.info(choices_line(first.plan))
        if first.device.type == "cpu":
            keep_threads(start.progress.threads if start.progress else None)
        return replace(
            first,
            recipe=recipe,
            run=run,
            data=replace(first.data, run=run, schedule=schedule),
            optimizer=optimizer,
            total_steps=schedule.steps(run.train.duration),
            ranks=ranks,
        )

    def _use_graphs_of(self, adapter: Adapter) -> None:
        """Make the compiled layers use the graphs for adapters like this one.

        Adapters can share graphs if rank, scaling and dropout are equal. Otherwise the first step
        compiles new graphs.
        """
        if not self.first.plan.compiled:
            return
        # Values of the adapter that a compiled graph contains as constants.
        shape = (adapter.rank, lora_scaling(adapter), adapter.dropout)
        if shape not in self.compiled:
            self.compiled[shape] = compilation.compile_apart(f"forward_{len(self.compiled)}")
        layer: Any
        for layer in self.first.model.layers:
            layer.compiled = self.compiled[shape]
