"""The true shapes of a few open models, in shapes.json: what their config.json says of size and
arithmetic.

Token ids are left out: they depend on the tokenizer. `mistral-7b` is version 0.3, which has no
sliding window. If Transformers has a class of the text model, a checkpoint with images is the text
model's part here. Where no copy of the file
itself was at hand, the values are those that libraries give for the model; the recipes name them,
and the parameters they make are the published ones. The models of all recipes that ship are among
them, so that a run of one is planned without the Hub.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """One model's shape.

    Attributes:
        source: the repository of its config.json.
        config: the values of that file.
        models: repositories of this shape, each with what its config.json says beyond `config`.
        vision: of the vision part that is there too, by their names in `ModelSpec`.
    """

    source: str
    config: Mapping[str, object]
    models: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    vision: Mapping[str, int] = field(default_factory=dict)


_SHAPE_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SHAPES: dict[str, Shape] = {name: Shape(**values) for name, values in _SHAPE_TABLE.items()}


def find_shape(name: str) -> Shape:
    """A shape by its name; UsageError with the nearest one if there is none of that name."""
    if name in SHAPES:
        return SHAPES[name]
    fix = f"one of {', '.join(SHAPES)}"
    near = nearest(name, SHAPES)
    if near:
        fix = f"did you mean --shape {near}?"
    raise UsageError(f"there is no shape {name!r}", where="--shape", fix=fix)


def vision_of_model(repo: str) -> Mapping[str, int]:
    """Return the sizes of the vision part of a repository's model; none where they are not here."""
    for shape in SHAPES.values():
        if repo in shape.models:
            return shape.vision
    return {}


def config_of_model(repo: str) -> dict[str, object] | None:
    """Return what the config.json of a repository of the Hub says of size and arithmetic.

    None where its shape is not here.
    """
    for shape in SHAPES.values():
        if repo in shape.models:
            return {**shape.config, **shape.models[repo]}
    return None
