"""The facts that a model's folder tells about it, read once."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.config.schema import Model, Run
from tunesmith.hub.fetch import tokenizer_folder
from tunesmith.model import load
from tunesmith.model.gguf_writers import describe_gguf_export
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.names import has_own_class
from tunesmith.model.safetensors_files import has_weights, read_json
from tunesmith.model.shipped import ShippedForm, form_of_folder, resolve_quantize
from tunesmith.model.shipped_entries import read_entries
from tunesmith.model.spec import ModelSpec, stated_position_limit
from tunesmith.model.support import Support, find_support
from tunesmith.model.tokenizer import load_tokenizer, vocab_rows

if TYPE_CHECKING:
    from tunesmith.data.text.placeholders import PictureProcessor


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder and what was read from it; the weights stay on the disk."""

    folder: Path
    model: Model  # without `quantize: auto`
    config: PretrainedConfig
    spec: ModelSpec
    support: Support  # how its layers train, by measurement where the table has no row for them
    tokenizer: PreTrainedTokenizerBase
    form: ShippedForm | None = None  # of weights that ship in codes
    # The config of the entire model that `config` is the text part of.
    whole: PretrainedConfig | None = None
    pictures: "PictureProcessor | None" = None  # with `model.vision`

    @property
    def pad_id(self) -> int:
        """The token that fills rows; never attended to nor trained."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocab_rows(self) -> int:
        """Rows that embedding and head need."""
        return vocab_rows(self.config, self.tokenizer, self.model)

    def describe(self) -> list[str]:
        """Lines for the user: how the base ships, where that is in codes, where tokenizer and
        embedding differ in size, and whether the model can be exported as GGUF.
        """
        entire = self.config if self.whole is None else self.whole
        gguf = describe_gguf_export(entire.model_type, self.config.model_type)
        return [*self._describe_form(), *self._describe_rows(), f"GGUF: {gguf}"]

    def _describe_form(self) -> list[str]:
        if self.form is None:
            return []
        use = {
            "as-shipped": "kept quantized, and dequantized for one matmul at a time",
            "none": f"dequantized to {self.model.dtype} while loading",
        }.get(
            self.model.quantize,
            f"dequantized, and quantized to {self.model.quantize}, while loading",
        )
        return [f"the base ships in {self.form.describe()}: {use}"]

    def _describe_rows(self) -> list[str]:
        embedding_rows = int(self.config.vocab_size)
        tokens = len(self.tokenizer)
        if tokens <= embedding_rows:
            return []
        sizes = (
            f"the tokenizer has {tokens:,} tokens, "
            f"and the model's embedding {embedding_rows:,} rows"
        )
        if self.model.added_tokens:
            names = ", ".join(self.model.added_tokens)
            return [f"{sizes}: rows are added for {names}, each the mean of the others"]
        return [
            f"warning: {sizes}: text with a token beyond them is an error; "
            "add rows with model.added_tokens"
        ]


def read_picture_processor(
    folder: Path, tokenizer: PreTrainedTokenizerBase, run: Run
) -> "PictureProcessor | None":
    """The processor of a recipe's pictures, by the model in `folder`; None without
    `model.vision`.
    """
    _, whole = load.load_configs(folder, run.model)
    if whole is None or not run.model.vision:
        return None
    # It loads torch.
    from tunesmith.data.text.placeholders import PictureProcessor

    return PictureProcessor.load(folder, tokenizer, whole, run.data.image_max_pixels)


def read_model_files(
    folder: Path, model: Model, *, image_max_pixels: int | None = None
) -> ModelFiles:
    """Read config and tokenizer of the model in `folder`, as the recipe's `model` block wants them,
    or ModelError.

    image_max_pixels: as `data.image_max_pixels`.
    """
    config, whole = load.load_configs(folder, model)
    file = folder / "config.json"
    form = form_of_folder(folder)
    if form is not None and has_weights(folder):
        read_entries(folder)  # what is torn is said now, and not after the rows are read
    # Where the text part has no class of its own, the whole says what it is.
    described = config if whole is None or has_own_class(config) else whole
    spec = model_spec(
        described.to_dict(), where=str(folder), trust_remote_code=model.trust_remote_code
    )
    # Transformers fills in max_position_embeddings where the file has none.
    limit = stated_position_limit(read_json(file), spec.layers, where=str(file))
    spec = replace(spec, position_limit=limit)
    model = resolve_quantize(model, spec)
    tokenizer = load_tokenizer(tokenizer_folder(model, folder), model)
    if whole is None or not model.vision:
        support = find_support(config, model, where=str(file), whole=whole)
        return ModelFiles(folder, model, config, spec, support, tokenizer, form, whole)
    # With them come libraries for pictures.
    from tunesmith.data.text.placeholders import PictureProcessor
    from tunesmith.hub.picture_support import add_vision, find_picture_support

    pictures = PictureProcessor.load(folder, tokenizer, whole, image_max_pixels)
    support = find_picture_support(whole, pictures, tokenizer, where=str(file))
    spec = add_vision(spec, whole, pictures)
    return ModelFiles(folder, model, config, spec, support, tokenizer, form, whole, pictures)
