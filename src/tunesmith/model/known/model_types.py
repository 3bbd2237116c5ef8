"""The table model_types.json: how tunesmith trains each causal and multimodal model type.

`benchmarks/parity/families.py --write` measures all types, and `tensor_cuts.py` measures which
support tensor parallelism. The tests repeat the measurement for one type of each kind. For a model
with its own config.json, use `support.find_support`, which measures this config.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from tunesmith.config.names import suggest
from tunesmith.errors import UsageError
from tunesmith.model.known.gguf_writers import GgufWriter, gguf_writer

FILE = Path(__file__).with_suffix(".json")
# Maximum difference of logits and gradients in fp32 that counts as rounding, relative to the
# largest value. A different summation order causes at most 2e-5 for all types of Transformers
# (`make families`). The smallest real difference was 1.5e-3 (xLSTM on padded rows).
ROUNDING_TOLERANCE = 1e-4

State = Literal["tuned", "packed", "padded", "refused"]
Pictures = Literal["packed", "refused", "untried", ""]
# Layers in which a picture's tokens attend to later tokens of the same picture: no layers, all
# layers, or the layers with a sliding window.
BidirectionalPictures = Literal["", "all", "sliding"]


@dataclass(frozen=True)
class Errors:
    """The largest errors of packed or padded rows, compared with a separate run of each document.

    The errors are relative to the largest value.
    """

    logits: float
    gradients: float

    def are_rounding(self) -> bool:
        return max(self.logits, self.gradients) <= ROUNDING_TOLERANCE

    def describe(self) -> str:
        return f"logits differ by {self.logits:.1e}, gradients by {self.gradients:.1e}"


@dataclass(frozen=True)
class Support:
    """Properties of a model type that decide how tunesmith trains it.

    Attributes:
        state: "tuned": packed rows with tunesmith's own forwards; "packed": packed rows; "padded":
            one document per row; "refused": the model cannot be trained.
        why: the reason for the state, as text for the user.
        recurrent: class names of the layers that run on one document per row.
        dead_targets: names of linear layers in a decoder layer on which an adapter would get no
            gradient: other code reads their weight, for example a fused kernel, or they only
            select tokens.
        packs_eager: whether packed rows are also correct with Transformers' own attention, which
            `model.attention: eager` selects.
        errors: the measured errors of this state, or of padded rows if the model is refused.
        bidirectional_pictures: layers in which the tokens of a picture attend to each other in both
            directions.
    """

    state: State
    why: str = ""
    recurrent: tuple[str, ...] = ()
    dead_targets: tuple[str, ...] = ()
    packs_eager: bool = False
    errors: Errors | None = None
    bidirectional_pictures: BidirectionalPictures = ""


TUNED_SUPPORT = Support(
    "tuned", "tunesmith's own forwards, which tests compare with Transformers'", packs_eager=True
)


@dataclass(frozen=True)
class ModelType:
    """One model type, measured with the default config of Transformers.

    Attributes:
        text: the type of the text model if the type is multimodal, else empty.
        entire: whether Transformers has no separate class for the text model, so that the class of
            the entire model is trained.
        pictures: how the type trains with pictures. "untried" if only a run with `model.vision`
            tests this, with the files of the model. Empty if pictures are not supported.
        tensor: the largest difference, in losses and gradients, between tensor parallelism on two
            ranks and one rank. None if tensor parallelism is not supported.
        uncut: the reason why the test of tensor parallelism failed. Empty if the test passed or did
            not run.
        since: the version of Transformers with this type, if it is newer than the table's version;
            else empty.
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
        """Tool that writes the type as GGUF. Empty if the type cannot be trained or exported."""
        if self.support.state == "refused":
            return ""
        return gguf_writer(self.model_type, self.text)

    def row(self) -> dict[str, object]:
        """Return this type as one flat row, as in the table and in `tunesmith models --json`."""
        values = asdict(self)
        support = values.pop("support")
        errors = support.pop("errors") or {"logits": None, "gradients": None}
        return {"model_type": self.model_type, **support, **errors, **values}


# Keys of the table that are attributes of ModelType, not of `Support`.
TYPE_FIELDS = {field.name for field in fields(ModelType)}


def read_model_types() -> dict[str, ModelType]:
    """Return the table as a mapping from type name to ModelType."""
    types = {}
    table = json.loads(FILE.read_text(encoding="utf-8"))
    for name, values in table["types"].items():
        for key in ("recurrent", "dead_targets"):
            values[key] = tuple(values.get(key, ()))
        errors = None
        if "logits" in values:
            errors = Errors(values.pop("logits"), values.pop("gradients"))
        type_values = {key: values.pop(key) for key in TYPE_FIELDS & values.keys()}
        types[name] = ModelType(name, Support(**values, errors=errors), **type_values)
    return types


def find_model_type(name: str) -> ModelType:
    """Return the type of this name.

    If the name is unknown, raise UsageError with the most similar name.
    """
    types = read_model_types()
    if name in types:
        return types[name]
    raise UsageError(
        f"{name!r} is not a known language model type of Transformers",
        where="command line",
        fix=suggest(name, types, otherwise="run `tunesmith models`, which lists all types"),
    )


def measured_with() -> dict[str, object]:
    """Return the versions of the packages with which the table was measured."""
    versions: dict[str, object] = json.loads(FILE.read_text(encoding="utf-8"))["versions"]
    return versions
