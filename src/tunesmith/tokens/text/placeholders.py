"""Conversion of pictures to placeholder tokens in the text and arrays for the vision model.

A processor of Transformers computes both. The placeholder tokens of a picture depend only on its
width and height. Therefore they are computed from a blank picture of the same size.

The processor is built without torchvision and without a video processor, because pictures need
neither.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import transformers
from packaging.version import Version
from PIL import Image
from transformers import (
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.host.files import check_regular_files
from tunesmith.tokens.text.example import Pixels

# Width and height of a picture, in pixels.
Size = tuple[int, int]

_FIX = "set model.vision=false to train only the text model, or use another model"
_REPLACED = "text_replacement_offsets"
# Outputs of a processor that are about the text. The other outputs are arrays for the vision model.
_TEXT_OUTPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", _REPLACED}
# First release of Transformers whose models accept precomputed image features
# (`mm_encoder_outputs`).
_MIN_TRANSFORMERS = "5.18"
# Maximum number of rows whose placeholder texts are cached. The limit saves memory, because the
# text of one row may have 100 KB.
_MAX_CACHED_TEXTS = 512
# Size of a test picture. All processors split a picture of this size into the same number of parts.
_PROBE_SIZE = (640, 480)


class _Pixtral(ProcessorMixin):
    """Replacement for Transformers' PixtralProcessor, because that class requires torchvision
    without using it.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.cell = patch_size * spatial_merge_size
        image_processor.patch_size = {"height": self.cell, "width": self.cell}
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        row = self.image_token * int(width // self.cell) + self.image_break_token
        rows = row * int(height // self.cell)
        return rows.removesuffix(self.image_break_token) + self.image_end_token


class PictureProcessor:
    """Converter of pictures to placeholder texts and arrays.

    The pictures must already be rotated, scaled down and converted to RGB.

    Args:
        kind: the processor's class.
        image_processor, tokenizer: parts of the processor. The processor adds tokens to the
            tokenizer, so no other object may use this tokenizer.
        settings: the other values of processor_config.json.
        token_id: id of the token that the model replaces by image features.
        max_pixels: `data.image_max_pixels`. Larger pictures were scaled down to it.

    Attributes:
        placeholder: the text that a chat template writes for a picture.
        token: the token with the id `token_id`.
        tokens, ids: texts and ids of all special tokens that represent a picture or a part of a
            picture.
        digest: sha256 (hex) of all settings that determine the texts and arrays of a given picture.
    """

    def __init__(
        self,
        kind: type[ProcessorMixin],
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        token_id: int,
        max_pixels: int | None,
    ) -> None:
        self._arguments = (kind, image_processor, tokenizer, settings, token_id, max_pixels)
        # Disable the check of the arguments in `kind`, because it requires processors for audio and
        # video.
        changes = {"check_argument_for_proper_class": lambda *_: None}
        unchecked: type[ProcessorMixin] = type(kind.__name__, (kind,), changes)
        parts = {"image_processor": image_processor, "tokenizer": tokenizer}
        arguments = [parts.get(name) for name in unchecked.get_attributes()]
        self._processor = unchecked.from_args_and_dict(arguments, settings)
        self.placeholder: str = self._processor.image_token
        self.chat_template: str | None = settings.get("chat_template")
        self.token_id = token_id
        self.token = str(tokenizer.convert_ids_to_tokens(token_id))
        self.max_pixels = max_pixels
        self.expand = lru_cache(_MAX_CACHED_TEXTS)(self._expand)
        about = json.dumps([self._processor.to_json_string(), max_pixels, transformers.__version__])
        self.digest = hashlib.sha256(about.encode()).hexdigest()
        [text] = self.expand((_PROBE_SIZE,))
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        # Exclude white space. Gemma 3 writes line breaks around a picture, which are added tokens
        # but also occur in ordinary texts.
        in_text = [token for token in added if token in text and not token.isspace()]
        self.tokens = tuple(dict.fromkeys([self.placeholder, *in_text]))
        self.ids = np.array(tokenizer.convert_tokens_to_ids(list(self.tokens)), np.int32)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Pickle only the arguments. The process that unpickles them builds a new processor."""
        return type(self), self._arguments

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        full_config: PretrainedConfig,
        max_pixels: int | None,
    ) -> Self:
        """Load the processor in a model's folder.

        Args:
            tokenizer: the tokenizer of the recipe.
            full_config: the config of the entire vision-language model, not the config of its text
            model.

        Raises:
            ModelError: the folder has no processor, or Transformers cannot build it.
            MachineError: the models of this version of Transformers do not accept image features.
        """
        if Version(transformers.__version__) < Version(_MIN_TRANSFORMERS):
            raise MachineError(
                f"training with pictures needs Transformers {_MIN_TRANSFORMERS} or later",
                where="model.vision",
                why=f"{transformers.__version__} is installed, and its models do not accept "
                "image features",
                fix=f"run `pip install 'transformers>={_MIN_TRANSFORMERS},<6'`, or set "
                "model.vision=false",
                cause="version",
            )
        check_regular_files(folder)
        what = "the model's picture processor"
        try:
            kind = _find_class(folder, full_config)
            what = kind.__name__
            settings, _ = kind.get_processor_dict(folder)
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            processor = cls(
                kind,
                image_processor,
                # Copy the tokenizer, because a processor may add tokens, and the recipe's tokenizer
                # must not change.
                copy.deepcopy(tokenizer),
                settings,
                int(full_config.image_token_id),
                max_pixels,
            )
        # Processors raise many types of exceptions if parts do not match or packages are missing.
        except Exception as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"{what} cannot be loaded", where=folder, why=first_line(error), fix=_FIX
            ) from error
        [text] = processor.expand((_PROBE_SIZE,))
        if processor.token not in text:
            raise ModelError(
                f"{kind.__name__} does not insert the image token {processor.token} for a picture",
                where=folder,
                why="image_token_id in config.json is the id of this token, but the processor"
                f" inserts {text[:40]!r}",
                fix="use the tokenizer, the processor and the config of the same model",
            )
        if image_processor.to_dict().get("do_pan_and_scan"):
            raise ModelError(
                "splitting pictures into crops (do_pan_and_scan) is not supported",
                where=folder / "preprocessor_config.json",
                fix="set do_pan_and_scan to false in this file",
            )
        return processor

    def _expand(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """Return the placeholder text of each picture of a row, given the sizes of the pictures."""
        blank = [Image.new("RGB", size) for size in sizes]
        # Skip the rescaling and normalization, because the texts do not depend on the pixels.
        output = self._process(blank, do_rescale=False, do_normalize=False)
        return tuple(replaced["replacement"] for replaced in output[_REPLACED][0])

    def count_tokens(self, size: Size) -> int:
        """Count the placeholder tokens of a picture of this size in a row without other
        pictures.
        """
        [text] = self.expand((size,))
        return text.count(self.token)

    def pixels(self, pictures: Sequence[Image.Image]) -> Pixels:
        """Compute the arrays of one row's pictures."""
        inputs = {}
        for name, values in self._process(pictures).items():
            if name not in _TEXT_OUTPUTS:
                inputs[name] = np.asarray(values)
        grids = np.zeros((0, 2), np.int64)
        if "image_grid_thw" in inputs:
            grids = inputs["image_grid_thw"][:, 1:] // self._processor.image_processor.merge_size
        return Pixels(inputs, grids)

    def _process(self, pictures: Sequence[Image.Image], **settings: Any) -> Any:
        return self._processor(
            images=[list(pictures)],
            text=[self.placeholder * len(pictures)],
            return_text_replacement_offsets=True,
            return_tensors="np",
            **settings,
        )


def _find_class(folder: Path, full_config: PretrainedConfig) -> type[ProcessorMixin]:
    """Return the processor class that the model's files name, or the class for its model type."""
    name = ""
    if type(full_config) in PROCESSOR_MAPPING:
        name = PROCESSOR_MAPPING[type(full_config)].__name__
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            stated = json.loads((folder / file).read_text(encoding="utf-8"))
            name = stated.get("processor_class", name)
    kind = _Pixtral if name == "PixtralProcessor" else getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, ProcessorMixin):
        return kind
    raise ModelError(
        f"there is no processor for the pictures of this {full_config.model_type}",
        where=folder,
        why=f"its class is {name or 'unknown'}; Transformers does not have this class, or the class"
        " needs a package that is not installed",
        fix=_FIX,
    )
