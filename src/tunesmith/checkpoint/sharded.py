"""Checkpoints of a model trained in full on several ranks.

Each rank writes what it holds, and any mesh reads it again. torch.distributed.checkpoint (DCP)
makes state/: a file or more of each rank, and `.metadata`, which says where in them each tensor's
parts lie. `model.<name>` are the weights, or their fp32 masters; fp32 shards are their own. What
copies have alike is there once. `optimizer.<name>.<field>` are the optimizer's tensors. Scalars are
in optimizer.safetensors; config, tokenizer and progress lie beside it as in every checkpoint.
"""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from tunesmith.checkpoint.contents import (
    OptimizerState,
    TokenizerFiles,
    read_optimizer,
    weights_of,
    write_config,
    write_optimizer,
)
from tunesmith.checkpoint.manifest import (
    CARD,
    MANIFEST,
    PART,
    Entries,
    atomic_folder,
    entry_of_file,
    prune,
)
from tunesmith.checkpoint.model_card import model_card, weights_file, with_files
from tunesmith.checkpoint.replicate import commit_on_all_ranks, copy_files
from tunesmith.checkpoint.resume import DELETE, Progress
from tunesmith.checkpoint.writer import SaveFunction, Writer
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import COLLECTIVE_TIMEOUT, ONE_PROCESS, Ranks
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import (
    EXIT_FAILED,
    CheckpointError,
    OtherRankError,
    TunesmithError,
    first_line,
)
from tunesmith.host.memory import available_memory
from tunesmith.hub.fetch import fetch
from tunesmith.methods.base import TrainModel
from tunesmith.model import load
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.older_readers import write_for_older_readers
from tunesmith.model.save_tensors import save_sharded
from tunesmith.model.stored_form import in_stored_form, is_stored_otherwise
from tunesmith.optim.optimizer import Optimizer
from tunesmith.runtime.device import is_integrated

STATE_FOLDER = "state"
METADATA = ".metadata"
COPY_SHARE = 0.7  # of the host's free memory, which a copy may take


def is_sharded(folder: Path) -> bool:
    """Tell whether a checkpoint was written by ranks together."""
    return (folder / STATE_FOLDER / METADATA).is_file()


class RanksWriter(Writer):
    """Writes checkpoints with the other ranks, on every node that has a run directory of its own.

    The rank that writes a directory makes, commits and renames the folder, and all write into it.
    Every rank makes a writer, and calls its methods, at the same step as the others.

    Attributes:
        ranks: over a group of their own, as a thread may use it beside the steps.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        saved_step: int | None,
        *,
        sync: Callable[[], None],
        ranks: Ranks,
    ) -> None:
        super().__init__(run_dir, keep, saved_step, sync=sync)
        self.ranks = replace(
            ranks, group=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        )
        # The identity of the thread that writes, or wrote last.
        self._thread: int | None = None

    def wait(self) -> None:
        """Wait as `Writer.wait` does; the heartbeat says what the writing thread waits for."""
        with self.ranks.heartbeat.activity.waits_for(self._thread):
            super().wait()

    def _write(self, save: SaveFunction, step: int, keep_step: int | None) -> None:
        self._thread = threading.get_ident()
        try:
            self._write_on_all_ranks(save, step, keep_step)
        except OtherRankError as error:
            # Rank 0 reports it, as it writes failure.json.
            if not self.ranks.is_main_process:
                raise
            raise CheckpointError(
                error.what,
                where=f"checkpoint-{step}",
                fix="start the same command again: it resumes from the newest checkpoint that is "
                "whole",
            ) from error

    def _write_on_all_ranks(self, save: SaveFunction, step: int, keep_step: int | None) -> None:
        place = self._run_dir / f"checkpoint-{step}"
        folder = place.with_name(f".{place.name}.partial")
        with ExitStack() as unfinished:
            with self.ranks.raise_on_all_ranks():
                self._sync()
                if self.ranks.is_run_dir_writer:
                    folder = unfinished.enter_context(atomic_folder(place, step))
            # The collectives in `save` fail on all ranks alike.
            with self.ranks.raise_on_all_ranks():
                hashed = save(folder) or {}
            commit_on_all_ranks(self.ranks, folder, step, hashed)
            finish = unfinished.pop_all()
        with self.ranks.raise_on_all_ranks():
            finish.close()
        # No node deletes an older one before all have this one.
        with self.ranks.raise_on_all_ranks():
            if self.ranks.is_run_dir_writer:
                prune(self._run_dir, self._keep, latest=step, keep_step=keep_step)
        self.saved_step = step


class _PartsReader(FileSystemReader):
    """DCP's reader, which first copies files here that this node's ranks read.

    Those are the ones that other nodes have, and this one lacks.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        super().__init__(folder / STATE_FOLDER)
        self.folder = folder
        self.ranks = ranks

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        if self.ranks.world > 1:
            # The files that DCP's plan reads of this rank, by where the tensors' parts lie.
            names = set()
            for item in plan.items:
                names.add(f"{STATE_FOLDER}/{self.storage_data[item.storage_index].relative_path}")
            missing = [name for name in names if not (self.folder / name).is_file()]
            entries = json.loads((self.folder / MANIFEST).read_text())["files"]
            copy_files(self.ranks, self.folder, missing, entries)
        return super().prepare_local_plan(plan)


