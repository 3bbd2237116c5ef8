"""The model card, which is the file README.md next to the weights.

The Hub shows it as the page of the model.

The card is made from the recipe and the card of the base model. It contains no path of this
machine.
"""

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from tunesmith.config.dump import dump
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.schema import Model, Run
from tunesmith.run_dir import Fields

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


def model_card(
    base: Model,
    run: Run | None = None,
    *,
    merged: str = "",
    is_trained: bool = True,
) -> str:
    """Return the text of the README.md of a model.

    Args:
        base: the model that was trained, or the base model of the adapter.
        run: the resolved recipe, if it is known.
        merged: the dtype of the weights if the adapter was merged into them. Otherwise empty.
        is_trained: whether the model was trained. False if it is only the base in another format.
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
        library_name="transformers" if is_full or merged else "peft",
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
        recipe=_FOLDERS.sub(r"\1", dump(run)) if run else "",
    )
    return str(card)


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
