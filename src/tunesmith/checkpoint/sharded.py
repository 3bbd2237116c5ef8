"""Checkpoints of a fully trained model on several ranks.

Each rank writes its shards, and a run with any other mesh can read them.
torch.distributed.checkpoint (DCP) writes the folder state/: one or more files of each rank, and
`.metadata`, which contains the file and position of each shard. `model.<name>` are the weights or
their fp32 masters. Shards that are trained in fp32 have no separate master. Replicated tensors are
stored once. `optimizer.<name>.<field>` are the optimizer's tensors. Scalars are stored in
optimizer.safetensors. The config, tokenizer and progress are the same files as in every checkpoint.
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
from torch import Tensor
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
from tunesmith.checkpoint.model_card import model_card
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
from tunesmith.model.arch import load
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.weights.older_readers import write_for_older_readers
from tunesmith.model.weights.save_tensors import save_sharded
from tunesmith.model.weights.stored_form import in_stored_form, is_stored_otherwise
from tunesmith.optim.optimizer import Optimizer
from tunesmith.runtime.device import is_integrated
from tunesmith.train_model import TrainModel

STATE_FOLDER = "state"
METADATA = ".metadata"
COPY_SHARE = 0.7  # maximum fraction of the host's free memory that a copy uses


def is_sharded(folder: Path) -> bool:
    """Return whether several ranks wrote the checkpoint together."""
    return (folder / STATE_FOLDER / METADATA).is_file()


class RanksWriter(Writer):
    """A writer of checkpoints for runs with several ranks.

    All ranks write a checkpoint together, on every node that has a run directory.

    The rank that writes a directory creates, commits and renames the folder, and all ranks write
    into the folder. Every rank creates a RanksWriter and calls its methods at the same steps.

    Attributes:
        ranks: the ranks with a separate process group, because a background thread uses the group
            during training steps.
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
        # Identifier of the thread that is writing or was the last to write.
        self._thread: int | None = None

    def wait(self) -> None:
        """Wait as `Writer.wait` does.

        Meanwhile, the heartbeat shows what the writing thread waits for.
        """
        with self.ranks.heartbeat.activity.waits_for(self._thread):
            super().wait()

    def _write(self, save: SaveFunction, step: int, keep_step: int | None) -> None:
        self._thread = threading.get_ident()
        try:
            self._write_on_all_ranks(save, step, keep_step)
        except OtherRankError as error:
            # Another rank has failed and reports its error. Rank 0 raises a CheckpointError, so
            # that it writes failure.json. All other ranks raise the OtherRankError unchanged.
            if not self.ranks.is_main_process:
                raise
            raise CheckpointError(
                error.what,
                where=f"checkpoint-{step}",
                fix="start the same command again: it resumes from the newest complete checkpoint",
            ) from error

    def _write_on_all_ranks(self, save: SaveFunction, step: int, keep_step: int | None) -> None:
        ranks = self.ranks
        place = self._run_dir / f"checkpoint-{step}"
        folder = place.with_name(f".{place.name}.partial")
        with ExitStack() as unfinished:
            with ranks.raise_on_all_ranks():
                self._sync()
                if ranks.is_run_dir_writer:
                    folder = unfinished.enter_context(atomic_folder(place, step))
            # If `save` fails on one rank, raise the error on all ranks.
            with ranks.raise_on_all_ranks():
                hashed = save(folder) or {}
            commit_on_all_ranks(ranks, folder, step, hashed)
            finish = unfinished.pop_all()
        with ranks.raise_on_all_ranks():
            finish.close()
        # Wait for all nodes, so that no node deletes an older checkpoint before all have the new
        # one.
        with ranks.raise_on_all_ranks():
            if ranks.is_run_dir_writer:
                prune(self._run_dir, self._keep, latest=step, keep_step=keep_step)
        self.saved_step = step


