"""The shapes of some open models. shapes.json contains their config.json without token ids.

Token ids depend on the tokenizer. `mistral-7b` is version 0.3, which has no sliding window. For a
vision-language model, the entry has only the text model if Transformers has a class for it.
If the config.json was not available, the values are those that other libraries use for the model,
checked against the published number of parameters. The table contains the models of all shipped
recipes, so that these can be planned without access to the Hub.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """Values of the config.json of one model, and the repositories that have these values.

    Attributes:
        source: the repository with its config.json.
        config: the values of its config.json.
        models: repositories with this shape. Each has the values in which its config.json differs
            from `config`.
        vision: sizes of the vision part, by their names in `ModelSpec`.
    """

    source: str
    config: Mapping[str, object]
    models: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    vision: Mapping[str, int] = field(default_factory=dict)


_SHAPE_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SHAPES: dict[str, Shape] = {name: Shape(**values) for name, values in _SHAPE_TABLE.items()}
SHAPE_OF_MODEL = {repo: shape for shape in SHAPES.values() for repo in shape.models}


def find_shape(name: str) -> Shape:
    """Return the shape of this name.

    If the name is unknown, raise UsageError with the most similar name.
    """
    if name in SHAPES:
        return SHAPES[name]
    fix = f"use one of {', '.join(SHAPES)}"
    near = nearest(name, SHAPES)
    if near:
        fix = f"did you mean --shape {near}?"
    raise UsageError(f"there is no model shape {name!r}", where="--shape", fix=fix)


def vision_of_model(repo: str) -> Mapping[str, int]:
    """Return the sizes of the vision part of a repository's model, or {} if they are unknown."""
    return SHAPE_OF_MODEL[repo].vision if repo in SHAPE_OF_MODEL else {}


def config_of_model(repo: str) -> dict[str, object] | None:
    """Return the sizes and arithmetic settings in the config.json of a repository on the Hub.

    Return None if its shape is not in the table.
    """
    shape = SHAPE_OF_MODEL.get(repo)
    return {**shape.config, **shape.models[repo]} if shape else None
