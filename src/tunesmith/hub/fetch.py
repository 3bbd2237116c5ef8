"""Get a model's folder: a local one, a .gguf file converted once, the Hub's cache, the Hub.

License, config, access and disk are checked before the first large byte. Only the files that
training needs are downloaded: of several formats of the weights, safetensors. And what the caches
hold: listed, and removed from them.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.host.files import cache_folder, check_regular_files, near_path, require_disk_space
from tunesmith.hub.download import FetchProgress, RemoteFile, download_large_files
from tunesmith.hub.gguf import convert_gguf
from tunesmith.hub.hub_calls import (
    DISK_FIX,
    hub_calls,
    hub_error,
    names_no_model,
    repo_page,
    retry,
)
from tunesmith.model.measured_spec import model_spec, read_configs
from tunesmith.model.safetensors_files import (
    INDEX,
    MODELOPT_CONFIG,
    SINGLE,
    indexed_files,
    no_safetensors,
    read_json,
)
from tunesmith.model.shapes import config_of_model
from tunesmith.model.shipped_entries import read_entries
from tunesmith.model.spec import ModelSpec, check_seq_len, check_supported
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# One of these is needed
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tekken.json",
)
SUPPORT = (
    "config.json",
    MODELOPT_CONFIG,
    "generation_config.json",
    "*processor_config.json",  # of images, for whoever reads what is written
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "*.jinja",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
MOST_PER_NUMBER = 8  # parameters for each stored number, at most; nf4 has two
MARGIN = 64 << 20  # bytes to leave free


def fetch(
    model: Model,
    *,
    progress: FetchProgress | None = None,
    seq_len: int | None = None,
) -> Path:
    """A folder with config.json, safetensors and, unless `model.tokenizer` names another, a
    tokenizer.

    Args:
        model: the recipe's block; `name` is a folder, a Hub id, or a .gguf file, which is converted
            to `dtype` (not `auto`).
        progress: shows the bytes that arrive; None: a bar if stderr is a terminal.
        seq_len: nothing large is downloaded of a model with fewer positions (RecipeError).

    ModelError where the model cannot be had or read, MachineError where the disk or a package is
    missing.
    """
    progress = progress or FetchProgress()
    path = local_model(model)
    if path is None:
        return cached_model(model) or download_model(plan_download(model, seq_len), progress)
    if path.suffix == ".gguf" and path.is_file():
        return convert_gguf(path, model.dtype)
    check_folder(path, model)
    return path


def local_model(model: Model) -> Path | None:
    """The local folder or .gguf file that `model.name` is, or None for a Hub id; ModelError for a
    path to nothing."""
    name = model.name
    path = Path(os.path.expanduser(name))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelError(
            f"{path.name} is neither a folder nor a .gguf file",
            where=str(path),
            fix=f"use its folder: model.name: {path.parent}",
        )
    # What looks like a path is not looked up at the Hub.
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        near = near_path(path)
        fix = f"did you mean {near}?" if near else "correct the path, or give a Hub id: owner/name"
        raise ModelError(
            f"there is nothing at {name}",
            where="model.name",
            fix=f"{fix}; of a run whose base has moved: model.name in its config.yaml",
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise hub_error(error, name, model.revision) from error
    if "/" not in name and not isinstance(
        try_to_load_from_cache(name, "config.json", revision=model.revision), str
    ):
        raise names_no_model(name)
    return None


def cached_model(model: Model) -> Path | None:
    """The snapshot in the Hub's cache, or None where it is not there or not complete."""
    config = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    weights = [SINGLE]
    # The index names all shards; without it there is one file.
    if (folder / INDEX).exists():
        weights = indexed_files(folder / INDEX)
    # A download that was cut off leaves the index and a part of the shards.
    if not all((folder / name).exists() for name in weights):
        return None
    if model.tokenizer is None and not _has_tokenizer(folder):
        return None
    check_folder(folder, model)
    return folder


def check_folder(folder: Path, model: Model) -> ModelSpec:
    """The spec of a folder's model; ModelError names the file that is missing, cut off or
    broken."""
    check_regular_files(folder)
    headers = read_entries(folder)
    config = folder / "config.json"
    spec = model_spec(
        read_json(config), where=str(config), trust_remote_code=model.trust_remote_code
    )
    stored = sum(math.prod(entry.shape) for entries in headers.values() for entry in entries)
    # Before modules of that size are built.
    if spec.parameters > MOST_PER_NUMBER * stored:
        described = f"config.json describes {spec.parameters:,} parameters"
        raise ModelError(
            f"{described}, and the weights have {stored:,}",
            where=str(config),
            why="the weights and config.json do not describe the same model",
            fix="fetch the model again, or correct config.json",
        )
    if model.tokenizer is None and not _has_tokenizer(folder):
        raise ModelError(
            "the folder has no tokenizer",
            where=str(folder),
            why=f"none of {', '.join(TOKENIZER)}",
            fix="copy the tokenizer's files there, or set model.tokenizer to a folder or Hub id "
            "that has one",
        )
    return spec


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER)


