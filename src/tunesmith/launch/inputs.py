"""The files of this machine that a recipe reads, and that another machine or a container needs."""

import os
from pathlib import Path

from tunesmith.config.paths import inputs_of
from tunesmith.config.schema import Run, Source
from tunesmith.errors import UsageError
from tunesmith.host.files import cache_folder

SECRETS = "/run/secrets"  # in a container: the files with tokens; docker/entrypoint.sh exports the trackers' from there
TRACKER_KEYS = ("WANDB_API_KEY", "COMET_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN")


def recipe_inputs(run: Run) -> list[Path]:
    """The files and folders that a recipe reads here, absolute, each once, in the order of the schema; no Hub ids.

    They are the data files, the template, the model, its tokenizer and the adapter to go on from. UsageError where one
    is not there: a container or another machine would say so only after it was started.
    """
    files = {key: text for key, text in inputs_of(run).items() if os.path.isabs(text)}
    for key, text in files.items():
        if not os.path.exists(text):
            raise UsageError(f"{text} is not there", where=key, fix=f"correct it: {key}=PATH")
    return [Path(text) for text in dict.fromkeys(files.values())]


def hub_sources(run: Run) -> list[Source]:
    """The sources of rows that are on the Hub."""
    return [
        source
        for source in (*run.data.train, *run.data.validation)
        if not os.path.isabs(source.source)
    ]


def caches() -> dict[str, Path]:
    """The variable that names each cache -> its folder here. The Hub's token lies beside its folders, and stays out."""
    from huggingface_hub import constants

    datasets = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    found = {"HF_HUB_CACHE": Path(constants.HF_HUB_CACHE), "HF_DATASETS_CACHE": Path(datasets)}
    return {
        name: path.expanduser().absolute()
        for name, path in (found | {"TUNESMITH_CACHE": cache_folder()}).items()
    }


def find_secrets() -> dict[str, str]:
    """The Hub's token, as HF_TOKEN, and the keys of trackers, as far as the user has them."""
    from huggingface_hub import get_token

    found = {"HF_TOKEN": get_token(), **{key: os.environ.get(key) for key in TRACKER_KEYS}}
    return {name: value for name, value in found.items() if value}
