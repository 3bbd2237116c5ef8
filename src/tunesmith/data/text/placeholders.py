"""Pictures as a model takes them: placeholder tokens in the text, and arrays for its vision part.

Both come from one processor of Transformers. The tokens of a picture depend only on its width and
height, so they are those of a blank picture of the same size.

The processor's class is asked for neither torchvision nor a video processor: pictures need none.
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

from tunesmith.data.text.example import Pixels
from tunesmith.errors import MachineError, ModelError, first_line
from tunesmith.host.files import check_regular_files

# Width and height of a picture, in pixels.
Size = tuple[int, int]

_FIX = "train its text model alone: model.vision=false; or use another model"
# What a processor returns of the text.
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
_REPLACED = "text_replacement_offsets"
# The first release whose models take the features of pictures, as `mm_encoder_outputs`.
_MIN_TRANSFORMERS = "5.18"
# Rows of pictures of other sizes whose texts are kept; one may have 100 KB.
_KEPT_TEXTS = 512
# One that every processor cuts into as many parts as it does.
_PROBE_SIZE = (640, 480)


class _Pixtral(ProcessorMixin):
    """Transformers' class of the same form, which asks for torchvision and needs none."""

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
    """Makes placeholders and arrays of pictures that are rotated, scaled and RGB.

    Args:
        kind: the processor's class.
        image_processor, tokenizer: its parts; it adds tokens to the tokenizer, which is its own.
        settings: what processor_config.json has beside them.
        token_id: of the tokens that a model replaces by a picture's features.
        max_pixels: `data.image_max_pixels`, to which larger pictures were scaled.

    Attributes:
        placeholder: what a chat template writes for a picture.
        token: the token of `token_id`.
        tokens, ids: all special tokens that stand for a picture or a part of it.
        digest: sha256 (hex) of all that its texts and arrays depend on beside pictures.
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
        # The parts that a class wants are those of its argument check: audio, video.
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
        self.expand = lru_cache(_KEPT_TEXTS)(self._expand)
        about = [self._processor.to_json_string(), max_pixels, transformers.__version__]
        self.digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        [text] = self.expand((_PROBE_SIZE,))
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        # Gemma 3's line breaks around a picture are added tokens too.
        found = [token for token in added if token in text and not token.isspace()]
        self.tokens = tuple(dict.fromkeys([self.placeholder, *found]))
        self.ids = np.array(tokenizer.convert_tokens_to_ids(list(self.tokens)), np.int32)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Its class is made anew in another process."""
        return type(self), self._arguments

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        whole: PretrainedConfig,
        max_pixels: int | None,
    ) -> Self:
        """The processor of a model's folder.

        Args:
            tokenizer: the recipe's.
            whole: the config of the vision-language model, not that of its text part.

        Raises:
            ModelError: the folder has none, or Transformers cannot build it.
            MachineError: Transformers is too old for models that take features of pictures.
        """
        if Version(transformers.__version__) < Version(_MIN_TRANSFORMERS):
            raise MachineError(
                f"pictures need Transformers {_MIN_TRANSFORMERS}",
                where="model.vision",
                why=f"{transformers.__version__} is installed, whose models do not take the "
                "features of pictures",
                fix=f"pip install 'transformers>={_MIN_TRANSFORMERS},<6', or model.vision=false",
                cause="version",
            )
        check_regular_files(folder)
        what = "the model's processor of pictures"
        try:
            kind = _find_class(folder, whole)
            what = kind.__name__
            settings, _ = kind.get_processor_dict(folder)
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
            processor = cls(
                kind,
                image_processor,
                # A processor may add tokens: the recipe's tokenizer stays as it is.
                copy.deepcopy(tokenizer),
                settings,
                int(whole.image_token_id),
                max_pixels,
            )
        # What does not fit together, or is not installed, ends in any of many kinds.
        except Exception as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"{what} cannot be built", where=str(folder), why=first_line(error), fix=_FIX
            ) from error
        [text] = processor.expand((_PROBE_SIZE,))
        if processor.token not in text:
            raise ModelError(
                f"{kind.__name__} writes no {processor.token} for a picture",
                where=str(folder),
                why=f"image_token_id in config.json is its id, and {text[:40]!r} has none",
                fix="use tokenizer, processor and config of one model",
            )
        if image_processor.to_dict().get("do_pan_and_scan"):
            raise ModelError(
                "pictures are not cut into crops (do_pan_and_scan)",
                where=str(folder / "preprocessor_config.json"),
                fix="write false there",
            )
        return processor

    def _expand(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """The texts that take the places of a row's placeholders, for pictures of these sizes."""
        blank = [Image.new("RGB", size) for size in sizes]
        # The texts are the same without the arithmetic on each pixel.
        output = self._process(blank, do_rescale=False, do_normalize=False)
        return tuple(replaced["replacement"] for replaced in output[_REPLACED][0])

    def count_tokens(self, size: Size) -> int:
        """Count the placeholders of a picture that is alone in its row."""
        [text] = self.expand((size,))
        return text.count(self.token)

    def pixels(self, pictures: Sequence[Image.Image]) -> Pixels:
        """The arrays of one row's pictures."""
        output = self._process(pictures)
        inputs = {}
        for name, values in output.items():
            if name not in _OF_TEXT and name != _REPLACED:
                inputs[name] = np.asarray(values)
        grids = np.zeros((0, 2), np.int64)
        if "image_grid_thw" in inputs:
            grids = inputs["image_grid_thw"][:, 1:] // self._processor.image_processor.merge_size
        return Pixels(inputs, grids)

    def _process(self, pictures: Sequence[Image.Image], **settings: Any) -> Any:
        text = self.placeholder * len(pictures)
        return self._processor(
            images=[list(pictures)],
            text=[text],
            return_text_replacement_offsets=True,
            return_tensors="np",
            **settings,
        )


def _find_class(folder: Path, whole: PretrainedConfig) -> type[ProcessorMixin]:
    """The class that a model's files name, else that of its type."""
    name = PROCESSOR_MAPPING[type(whole)].__name__ if type(whole) in PROCESSOR_MAPPING else ""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            stated = json.loads((folder / file).read_text(encoding="utf-8"))
            name = stated.get("processor_class", name)
    kind = _Pixtral if name == "PixtralProcessor" else getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, ProcessorMixin):
        return kind
    raise ModelError(
        f"there is no processor for the pictures of this {whole.model_type}",
        where=str(folder),
        why=f"Transformers has none ({name or 'no file names one'}), or it needs a package that is"
        " not installed",
        fix=_FIX,
    )
