"""Measurement of how a vision-language model can be trained with pictures."""

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tunesmith.batches.batch import collate
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, errors_at, first_line
from tunesmith.host.files import measure_once
from tunesmith.model.arch.load import build_on_meta
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.known.decoder import find_projector, vision_parameters
from tunesmith.model.known.model_types import Support
from tunesmith.model.measuring.measured_spec import without_labels
from tunesmith.model.measuring.picture_flops import count_picture_flops
from tunesmith.model.measuring.support import FIRST_ID
from tunesmith.model.measuring.tiny_model import FIRST_SPECIAL_ID, PICTURE_ID
from tunesmith.model.measuring.vision_support import PictureRow, measure_pictures
from tunesmith.tokens.text.example import Example, Pixels
from tunesmith.tokens.text.placeholders import PictureProcessor

log = logging.getLogger(__name__)

# Version of the cached results. Increase it if the measurement changes.
PICTURE_SUPPORT_VERSION = 5
# Width and height of the pictures in each test document. The pictures are small and have different
# sizes. The second document has no picture.
DOCUMENT_PICTURES = (((72, 48), (40, 88)), (), ((56, 64),))
TYPICAL_SIZE = (640, 480)
# Number of text tokens before the first picture of a document, and after each picture.
TEXT_AROUND = 9


@dataclass
class ReadyPixels:
    """The pictures of an example, with pixels that are already computed."""

    token_id: int
    ready: Pixels

    def begin(self) -> None:
        """Do nothing, because the pixels are already computed."""

    def pixels(self) -> Pixels:
        return self.ready


def find_picture_support(
    full_config: PretrainedConfig,
    processor: PictureProcessor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str,
) -> Support:
    """Measure how a vision-language model can be trained with pictures. Results are cached on disk.

    Args:
        full_config: the config of the entire model.
        where: the path of the config, for error messages.

    Raise ModelError if the model cannot be trained with pictures. The error gives the measured
    values.
    """
    sizes = without_labels(full_config.to_dict())
    versions = [version("transformers"), version("torch")]
    key = [PICTURE_SUPPORT_VERSION, *versions, processor.digest, sizes]
    with errors_at(where):
        support = measure_once(
            "support",
            key,
            lambda: measure_pictures(full_config, make_picture_row(processor, tokenizer)),
            Support,
        )
    if support.state == "refused":
        raise ModelError(
            f"{full_config.model_type} cannot be trained with pictures in this environment",
            where=where,
            why=support.why,
            fix="train only the text model with model.vision=false, or use another model",
        )
    return support


@dataclass(frozen=True)
class VisionSize:
    """Size of a model's vision encoder.

    Attributes:
        parameters: number of all parameters, including the projector.
        projector: number of the parameters that `model.train_projector` trains.
        flops: floating-point operations for a picture of TYPICAL_SIZE; 0 if they could not be
            counted.
    """

    parameters: int
    projector: int
    flops: int


def add_vision(
    spec: ModelSpec, full_config: PretrainedConfig, processor: PictureProcessor
) -> ModelSpec:
    """Return a copy of the spec with the sizes of the vision encoder and of its inputs."""
    pixels = processor.pixels([Image.new("RGB", TYPICAL_SIZE)])

    def measure() -> VisionSize:
        stated = Model(name=full_config.model_type, dtype="fp32", vision=True)
        model = build_on_meta(full_config.get_text_config(), stated, full_config=full_config)
        parameters = sum(parameter.numel() for _, parameter in vision_parameters(model))
        modules = [model.get_submodule(name) for name in find_projector(model)]
        projector = sum(p.numel() for module in modules for p in module.parameters())
        try:
            inputs = {name: torch.from_numpy(array) for name, array in pixels.inputs.items()}
            return VisionSize(parameters, projector, count_picture_flops(model, inputs))
        # Catch any error, because this runs the code of 90 model types, and a run does not need the
        # number of FLOPs.
        except Exception as error:
            log.warning(
                "MFU does not include the vision encoder, because its operations cannot be "
                f"counted: {first_line(error)}"
            )
            return VisionSize(parameters, projector, 0)

    key = [
        PICTURE_SUPPORT_VERSION,
        version("transformers"),
        processor.digest,
        without_labels(full_config.to_dict()),
    ]
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
    """Build test documents with random tokens and noise pictures, for the tiny test model."""
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
    inputs_by_document = []
    for example in examples:
        inputs = example.pictures.pixels().inputs if example.pictures else {}
        inputs_by_document.append({name: torch.from_numpy(array) for name, array in inputs.items()})
    return PictureRow(
        batch.input_ids[0],
        batch.position_ids,
        lengths,
        batch.spans,
        batch.pictures,
        tuple(inputs_by_document),
    )
