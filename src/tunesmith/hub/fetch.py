"""Access to models in two forms: local folders and models on the Hub.

License, config, access and disk space are checked before large files are downloaded. Only the files
that training needs are downloaded. The weights must be in the safetensors format.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects
from rich.filesize import decimal as size_text

from tunesmith.config.paths import find_local_model
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.host.files import (
    check_regular_files,
    require_disk_space,
)
from tunesmith.hub.hub_calls import DISK_FIX, hub_calls, repo_page, unknown_model_name
from tunesmith.model.arch.shapes import config_of_model
from tunesmith.model.arch.spec import ModelSpec, check_seq_len, check_supported
from tunesmith.model.arch.text_config import read_configs
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.model.weights.safetensors_files import (
    INDEX,
    MODELOPT_CONFIG,
    SINGLE,
    indexed_files,
    no_safetensors,
    read_json,
    weight_files,
)
from tunesmith.model.weights.shipped_entries import read_entries

log = logging.getLogger(__name__)

# Names of tokenizer files. A model folder must have at least one of these files.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
    "tekken.json",
)
# Name patterns of the small files (config, tokenizer, license) that are downloaded.
SUPPORT = [
    "config.json",
    MODELOPT_CONFIG,
    "generation_config.json",
    "*processor_config.json",  # image processor, for programs that load the trained model
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
]
MAX_PARAMETERS_PER_NUMBER = 8  # maximum parameters in one stored number; nf4 has two
MIN_FREE_BYTES = 64 << 20  # bytes that must be free on the disk after a download


def fetch(model: Model, *, seq_len: int | None = None, bars: bool = True) -> Path:
    """Return a folder with config.json, safetensors and a tokenizer. Download the model if needed.

    The tokenizer may be missing if `model.tokenizer` is set.

    Args:
        model: the recipe's section `model`. `model.name` is a folder or a Hub id.
        seq_len: the recipe's seq_len. It is compared with the model's context length before a
            download.
        bars: whether huggingface_hub draws progress bars if stderr is a terminal.

    Raises:
        ModelError: the model cannot be downloaded or read.
        RecipeError: the model's context is shorter than `seq_len`.
        MachineError: the disk has too little free space, or a package is missing.
    """
    path = local_model(model)
    if path is None:
        return cached_model(model) or download_model(plan_download(model, seq_len), bars=bars)
    check_folder(path, model)
    return path


def local_model(model: Model) -> Path | None:
    """Return the local folder that `model.name` names, or None for a Hub id.

    Raise ModelError if the path does not exist.
    """
    name = model.name
    path = find_local_model(name)
    if path is not None:
        return path
    with hub_calls(name, model.revision):
        cached = try_to_load_from_cache(name, "config.json", revision=model.revision)
    if "/" not in name and not isinstance(cached, str):
        raise unknown_model_name(name)
    return None


def cached_model(model: Model) -> Path | None:
    """Return the model's folder in the Hub's cache, or None if it is missing or incomplete."""
    config = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    # Check that every shard exists, because an interrupted download leaves the index file and only
    # some of the shards.
    if not all((folder / name).exists() for name in weight_files(folder)):
        return None
    if model.tokenizer is None and not _has_tokenizer(folder):
        return None
    check_folder(folder, model)
    return folder


def check_folder(folder: Path, model: Model) -> ModelSpec:
    """Check the files of a model folder, and return the model's sizes.

    Raise ModelError if a file is missing, truncated or damaged.
    """
    check_regular_files(folder)
    headers = read_entries(folder)
    spec = spec_of_folder(folder, model)
    stored = sum(math.prod(entry.shape) for entries in headers.values() for entry in entries)
    # Compare config.json with the weights now. If a size in config.json is wrong, building the
    # model later could need too much memory.
    if spec.parameters > MAX_PARAMETERS_PER_NUMBER * stored:
        described = f"config.json describes {spec.parameters:,} parameters"
        raise ModelError(
            f"{described}, but the weights have {stored:,}",
            where=folder / "config.json",
            fix="fetch the model again, or correct config.json",
        )
    if model.tokenizer is None and not _has_tokenizer(folder):
        raise ModelError(
            "the folder has no tokenizer",
            where=folder,
            why=f"the folder has none of {', '.join(TOKENIZER)}",
            fix="set model.tokenizer to a folder or Hub id with a tokenizer",
        )
    return spec


def spec_of_folder(folder: Path, model: Model) -> ModelSpec:
    """Return the sizes of the model in `folder`, from its config.json."""
    file = folder / "config.json"
    return model_spec(read_json(file), where=str(file), trust_remote_code=model.trust_remote_code)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER)


def describe_repo(repo: str, revision: str | None, repo_type: str) -> ModelInfo | DatasetInfo:
    """Get the description of a repository with its file sizes from the Hub, and log its license."""
    ask = HfApi().dataset_info if repo_type == "dataset" else HfApi().model_info
    with hub_calls(repo, revision, repo_type):
        info = ask(repo, revision=revision, files_metadata=True)
    suffix = ", gated" if info.gated else ""
    log.info(f"{repo}: license {stated_license(info)}{suffix} ({repo_page(repo, repo_type)})")
    return info


def stated_license(info: ModelInfo | DatasetInfo) -> str:
    """Return the license from the repository's model or dataset card, or "not stated"."""
    card = info.card_data
    stated = card and (card.get("license_name") or card.get("license"))
    return ", ".join(stated) if isinstance(stated, list) else str(stated or "not stated")