class _PartsReader(FileSystemReader):
    """A DCP reader for nodes without a shared disk.

    It first copies the files that this node needs from other nodes.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        super().__init__(folder / STATE_FOLDER)
        self.folder = folder
        self.ranks = ranks

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        if self.ranks.world > 1:
            # Names of the files that this rank must read according to DCP's plan.
            names = set()
            for item in plan.items:
                stored = self.storage_data[item.storage_index]
                names.add(f"{STATE_FOLDER}/{stored.relative_path}")
            missing = [name for name in names if not (self.folder / name).is_file()]
            entries = json.loads((self.folder / MANIFEST).read_text())["files"]
            copy_files(self.ranks, self.folder, missing, entries)
        return super().prepare_local_plan(plan)


class _PartsWriter(FileSystemWriter):
    """A DCP writer that raises the operating system's error if the disk is full."""

    def write_data(
        self, plan: SavePlan, planner: SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        """Write the shards as DCP does.

        Raise the original OSError if the disk cannot be written.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # Search the chain of causes, because torch.save raises a RuntimeError whose cause is
            # the OSError.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


def fits_twice(
    optimizer: OptimizerState, model: TrainModel, ranks: Ranks, device: torch.device
) -> bool:
    """Return whether every host has enough free memory to copy the tensors that its ranks write.

    Return False for an integrated GPU, because it shares the host's memory. This is a collective
    call.
    """
    size = sum(local_part(tensor).nbytes for tensor in _tensors_by_name(model, optimizer).values())
    has_host_memory = device.type == "cpu" or not is_integrated(device)
    # Multiply by the number of ranks on the node, because all of them copy at the same time.
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
    """Return a function that writes a checkpoint.

    The caller passes it to a `RanksWriter` that has the same `ranks`.

    Args:
        copy: copy the current state, so that any thread can write it later. If the state is not
            copied, it must be written before the next step.
    """
    tensors = _tensors_by_name(model, optimizer)
    progress = replace(progress)
    if copy:
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    # Store the step counts separately, because every rank reads all of them. DCP would distribute
    # them over the shards, and every node would need all shards.
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
        except CheckpointException as error:  # raised on all ranks; not a subclass of Exception
            rank, (cause, _) = min(error.failures.items())
            if ranks.is_main_process:
                cause.add_note(f"on {ranks.name(rank)}")
                raise cause from None
            raise OtherRankError(
                f"{ranks.name(rank)} failed: {cause}", exit_code=EXIT_FAILED
            ) from None

        # Each rank hashes the files that it has written. DCP puts the rank into the names of the
        # files.
        parts = (folder / STATE_FOLDER).glob(f"__{ranks.rank}_*{PART}")
        return {f"{STATE_FOLDER}/{path.name}": entry_of_file(path) for path in parts}

    return save


def _tensors_by_name(model: TrainModel, optimizer: OptimizerState) -> dict[str, Tensor]:
    """Return a dict from names in the checkpoint to the tensors that are written.

    An fp32 master replaces its 16-bit weight.
    """
    tensors = {}
    for name, tensor in weights_of(model.model).items():
        tensors[f"model.{name}"] = tensor.detach()
    for name, tensor in optimizer.items():
        weight, _, field = name.rpartition(".")
        place = f"model.{weight}" if field == "master" else f"optimizer.{name}"
        tensors[place] = tensor.detach()
    return tensors


def read_sharded_optimizer(
    optimizer: Optimizer, folder: Path, progress: Progress, ranks: Ranks = ONE_PROCESS
) -> None:
    """Load a checkpoint's optimizer state into the optimizer.

    If the state is sharded, only this rank's shards are loaded.

    This is a collective call. The errors are those of `read_shards`.
    """
    with read_optimizer(folder) as scalars:
        for name, part in optimizer.parts.items():
            step = scalars.get(f"{name}.step")
            if step is not None:
                part.state = part.initial_state()
                part.state["step"].copy_(step.read())

    masters = optimizer.masters
    # Skip scalars, which are already read, and masters, which are read below under the names of
    # their weights.
    stored_elsewhere = {f"{name}.master" for name in masters}.union(scalars)
    moments = {}
    for name, tensor in optimizer.state_dict().items():
        if name not in stored_elsewhere:
            moments[f"optimizer.{name}"] = tensor
    read_shards(folder, moments, ranks)
    read_shards(folder, {f"model.{name}": master for name, master in masters.items()}, ranks)
    optimizer.scale = progress.loss_scale
    optimizer.growth_tracker = progress.good_steps


def read_shards(folder: Path, tensors: dict[str, Tensor], ranks: Ranks = ONE_PROCESS) -> None:
    """Read the stored values into `tensors`, in their dtypes. Each rank reads only its own shards.

    The keys are names in the checkpoint, such as `model.lm_head.weight`. Nodes copy missing files
    from each other. This is a collective call.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        MachineError: the disk does not have enough space for files of other nodes.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Hide DCP's warning about `no_dist`, because this setting is intended.
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
        where=folder / STATE_FOLDER,
        why=first_line(error),
        fix=DELETE,
    )