class _PartsWriter(FileSystemWriter):
    """DCP's writer of files."""

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write as DCP does; where the disk takes no more, raise the OSError that says why."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch.save raises an error of its own on top of it.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def fits_twice(
    optimizer: OptimizerState, model: TrainModel, ranks: Ranks, device: torch.device
) -> bool:
    """Tell whether the host of every rank has room for a copy of what its ranks write.

    A collective call. An integrated GPU's memory is the host's, where there is none to spare.
    """
    size = sum(local_part(tensor).nbytes for tensor in _named(model, optimizer).values())
    has_host_memory = device.type == "cpu" or not is_integrated(device)
    # The ranks of a node copy at the same time.
    fits = has_host_memory and size * ranks.local_world < COPY_SHARE * available_memory()
    return all(ranks.all_gather_object(fits))


def sharded_save_function(
    run: Run,
    model: TrainModel,
    tokenizer: TokenizerFiles,
    optimizer: OptimizerState,
    progress: Progress,
    *,
    ranks: Ranks,
    copy: bool,
) -> SaveFunction:
    """Return what a `RanksWriter` with these `ranks` writes a checkpoint with.

    copy: write the state of this moment, which any thread may do later; else it must be written
        before the next step.
    """
    tensors = _named(model, optimizer)
    progress = replace(progress)
    if copy:
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    # Every rank reads all step counts. DCP would spread them over the parts, and every node would
    # need all of these.
    scalars = {}
    for name, tensor in list(tensors.items()):
        if name.startswith("optimizer.") and tensor.dim() == 0:
            scalars[name.removeprefix("optimizer.")] = tensors.pop(name)

    def save(folder: Path) -> Entries:
        writer = _PartsWriter(folder / STATE_FOLDER)
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                write_config(folder, model, tokenizer)
                write_optimizer(folder, scalars)
                progress.write(folder)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
        except CheckpointException as error:  # on all ranks alike, and not an Exception
            rank, (cause, _) = min(error.failures.items())
            if ranks.is_main_process:
                cause.add_note(f"on {ranks.name(rank)}")
                raise cause from None
            raise OtherRankError(
                f"{ranks.name(rank)} failed: {cause}", exit_code=EXIT_FAILED
            ) from None
        # Each rank hashes what it has written; DCP names the files after the rank.
        parts = (folder / STATE_FOLDER).glob(f"__{ranks.rank}_*{PART}")
        return {f"{STATE_FOLDER}/{path.name}": entry_of_file(path) for path in parts}

    return save


