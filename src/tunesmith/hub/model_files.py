"""Reader of the small files in a model folder, which are the config, the tokenizer and the image
processor.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.schema import Model, Run
from tunesmith.host.signals import loading_libraries
from tunesmith.hub.fetch import tokenizer_folder
from tunesmith.model.arch.check_config import check_config
from tunesmith.model.arch.spec import ModelSpec, stated_position_limit
from tunesmith.model.arch.text_config import has_own_class
from tunesmith.model.arch.tokenizer import load_original_tokenizer, vocab_rows
from tunesmith.model.known.model_types import Support
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.model.weights.safetensors_files import has_weights
from tunesmith.model.weights.shipped import ShippedForm, resolve_quantize, shipped_form
from tunesmith.model.weights.shipped_entries import read_entries

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from tunesmith.tokens.text.placeholders import PictureProcessor


@dataclass(frozen=True)
class ModelFiles:
    """Contents of a model folder, except for the weights.

    Attributes:
        folder: the folder.
        model: the recipe's section `model`. `quantize: auto` is already replaced by a value.
        config: the config of the text model.
        spec: the sizes of the model.
        support: how the layers of the model can be trained. This is measured if the model type is
            not in the table of architectures.
        tokenizer: the tokenizer.
        form: the quantization of the stored weights; None if they are not quantized.
        full_config: the config of the entire vision-language model; None for a text model.
        pictures: the image processor; None without `model.vision`.
    """

    folder: Path
    model: Model
    config: "PretrainedConfig"
    spec: ModelSpec
    support: Support
    tokenizer: "PreTrainedTokenizerBase"
    form: ShippedForm | None = None
    full_config: "PretrainedConfig | None" = None
    pictures: "PictureProcessor | None" = None

    @property
    def pad_id(self) -> int:
        """Id of the padding token. Padding is neither attended to nor trained."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocab_rows(self) -> int:
        """Number of rows that the embedding and the output layer need."""
        return vocab_rows(self.config, self.tokenizer, self.model)


def read_picture_processor(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", run: Run
) -> "PictureProcessor | None":
    """Load the image processor of the model in `folder`.

    Return None if the recipe has no `model.vision`.
    """
    if not run.model.vision:
        return None
    # Import here, because these modules load torch.
    from tunesmith.model.arch.load import load_configs
    from tunesmith.tokens.text.placeholders import PictureProcessor

    _, full_config = load_configs(folder, run.model)
    assert full_config is not None, "load_configs raises an error for a text model"
    return PictureProcessor.load(folder, tokenizer, full_config, run.data.image_max_pixels)


def read_model_files(
    folder: Path, model: Model, *, image_max_pixels: int | None = None
) -> ModelFiles:
    """Read the config and the tokenizer of the model in `folder`.

    Args:
        model: the recipe's section `model`.
        image_max_pixels: the recipe's `data.image_max_pixels`.

    Raise ModelError if the files are damaged, or if the model is not supported.
    """
    with loading_libraries():
        from tunesmith.model.arch.load import load_configs  # imports torch
        from tunesmith.model.measuring.support import find_support

    where = f"{folder}/config.json"
    stated = check_config(folder, model)
    config, full_config = load_configs(folder, model, stated)
    form = shipped_form(stated, where)
    if form is not None and has_weights(folder):
        read_entries(folder)  # report damaged weight files now, and not after the rows are read
    # If Transformers has no separate class for the text model of a vision-language model, compute
    # the spec from the config of the entire model.
    described = config if full_config is None or has_own_class(config) else full_config
    spec = model_spec(
        described.to_dict(), where=str(folder), trust_remote_code=model.trust_remote_code
    )
    # Read the limit of positions from the file, because Transformers sets a default
    # max_position_embeddings if the file has none.
    limit = stated_position_limit(stated, spec.layers, where=where)
    spec = replace(spec, position_limit=limit)
    model = resolve_quantize(model, spec.quantized)
    tokenizer = load_original_tokenizer(tokenizer_folder(model, folder), model)
    pictures = None
    if full_config is not None and model.vision:
        # Import here, because these modules load image libraries.
        from tunesmith.hub.picture_support import add_vision, find_picture_support
        from tunesmith.tokens.text.placeholders import PictureProcessor

        pictures = PictureProcessor.load(folder, tokenizer, full_config, image_max_pixels)
        support = find_picture_support(full_config, pictures, tokenizer, where=where)
        spec = add_vision(spec, full_config, pictures)
    else:
        support = find_support(config, model, where=where, full_config=full_config)
    return ModelFiles(folder, model, config, spec, support, tokenizer, form, full_config, pictures)
