"""The measurement of how a vision-language model trains with pictures of its own processor."""

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.config.schema import Model
from tunesmith.data.batches.batch import collate
from tunesmith.data.text.example import Example, Pixels
from tunesmith.data.text.placeholders import PictureProcessor
from tunesmith.errors import ModelError, errors_at, first_line
from tunesmith.host.files import measure_once
from tunesmith.model.decoder import find_projector, vision_parameters
from tunesmith.model.load import build_on_meta
from tunesmith.model.measured_spec import NO_SIZES
from tunesmith.model.model_types import Support
from tunesmith.model.picture_flops import count_picture_flops
from tunesmith.model.spec import ModelSpec
from tunesmith.model.support import FIRST_ID
from tunesmith.model.twin import FIRST_SPECIAL_ID, PICTURE_ID
from tunesmith.model.vision_support import PictureRow, measure_pictures

log = logging.getLogger(__name__)

PICTURE_SUPPORT_VERSION = 4  # of the cached files; what is measured, and how, counts
# Width and height of each document's pictures: small, and no two alike.
DOCUMENT_PICTURES = (((72, 48), (40, 88)), (), ((56, 64),))
TYPICAL_SIZE = (640, 480)
TEXT_AROUND = 9  # tokens before a document's first picture, and after each


@dataclass
class ReadyPixels:
    """The pictures of an example whose pixels are there."""

    token_id: int
    ready: Pixels

    def begin(self) -> None:
        """Do nothing."""

    def pixels(self) -> Pixels:
        return self.ready


def _sizes_of(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a config without those that are no sizes."""
    return {name: value for name, value in config.to_dict().items() if name not in NO_SIZES}


def find_picture_support(
    whole: PretrainedConfig,
    processor: PictureProcessor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
) -> Support:
    """Find how a vision-language model trains with pictures, from its config, which errors call
    `where`, or from the disk; ModelError for one that is refused, with the figures.
    """
    sizes = _sizes_of(whole)
    versions = [version("transformers"), version("torch")]
    key = [PICTURE_SUPPORT_VERSION, *versions, processor.digest, sizes]
    with errors_at(where):
        support = measure_once(
            "support",
            key,
            lambda: measure_pictures(whole, make_picture_row(processor, tokenizer)),
            Support,
        )
    if support.state == "refused":
        raise ModelError(
            f"{whole.model_type} does not train with pictures here",
            where=where,
            why=support.why,
            fix="train its text model alone: model.vision=false; or use another model",
        )
    return support


@dataclass(frozen=True)
class VisionSize:
    """The parameters of a model's vision part, and its operations on a picture of TYPICAL_SIZE.

    Attributes:
        projector: those of the parameters that `model.train_projector` trains.
        flops: 0 where they could not be counted.
    """

    parameters: int
    projector: int
    flops: int


def add_vision(spec: ModelSpec, whole: PretrainedConfig, processor: PictureProcessor) -> ModelSpec:
    """The spec with the sizes of the vision part, and of what it is given."""
    pixels = processor.pixels([Image.new("RGB", TYPICAL_SIZE)])

    def measure() -> VisionSize:
        stated = Model(name=whole.model_type, dtype="fp32", vision=True)
        model = build_on_meta(whole.get_text_config(), stated, whole=whole)
        parameters = sum(parameter.numel() for _, parameter in vision_parameters(model))
        projector = 0
        for name in find_projector(model):
            projector += sum(p.numel() for p in model.get_submodule(name).parameters())
        try:
            inputs = {name: torch.from_numpy(array) for name, array in pixels.inputs.items()}
            return VisionSize(parameters, projector, count_picture_flops(model, inputs))
        # Code of 90 model types, for a figure that a run can do without.
        except Exception as error:
            log.warning(f"the operations of the vision part are not counted: {first_line(error)}")
            return VisionSize(parameters, projector, 0)

    key = [PICTURE_SUPPORT_VERSION, version("transformers"), processor.digest, _sizes_of(whole)]
    size = measure_once("specs", key, measure, VisionSize)
    given = sum(array.nbytes for array in pixels.inputs.values())
    tokens = processor.count_tokens(TYPICAL_SIZE)
    return replace(
        spec,
        vision_parameters=size.parameters,
        projector_parameters=size.projector,
        picture_bytes=given // tokens,
        picture_flops=size.flops // tokens,
    )


def make_picture_row(processor: PictureProcessor, tokenizer: PreTrainedTokenizerBase) -> PictureRow:
    """Make documents with pictures of noise, as a twin takes them."""
    random = np.random.default_rng(0)
    examples = []
    for sizes in DOCUMENT_PICTURES:
        runs = [np.zeros(TEXT_AROUND, bool)]
        for text in processor.expand(sizes) if sizes else ():
            tokens = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
            runs += [tokens == processor.token_id, np.zeros(TEXT_AROUND, bool)]
        is_picture = np.concatenate(runs)
        ids = random.integers(FIRST_ID, FIRST_SPECIAL_ID, len(is_picture)).astype(np.int32)
        ids[is_picture] = PICTURE_ID
        pictures = None
        if sizes:
            noise = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
            pixels = processor.pixels([Image.fromarray(values) for values in noise])
            pictures = ReadyPixels(PICTURE_ID, pixels)
        examples.append(Example(ids, np.ones(len(ids), bool), pictures=pictures))
    lengths = tuple(len(example.ids) for example in examples)
    batch = collate([examples], length=sum(lengths), pad_id=0)
    alone = []
    for example in examples:
        inputs = example.pictures.pixels().inputs if example.pictures else {}
        alone.append({name: torch.from_numpy(array) for name, array in inputs.items()})
    return PictureRow(
        batch.input_ids[0], batch.position_ids, lengths, batch.spans, batch.pictures, tuple(alone)
    )
