"""Run directories of nodes that share no disk, used as one.

Each run directory has one rank that writes it (`Ranks.is_run_dir_writer`): rank 0, and where others
do not see rank 0's, one of theirs. The manifest of a checkpoint is the same in all of them and
lists all files. Each directory holds all but the parts that ranks elsewhere wrote, so a checkpoint
is whole if some directory has each file. What a node lacks and needs is copied to it over the
ranks' process group.
"""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Collection, Iterator
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

CHUNK_BYTES = 16 << 20  # of a file in memory while it is copied
_COPY = re.compile(r"\.?checkpoint-(\d+)(?:\.partial|\.old)?")


@dataclass(frozen=True)
class Transfer:
    """A file that rank `source` sends to rank `target`; `digest` is empty if it is not known."""

    name: str
    source: int
    target: int
    size: int
    digest: str


def find_run_dir_writers(ranks: Ranks, folder: Path, claim: Callable[[], object]) -> Ranks:
    """The ranks, which now know who of them see the same `folder`; a collective call.

    claim: creates the folder; called on the lowest rank that sees it, once for each disk that has
        one.
    """
    if ranks.world == 1:
        claim()
        return ranks
    writers: dict[int, int] = {}
    while len(writers) < ranks.world:
        missing = [rank for rank in range(ranks.world) if rank not in writers]
        lowest = missing[0]
        # A new name each time: what an earlier start left behind must not count as it.
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
    """The step of the newest checkpoint that is whole over all nodes, and the lowest rank whose
    directory had it; a collective call.

    Where a node lacks it or files of it, all but other ranks' parts are copied there. That is
    logged, and each damaged checkpoint that is skipped.

    MachineError if there is none, but one whose missing parts may lie on a node that is not here.
    """
    local_copies = copies_in(run_dir) if ranks.is_run_dir_writer else {}
    keys = {key for keys in ranks.all_gather_object([*local_copies]) for key in keys}
    incomplete = ""
    # In one order on all ranks: the body holds collectives.
    for step, digest in sorted(keys, reverse=True):
        place = run_dir / f"checkpoint-{step}"
        local_copy = local_copies.get((step, digest))
        names = ranks.all_gather_object(local_copy.name if local_copy else None)
        damage: dict[str, str] | None = None
        with ranks.raise_on_all_ranks():
            if local_copy:
                damage = dict(damaged_files(local_copy))
        # The damaged files of each copy, by the rank that writes its directory.
        damages = {
            rank: found
            for rank, found in enumerate(ranks.all_gather_object(damage))
            if found is not None
        }
        # A file is lost where every copy lacks it or has it damaged.
        lost_files = set.intersection(*map(set, damages.values()))
        if not lost_files:
            source = min(damages)
            with ranks.raise_on_all_ranks():
                if local_copy:
                    _rename_copy(local_copy, place, damages[ranks.rank])
            bring_folder(ranks, place, source, wants=ranks.is_run_dir_writer)
            return step, source
        # Of a folder that a kill left behind under another name nothing was expected.
        if place.name not in names:
            continue
        clauses = [damage[file] for file in sorted(lost_files) for damage in damages.values()]
        # A part that is missing may lie on a node that is not here; any other fault is certain.
        certain = [clause for clause in clauses if not clause.endswith(ELSEWHERE)]
        log.info(f"{place.name} is skipped: {(certain or clauses)[0]}")
        if not certain:
            incomplete = incomplete or f"{place.name} is incomplete: {clauses[0]}"
    with ranks.raise_on_all_ranks():
        if incomplete:
            raise MachineError(
                incomplete,
                where=str(run_dir),
                why="without it the run would start over",
                fix="start on that node too, or copy its checkpoint's files into this one; "
                "--fresh starts over",
            )
    return None


def copies_in(run_dir: Path) -> dict[tuple[int, str], Path]:
    """The checkpoints of one directory by step and SHA-256 of the manifest.

    That is empty where there is none. Hidden ones count only with a manifest: a kill caught them in
    a rename.
    """
    copies: dict[tuple[int, str], Path] = {}
    if not run_dir.is_dir():
        return copies
    # Sorted, hidden ones come first: a visible one with the same manifest takes their place.
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


def bring_folder(ranks: Ranks, place: Path, source: int, *, wants: bool) -> None:
    """Copy a complete folder, but no parts, from the directory of rank `source`.

    It goes to the directories of ranks that want it, in place of another one of that name. Where it
    is already, only what is missing is copied. A collective call.
    """
    if not any(ranks.run_dir_writers):
        return
    # In this order: the first makes the directory a run's.
    identity = [place.parent / name for name in (IDENTITY, RECIPE)]
    texts: list[bytes] = []
    with ranks.raise_on_all_ranks():
        if ranks.rank == source:
            texts = [path.read_bytes() for path in (place / MANIFEST, *identity)]
    manifest, *identity_texts = ranks.all_gather_object(texts)[source]
    values = json.loads(manifest)
    entries: Entries = values["files"]
    folder = place
    lacks_folder = False
    with ExitStack() as unfinished:
        with ranks.raise_on_all_ranks():
            if wants:
                has_folder = (place / MANIFEST).is_file()
                lacks_folder = not has_folder or (place / MANIFEST).read_bytes() != manifest
            if lacks_folder:
                for path, text in zip(identity, identity_texts, strict=True):
                    write_atomically(path, text)
                folder = unfinished.enter_context(atomic_folder(place, values["step"]))
            common = [name for name in entries if not name.endswith(PART)]
            missing = [name for name in common if wants and not (folder / name).is_file()]
        copy_files(ranks, folder, missing, entries)
        with ranks.raise_on_all_ranks():
            if lacks_folder:
                write_atomically(folder / MANIFEST, manifest)
        # No rank gives the folder its name before all have their files.
        finish = unfinished.pop_all()
    with ranks.raise_on_all_ranks():
        finish.close()


