"""The model card: the README.md beside the weights, as the Hub shows it.

It is made from a run directory's own files (recipe, metrics.jsonl, env.json) and holds no path of
this machine.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tunesmith.config.dump import dump
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.schema import Model, Run
from tunesmith.errors import RunError
from tunesmith.metrics.record import read_records
from tunesmith.metrics.summary import run_figures
from tunesmith.run_dir import METRICS, Fields, describe_weights, read_env

# Of the loss curve, in characters.
CHART_WIDTH = 60
CHART_HEIGHT = 8
_BLOCK_CHARACTERS = " ▁▂▃▄▅▆▇█"
_FOLDERS = re.compile(
    r"^( *(?:- )?(?:name|tokenizer|from|source|template|\w+_dir): \"?)/(?:.*/)?", re.MULTILINE
)
_PACKAGES = ("tunesmith", "python", "torch", "transformers", "peft")


@dataclass(frozen=True)
class CardFile:
    """A row of the card's table of files.

    Attributes:
        kind: format and type of the weights.
        mean_kl: divergence from the tuned model in nats, measured at export; None: not measured.
        agreement: share of positions with the same most likely token.
    """

    name: str
    kind: str
    bytes: int
    mean_kl: float | None = None
    agreement: float | None = None


def model_card(
    base: Model,
    run: Run | None = None,
    run_dir: Path = Path(),
    *,
    merged: str = "",
    library: str | None = None,
    is_trained: bool = True,
    step: int | None = None,
) -> str:
    """The text of a README.md.

    Args:
        base: the model that was trained, or that the adapter belongs to.
        run, run_dir: the resolved recipe and its directory, where they are known.
        merged: the form of the weights that an adapter was merged into, a dtype or GGUF; empty: it
            was merged into none.
        library: the Hub's name of what opens the files; None: Transformers or PEFT.
        is_trained: whether it is more than the base in another format.
        step: that the weights are of; None: that is not known.
    """
    is_full = run is not None and run.adapter.kind == "none"
    training_tags = ["full" if is_full else "lora", *([run.method.name] if run else [])]
    # In their order, without repetitions.
    sources = list(dict.fromkeys(source.source for source in run.data.train)) if run else []
    license_keys = _license(base)
    data = ModelCardData(
        base_model=base.name if is_hub_id(base.name) else None,
        datasets=[name for name in sources if is_hub_id(name)] or None,
        library_name=library or ("transformers" if is_full or merged else "peft"),
        pipeline_tag="text-generation",
        tags=["tunesmith", *(training_tags if is_trained else [])],
        **license_keys,
    )
    how = "with a LoRA adapter"
    if is_full:
        how = "trained in full"
    elif merged:
        how += f" merged into its weights ({merged})"
    if not is_trained:
        how = "as released, in another format"
    title = f"# {_shown(base.name)}"
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"{title}, fine-tuned" if is_trained else title,
        f"`{_shown(base.name)}`, {how}.",
    ]
    if run:
        names = ", ".join(f"`{_shown(name)}`" for name in sources)
        recipe = _FOLDERS.sub(r"\1", dump(run))
        paragraphs.append(f"Trained on {names} with tunesmith.")
        paragraphs += _training(run_dir, step)
        paragraphs.append(
            f"<details><summary>The recipe</summary>\n\n```yaml\n{recipe}```\n\n</details>"
        )
    license_name = license_keys.get("license_name") or license_keys.get("license")
    whose = "The license of the base model"
    if license_name:
        whose = f"`{license_name}`, the license of the base model,"
    paragraphs.append(f"{whose} applies to this model too.\n")
    return str(ModelCard("\n\n".join(paragraphs)))


def with_files(card: str, files: Sequence[CardFile]) -> str:
    """A card of `model_card` with a table of its files in front of the last paragraph, which is
    about the license."""
    lines = [
        "## Files",
        "",
        "| file | kind | MB | mean KL | same most likely token |",
        "|---|---|---|---|---|",
    ]
    for file in files:
        measured = "not measured | "
        if file.mean_kl is not None and file.agreement is not None:
            measured = f"{file.mean_kl:.2g} | {file.agreement:.0%}"
        lines.append(f"| `{file.name}` | {file.kind} | {file.bytes / 1e6:,.1f} | {measured} |")
    if any(file.mean_kl is not None for file in files):
        lines += ["", "Both compared with the tuned model on its own rows, at export time."]
    text, _, license_paragraph = card.rstrip("\n").rpartition("\n\n")
    return "\n\n".join([text, "\n".join(lines), license_paragraph]) + "\n"


def weights_file(
    folder: Path, kind: str, mean_kl: float | None = None, agreement: float | None = None
) -> CardFile:
    """The row of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    name = files[0].name if len(files) == 1 else f"*.safetensors, {len(files)} files"
    size = sum(file.stat().st_size for file in files)
    return CardFile(name, kind, size, mean_kl, agreement)


