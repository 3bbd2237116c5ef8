"""Synchronization of the run directories of nodes that do not share a disk.

Each run directory has one rank that writes it (`Ranks.is_run_dir_writer`). Rank 0 is the writer for
all ranks that see the run directory of rank 0. On a node that does not see this directory, one of
the node's ranks is the writer. The manifest of a checkpoint is identical in all directories and
lists all files. Each directory contains all files except the shards that ranks on other nodes
wrote. A checkpoint is therefore complete if each file is in at least one directory. Files that a
node needs are copied to it over the process group.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoint.manifest import (
    ANNOUNCED_BYTES,
    CARD,
    ELSEWHERE,
    MANIFEST,
    PART,
    Entries,
    atomic_folder,
    damaged_files,
    digest_of_file,
    flush_files,
    flush_to_disk,
    free_name,
    is_complete,
    remove,
    write_manifest,
)
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import CheckpointError, MachineError
from tunesmith.host.files import require_disk_space, write_atomically
from tunesmith.host.memory import open_uncached
from tunesmith.run_dir import IDENTITY, RECIPE
from tunesmith.units import count_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20  # size of the chunks in which a file is copied
_COPY = re.compile(r"\.?checkpoint-(\d+)(?:\.partial|\.old)?")


@dataclass(frozen=True)
class Transfer:
    """A file that rank `source` sends to rank `target`.

    `digest` is empty if it is not known.
    """

    name: str
    source: int
    target: int
    size: int
    digest: str


def choose_run_dir_writers(ranks: Ranks, folder: Path, claim: Callable[[], object]) -> Ranks:
    """Find out which ranks see the same `folder`, and return `ranks` with this information.

    This is a collective call.

    Args:
        claim: creates the folder. It is called once for each disk, on the lowest rank that sees the
            folder.
    """
    if ranks.world == 1:
        claim()
        return ranks

    writers: dict[int, int] = {}
    while len(writers) < ranks.world:
        missing = [rank for rank in range(ranks.world) if rank not in writers]
        lowest = missing[0]
        # Use a new file name each time, because a killed process may have left its file behind.
        token = folder / ranks.broadcast_object(f".seen-{uuid.uuid4().hex}")
        with ranks.raise_on_all_ranks():
            if ranks.rank == lowest:
                claim()
                token.touch()
        sees_token = ranks.all_gather_object(token.exists())
        with ranks.raise_on_all_ranks():
            if ranks.rank == lowest:
                token.unlink()
        writers |= {rank: lowest for rank in missing if sees_token[rank]}
    return replace(ranks, run_dir_writers=tuple(writers[rank] for rank in range(ranks.world)))


def newest_checkpoint(run_dir: Path, ranks: Ranks = ONE_PROCESS) -> tuple[int, int] | None:
    """Find the newest checkpoint that is complete across all nodes. Return its step and a rank, or
    None.

    The rank is the lowest one whose directory has the checkpoint. Files that a node lacks, except
    the shards of other ranks, are copied to the node. The copy and each skipped damaged checkpoint
    are logged. This is a collective call.

    Raise MachineError if there is no complete checkpoint, but a missing shard may be on a node that
    does not take part in this run.
    """
    local_copies = copies_in(run_dir) if ranks.is_run_dir_writer else {}
    keys = set[tuple[int, str]]().union(*ranks.all_gather_object([*local_copies]))
    incomplete = ""

    # Sort the keys, because the loop body contains collectives, so all ranks must process the keys
    # in the same order.
    for step, digest in sorted(keys, reverse=True):
        place = run_dir / f"checkpoint-{step}"
        local_copy = local_copies.get((step, digest))
        names = ranks.all_gather_object(local_copy.name if local_copy else None)
        damage: dict[str, str] | None = None
        with ranks.raise_on_all_ranks():
            if local_copy:
                damage = dict(damaged_files(local_copy))

        # Damaged files in each node's copy of the checkpoint. The key is the rank that writes the
        # node's directory.
        damages = {}
        for rank, found in enumerate(ranks.all_gather_object(damage)):
            if found is not None:
                damages[rank] = found
        # A file is lost if it is missing or damaged in every copy.
        lost_files = set.intersection(*map(set, damages.values()))
        if not lost_files:
            source = min(damages)
            with ranks.raise_on_all_ranks():
                if local_copy:
                    _rename_copy(local_copy, place, damages[ranks.rank])
            copy_folder(ranks, place, source, needs_files=ranks.is_run_dir_writer)
            return step, source

        # Do not report a checkpoint that only exists as a hidden folder: a run was killed while it
        # wrote this folder.
        if place.name not in names:
            continue
        clauses = [damage[file] for file in sorted(lost_files) for damage in damages.values()]
        # Prefer faults that are certain. A missing shard is not certain, because it may be on a
        # node that does not take part in this run.
        certain = [clause for clause in clauses if not clause.endswith(ELSEWHERE)]
        log.info(f"{place.name} cannot be used and is skipped: {(certain or clauses)[0]}")
        if not certain:
            incomplete = incomplete or f"{place.name} is incomplete: {clauses[0]}"
    with ranks.raise_on_all_ranks():
        if incomplete:
            raise MachineError(
                incomplete,
                where=run_dir,
                why="without this checkpoint the run would start over",
                fix="start the run on that node too, copy the missing files from that node to this "
                "node, or start over with --fresh",
            )
    return None


def copies_in(run_dir: Path) -> dict[tuple[int, str], Path]:
    """Return all checkpoints in a run directory as a dict from (step, SHA-256 of the manifest) to
    the folder.

    The SHA-256 is "" if there is no manifest. A hidden folder is included only if it has a
    manifest. In this case the checkpoint is complete, but the run was killed before it could rename
    the folder.
    """
    if not run_dir.is_dir():
        return {}
    copies = {}
    # Sorting puts hidden folders first. A visible folder with the same manifest then replaces the
    # hidden folder in `copies`.
    for path in sorted(run_dir.iterdir()):
        match = _COPY.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        manifest = path / MANIFEST
        digest = digest_of_file(manifest) if manifest.is_file() else ""
        if digest or not path.name.startswith("."):
            copies[int(match[1]), digest] = path
    return copies


def _rename_copy(copy: Path, place: Path, damage: Collection[str]) -> None:
    if copy != place:
        if is_complete(place):
            remove(place)
        elif place.exists():
            place.rename(free_name(place))
        copy.rename(place)
    for name in damage:
        (place / name).unlink(missing_ok=True)


def copy_folder(ranks: Ranks, place: Path, source: int, *, needs_files: bool) -> None:
    """Copy a complete folder, except for the shards of a sharded checkpoint, from rank `source`'s
    directory.

    This is a collective call.

    The folder is copied to the directory of each rank that passes `needs_files=True`. A different
    folder of the same name is replaced. If the same folder already exists, only missing files are
    copied.
    """
    if not any(ranks.run_dir_writers):
        return
    # Copy env.json first, because it marks the directory as a run's directory.
    identity = [place.parent / name for name in (IDENTITY, RECIPE)]
    manifest_path = place / MANIFEST
    texts = []
    with ranks.raise_on_all_ranks():
        if ranks.rank == source:
            texts = [path.read_bytes() for path in (manifest_path, *identity)]
    manifest, *identity_texts = ranks.all_gather_object(texts)[source]

    values = json.loads(manifest)
    entries: Entries = values["files"]
    folder = place
    lacks_folder = False
    with ExitStack() as unfinished:
        with ranks.raise_on_all_ranks():
            if needs_files:
                has_folder = manifest_path.is_file()
                lacks_folder = not has_folder or manifest_path.read_bytes() != manifest
            if lacks_folder:
                for path, text in zip(identity, identity_texts, strict=True):
                    write_atomically(path, text)
                folder = unfinished.enter_context(atomic_folder(place, values["step"]))
            common = [name for name in entries if not name.endswith(PART)]
            missing = [name for name in common if needs_files and not (folder / name).is_file()]
        copy_files(ranks, folder, missing, entries)
        with ranks.raise_on_all_ranks():
            if lacks_folder:
                write_atomically(folder / MANIFEST, manifest)
        # Do not close `atomic_folder` yet. Closing it renames the folder, and before this all ranks
        # must have their files.
        finish = unfinished.pop_all()
    with ranks.raise_on_all_ranks():
        finish.close()


def commit_on_all_ranks(ranks: Ranks, folder: Path, step: int, hashed: Entries) -> None:
    """Copy the missing files of a checkpoint's folder to every node, and write its manifest.

    This is a collective call.

    Each node receives the files of rank 0 except shards, and one manifest of all files.

    Args:
        hashed: manifest entries of the shards that this rank wrote.
    """
    parts: Entries = {}
    for entries_of_rank in ranks.all_gather_object(hashed):
        parts |= entries_of_rank
    local_entries = {}
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer:
            local_entries = flush_files(folder, parts)

    all_entries = ranks.all_gather_object(local_entries)
    entries: Entries = {}
    # Go from the highest rank to the lowest, so that the entry of the lowest rank is used if
    # several ranks have the same file.
    for entries_of_rank in reversed(all_entries):
        entries |= entries_of_rank

    common = [name for name in all_entries[0] if not name.endswith(PART)]
    missing = [name for name in common if ranks.is_run_dir_writer and name not in local_entries]
    copy_files(ranks, folder, missing, entries)
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer:
            write_manifest(folder, step, dict(sorted(entries.items())))


def copy_files(
    ranks: Ranks,
    folder: Path,
    missing: Collection[str],
    entries: Entries,
    *,
    source: int | None = None,
) -> None:
    """Copy files in `folder` from the run directories that have them to the run directories that do
    not.

    A file appears in the target directory only when it is complete. If `entries` has an SHA-256 for
    the file, the received file must have the same SHA-256. This is a collective call.

    Args:
        missing: names of the files that this rank needs.
        entries: entries of a manifest.
        source: rank whose directory sends the files. If it is None, the first rank that has a file
            sends this file.

    Raises:
        CheckpointError: no node has the file, it cannot be read or written, or it is damaged.
        MachineError: the disk does not have enough free space.
    """
    requests = set()
    for rank, names in enumerate(ranks.all_gather_object([*missing])):
        # Collect the files by run directory and not by rank. Ranks that see the same directory need
        # only one copy of a file.
        requests |= {(name, ranks.run_dir_writers[rank]) for name in names}
    if not requests:
        return

    sizes = {}
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer and source in (None, ranks.rank):
            paths = {name: folder / name for name, _ in requests}
            sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    all_sizes = ranks.all_gather_object(sizes)

    transfers = []
    with ranks.raise_on_all_ranks():
        # Sort the files, so that sender and receiver process the transfers in the same order.
        for name, target in sorted(requests):
            givers = [
                rank for rank, files in enumerate(all_sizes) if name in files and rank != target
            ]
            if givers:
                # Users edit the model card, so the SHA-256 in the manifest's entry for it may be
                # outdated.
                is_summed = name in entries and name != CARD
                digest = entries[name]["sha256"] if is_summed else ""
                giver = givers[0]
                transfers.append(Transfer(name, giver, target, all_sizes[giver][name], digest))
            # The model card is optional, so no error is raised if it is missing.
            elif name != CARD:
                raise CheckpointError(
                    f"no node has the file {name}",
                    where=folder,
                    fix="include the node that has this file in the run",
                )
        received = [transfer.size for transfer in transfers if transfer.target == ranks.rank]
        require_disk_space(
            folder,
            sum(received),
            what="files of other nodes",
            fix="free disk space on this node and start again",
        )

    total = sum(transfer.size for transfer in transfers)
    if total > ANNOUNCED_BYTES:
        log.info(f"copying {count_of(len(transfers), 'file')}, {total:,} bytes, to other nodes")

    _run_transfers(folder, transfers, ranks)


def _run_transfers(folder: Path, transfers: Sequence[Transfer], ranks: Ranks) -> None:
    """Send and receive files. A received file gets its name only if its source could read it."""
    faults: list[OSError] = []
    failed = set()
    received = {}
    for number, transfer in enumerate(transfers):
        earlier_faults = len(faults)
        if ranks.rank == transfer.source:
            _send(folder, transfer, ranks, faults)
        elif ranks.rank == transfer.target:
            received[number] = _receive(folder, transfer, ranks, faults)
        if len(faults) > earlier_faults:
            failed.add(number)
    failed = set[int]().union(*ranks.all_gather_object(failed))
    with ranks.raise_on_all_ranks():
        for number, partial in received.items():
            if number not in failed:
                # Closing the file removes its pages from the page cache.
                with open_uncached(partial):
                    partial.replace(folder / transfers[number].name)
        if faults:
            raise CheckpointError(
                "a file cannot be copied to another node",
                where=folder,
                why=str(faults[0]),
                fix="start the same command again",
            )


def _send(folder: Path, transfer: Transfer, ranks: Ranks, faults: list[OSError]) -> None:
    """Send a file. After an error, send anything, because the receiver waits for all its bytes."""
    # Import torch here and not at the top of the module, because the checks at the start of a run
    # use this module but must not load torch, which takes seconds.
    import torch.distributed as dist

    path = folder / transfer.name
    earlier_faults = len(faults)
    with ExitStack() as stack:
        with _collect_error(faults):
            file = stack.enter_context(open_uncached(path))
        for memory, chunk in _chunks(transfer.size):
            with _collect_error(faults):
                if len(faults) == earlier_faults and file.readinto(memory) < len(memory):
                    raise OSError(f"{path} was truncated while it was read")
            dist.send(chunk, transfer.target, group=ranks.group)


def _receive(folder: Path, transfer: Transfer, ranks: Ranks, faults: list[OSError]) -> Path:
    """Receive a file, and return the path of a temporary file with its content."""
    # Import torch here for the reason that is given in `_send`.
    import torch.distributed as dist

    path = folder / transfer.name
    partial = path.with_name(f".{path.name}.partial")
    # Remember the number of errors in earlier files, because only a new error must stop the writing
    # of this file.
    earlier_faults = len(faults)
    sha256 = hashlib.sha256()
    with _collect_error(faults), ExitStack() as stack:  # closing the file can raise an error too
        with _collect_error(faults):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(partial.open("wb"))
        for memory, chunk in _chunks(transfer.size):
            dist.recv(chunk, transfer.source, group=ranks.group)
            sha256.update(memory)
            with _collect_error(faults):
                if len(faults) == earlier_faults:
                    file.write(memory)
    with _collect_error(faults):
        if len(faults) == earlier_faults and transfer.digest not in ("", sha256.hexdigest()):
            sender = ranks.name(transfer.source)
            raise OSError(f"the data of {path} from {sender} does not match its checksum")
        if len(faults) == earlier_faults:
            flush_to_disk(partial)
    return partial


def _chunks(size: int) -> "Iterator[tuple[memoryview, torch.Tensor]]":
    """Yield a buffer for each chunk of a file of `size` bytes, as a memoryview and as a tensor."""
    import torch

    memory = bytearray(min(size, CHUNK_BYTES))
    for start in range(0, size, CHUNK_BYTES):
        piece = memoryview(memory)[: size - start]
        yield piece, torch.frombuffer(piece, dtype=torch.uint8)


@contextmanager
def _collect_error(faults: list[OSError]) -> Iterator[None]:
    """Add an OSError of the block to `faults` instead of raising it.

    The rank at the other end waits for every chunk of every file, so the transfer must continue.
    """
    try:
        yield
    except OSError as error:
        faults.append(error)
