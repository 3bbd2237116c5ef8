"""The model card: the README.md beside the weights, as the Hub shows it.

It is made from a run directory's own files (recipe, metrics.jsonl, env.json) and holds no path of
this machine.
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
from tunesmith.metrics.record import read_records
from tunesmith.metrics.summary import run_figures
from tunesmith.run_dir import METRICS, Fields, describe_weights, read_env

# The Jinja template of a card, by `ModelCard.from_template`.
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
    data = ModelCardData(
        base_model=base.name if is_hub_id(base.name) else None,
        datasets=[name for name in sources if is_hub_id(name)] or None,
        library_name=library or ("transformers" if is_full or merged else "peft"),
        pipeline_tag="text-generation",
        tags=["tunesmith", *(training_tags if is_trained else [])],
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


def _figures(run_dir: Path, step: int | None) -> str:
    """Return the lines on weights, training and machine from what the run wrote. Return "" if a
    file is unreadable.
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
        return "\n".join(figures)
    return ""


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
