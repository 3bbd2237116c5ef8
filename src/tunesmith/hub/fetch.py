"""Get a model's folder: a local one, a .gguf file converted once, the Hub's cache, the Hub.

Everything that can go wrong is found before the first large byte: the licence is told, the config is one that can be
trained, every file may be read with this token, and the disk has room for what is still to come. Only the files that
training needs are taken: of several formats of the weights, safetensors.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    validate_repo_id,
)

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.hub import gguf
from tunesmith.hub.download import TRANSPORT, Remote, arrived, download, no_room, page, patiently, refused
from tunesmith.model import spec
from tunesmith.model.safetensors_files import INDEX, SINGLE, entries, no_safetensors, read_json, weight_files

TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")  # one of these is needed
SUPPORT = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "spiece.model", "tekken.json", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
MARGIN = 64 << 20  # bytes to leave free


@runtime_checkable
class FetchProgress(Protocol):
    """Who is told what goes on; `tunesmith fetch` draws a bar."""

    def note(self, text: str) -> None: ...
    def start(self, what: str, total: int, done: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def end(self) -> None: ...


class ProgressLines:
    """Plain lines to `say` (None: stderr), at most one in ten seconds while bytes arrive. Sizes in bytes."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._total = self._done = 0
        self._told = 0.0

    def note(self, text: str) -> None:
        if self._say is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._say(text)

    def start(self, what: str, total: int, done: int) -> None:
        self._total, self._done, self._told = total, done, time.monotonic()
        self.note(f"fetching {what}: {size_text(total)}" + (f", {size_text(done)} there already" if done else ""))

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._told >= 10:
            self._told = time.monotonic()
            self.note(f"  {size_text(self._done)} of {size_text(self._total)}")

    def end(self) -> None:
        pass


def size_text(count: float) -> str:
    """Bytes for a reader: `270 MB`, `16.1 GB` (powers of ten, as the Hub's pages)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def fetch(model: Model, *, progress: FetchProgress | Callable[[str], None] | None = None, update: bool = False) -> Path:
    """The model's folder, brought here if it must be.

    Args:
        model: the recipe's block; `name` is a folder, a .gguf file or a Hub id.
        progress: who is told, or what takes one line; None: plain lines on stderr.
        update: ask the Hub for a newer commit although the cache is whole.

    Returns:
        a folder with config.json, safetensors and, unless `model.tokenizer` names another, a tokenizer.

    Raises:
        ModelError: missing, unsupported, gated, damaged, or only in a format that is not read.
        MachineError: no room, a cache that cannot be written, a package that a .gguf file needs.
    """
    if not isinstance(progress, FetchProgress):
        progress = ProgressLines(progress)
    found = local(model)
    if found is not None:
        if found.suffix == ".gguf":
            return gguf.converted(found, model.dtype, progress.note)
        check_folder(found, model)
        return found
    cached = None if update else in_cache(model)
    if cached is not None:
        return cached
    return bring(plan_download(model, progress), progress)


def local(model: Model) -> Path | None:
    """The local folder or .gguf file that `model.name` is, or None for a Hub id; ModelError for a path to nothing."""
    path = Path(model.name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelError(
            f"{path.name} is a file, but neither a folder nor a .gguf file",
            where=str(path),
            fix=f"name its folder: model.name: {path.parent}",
        )
    if model.name.endswith(".gguf") or model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ModelError(
            f"there is nothing at {model.name}",
            where="model.name",
            fix="correct the path, or give a Hub id: owner/name",
        )
    try:
        validate_repo_id(model.name)
    except HFValidationError as error:
        raise refused(error, model.name, model.revision) from error
    return None


def in_cache(model: Model) -> Path | None:
    """The snapshot in the Hub's cache, or None where it is not there or not whole."""
    config = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    spec.read_spec(read_json(folder / "config.json"), where=config, trust_remote_code=model.trust_remote_code)
    names = {p.name for p in folder.iterdir()}
    weights = _indexed(folder / INDEX) if INDEX in names else {SINGLE}
    if not all((folder / n).exists() for n in weights) or (model.tokenizer is None and not names & set(TOKENIZER)):
        return None
    check_folder(folder, model)
    return folder


def check_folder(folder: Path, model: Model) -> spec.ModelSpec:
    """Check that a folder holds a model that can be trained, and all of it.

    Raises:
        ModelError: names the file that is missing, cut off or broken.
    """
    config = folder / "config.json"
    if not config.exists() and not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        raise no_safetensors([p.name for p in folder.iterdir()], name=str(folder), where=str(folder))
    found = spec.read_spec(read_json(config), where=str(config), trust_remote_code=model.trust_remote_code)
    for file in weight_files(folder):
        entries(file)
    if model.tokenizer is None and not any((folder / name).exists() for name in TOKENIZER):
        raise ModelError(
            "the folder has no tokenizer",
            where=str(folder),
            why=f"none of {', '.join(TOKENIZER)}",
            fix="copy the tokenizer's files there, or set model.tokenizer to a folder or Hub id that has one",
        )
    return found


@dataclass(frozen=True)
class DownloadPlan:
    """What a model needs from the Hub. Sizes in bytes."""

    model: Model
    commit: str
    licence: str
    gated: bool
    files: tuple[Remote, ...]
    left_out: tuple[str, ...]
    storage: Path

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        return sum(file.size - arrived(file, self.storage) for file in self.files)


def plan_download(model: Model, progress: FetchProgress) -> DownloadPlan:
    """Ask the Hub what the model is, and check it, before anything large is brought.

    Raises:
        ModelError: not there, not permitted, not a kind that is trained, no safetensors.
    """
    try:
        with _quiet():
            return _plan(model, progress)
    except (HfHubHTTPError, OfflineModeIsEnabled, TRANSPORT, OSError) as error:
        raise refused(error, model.name, model.revision) from error


