"""Run directories of nodes that share no disk, taken as one.

Each run directory has one rank that writes it (`Ranks.leads_dir`): rank 0, and where others do not see rank 0's, one of
theirs. The manifest of a checkpoint is the same in all of them and lists all files. Each directory holds all but the
parts that ranks elsewhere wrote, so a checkpoint is whole if some directory has each file. What a node lacks and needs
is copied to it over the ranks' process group.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from tunesmith.checkpoint.manifest import (
    CARD,
    ELSEWHERE,
    MANIFEST,
    PART,
    Entries,
    SavedCheckpoint,
    damaged_files,
    digest_of_file,
    flush_files,
    flush_to_disk,
    free_name,
    is_sealed,
    remove,
    write_manifest,
    writing,
)
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.errors import CheckpointError, MachineError
from tunesmith.host.files import require_disk_space, write_atomically
from tunesmith.host.memory import open_uncached
from tunesmith.run_dir import IDENTITY, RECIPE

CHUNK = 16 << 20  # bytes of a file in memory while it is copied
_COPY = re.compile(r"\.?checkpoint-(\d+)(?:\.partial|\.old)?")


def find_dir_leaders(ranks: Ranks, folder: Path, claim: Callable[[], object]) -> Ranks:
    """The ranks, which now know who of them see the same `folder`; a collective call.

    `claim` creates the folder: it is called on the lowest rank that sees it, once for each disk that has one.
    """
    leaders: dict[int, int] = {}
    if ranks.world == 1:
        claim()
        return ranks
    while missing := [rank for rank in range(ranks.world) if rank not in leaders]:
        token = folder / ranks.share(f".seen-{uuid.uuid4().hex}")
        with ranks.together():
            if ranks.rank == missing[0]:
                claim()
                token.touch()
        seen = ranks.gather(token.exists())
        with ranks.together():
            if ranks.rank == missing[0]:
                token.unlink()
        leaders |= {rank: missing[0] for rank in missing if seen[rank]}
    return replace(ranks, dir_leaders=tuple(leaders[rank] for rank in range(ranks.world)))


def newest_checkpoint(
    run_dir: Path, warn: Callable[[str], None], ranks: Ranks = ONE_PROCESS
) -> SavedCheckpoint | None:
    """The newest checkpoint that is whole over all nodes; a collective call.

    Where a node lacks it or files of it, all but other ranks' parts are copied there. `warn` gets a line about that, and
    about each damaged checkpoint that is skipped. MachineError if there is none, but one whose missing parts may lie on a
    node that is not here.
    """
    own = copies_in(run_dir) if ranks.leads_dir else {}
    keys = {key for keys in ranks.gather([*own]) for key in keys}
    elsewhere = ""
    for step, digest in sorted(keys, reverse=True):
        place, copy = run_dir / f"checkpoint-{step}", own.get((step, digest))
        owners = _compare_copies(ranks, run_dir, ranks.gather(copy.name if copy else None))
        source, (_, first) = next(iter(owners.items()))
        lost = [file for file in first if all(file in other for _, other in owners.values())]
        if not lost:
            with ranks.together():
                if copy:
                    _put_in_place(copy, place, owners[ranks.rank][1])
            bring_folder(ranks, place, source, wants=ranks.leads_dir, say=warn)
            return SavedCheckpoint(place, step, source)
        if place.name in {name for name, _ in owners.values()}:  # others a kill left behind
            clauses = [other[file] for file in lost for _, other in owners.values()]
            apart = [clause for clause in clauses if not clause.endswith(ELSEWHERE)]
            warn(f"{place.name} is skipped: {(apart or clauses)[0]}")
            elsewhere = elsewhere or ("" if apart else f"{place.name} is not whole: {clauses[0]}")
    with ranks.together():
        if elsewhere:
            fix = "start on that node too, or copy its checkpoint's files into this one; --fresh starts over"
            raise MachineError(
                elsewhere, where=str(run_dir), why="without it the run would start over", fix=fix
            )
    return None


def _compare_copies(
    ranks: Ranks, run_dir: Path, names: list[str | None]
) -> dict[int, tuple[str, dict[str, str]]]:
    """Of each rank that has a copy of a checkpoint in its directory: its name, and its damaged files with what is wrong.

    `names` are those copies, rank by rank. All ranks that see a directory compare the checksums together, each of some
    files: hundreds of gigabytes would take one of them minutes. A collective call.
    """
    leader = ranks.dir_leaders[ranks.rank]
    readers = [rank for rank, of in enumerate(ranks.dir_leaders) if of == leader]
    name, damage = names[leader], dict[str, str]()
    with ranks.together():
        if name is not None:
            damage = dict(
                damaged_files(run_dir / name, share=(readers.index(ranks.rank), len(readers)))
            )
    owners = {rank: (name, dict[str, str]()) for rank, name in enumerate(names) if name is not None}
    for reader, clauses in enumerate(ranks.gather(damage)):
        if (owner := owners.get(ranks.dir_leaders[reader])) is not None:
            owner[1].update(clauses)
    return owners


def copies_in(run_dir: Path) -> dict[tuple[int, str], Path]:
    """The checkpoints of one directory by step and SHA-256 of the manifest, which is empty where there is none. Hidden ones
    count only with a manifest: a kill caught them in a rename."""
    found = {}
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else []:  # hidden ones first
        if (match := _COPY.fullmatch(path.name)) and path.is_dir():
            digest = digest_of_file(path / MANIFEST) if (path / MANIFEST).is_file() else ""
            if digest or not path.name.startswith("."):
                found[int(match[1]), digest] = path
    return found


def _put_in_place(copy: Path, place: Path, damage: Collection[str]) -> None:
    if copy != place:
        if is_sealed(place):
            remove(place)
        elif place.exists():
            place.rename(free_name(place))
        copy.rename(place)
    for name in damage:
        (place / name).unlink(missing_ok=True)


def bring_folder(
    ranks: Ranks, place: Path, source: int, *, wants: bool, say: Callable[[str], None]
) -> None:
    """Copy a sealed folder, but no parts, from the directory of rank `source` to those of ranks that want it, in place of
    another one of that name. Where it is already, only what is missing is copied. A collective call."""
    if not any(ranks.dir_leaders):
        return
    # In this order: the first makes it a run's
    identity = [place.parent / name for name in (IDENTITY, RECIPE)]
    with ranks.together():
        texts = (
            [path.read_bytes() for path in (place / MANIFEST, *identity)]
            if ranks.rank == source
            else []
        )
    manifest, *texts = ranks.gather(texts)[source]
    entries, lacks = json.loads(manifest)["files"], wants
    with ExitStack() as unfinished:
        with ranks.together():
            if (place / MANIFEST).is_file():
                lacks = wants and (place / MANIFEST).read_bytes() != manifest
            for path, text in zip(identity, texts, strict=True) if lacks else ():
                write_atomically(path, text)
            folder = (
                unfinished.enter_context(writing(place, json.loads(manifest)["step"]))
                if lacks
                else place
            )
            wanted = [
                name
                for name in entries
                if not name.endswith(PART) and not (folder / name).is_file()
            ]
        copy_files(ranks, folder, wanted if wants else [], entries, say=say)
        with ranks.together():
            if lacks:
                write_atomically(folder / MANIFEST, manifest)
        finish = unfinished.pop_all()
    with ranks.together():
        finish.close()


def seal_together(ranks: Ranks, folder: Path, step: int, hashed: Entries) -> None:
    """Seal a checkpoint's folder on every node: each gets what rank 0 wrote, but no parts, and one manifest of all files;
    a collective call. `hashed` are the entries of the parts that this rank wrote."""
    parts = {name: entry for entries in ranks.gather(hashed) for name, entry in entries.items()}
    with ranks.together():
        own = flush_files(folder, parts) if ranks.leads_dir else {}
    every = ranks.gather(own)
    entries = {name: entry for other in reversed(every) for name, entry in other.items()}
    common = [name for name in every[0] if not name.endswith(PART) and name not in own]
    copy_files(ranks, folder, common if ranks.leads_dir else [], entries)
    with ranks.together():
        if ranks.leads_dir:
            write_manifest(folder, step, dict(sorted(entries.items())))


def copy_files(
    ranks: Ranks,
    folder: Path,
    wanted: Collection[str],
    entries: Entries,
    *,
    say: Callable[[str], None] = lambda text: None,
    source: int | None = None,
) -> None:
    """Copy files below `folder` from a directory that has them, `source`'s or the first, to that of a rank that wants them;
    a collective call. They appear there whole, with the SHA-256 of `entries`, of a manifest.

    CheckpointError if no node has one, or it cannot be read, written or is damaged; MachineError where the disk has no room.
    """
    wants = {
        (name, ranks.dir_leaders[rank])
        for rank, names in enumerate(ranks.gather([*wanted]))
        for name in names
    }
    if not wants:
        return
    have: dict[str, tuple[int, str]] = {}
    with ranks.together():
        for name in (
            {name for name, _ in wants} if ranks.leads_dir and source in (None, ranks.rank) else ()
        ):
            if (path := folder / name).is_file():
                known = name in entries and name != CARD  # people edit it
                have[name] = (
                    path.stat().st_size,
                    entries[name]["sha256"] if known else digest_of_file(path),
                )
    every, moves = ranks.gather(have), []
    with ranks.together():
        for name, target in sorted(wants):
            giver = next(
                (rank for rank, files in enumerate(every) if name in files and rank != target), None
            )
            if giver is not None:
                moves.append((name, giver, target, *every[giver][name]))
            elif name != CARD:
                raise CheckpointError(
                    f"no node has {name}",
                    where=str(folder),
                    fix="start on the node that has it too",
                )
        size = sum(size for _, _, target, size, _ in moves if target == ranks.rank)
        require_disk_space(
            folder, size, what="files of other nodes", fix="make room there and start again"
        )
    givers, total = sorted({giver for _, giver, *_ in moves}), sum(size for *_, size, _ in moves)
    names, where = (
        ", ".join(map(ranks.name, givers)),
        folder.name.strip(".").removesuffix(".partial"),
    )
    say(f"{where}: {len(moves)} files, {total:,} bytes, are copied to other nodes from {names}")
    faults: list[OSError] = []
    for name, giver, target, size, digest in moves:
        if ranks.rank == giver:
            _send(folder / name, size, target, ranks, faults)
        elif ranks.rank == target:
            _receive(folder / name, size, digest, giver, ranks, faults)
    with ranks.together():
        if faults:
            what, fix = "a file cannot be copied to another node", "start the same command again"
            raise CheckpointError(what, where=str(folder), why=str(faults[0]), fix=fix)


def _send(path: Path, size: int, target: int, ranks: Ranks, faults: list[OSError]) -> None:
    with ExitStack() as stack:
        with _noted(faults):
            file = stack.enter_context(open_uncached(path))
        for memory, chunk in _chunks(size):
            with _noted(faults):
                if not faults and file.readinto(memory) < len(memory):
                    raise OSError(f"{path} became shorter while it was read")
            dist.send(chunk, target, group=ranks.group)


def _receive(
    path: Path, size: int, digest: str, giver: int, ranks: Ranks, faults: list[OSError]
) -> None:
    partial, earlier, found = path.with_name(f".{path.name}.partial"), len(faults), hashlib.sha256()
    with _noted(faults), ExitStack() as stack:  # closing writes too
        with _noted(faults):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(partial.open("wb"))
        for memory, chunk in _chunks(size):
            dist.recv(chunk, giver, group=ranks.group)
            found.update(memory)
            with _noted(faults):
                if len(faults) == earlier:
                    file.write(memory)
    with _noted(faults):
        if len(faults) == earlier:
            if found.hexdigest() != digest:
                raise OSError(
                    f"what {ranks.name(giver)} sent of {path} does not match its checksum"
                )
            flush_to_disk(partial)
            with open_uncached(partial):
                partial.replace(path)


def _chunks(size: int) -> Iterator[tuple[memoryview, torch.Tensor]]:
    """Memory for each piece of a file of `size` bytes, and the same as a tensor."""
    memory = bytearray(min(size, CHUNK))
    for start in range(0, size, CHUNK):
        piece = memoryview(memory)[: size - start]
        yield piece, torch.frombuffer(piece, dtype=torch.uint8)


@contextmanager
def _noted(faults: list[OSError]) -> Iterator[None]:
    """Keep an error for the end: the other rank waits for every chunk of every file."""
    try:
        yield
    except OSError as error:
        faults.append(error)
