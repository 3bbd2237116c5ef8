"""One loaded base for many runs: a start replaces the adapter, the optimizer and the data's order.

What a run draws depends on its seed, names, steps and micro batches alone, so an adapter that is
on a base in use learns, to the last bit, what it would learn in a process of its own.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from tunesmith.adapter import lora, peft_files
from tunesmith.adapter.low_rank import lora_scaling
from tunesmith.build_model import init_adapter, reference_of
from tunesmith.checkpoint.resume import Start, check_unchanged, describe_resume
from tunesmith.config.schema import Adapter, Run
from tunesmith.data.batches.schedule import BatchSchedule
from tunesmith.distributed.ranks import Ranks
from tunesmith.runtime import compilation
from tunesmith.runtime.device import free_device_memory
from tunesmith.runtime.host import keep_threads
from tunesmith.training.build import Session, build, make_optimizer

log = logging.getLogger(__name__)


class SharedBase:
    """A base that is loaded, quantized and prepared for training once.

    The plan is that of the `widest` run: no other run needs more memory. The other runs differ only
    in `space.VARIED`.
    """

    def __init__(self, widest: Run, ranks: Ranks) -> None:
        self.widest = widest
        self.ranks = ranks
        self.compiled: dict[tuple[int, float, float], Callable[..., object]] = {}

    @cached_property
    def first(self) -> Session:
        """The Session of the widest run. Its base is loaded at the first use."""
        return build(self.widest, Start(), ranks=self.ranks)

    def build(
        self,
        run: Run,
        start: Start,
        *,
        why: bool = False,
        ranks: Ranks,
    ) -> Session:
        """The Session of one of the runs, in place of the last one; arguments as of `build`."""
        first = self.first
        root = first.model
        # What `auto` stands for with the base that is loaded.
        run = replace(run, model=first.run.model)
        with ranks.raise_on_all_ranks():
            check_unchanged(start, run, first.hashes)
            tokens = first.data.train
            schedule = BatchSchedule.of(run, tokens)
            for text in describe_resume(start, run, schedule):
                log.info(text)
            # The adapter begins as in a run of its own with this seed.
            torch.manual_seed(run.train.seed)
            # The base stays in memory: only the adapter is another.
            lora.replace_adapter(root.model, run.adapter)
            init_adapter(run, root.model)
            root.reference = reference_of(run, root)
            if start.checkpoint:
                peft_files.load_adapter(root.model, start.checkpoint)
        self._use_graphs_of(run.adapter)
        if first.device.type == "cuda":
            # Of the last run.
            free_device_memory()
        optimizer = make_optimizer(run, root, start, ranks)
        for text in (f"model: {root.describe()}", *first.plan.describe(why=why)):
            log.info(text)
        if first.device.type == "cpu":
            keep_threads(start.progress.threads if start.progress else None)
        return replace(
            first,
            run=run,
            data=replace(first.data, run=run, schedule=schedule),
            optimizer=optimizer,
            total_steps=schedule.steps(run.train.duration),
            ranks=ranks,
        )

    def _use_graphs_of(self, adapter: Adapter) -> None:
        """Let compiled layers train by the graphs of this shape of adapter.

        The first step with it makes them.
        """
        if not self.first.plan.compiled:
            return
        # What a compiled graph has in it as constants.
        shape = (adapter.rank, lora_scaling(adapter), adapter.dropout)
        if shape not in self.compiled:
            self.compiled[shape] = compilation.compile_apart(f"forward_{len(self.compiled)}")
        layer: Any
        for layer in self.first.model.layers:
            layer.compiled = self.compiled[shape]
