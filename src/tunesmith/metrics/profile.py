"""Profiler for the recipe key `profile`: PyTorch traces and memory snapshots of some steps on every
rank.

For each cycle, rank r writes these files into the profile folder (`output_dir/profile/` for a
training run):

    rank<r>.<time>.pt.trace.json.gz   trace for ui.perfetto.dev and TensorBoard
    memory-rank<r>-<cycle>.pickle     allocator segments for pytorch.org/memory_viz, only on GPUs
"""

import pickle
import time
import warnings
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tunesmith.config.schema import Profile


class Profiler:
    """Context manager around the training loop. Call `step()` after each optimizer step.

    It has no cost if the profile is not enabled.

    Attributes:
        traces: files written so far, one per cycle.
    """

    def __init__(self, settings: Profile, folder: Path, *, rank: int, device: torch.device) -> None:
        self.folder = folder
        self.rank = rank
        self.device = device
        self.traces: list[Path] = []
        self._steps_left = (settings.wait + settings.warmup + settings.active) * settings.cycles
        self._profile: profile | None = None
        # On a rank that is not profiled, create no profiler, so that it has no overhead.
        if not settings.enabled or (settings.ranks != "all" and rank not in settings.ranks):
            return
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=settings.wait,
                warmup=settings.warmup,
                active=settings.active,
                repeat=settings.cycles,
            ),
            on_trace_ready=self._write,
            profile_memory=True,
            record_shapes=True,
            with_stack=settings.stacks,
        )
        # Each cycle has its own trace file, so that no event is lost.
        warnings.filterwarnings("ignore", message="(Warning: )?Profiler clears events")

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.start()
        return self

    def step(self) -> None:
        """Count an optimizer step. After the last cycle, stop the profiler and write its data."""
        if self._profile is None:
            return
        self._profile.step()
        self._steps_left -= 1
        if self._steps_left == 0:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        running, self._profile = self._profile, None
        if running is not None:
            running.stop()

    def _write(self, cycle: profile) -> None:
        """Write a trace.

        Torch calls this at the end of each cycle, and at the end of a run that ends during a cycle.
        """
        trace = self.folder / f"rank{self.rank}.{time.time_ns()}.pt.trace.json.gz"
        cycle.export_chrome_trace(str(trace))
        self.traces.append(trace)

        if self.device.type == "cuda":
            # The dictionary has the format that pytorch.org's memory viewer reads.
            snapshot = {"segments": torch.cuda.memory_snapshot(), "device_traces": []}
            name = f"memory-rank{self.rank}-{len(self.traces)}.pickle"
            with (self.folder / name).open("wb") as file:
                pickle.dump(snapshot, file)