def _plan(model: Model, progress: FetchProgress) -> DownloadPlan:
    listing = about(model.name, model.revision, "model", progress)
    names = [n for n in listing.sizes if "/" not in n]
    if not {INDEX, SINGLE} & set(names):
        raise no_safetensors(names, name=model.name, where=page(model.name), repo=True)
    if "config.json" not in names:
        raise ModelError(
            "the repository has weights and no config.json",
            where=page(model.name),
            why="nothing says which model they are of",
            fix="take another revision, or a repository in the form of Transformers",
        )

    def small(name: str) -> Path:
        return Path(patiently(lambda: hf_hub_download(model.name, name, revision=listing.commit)))

    spec.read_spec(
        read_json(small("config.json")),
        where=f"{page(model.name)}/blob/{listing.commit}/config.json",
        trust_remote_code=model.trust_remote_code,
    )
    weights = _indexed(small(INDEX)) if INDEX in names else {SINGLE}
    patterns = SUPPORT + (("*.py",) if model.trust_remote_code else ())
    support = {n for n in names if any(fnmatch(n, p) for p in patterns)}
    wanted = sorted(support | {INDEX} & set(names)) + sorted(weights)
    lost = sorted(weights - set(names))
    if lost:
        raise ModelError(
            f"{len(lost)} weight files that the index names are not there: {', '.join(lost[:3])}",
            where=page(model.name),
            fix="take another revision, or tell the model's owner",
        )
    left_out = tuple(n for n in listing.sizes if n not in wanted and not n.endswith((".md", ".gitattributes")))
    return DownloadPlan(
        model, listing.commit, listing.licence, listing.gated, tuple(_heads(model.name, listing.commit, wanted)),
        left_out, storage_of(model.name),
    )  # fmt: skip


def _heads(repo: str, commit: str, names: Iterable[str]) -> list[Remote]:
    """Ask for the head of every file: shows that the token may read it, and tells its size and hash."""

    def head(name: str) -> Remote:
        url = hf_hub_url(repo, name, revision=commit)
        seen = patiently(lambda: get_hf_file_metadata(url))
        if seen.size is None or not seen.etag:
            raise ModelError(f"the server tells neither size nor hash of {name}", where=url, fix="check HF_ENDPOINT")
        return Remote(name, url, seen.size, seen.etag)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(head, names))


def _indexed(index: Path) -> set[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise ModelError("the index has no weight_map of file names", where=str(index), fix="fetch the model again")
    return set(names.values())


def storage_of(repo: str, kind: str = "model") -> Path:
    """A repository's folder in the Hub's cache."""
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"


def check_room(name: str, missing: int) -> None:
    """Raise MachineError unless the cache's disk has room for `missing` bytes."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if missing and missing + MARGIN > free:
        raise no_room(name, cache, missing + MARGIN, free)


def bring(plan: DownloadPlan, progress: FetchProgress) -> Path:
    """Download what is missing of a plan, and return the snapshot's folder, checked.

    Raises:
        ModelError, MachineError: as `fetch`.
    """
    model = plan.model
    check_room(model.name, plan.missing)
    try:
        with _quiet():
            if plan.missing:
                progress.start(model.name, plan.total, plan.total - plan.missing)
                download(plan.files, plan.storage, progress.advance)
                progress.end()
            names = [file.name for file in plan.files]
            folder = Path(
                patiently(lambda: snapshot_download(model.name, revision=model.revision, allow_patterns=names))
            )
    except (HfHubHTTPError, OfflineModeIsEnabled, TRANSPORT, OSError) as error:
        raise refused(error, model.name, model.revision) from error
    check_folder(folder, model)
    return folder


@dataclass(frozen=True)
class Listing:
    """A repository as the Hub describes it: commit, licence, whether it is gated, and its files with their sizes."""

    commit: str
    licence: str
    gated: bool
    sizes: dict[str, int]


def describe(repo: str, revision: str | None, kind: str, progress: FetchProgress) -> Listing:
    """Ask the Hub about a repository and tell its licence.

    Raises:
        ModelError: not there, not permitted, or the Hub does not answer.
    """
    try:
        with _quiet():
            return about(repo, revision, kind, progress)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, TRANSPORT, OSError) as error:
        raise refused(error, repo, revision, kind) from error


def about(repo: str, revision: str | None, kind: str, progress: FetchProgress) -> Listing:
    """The same, with huggingface_hub's own errors."""
    info: Any = patiently(lambda: HfApi().repo_info(repo, revision=revision, repo_type=kind, files_metadata=True))
    card = info.card_data.to_dict() if info.card_data is not None else {}
    tags = [t.removeprefix("license:") for t in info.tags or () if t.startswith("license:")]
    licence = card.get("license_name") or card.get("license") or (tags[0] if tags else "not stated")
    said = ", ".join(licence) if isinstance(licence, list) else str(licence)
    progress.note(f"{repo}: licence {said}{', gated' if info.gated else ''} ({page(repo, kind)})")
    return Listing(info.sha, said, bool(info.gated), {s.rfilename: s.size or 0 for s in info.siblings or ()})


def tokenizer_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a tokenizer and its model's configuration, without weights: a local one, the Hub's cache, the Hub.

    Raises:
        ModelError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    try:
        cached = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        with _quiet():
            return Path(patiently(lambda: snapshot_download(name, revision=revision, allow_patterns=list(SUPPORT))))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, TRANSPORT, OSError) as error:
        raise refused(error, name, revision) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub's own bars and warnings off the terminal: progress and errors are told once, by us."""
    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
