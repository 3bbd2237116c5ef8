"""Search for the adapter that the recipe key `adapter.from` names.

The run starts with the weights of this adapter.
"""

from pathlib import Path

from tunesmith.checkpoint.saved_model import find_saved_model
from tunesmith.errors import ModelError, first_line
from tunesmith.host.files import relative_to_cwd
from tunesmith.host.shell import shell_word
from tunesmith.model.weights.safetensors_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ENDS_AND_MIDDLE,
    read_header,
    sampled_digest,
)
from tunesmith.run_dir import RECIPE, suggest_run


def find_adapter(name: str) -> Path:
    """Return the folder of the adapter that `adapter.from` names: a folder, a run directory or a
    Hub id.

    If the name is a run directory, the result is the adapter that the commands `chat`, `eval` and
    `export` would also use.

    Raises:
        ModelError: the name is neither a folder nor an adapter on the Hub, or the run has trained
            all weights.
        CheckpointError: the run has no finished checkpoint.
    """
    local = find_local_adapter(name)
    if local is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the adapter {name!r} is neither a folder nor a readable adapter on the Hub",
            where="adapter.from",
            why=first_line(error),
            fix="name a run directory, a folder with adapter_config.json, or a Hub id; set "
            "HF_TOKEN for a private adapter",
        ) from error


def find_local_adapter(name: str) -> Path | None:
    """Return the adapter's folder without using the Hub, or None for a Hub id.

    Only small files are read. See `find_adapter`.
    """
    place = Path(name)
    if is_run_dir(name):
        return adapter_of_run(place)[0]
    if place.is_dir():
        return place
    # A name such as `a/b` is a path if the folder `a` exists, else a Hub id. `model.name` follows
    # the same rule.
    if not (place.is_absolute() or place.parent.is_dir()):
        return None
    raise ModelError(
        f"the folder {relative_to_cwd(place)} does not exist",
        where="adapter.from",
        fix=suggest_run(place),
    )


def is_run_dir(name: str) -> bool:
    """Return whether `adapter.from` names a run directory.

    Unlike an adapter in another folder, the adapter of a run directory can change while that run is
    trained.
    """
    return (Path(name) / RECIPE).is_file() and not (Path(name) / ADAPTER_CONFIG).is_file()


def folder_in_run(folder: str | None, run_dir: str | None) -> str | None:
    """Return the name of `folder` if this folder is in `run_dir`, else None.

    Both arguments are values of `adapter.from`.
    """
    if folder and run_dir and Path(folder).parent == Path(run_dir):
        return Path(folder).name
    return None


def adapter_of_run(run_dir: Path) -> tuple[Path, str]:
    """Return the adapter's folder in a run directory, and a line that describes which folder it is.

    Raise the same errors as `find_adapter`.
    """
    folder, note, _ = find_saved_model(Path(relative_to_cwd(run_dir)))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            "the run has no adapter, because it trained all weights",
            where=f"adapter.from: {run_dir}",
            fix=f"continue from the run's model with {shell_word(f'model.name={folder}')}, and "
            "leave out adapter.from",
        )
    return folder.absolute(), note


def adapter_digest(name: str) -> str:
    """Return a SHA-256 (hex) of samples of an adapter's weights.

    Args:
        name: a value of `adapter.from`.
    """
    return sampled_digest(read_header(find_adapter(name) / ADAPTER_WEIGHTS), ENDS_AND_MIDDLE)
