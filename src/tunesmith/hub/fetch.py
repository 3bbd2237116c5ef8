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

from huggingface_hub import (
    DatasetInfo,
    DryRunFileInfo,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal as size_text

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.host.files import cache_folder, check_regular_files, near_path, require_disk_space
from tunesmith.hub.gguf import convert_gguf
from tunesmith.hub.hub_calls import DISK_FIX, hub_calls, hub_error, names_no_model, repo_page
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


def fetch(model: Model, *, seq_len: int | None = None, bars: bool = True) -> Path:
    """A folder with config.json, safetensors and, unless `model.tokenizer` names another, a
    tokenizer.

    Args:
        model: the recipe's block; `name` is a folder, a Hub id, or a .gguf file, which is converted
            to `dtype` (not `auto`).
        seq_len: nothing large is downloaded of a model with fewer positions (RecipeError).
        bars: whether huggingface_hub draws progress bars if stderr is a terminal.

    ModelError where the model cannot be had or read, MachineError where the disk or a package is
    missing.
    """
    path = local_model(model)
    if path is None:
        return cached_model(model) or download_model(plan_download(model, seq_len), bars=bars)
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
    # What looks like a path is not looked up at the Hub.
    is_path = name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path or path.is_file():
        near = path.parent if path.is_file() else near_path(path)
        fix = f"did you mean {near}?" if near else "correct the path, or give a Hub id: owner/name"
        raise ModelError(
            f"there is no folder or .gguf file {name}",
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
    spec = spec_of_folder(folder, model)
    stored = sum(math.prod(entry.shape) for entries in headers.values() for entry in entries)
    # Before modules of that size are built.
    if spec.parameters > MOST_PER_NUMBER * stored:
        described = f"config.json describes {spec.parameters:,} parameters"
        raise ModelError(
            f"{described}, and the weights have {stored:,}",
            where=str(folder / "config.json"),
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


def spec_of_folder(folder: Path, model: Model) -> ModelSpec:
    """The sizes of the model in `folder`, by its config.json alone."""
    file = folder / "config.json"
    return model_spec(read_json(file), where=str(file), trust_remote_code=model.trust_remote_code)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER)


def describe_repo(repo: str, revision: str | None, repo_type: str) -> ModelInfo | DatasetInfo:
    """Ask the Hub about a repository, with the sizes of its files, and log its license."""
    ask = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
    with hub_calls(repo, revision, repo_type):
        info = ask(repo, revision=revision, files_metadata=True)
    suffix = ", gated" if info.gated else ""
    log.info(f"{repo}: license {stated_license(info)}{suffix} ({repo_page(repo, repo_type)})")
    return info


def stated_license(info: ModelInfo | DatasetInfo) -> str:
    """Return the license that a repository's card names, or "not stated"."""
    card = info.card_data.to_dict() if info.card_data is not None else {}
    stated = card.get("license_name") or card.get("license") or "not stated"
    return ", ".join(stated) if isinstance(stated, list) else str(stated)


@dataclass(frozen=True)
class DownloadPlan:
    """The files that a model needs from the Hub."""

    model: Model
    info: ModelInfo | DatasetInfo
    files: tuple[DryRunFileInfo, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.file_size or 0 for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes of the files that are not in the cache."""
        return sum(file.file_size or 0 for file in self.files if file.will_download)


def plan_download(model: Model, seq_len: int | None = None) -> DownloadPlan:
    """Ask the Hub what the model is, and check it (license, format, config, shards) before a large
    download."""
    info = describe_repo(model.name, model.revision, "model")
    page = repo_page(model.name)
    all_names = {file.rfilename for file in info.siblings or ()}
    names = {name for name in all_names if "/" not in name}
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
            return Path(hf_hub_download(model.name, name, revision=info.sha))

    where = f"{page}/blob/{info.sha}/config.json"
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
    missing = [name for name in weights if name not in all_names]
    if missing:
        what = f"weight files are not in the repository: {', '.join(missing[:3])}"
        raise ModelError(what, where=page, fix="use another revision, or tell the model's owner")
    patterns = [*SUPPORT, INDEX]
    if model.trust_remote_code:
        patterns.append("*.py")
    targets = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    targets += weights
    with hub_calls(model.name, model.revision):
        files = snapshot_download(
            model.name, revision=info.sha, allow_patterns=targets, dry_run=True
        )
    return DownloadPlan(model, info, tuple(files))


def repo_cache(repo: str, repo_type: str = "model") -> Path:
    """A repository's folder in the Hub's cache."""
    return Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}"


def check_cache_room(name: str, missing: int) -> None:
    """Raise MachineError unless the cache's disk has room for `missing` bytes."""
    if missing:
        require_disk_space(Path(constants.HF_HUB_CACHE), missing + MARGIN, what=name, fix=DISK_FIX)


def download_model(plan: DownloadPlan, *, bars: bool = True) -> Path:
    """Download what is missing of a plan, and return the snapshot's folder, checked; raises as
    `fetch`."""
    model = plan.model
    check_cache_room(model.name, plan.missing)
    if plan.missing:
        sizes = f"{size_text(plan.missing)} of {size_text(plan.total)}"
        log.info(f"fetching {model.name}: {sizes}")
    names = [file.filename for file in plan.files]
    folder = _download_snapshot(model.name, model.revision, names, bars=bars)
    check_folder(folder, model)
    return folder


def _download_snapshot(
    repo: str, revision: str | None, patterns: Sequence[str], *, bars: bool = False
) -> Path:
    """Return the snapshot's folder with the files of these patterns; missing ones are
    downloaded."""
    with hub_calls(repo, revision, bars=bars):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


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
    """

    name: str
    kind: str
    size: int
    folder: Path


def cached_items() -> list[CachedItem]:
    """Everything in the caches, the largest first; parts of unfinished downloads counted."""
    # Not scan_cache_dir: it leaves out a repository of which no file is complete yet.
    hub = Path(constants.HF_HUB_CACHE)
    items = [
        *_items_in(hub, "model", "models--"),
        *_items_in(hub, "dataset", "datasets--"),
        *_items_in(cache_folder("models"), "converted"),
        *_items_in(cache_folder("shipped"), "shipped"),
    ]
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
        items.append(CachedItem(name, kind, sum(file.st_size for file in files), folder))
    return items


def remove_cached(item: CachedItem) -> None:
    """Delete it from the disk, with its locks and parts."""
    shutil.rmtree(item.folder)
    shutil.rmtree(item.folder.parent / ".locks" / item.folder.name, ignore_errors=True)