@dataclass(frozen=True)
class RepoListing:
    """A repository as the Hub describes it: its commit, license, whether it is gated, and its files
    by name."""

    commit: str
    license: str
    gated: bool
    files: dict[str, RemoteFile]


def list_repo(repo: str, revision: str | None, repo_type: str) -> RepoListing:
    """Ask the Hub about a repository (model or dataset); see `hub_calls`."""
    with hub_calls(repo, revision, repo_type):
        info: Any = retry(
            lambda: HfApi().repo_info(
                repo, revision=revision, repo_type=repo_type, files_metadata=True
            )
        )
    files = {}
    for file in info.siblings or ():
        name = file.rfilename
        # Large files are hashed by SHA-256, small ones by git.
        etag = file.lfs.sha256 if file.lfs else file.blob_id or ""
        url = hf_hub_url(repo, name, repo_type=repo_type, revision=info.sha)
        files[name] = RemoteFile(name, url, file.size or 0, etag)
    return RepoListing(info.sha, _stated_license(info), bool(info.gated), files)


def log_license(listing: RepoListing, repo: str, repo_type: str) -> None:
    """Show the license of a repository that is to be fetched."""
    suffix = ", gated" if listing.gated else ""
    log.info(f"{repo}: license {listing.license}{suffix} ({repo_page(repo, repo_type)})")


def _stated_license(info: Any) -> str:
    """Read the license off a repository's card."""
    card = {}
    if info.card_data is not None:
        card = info.card_data.to_dict()
    stated = card.get("license_name") or card.get("license") or "not stated"
    return ", ".join(stated) if isinstance(stated, list) else str(stated)


@dataclass(frozen=True)
class DownloadPlan:
    """The files that a model needs from the Hub, and those of its repository it does not need."""

    model: Model
    listing: RepoListing
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...]
    storage: Path

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that are not in the cache."""
        return sum(file.size - file.arrived(self.storage) for file in self.files)


def plan_download(model: Model, seq_len: int | None = None) -> DownloadPlan:
    """Ask the Hub what the model is, and check it (license, format, config, shards) before a large
    download."""
    listing = list_repo(model.name, model.revision, "model")
    log_license(listing, model.name, "model")
    page = repo_page(model.name)
    names = {name for name in listing.files if "/" not in name}
    if not {INDEX, SINGLE} & names:
        raise no_safetensors(sorted(names), name=model.name, where=page, repo=True)
    if "config.json" not in names:
        raise ModelError(
            "the repository has weights but no config.json",
            where=page,
            why="the model's architecture is unknown",
            fix="use another revision, or a repository in Transformers format",
        )

    def small_file(name: str) -> Path:
        with hub_calls(model.name, model.revision):
            return Path(retry(lambda: hf_hub_download(model.name, name, revision=listing.commit)))

    where = f"{page}/blob/{listing.commit}/config.json"
    config = read_json(small_file("config.json"))
    # All checks by config.json come before gigabytes are fetched.
    check_supported(config, where, vision=model.vision)
    spec = model_spec(config, where=where, trust_remote_code=model.trust_remote_code)
    if spec.measured:  # of Transformers' own code, so whether it trains is clear before its weights
        from tunesmith.model.support import find_support

        text, whole = read_configs(config, where)
        find_support(text, model, where=where, whole=whole)
    if seq_len is not None:
        check_seq_len(spec, seq_len, where=where)
    weights = [SINGLE]
    if INDEX in names:
        weights = indexed_files(small_file(INDEX))
    missing = [name for name in weights if name not in listing.files]
    if missing:
        named = ", ".join(missing[:3])
        count = count_of(len(missing), "weight file")
        what = f"the index lists {count} not in the repository: {named}"
        raise ModelError(what, where=page, fix="use another revision, or tell the model's owner")
    patterns = [*SUPPORT, INDEX]
    if model.trust_remote_code:
        patterns.append("*.py")
    support = sorted(n for n in names if any(fnmatch(n, pattern) for pattern in patterns))
    targets = support + weights
    # For the user to know what is not fetched.
    left_out = tuple(
        n for n in listing.files if n not in targets and not n.endswith((".md", ".gitattributes"))
    )
    files = tuple(listing.files[name] for name in targets)
    # A mirror may leave the hash out; then no file could be checked.
    for file in files:
        if not file.etag:
            what = f"the server gives no hash for {file.name}"
            raise ModelError(what, where=page, fix="check HF_ENDPOINT")
    return DownloadPlan(model, listing, files, left_out, repo_cache(model.name))


def repo_cache(repo: str, repo_type: str = "model") -> Path:
    """A repository's folder in the Hub's cache."""
    return Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}"


def check_cache_room(name: str, missing: int) -> None:
    """Raise MachineError unless the cache's disk has room for `missing` bytes."""
    if missing:
        require_disk_space(Path(constants.HF_HUB_CACHE), missing + MARGIN, what=name, fix=DISK_FIX)