def _named(model: TrainModel, optimizer: OptimizerState) -> dict[str, Tensor]:
    """Collect what ranks write, by its name in a checkpoint.

    An fp32 master takes the place of its 16-bit weight.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in weights_of(model.model).items()}
    for name, tensor in optimizer.items():
        weight, _, field = name.rpartition(".")
        place = f"model.{weight}" if field == "master" else f"optimizer.{name}"
        tensors[place] = tensor.detach()
    return tensors


def read_sharded_weights(model: nn.Module, folder: Path, ranks: Ranks = ONE_PROCESS) -> None:
    """Load a materialized model, or this rank's shards of it, in its own dtype.

    A collective call of `ranks`, whose nodes get what they lack from each other. CheckpointError if
    it cannot be read; MachineError where the disk has no room for files of other nodes.
    """
    _read(folder, {f"model.{name}": tensor for name, tensor in weights_of(model).items()}, ranks)


def read_sharded_optimizer(
    optimizer: Optimizer, folder: Path, progress: Progress, ranks: Ranks = ONE_PROCESS
) -> None:
    """Load a checkpoint's state into the optimizer, or into this rank's part of it; as above."""
    with read_optimizer(folder) as scalars:
        for name, part in optimizer.parts.items():
            if f"{name}.step" in scalars:
                part.state = part.initial_state()
                part.state["step"].copy_(scalars[f"{name}.step"].read())
    # Scalars are read above, masters below under the name of their weight.
    stored_elsewhere = {*scalars, *(f"{name}.master" for name in optimizer.masters)}
    moments = {}
    for name, tensor in optimizer.state_dict().items():
        if name not in stored_elsewhere:
            moments[f"optimizer.{name}"] = tensor
    _read(folder, moments, ranks)
    _read(folder, {f"model.{name}": master for name, master in optimizer.masters.items()}, ranks)
    optimizer.scale = progress.loss_scale
    optimizer.growth_tracker = progress.good_steps


def _read(folder: Path, tensors: dict[str, Tensor], ranks: Ranks = ONE_PROCESS) -> None:
    """Read into tensors, each rank what it holds of them."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # DCP says so of `no_dist`.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load({**tensors}, storage_reader=_PartsReader(folder, ranks), no_dist=True)
    except CheckpointException as error:
        cause = error.failures[0][0]
        if isinstance(cause, TunesmithError):
            raise cause from None
        raise _unreadable(folder, cause) from None


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{folder.name} has no readable {STATE_FOLDER}/",
        where=str(folder / STATE_FOLDER),
        why=first_line(error),
        fix=DELETE,
    )


class ShardedTensors:
    """The model's tensors of a sharded checkpoint, by their names.

    Attributes:
        shapes: of each, and the dtype that it is stored in; fp32 for masters.

    CheckpointError if it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shapes: dict[str, Tensor] = {}
        try:
            metadata = FileSystemReader(folder / STATE_FOLDER).read_metadata()
        except Exception as error:  # pickle's are of many kinds
            raise _unreadable(folder, error) from error
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith("model.") and isinstance(entry, TensorStorageMetadata):
                shape = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                self.shapes[key.removeprefix("model.")] = shape

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        tensor = torch.empty_like(self.shapes[name], device="cpu")
        _read(self._folder, {f"model.{name}": tensor})
        return tensor


def export_sharded(folder: Path, output: Path, run: Run) -> None:
    """Write a sharded checkpoint's model as Transformers' files into a new folder.

    One tensor is in memory at a time; where experts are written singly, two stacks of them.
    CheckpointError if it cannot be read, or `output` not be written.
    """
    stored = ShardedTensors(folder)
    shapes: dict[str, Tensor] = {}
    for name, shape in stored.shapes.items():
        # Masters are fp32 there.
        dtype = DTYPES[run.model.dtype] if shape.is_floating_point() else shape.dtype
        shapes[name] = shape.to(dtype)
    names = {id(shape): name for name, shape in shapes.items()}
    # The experts of a layer take turns, of two stacks.
    read_whole = lru_cache(maxsize=2)(stored.read)

    def read(shape: Tensor, rows: slice) -> Iterator[Tensor]:
        whole = read_whole(names[id(shape)])
        yield whole[rows] if whole.ndim else whole

    step = int(json.loads((folder / MANIFEST).read_text())["step"])
    with atomic_folder(output, step) as inside:
        config, whole = load.load_configs(folder, run.model)
        model = load.build_on_meta(config, run.model, whole=whole)
        base = fetch(run.model) if is_stored_otherwise(model) else None
        save_sharded(inside, in_stored_form(model, shapes, base), read=read)
        for path in folder.iterdir():
            if path.is_file() and path.name != MANIFEST:
                shutil.copyfile(path, inside / path.name)
        # A checkpoint of an earlier version has the new keys alone.
        write_for_older_readers(inside)
        files = [weights_file(inside, f"Transformers, {run.model.dtype}")]
        card = with_files(model_card(run.model, run, folder.parent, step=step), files)
        (inside / CARD).write_text(card, encoding="utf-8")
