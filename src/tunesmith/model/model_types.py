"""The table of how every causal and multimodal model type of Transformers trains here.

It is in model_types.json.

`benchmarks/parity/families.py --write` measures them all, and `tensor_cuts.py` whether ranks can
share their layers; tests measure one of each kind again.
Of a model with a config.json at hand `support.find_support` says it for that very config.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from tunesmith.config.names import nearest
from tunesmith.errors import UsageError
from tunesmith.model.gguf_writers import GgufWriter, gguf_writer

FILE = Path(__file__).with_suffix(".json")
# Differences of logits and gradients in fp32, relative to the largest value. Sums in another order
# differ by 2e-5 at most over all types of Transformers (`make families`); the least that was more
# than rounding, xLSTM on padded rows, by 1.5e-3.
ROUNDING_TOLERANCE = 1e-4

State = Literal["tuned", "packed", "padded", "refused"]
Pictures = Literal["packed", "refused", "untried", ""]
# Layers in which a picture's tokens see those behind them, up to its end: none, all, those with a
# window.
BothWays = Literal["", "all", "sliding"]


@dataclass(frozen=True)
class Errors:
    """The largest differences from each document alone, relative to the largest value."""

    logits: float
    gradients: float

    def are_rounding(self) -> bool:
        return max(self.logits, self.gradients) <= ROUNDING_TOLERANCE

    def describe(self) -> str:
        return f"logits differ by {self.logits:.1e}, gradients by {self.gradients:.1e}"


@dataclass(frozen=True)
class Support:
    """The way in which a model trains.

    Attributes:
        state: "tuned": packed, by the forwards that this engine has written; "packed": documents
            share rows; "padded": one document a row; "refused": not at all.
        why: the reason, for the user.
        recurrent: class names of the layers that run on one row a document.
        dead_targets: names of linear layers, within a decoder layer, whose weight is read past
            their forward, here or by a fused kernel: an adapter there would get no gradient.
        packs_eager: whether packed rows are each document alone under Transformers' own attention
            too, which `model.attention: eager` selects.
        errors: of the layout in use, or of padded rows where none is.
        both_ways: layers in which a picture's tokens see those behind them, up to its end.
    """

    state: State
    why: str = ""
    recurrent: tuple[str, ...] = ()
    dead_targets: tuple[str, ...] = ()
    packs_eager: bool = False
    errors: Errors | None = None
    both_ways: BothWays = ""

    def describe(self) -> list[str]:
        """Lines for the user where a model trains otherwise than one that this engine is tuned
        for.
        """
        if self.state == "padded":
            return [f"warning: {self.why}; it is slower than packed rows"]
        if self.recurrent:
            return [
                f"{', '.join(self.recurrent)}: recurrent layers run on one row a document, "
                "padded to a common length"
            ]
        return []


@dataclass(frozen=True)
class ModelType:
    """One type, on the config that Transformers gives it.

    Attributes:
        text: the type of its text model, where it is a composite; else empty.
        entire: whether its text model has no class of its own in Transformers, so that the class of
            the entire model is trained.
        pictures: how it trains with pictures; "untried" if that is measured on a model's own folder
            alone, and empty if it takes none.
        tensor: the largest difference, in losses and gradients, of two ranks that compute each
            layer together from one; None where its layers are not cut.
        uncut: why they are not, of a type that was tried; else empty.
        since: the Transformers that it was measured with, of one that is not in the release that
            the table names; else empty.
    """

    model_type: str
    support: Support
    text: str = ""
    entire: bool = False
    pictures: Pictures = ""
    tensor: float | None = None
    uncut: str = ""
    since: str = ""

    @property
    def gguf(self) -> GgufWriter:
        """The writer of the type as GGUF; empty if it cannot be trained or exported."""
        if self.support.state == "refused":
            return ""
        return gguf_writer(self.model_type, self.text)

    def row(self) -> dict[str, object]:
        """Return the row that the table and `tunesmith models --json` have of it, in one level."""
        values = asdict(self)
        support = values.pop("support")
        errors = support.pop("errors") or {"logits": None, "gradients": None}
        return {"model_type": self.model_type, **support, **errors, **values}


# Keys of the table that are not of `Support`.
OF_TYPE = {field.name for field in fields(ModelType)}


def read_model_types(file: Path = FILE) -> dict[str, ModelType]:
    """The table, by the name of the type."""
    types = {}
    for name, values in json.loads(file.read_text(encoding="utf-8"))["types"].items():
        for key in ("recurrent", "dead_targets"):
            values[key] = tuple(values.get(key, ()))
        errors = None
        if "logits" in values:
            errors = Errors(values.pop("logits"), values.pop("gradients"))
        rest = {key: values.pop(key) for key in OF_TYPE & values.keys()}
        types[name] = ModelType(name, Support(**values, errors=errors), **rest)
    return types


def find_model_type(name: str) -> ModelType:
    """One type; UsageError with the nearest one if there is none of that name."""
    types = read_model_types()
    if name in types:
        return types[name]
    near = nearest(name, types)
    raise UsageError(
        f"Transformers has no language model type {name!r} that is known",
        where="command line",
        fix=f"did you mean {near}?" if near else "tunesmith models",
    )


def measured_with() -> dict[str, object]:
    """The versions that the table was measured with."""
    versions: dict[str, object] = json.loads(FILE.read_text(encoding="utf-8"))["versions"]
    return versions
