"""The model card: the README.md beside the weights, as the Hub shows it.

It is made from a run directory's own files (recipe, metrics.jsonl, env.json) and holds no path of this machine.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tunesmith.config.dump import dump
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.schema import Model, Run
from tunesmith.errors import RunError
from tunesmith.metrics.record import read_records
from tunesmith.metrics.summary import run_figures
from tunesmith.run_dir import METRICS, read_env

WIDTH, HEIGHT = 60, 8  # of the loss curve, in characters
_BLOCKS = " ▁▂▃▄▅▆▇█"
_FOLDERS = re.compile(
    r"^( *(?:- )?(?:name|tokenizer|from|source|template|\w+_dir): \"?)/(?:.*/)?", re.MULTILINE
)
_PACKAGES = ("tunesmith", "python", "torch", "transformers", "peft")


def model_card(
    base: Model, run: Run | None = None, run_dir: Path = Path(), *, merged: str = ""
) -> str:
    """The text of a README.md.

    Args:
        base: the model that was trained, or that the adapter belongs to.
        run, run_dir: the resolved recipe and its directory, where they are known.
        merged: dtype of the weights that an adapter was merged into.
    """
    full = run is not None and run.adapter.kind == "none"
    sources = list(dict.fromkeys(source.source for source in run.data.train)) if run else []
    licence = _licence(base)
    data = ModelCardData(
        base_model=base.name if is_hub_id(base.name) else None,
        datasets=[name for name in sources if is_hub_id(name)] or None,
        library_name="transformers" if full or merged else "peft",
        pipeline_tag="text-generation",
        tags=["tunesmith", "full" if full else "lora", *([run.method] if run else [])],
        **licence,
    )
    adapter = "with a LoRA adapter" + (f" merged into its weights ({merged})" if merged else "")
    how = "trained in full" if full else adapter
    text = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_shown(base.name)}, fine-tuned",
        f"`{_shown(base.name)}`, {how}.",
    ]
    if run:
        trained_on = ", ".join(f"`{_shown(name)}`" for name in sources)
        text += [f"Trained on {trained_on} with tunesmith.", *_training(run_dir)]
        recipe = _FOLDERS.sub(r"\1", dump(run))
        text += [f"<details><summary>The recipe</summary>\n\n```yaml\n{recipe}```\n\n</details>"]
    stated = licence.get("license_name") or licence.get("license")
    whose = (
        f"`{stated}`, the licence of the base model," if stated else "The licence of the base model"
    )
    return str(ModelCard("\n\n".join([*text, f"{whose} holds for this model too.\n"])))


def _training(run_dir: Path) -> list[str]:
    """Figures, machine and loss curve, from what the run wrote; nothing where that cannot be read."""
    with suppress(OSError, LookupError, TypeError, ValueError, ArithmeticError, RunError):
        records = read_records(run_dir / METRICS)
        env = read_env(run_dir).value
        machine = ", ".join(gpu["name"] for gpu in env["gpus"]) or env["cpu"]
        versions = ", ".join(f"{name} {env[name]}" for name in _PACKAGES if name in env)
        figures = [
            *run_figures(records, 0.0),
            f"{'hardware':<12}{machine}",
            f"{'versions':<12}{versions}",
        ]
        blocks = figures, loss_curve([record.loss for record in records])
        return ["```text\n{}\n```".format("\n".join(lines)) for lines in blocks]
    return []


def loss_curve(losses: Sequence[float]) -> list[str]:
    """The lines of a picture in characters: the mean losses of up to 60 stretches of steps, a column each."""
    width = min(WIDTH, len(losses))
    edges = [len(losses) * i // width for i in range(width + 1)]
    means = [fmean(losses[start:end]) for start, end in pairwise(edges)]
    low, high = min(means), max(means)
    # In eighths of a character; the lowest column keeps one, so that it is seen.
    tall = [1 + round((mean - low) / ((high - low) or 1.0) * (8 * HEIGHT - 1)) for mean in means]
    labels = {HEIGHT - 1: f"{high:.4f}", HEIGHT // 2: "loss", 0: f"{low:.4f}"}
    rows = []
    for row in reversed(range(HEIGHT)):
        cells = "".join(_BLOCKS[min(8, max(0, column - 8 * row))] for column in tall)
        rows.append(f"{labels.get(row, ''):>9} |{cells}".rstrip())
    return [*rows, f"{'':9} +{'-' * width}", f"{'':11}steps 1 to {len(losses)}"]


def is_hub_id(name: str) -> bool:
    """Whether a model or source of a recipe is on the Hub, and no path of this machine."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not (Path(name).exists() or name.endswith((".gguf", *DATA_SUFFIXES)))
    return False


def _shown(name: str) -> str:
    return name if is_hub_id(name) else Path(name).name


def _licence(base: Model) -> dict[str, Any]:
    """The keys about the licence in the card of the base, if it lies in its folder or the Hub's cache."""
    known = is_hub_id(base.name) and try_to_load_from_cache(
        base.name, "README.md", revision=base.revision
    )
    card = Path(known) if isinstance(known, str) else Path(base.name).expanduser() / "README.md"
    stated: dict[str, Any] = {}
    # None may be there, or what is no card: nothing in it may keep trained weights from the disk.
    with suppress(Exception):
        stated = metadata_load(card) or {}
    keys = ("license", "license_name", "license_link")
    return {key: stated[key] for key in keys if isinstance(stated.get(key), str)}
