"""The adapter that a run continues from, `adapter.from` in its recipe."""

from pathlib import Path

from tunesmith.checkpoint.saved_model import find_saved_model
from tunesmith.errors import ModelError, first_line
from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_word
from tunesmith.model.safetensors_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ENDS_AND_MIDDLE,
    read_header,
    sampled_digest,
)
from tunesmith.run_dir import RECIPE, name_a_run


def find_adapter(name: str) -> Path:
    """The folder of PEFT files that `adapter.from` names: a folder, a run directory, or a Hub id.

    Of a run directory it is the one that `chat`, `eval` and `export` take.

    Raises:
        ModelError: there is neither a folder nor an adapter on the Hub, or the run has trained all
            weights.
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
        what = (
            f"the adapter {name!r} is neither a folder nor an adapter on the Hub that can be read"
        )
        fix = (
            "name a run directory, a folder with adapter_config.json, or a Hub id; for a private "
            "one set HF_TOKEN"
        )
        raise ModelError(what, where="adapter.from", why=first_line(error), fix=fix) from error


def find_local_adapter(name: str) -> Path | None:
    """`find_adapter` without the Hub, from small files alone; None for a Hub id."""
    place = Path(name)
    if is_run_dir(name):
        return adapter_of_run(place)[0]
    if place.is_dir():
        return place
    # As for a model: an existing folder in front of the slash makes it a path.
    if not (place.is_absolute() or place.parent.is_dir()):
        return None
    raise ModelError(f"there is no {from_here(place)}", where="adapter.from", fix=name_a_run(place))


def is_run_dir(name: str) -> bool:
    """Tell whether `adapter.from` names a run directory, which may come to hold other adapters."""
    return (Path(name) / RECIPE).is_file() and not (Path(name) / ADAPTER_CONFIG).is_file()


def folder_in_run(folder: str | None, run_dir: str | None) -> str | None:
    """The name of `folder` if it lies in `run_dir`; both as in `adapter.from`."""
    if folder and run_dir and Path(folder).parent == Path(run_dir):
        return Path(folder).name
    return None


def adapter_of_run(run_dir: Path) -> tuple[Path, str]:
    """The adapter of a run directory, and which of its folders that is, in words.

    Raises: as `find_adapter`.
    """
    folder, note, _ = find_saved_model(Path(from_here(run_dir)))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            "the run has no adapter: it trained all weights",
            where=f"adapter.from: {run_dir}",
            fix=f"continue from its model: {shell_word(f'model.name={folder}')}, without "
            "adapter.from",
        )
    return folder.absolute(), note


def adapter_digest(name: str) -> str:
    """sha256 (hex) of an adapter's weights, by samples of them; `name` as in `adapter.from`."""
    return sampled_digest(read_header(find_adapter(name) / ADAPTER_WEIGHTS), ENDS_AND_MIDDLE)