def download_model(plan: DownloadPlan, progress: FetchProgress) -> Path:
    """Download what is missing of a plan, and return the snapshot's folder, checked; raises as
    `fetch`."""
    model = plan.model
    check_cache_room(model.name, plan.missing)
    if plan.missing:
        arrived = plan.total - plan.missing
        # The bar begins outside `hub_calls`, which silences those of huggingface_hub.
        with (
            progress.transfer(model.name, plan.total, arrived) as advance,
            hub_calls(model.name, model.revision),
        ):
            download_large_files(plan.files, plan.storage, advance)
            # The small ones, which follow at once.
            advance(plan.missing)
    folder = _download_snapshot(
        model.name, model.revision, patterns=[file.name for file in plan.files]
    )
    check_folder(folder, model)
    return folder


def _download_snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot's folder with the files of these patterns: those in the cache are linked, the
    others downloaded."""
    with hub_calls(repo, revision):
        return Path(
            retry(lambda: snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
        )


def tokenizer_folder(model: Model, folder: Path) -> Path:
    """The folder of a recipe's tokenizer: the model's own `folder`, or that of `model.tokenizer`,
    fetched if needed."""
    return folder if model.tokenizer is None else fetch_without_weights(model.tokenizer)


def fetch_for_tokens(model: Model) -> Path:
    """A folder with a model's configuration and tokenizer; of a .gguf file, and of a model that is
    not on this machine, without its weights."""
    path = local_model(model)
    if path is None:
        return cached_model(model) or fetch_without_weights(model.name, model.revision)
    if path.is_file():
        return convert_gguf(path, None)
    return fetch(model)


def fetch_without_weights(name: str, revision: str | None = None) -> Path:
    """A local folder, or that of a Hub id's tokenizer and configuration, fetched if needed;
    ModelError for neither."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    with hub_calls(name, revision):
        cached = cached_without_weights(name, revision)
    return cached or _download_snapshot(name, revision, SUPPORT)


def config_in_package(model: Model) -> Mapping[str, object] | None:
    """config.json of a well-known Hub id of which nothing is on this machine; None for any other
    model.

    A plan for these needs no network, token or license.
    """
    if model.revision is not None or local_model(model) is not None:
        return None
    config = config_of_model(model.name)
    if config is None or cached_without_weights(model.name) is not None:
        return None
    return config


def cached_without_weights(name: str, revision: str | None = None) -> Path | None:
    """The folder of a Hub id's tokenizer and configuration in the Hub's cache, without asking the
    Hub; None if not there."""
    cached = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


@dataclass(frozen=True)
class CachedItem:
    """One thing in a cache.

    Attributes:
        kind: model, dataset, converted or shipped.
        size: in bytes.
        used: seconds since the epoch.
    """

    name: str
    kind: str
    size: int
    used: float
    folder: Path


def cached_items() -> list[CachedItem]:
    """Everything in the caches, the largest first; parts of unfinished downloads counted."""
    # Not scan_cache_dir: it leaves out a repository of which no file is complete yet.
    hub = Path(constants.HF_HUB_CACHE)
    items = _items_in(hub, "model", "models--")
    items += _items_in(hub, "dataset", "datasets--")
    items += _items_in(cache_folder("models"), "converted")
    items += _items_in(cache_folder("shipped"), "shipped")
    return sorted(items, key=lambda item: -item.size)


def _items_in(cache: Path, kind: str, prefix: str = "") -> list[CachedItem]:
    """The folders of a cache whose names begin with `prefix`."""
    items = []
    for folder in filter(Path.is_dir, cache.glob(f"{prefix}*")):
        name = folder.name
        if prefix:
            name = name.removeprefix(prefix).replace("--", "/")
        # Links are not followed, so that a blob counts once.
        files = [p.lstat() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
        used = max((file.st_atime for file in files), default=folder.stat().st_mtime)
        size = sum(file.st_size for file in files)
        items.append(CachedItem(name, kind, size, used, folder))
    return items


def remove_cached(item: CachedItem) -> None:
    """Delete it from the disk, with its locks and parts."""
    shutil.rmtree(item.folder)
    shutil.rmtree(item.folder.parent / ".locks" / item.folder.name, ignore_errors=True)
