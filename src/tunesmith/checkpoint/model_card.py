"""The model card, which is the file README.md next to the weights.

The Hub shows it as the page of the model.

The card is made from files in the run directory (recipe, metrics.jsonl, env.json). It contains no
path of this machine.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tunesmith.config.dump import dump
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.schema import Model, Run
from tunesmith.errors import RunError
from tunesmith.metrics.record import read_records, read_start_values
from tunesmith.metrics.run_figures import run_figures
from tunesmith.run_dir import METRICS, Fields, describe_weights, read_env

# Jinja template of a model card, for `ModelCard.from_template`.
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}{{ ", fine-tuned" if is_trained }}

`{{ name }}`,
{%- if not is_trained %} as released, in another format.
{%- elif is_full %} trained in full.
{%- else %} with a LoRA adapter{{ " merged into its weights (%s)" | format(merged) if merged }}.
{%- endif %}
{%- if recipe %}

Trained on {% for row in rows %}`{{ row }}`{{ ", " if not loop.last }}{% endfor %} with tunesmith.
{%- if figures %}

```text
{{ figures }}
```
{%- endif %}

<details><summary>The recipe</summary>

```yaml
{{ recipe }}```

</details>
{%- endif %}

{% if license_name or license -%}
`{{ license_name or license }}`, the license of the base model,
{%- else %}The license of the base model{% endif %} applies to this model too.

"""
_FOLDERS = re.compile(
    r"^( *(?:- )?(?:name|tokenizer|from|source|template|\w+_dir): \"?)/(?:.*/)?", re.MULTILINE
)
_PACKAGES = ("tunesmith", "python", "torch", "transformers", "peft")


@dataclass(frozen=True)
class CardFile:
    """A row of the table of files in the model card.

    Attributes:
        kind: format and dtype of the weights.
        mean_kl: KL divergence from the fine-tuned model in nats, measured at export. None if it was
            not measured.
        agreement: fraction of positions with the same most likely token.
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
    """Return the text of the README.md of a model.

    Args:
        base: the model that was trained, or the base model of the adapter.
        run, run_dir: the resolved recipe and the run directory, if they are known.
        merged: if the adapter was merged into the base weights, the dtype of the merged weights, or
            "GGUF". Otherwise empty.
        library: the Hub's name of the library that reads the files. None means Transformers or
            PEFT.
        is_trained: whether the model was trained. False if it is only the base in another format.
        step: step of the weights. None if it is not known.
    """
    is_full = run is not None and run.adapter.kind == "none"
    tags = ["tunesmith"]
    if is_trained:
        tags.append("full" if is_full else "lora")
        if run:
            tags.append(run.method.name)
    sources = []
    if run:
        # Data sources in the order of the recipe, without duplicates.
        sources = list(dict.fromkeys(source.source for source in run.data.train))

    data = ModelCardData(
        base_model=base.name if is_hub_id(base.name) else None,
        datasets=[name for name in sources if is_hub_id(name)] or None,
        library_name=library or ("transformers" if is_full or merged else "peft"),
        pipeline_tag="text-generation",
        tags=tags,
        **_license(base),
    )

    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=_shown(base.name),
        is_trained=is_trained,
        is_full=is_full,
        merged=merged,
        rows=[_shown(name) for name in sources],
        figures=_figures(run_dir, step) if run else "",
        recipe=_FOLDERS.sub(r"\1", dump(run)) if run else "",
    )
    return str(card)


def with_files(card: str, files: Sequence[CardFile]) -> str:
    """Insert a table of files into a card that `model_card` has returned.

    The table is put before the last paragraph, which is about the license.
    """
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
        lines += ["", "Both are compared with the fine-tuned model on its own rows at export time."]

    text, _, license_paragraph = card.rstrip("\n").rpartition("\n\n")
    return "\n\n".join([text, "\n".join(lines), license_paragraph]) + "\n"


def weights_file(
    folder: Path, kind: str, mean_kl: float | None = None, agreement: float | None = None
) -> CardFile:
    """Return the table row for the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        name = files[0].name
    else:
        name = f"*.safetensors, {len(files)} files"
    size = sum(file.stat().st_size for file in files)
    return CardFile(name, kind, size, mean_kl, agreement)


def _figures(run_dir: Path, step: int | None) -> str:
    """Return the lines of the card about weights, training and machine. They are read from the
    files of the run.

    Return "" if a file cannot be read.
    """
    with suppress(OSError, LookupError, TypeError, ValueError, ArithmeticError, RunError):
        records = read_records(run_dir / METRICS)
        env = read_env(run_dir).value
        machine = ", ".join(gpu["name"] for gpu in env["gpus"]) or env["cpu"]
        versions = ", ".join(f"{name} {env[name]}" for name in _PACKAGES if name in env)

        figures = []
        if step:
            figures.append(f"weights     {describe_weights(step, records[-1].step)}")
        figures += run_figures(records, 0.0, start=read_start_values(run_dir / METRICS))
        figures.append(f"hardware    {machine}")
        figures.append(f"versions    {versions}")
        return "\n".join(figures)
    return ""


def is_hub_id(name: str) -> bool:
    """Return whether a model or data source is on the Hub instead of a path on this machine."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not (Path(name).exists() or name.endswith((".gguf", *DATA_SUFFIXES)))
    return False


def _shown(name: str) -> str:
    return name if is_hub_id(name) else Path(name).name


def _license(base: Model) -> Fields:
    """Return the license keys in the card of the base model.

    Return an empty dict if the card is neither in the model's folder nor in the Hub's cache.
    """
    card = Path(base.name).expanduser() / "README.md"
    if is_hub_id(base.name):
        cached = try_to_load_from_cache(base.name, "README.md", revision=base.revision)
        if isinstance(cached, str):
            card = Path(cached)
    metadata = {}
    # The card of the base model can be missing or invalid. Ignore all errors, so that the trained
    # weights are saved in any case.
    with suppress(Exception):
        metadata = metadata_load(card) or {}
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
