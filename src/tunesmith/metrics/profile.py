"""`profile:` of a recipe: PyTorch's traces and memory snapshots of some steps, on every rank.

In its folder, `output_dir/profile/` for a training run, each rank r writes for each cycle:

    rank<r>.<time>.pt.trace.json.gz   the trace, for ui.perfetto.dev and TensorBoard
    memory-rank<r>-<cycle>.pickle     GPU only: the allocator's segments, for pytorch.org/memory_viz
"""

import pickle
import time
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tunesmith.config.schema import Profile


class Profiler:
    """Context around the training loop; call `step()` after each optimizer step. Costs nothing when
    not enabled.

    `traces` are the files written so far, one per cycle.
    """

    def __init__(self, settings: Profile, folder: Path, *, rank: int, device: torch.device) -> None:
        self.folder = folder
        self.rank = rank
        self.device = device
        self.traces: list[Path] = []
        self._steps_left = (settings.wait + settings.warmup + settings.active) * settings.cycles
        self._profile: profile | None = None
        # Ranks that are not profiled pay nothing.
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
            # Else torch warns, 2.11 and 2.12 of every profile, that a new cycle clears the events.
            acc_events=True,
        )

    def __enter__(self) -> Self:
        if self._profile is not None:
            self._profile.start()
            self._keep_traces_only()
        return self

    def step(self) -> None:
        """Note an optimizer step. The profiler ends after its last cycle, with what it holds."""
        if self._profile is None:
            return
        self._profile.step()
        self._keep_traces_only()
        self._steps_left -= 1
        if self._steps_left == 0:
            self.__exit__()

    def _keep_traces_only(self) -> None:
        """Parse no events of a cycle that has begun: its trace has them.

        Torch takes a minute to parse 150,000 operations, and parses those of earlier cycles again.
        """
        if self._profile is not None and self._profile.profiler is not None:
            self._profile.profiler.acc_events = False

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            running = self._profile
            self._profile = None
            running.stop()

    def _write(self, cycle: profile) -> None:
        """Called by torch at the end of each cycle, also of one that the run's end cuts short."""
        trace = self.folder / f"rank{self.rank}.{time.time_ns()}.pt.trace.json.gz"
        cycle.export_chrome_trace(str(trace))
        self.traces.append(trace)
        if self.device.type == "cuda":
            name = f"memory-rank{self.rank}-{len(self.traces)}.pickle"
            _write_snapshot(self.folder / name)


def _write_snapshot(file: Path) -> None:
    """Write the state of the GPU's allocator in the form that pytorch.org's memory viewer opens."""
    snapshot = {"segments": torch.cuda.memory_snapshot(), "device_traces": []}
    with file.open("wb") as out:
        pickle.dump(snapshot, out)
