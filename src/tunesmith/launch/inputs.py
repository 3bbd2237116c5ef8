"""The files of this machine that a recipe reads, and that another machine or a container needs."""

import os
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import UsageError

SECRETS = "/run/secrets"  # in a container: the files with tokens; docker/entrypoint.sh exports the trackers' from there
TRACKER_KEYS = ("WANDB_API_KEY", "COMET_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN")


def recipe_inputs(run: Run) -> list[Path]:
    """The files and folders that a recipe reads here, absolute, each once, in the order of the schema; no Hub ids.

    They are the data files, the template, the model, its tokenizer and the adapter to go on from. UsageError where one
    is not there: a container or another machine would say so only after it was started.
    """
    data = run.data
    named = [
        ("model.name", run.model.name),
        ("model.tokenizer", run.model.tokenizer),
        ("adapter.from", run.adapter.from_),
        *(("data.train.source", source.source) for source in data.train),
        *(("data.validation.source", source.source) for source in data.validation),
        ("data.template", data.template),
    ]
    found: dict[Path, None] = {}
    for key, text in named:
        if text is None or not os.path.isabs(text):  # config/paths.py has made each path absolute
            continue
        if not os.path.exists(text):
            raise UsageError(f"{text} is not there", where=key, fix=f"correct it: {key}=PATH")
        found[Path(text)] = None
    return list(found)