def commit_on_all_ranks(ranks: Ranks, folder: Path, step: int, hashed: Entries) -> None:
    """Make a checkpoint's folder complete on every node; a collective call.

    Each gets what rank 0 wrote, but no parts, and one manifest of all files.

    hashed: the entries of the parts that this rank wrote.
    """
    parts: Entries = {}
    for entries_of_rank in ranks.all_gather_object(hashed):
        parts |= entries_of_rank
    local_entries: Entries = {}
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer:
            local_entries = flush_files(folder, parts)
    all_entries = ranks.all_gather_object(local_entries)
    entries: Entries = {}
    # Of a file that several have, the lowest rank's counts.
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
    """Copy files below `folder` between directories; a collective call.

    From a directory that has them to that of a rank that wants them. They appear there whole, with
    the SHA-256 of `entries`, if these name them.

    Args:
        entries: of a manifest.
        source: the rank whose directory gives them; None: the first that has each.

    CheckpointError if no node has one, or it cannot be read, written or is damaged; MachineError
    where the disk has no room.
    """
    wants = set()
    for rank, names in enumerate(ranks.all_gather_object([*missing])):
        # By directory: ranks that see the same one want a file once.
        wants |= {(name, ranks.run_dir_writers[rank]) for name in names}
    if not wants:
        return
    sizes: dict[str, int] = {}
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer and source in (None, ranks.rank):
            paths = {name: folder / name for name, _ in wants}
            sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    all_sizes = ranks.all_gather_object(sizes)
    transfers: list[Transfer] = []
    with ranks.raise_on_all_ranks():
        # Sorted: both sides of each transfer come to it in the same order.
        for name, target in sorted(wants):
            givers = [
                rank for rank, files in enumerate(all_sizes) if name in files and rank != target
            ]
            if givers:
                # People edit the card, so its entry may not be true any more.
                is_summed = name in entries and name != CARD
                digest = entries[name]["sha256"] if is_summed else ""
                size = all_sizes[givers[0]][name]
                transfers.append(Transfer(name, givers[0], target, size, digest))
            # Nobody may have written a card.
            elif name != CARD:
                raise CheckpointError(
                    f"no node has {name}",
                    where=str(folder),
                    fix="include the node that has it in the run",
                )
        require_disk_space(
            folder,
            sum(transfer.size for transfer in transfers if transfer.target == ranks.rank),
            what="files of other nodes",
            fix="free disk space there and start again",
        )
    total = sum(transfer.size for transfer in transfers)
    if total > ANNOUNCED_BYTES:
        log.info(f"copying {count_of(len(transfers), 'file')}, {total:,} bytes, to other nodes")
    faults: list[OSError] = []
    for transfer in transfers:
        if ranks.rank == transfer.source:
            _send(folder, transfer, ranks, faults)
        elif ranks.rank == transfer.target:
            _receive(folder, transfer, ranks, faults)
    with ranks.raise_on_all_ranks():
        if faults:
            raise CheckpointError(
                "a file cannot be copied to another node",
                where=str(folder),
                why=str(faults[0]),
                fix="start the same command again",
            )


def _send(folder: Path, transfer: Transfer, ranks: Ranks, faults: list[OSError]) -> None:
    # Nodes that share no disk have loaded it: a start is decided without.
    import torch.distributed as dist

    path = folder / transfer.name
    with ExitStack() as stack:
        with _noted(faults):
            file = stack.enter_context(open_uncached(path))
        for memory, chunk in _chunks(transfer.size):
            with _noted(faults):
                if not faults and file.readinto(memory) < len(memory):
                    raise OSError(f"{path} was truncated while it was read")
            dist.send(chunk, transfer.target, group=ranks.group)


def _receive(folder: Path, transfer: Transfer, ranks: Ranks, faults: list[OSError]) -> None:
    # Nodes that share no disk have loaded it: a start is decided without.
    import torch.distributed as dist

    path = folder / transfer.name
    partial = path.with_name(f".{path.name}.partial")
    # Those of earlier files do not keep this one from being written.
    earlier_faults = len(faults)
    sha256 = hashlib.sha256()
    with _noted(faults), ExitStack() as stack:  # closing writes too
        with _noted(faults):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(partial.open("wb"))
        for memory, chunk in _chunks(transfer.size):
            dist.recv(chunk, transfer.source, group=ranks.group)
            sha256.update(memory)
            with _noted(faults):
                if len(faults) == earlier_faults:
                    file.write(memory)
    with _noted(faults):
        if len(faults) > earlier_faults:
            return
        if transfer.digest not in ("", sha256.hexdigest()):
            sender = ranks.name(transfer.source)
            raise OSError(f"what {sender} sent of {path} does not match its checksum")
        flush_to_disk(partial)
        # Leaves the page cache when it closes.
        with open_uncached(partial):
            partial.replace(path)


def _chunks(size: int) -> "Iterator[tuple[memoryview, torch.Tensor]]":
    """Memory for each piece of a file of `size` bytes, and the same as a tensor."""
    import torch

    memory = bytearray(min(size, CHUNK_BYTES))
    for start in range(0, size, CHUNK_BYTES):
        piece = memoryview(memory)[: size - start]
        yield piece, torch.frombuffer(piece, dtype=torch.uint8)


@contextmanager
def _noted(faults: list[OSError]) -> Iterator[None]:
    """Keep an error for the end: the other rank waits for every chunk of every file."""
    try:
        yield
    except OSError as error:
        faults.append(error)