def _training(run_dir: Path, step: int | None) -> list[str]:
    """The step of the weights, figures, machine and loss curve, from what the run wrote; nothing
    if it is unreadable.
    """
    with suppress(OSError, LookupError, TypeError, ValueError, ArithmeticError, RunError):
        records = read_records(run_dir / METRICS)
        env = read_env(run_dir).value
        machine = ", ".join(gpu["name"] for gpu in env["gpus"]) or env["cpu"]
        versions = ", ".join(f"{name} {env[name]}" for name in _PACKAGES if name in env)
        figures = [
            *([f"{'weights':<12}{describe_weights(step, records[-1].step)}"] if step else []),
            *run_figures(records, 0.0),
            f"{'hardware':<12}{machine}",
            f"{'versions':<12}{versions}",
        ]
        curve = loss_curve([record.loss for record in records])
        return ["```text\n{}\n```".format("\n".join(lines)) for lines in (figures, curve)]
    return []


def loss_curve(losses: Sequence[float]) -> list[str]:
    """The lines of a picture in characters.

    A column is the mean loss of a stretch of steps; there are up to 60.
    """
    width = min(CHART_WIDTH, len(losses))
    edges = [len(losses) * column // width for column in range(width + 1)]
    means = [fmean(losses[start:end]) for start, end in pairwise(edges)]
    low = min(means)
    high = max(means)
    span = (high - low) or 1.0
    # In eighths of a character; the lowest column keeps one, so that it is seen.
    highest = 8 * CHART_HEIGHT - 1
    heights = [1 + round((mean - low) / span * highest) for mean in means]
    labels = [""] * CHART_HEIGHT
    labels[0] = f"{low:.4f}"
    labels[CHART_HEIGHT // 2] = "loss"
    labels[CHART_HEIGHT - 1] = f"{high:.4f}"
    lines = []
    for row in reversed(range(CHART_HEIGHT)):
        line = f"{labels[row]:>9} |"
        for height in heights:
            # How much of this row, in eighths, the column fills.
            eighths = min(8, max(0, height - 8 * row))
            line += _BLOCK_CHARACTERS[eighths]
        lines.append(line.rstrip())
    lines.append(f"{'':9} +{'-' * width}")
    lines.append(f"{'':11}steps 1 to {len(losses)}")
    return lines


def is_hub_id(name: str) -> bool:
    """Tell whether a model or source of a recipe is on the Hub, and no path of this machine."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not (Path(name).exists() or name.endswith((".gguf", *DATA_SUFFIXES)))
    return False


def _shown(name: str) -> str:
    return name if is_hub_id(name) else Path(name).name


def _license(base: Model) -> Fields:
    """The keys about the license in the card of the base.

    Empty if that lies neither in its folder nor in the Hub's cache.
    """
    card = Path(base.name).expanduser() / "README.md"
    if is_hub_id(base.name):
        cached = try_to_load_from_cache(base.name, "README.md", revision=base.revision)
        if isinstance(cached, str):
            card = Path(cached)
    metadata: Fields = {}
    # None may be there, or what is no card: nothing in it may keep trained weights from the disk.
    with suppress(Exception):
        metadata = metadata_load(card) or {}
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