class ShardedTensors:
    """Reader of the model's tensors in a sharded checkpoint, by name.

    Attributes:
        shapes: meta tensors with the stored shape and dtype. The dtype of masters is fp32.

    Raise CheckpointError if the checkpoint cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.shapes: dict[str, Tensor] = {}
        try:
            metadata = FileSystemReader(folder / STATE_FOLDER).read_metadata()
        except Exception as error:  # pickle raises errors of many types
            raise _unreadable(folder, error) from error
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith("model.") and isinstance(entry, TensorStorageMetadata):
                shape = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                self.shapes[key.removeprefix("model.")] = shape

    def read(self, name: str) -> Tensor:
        """Return the entire tensor on the CPU."""
        tensor = torch.empty_like(self.shapes[name], device="cpu")
        read_shards(self._folder, {f"model.{name}": tensor})
        return tensor


def export_sharded(folder: Path, output: Path, run: Run) -> None:
    """Write the model of a sharded checkpoint as a Transformers model into a new folder.

    At most two tensors are in memory at a time.

    Raise CheckpointError if the checkpoint cannot be read or `output` cannot be written.
    """
    settings = run.model
    stored = ShardedTensors(folder)
    shapes = {}
    for name, shape in stored.shapes.items():
        dtype = shape.dtype
        if shape.is_floating_point():
            # The checkpoint may have an fp32 master of a weight. Export the weight in the dtype of
            # the recipe.
            dtype = DTYPES[settings.dtype]
        shapes[name] = shape.to(dtype)
    names = {id(shape): name for name, shape in shapes.items()}
    # Keep the last two tensors in memory. All experts of a layer are stored in two tensors, and
    # `save_sharded` reads slices of both alternately.
    read_whole = lru_cache(maxsize=2)(stored.read)

    def read(shape: Tensor, rows: slice) -> Iterator[Tensor]:
        full = read_whole(names[id(shape)])
        yield full[rows] if full.ndim else full

    manifest = json.loads((folder / MANIFEST).read_text())
    step = int(manifest["step"])
    with atomic_folder(output, step) as inside:
        config, full_config = load.load_configs(folder, settings)
        model = load.build_on_meta(config, settings, full_config=full_config)
        base = fetch(settings) if is_stored_otherwise(model) else None
        tensors = in_stored_form(model, shapes, base)
        save_sharded(inside, tensors, read=read)
        for path in folder.iterdir():
            if path.is_file() and path.name != MANIFEST:
                shutil.copyfile(path, inside / path.name)
        # Add the keys that older versions of libraries read. A checkpoint that an earlier version
        # of tunesmith wrote lacks these keys.
        write_for_older_readers(inside)
        (inside / CARD).write_text(model_card(settings, run), encoding="utf-8")