@dataclass(frozen=True)
class DownloadPlan:
    """The files of a Hub model that training needs, including files that are already cached."""

    model: Model
    info: ModelInfo | DatasetInfo
    files: tuple[DryRunFileInfo, ...]

    @property
    def total(self) -> int:
        """Total size of all files in bytes."""
        return sum(file.file_size or 0 for file in self.files)

    @property
    def missing(self) -> int:
        """Total size in bytes of the files that are not in the cache."""
        return sum(file.file_size or 0 for file in self.files if file.will_download)


def plan_download(model: Model, seq_len: int | None = None) -> DownloadPlan:
    """List the files to download for a model, and check the model before a large download.

    The checks cover license, format, config and shards. Raise ModelError if a check fails, and
    RecipeError if the model's context is shorter than `seq_len`.
    """
    info = describe_repo(model.name, model.revision, "model")
    page = repo_page(model.name)
    all_names = {file.rfilename for file in info.siblings or ()}
    names = {name for name in all_names if "/" not in name}
    if not {INDEX, SINGLE} & names:
        raise no_safetensors(sorted(names), name=model.name, where=page)
    if "config.json" not in names:
        raise ModelError(
            "the repository has weights but no config.json",
            where=page,
            fix="use another revision or repository",
        )

    def small_file(name: str) -> Path:
        with hub_calls(model.name, model.revision):
            return Path(hf_hub_download(model.name, name, revision=info.sha))

    where = f"{page}/blob/{info.sha}/config.json"
    config = read_json(small_file("config.json"))
    # Check config.json now, before the weights are downloaded.
    check_supported(config, where, vision=model.vision)
    spec = model_spec(config, where=where, trust_remote_code=model.trust_remote_code)
    # If the model type is not in tunesmith's table of architectures, run Transformers' model code
    # to measure whether the model can be trained. The measurement needs no weights.
    if spec.measured:
        from tunesmith.model.measuring.support import find_support

        text, full_config = read_configs(config, where)
        find_support(text, model, where=where, full_config=full_config)
    if seq_len is not None:
        check_seq_len(spec, seq_len, where=where)
    weights = indexed_files(small_file(INDEX)) if INDEX in names else [SINGLE]
    missing = [name for name in weights if name not in all_names]
    if missing:
        raise ModelError(
            f"the repository lacks weight files that its index lists: {', '.join(missing[:3])}",
            where=page,
            fix="use another revision, or tell the model's owner",
        )
    patterns = [*SUPPORT, INDEX]
    if model.trust_remote_code:
        patterns.append("*.py")
    targets = [*filter_repo_objects(names, allow_patterns=patterns), *weights]
    with hub_calls(model.name, model.revision):
        files = snapshot_download(
            model.name, revision=info.sha, allow_patterns=targets, dry_run=True
        )
    return DownloadPlan(model, info, tuple(files))


def repo_cache(repo: str, repo_type: str = "model") -> Path:
    """Return the folder of a repository in the Hub's cache."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type=repo_type))


def check_cache_space(name: str, missing: int) -> None:
    """Raise MachineError unless the disk of the cache has space for `missing` bytes."""
    if missing:
        require_disk_space(
            Path(constants.HF_HUB_CACHE), missing + MIN_FREE_BYTES, what=name, fix=DISK_FIX
        )


def download_model(plan: DownloadPlan, *, bars: bool = True) -> Path:
    """Download the files of a plan that are not in the cache, check the model, and return its
    folder.

    The errors are those of `fetch`.
    """
    model = plan.model
    check_cache_space(model.name, plan.missing)
    if plan.missing:
        sizes = f"{size_text(plan.missing)} of {size_text(plan.total)}"
        log.info(f"fetching {model.name}: {sizes}")
    names = [file.filename for file in plan.files]
    with hub_calls(model.name, model.revision, bars=bars):
        folder = snapshot_download(model.name, revision=model.revision, allow_patterns=names)
    check_folder(Path(folder), model)
    return Path(folder)


def tokenizer_folder(model: Model, folder: Path) -> Path:
    """Return the folder of the recipe's tokenizer.

    If the recipe sets `model.tokenizer`, download this tokenizer if needed and return its folder.
    Otherwise return the model's `folder`.
    """
    return folder if model.tokenizer is None else fetch_tokenizer(model.tokenizer)


def fetch_for_tokens(model: Model) -> Path:
    """Return a folder with the config and tokenizer of a model, downloaded if needed.

    The weights of Hub models are not downloaded.
    """
    path = local_model(model)
    if path is None:
        return cached_model(model) or fetch_without_weights(model.name, model.revision)
    return fetch(model)


def fetch_without_weights(name: str, revision: str | None = None) -> Path:
    """Return a folder with config and tokenizer. Download them if `name` is not a local folder.

    Raise ModelError if the model does not exist on the Hub.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    with hub_calls(name, revision):
        cached = cached_without_weights(name, revision)
        return cached or Path(snapshot_download(name, revision=revision, allow_patterns=SUPPORT))


def fetch_tokenizer(name: str) -> Path:
    """Return a folder with the tokenizer that `model.tokenizer` names. Download it if needed."""
    try:
        return fetch_without_weights(name)
    except ModelError as error:
        if error.where == "model.name":
            error.where = "model.tokenizer"
        raise


def config_in_package(model: Model) -> Mapping[str, object] | None:
    """Return the config.json of a well-known Hub model from a copy in the tunesmith package.

    With this copy, a plan for the model needs no network, token or license. Return None for other
    models, and for models whose config is already on this machine.
    """
    if model.revision is not None or local_model(model) is not None:
        return None
    config = config_of_model(model.name)
    if config is None or cached_without_weights(model.name) is not None:
        return None
    return config


def cached_without_weights(name: str, revision: str | None = None) -> Path | None:
    """Return the folder in the Hub's cache with the tokenizer and config of a Hub id.

    Return None if they are not in the cache. The Hub is not contacted.
    """
    cached = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None
