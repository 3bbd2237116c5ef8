"""Stage 2 of a start: read the small files of the model. No weights are downloaded or read.

For the model types of `architectures.py`, this stage imports no torch from the second start.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.schema import Run
from tunesmith.hub import fetch
from tunesmith.hub.model_files import read_model_files
from tunesmith.model.arch.check_config import check_config
from tunesmith.model.arch.config_facts import read_config_facts
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.arch.tokenizer import load_tokenizer, vocab_rows
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.known.model_types import TUNED_SUPPORT, Support
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.model.weights.shipped import resolve_quantize
from tunesmith.planning.run_plan import fit_to_model
from tunesmith.start.rows import RowFacts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.tokens.text.placeholders import PictureProcessor


@dataclass(frozen=True)
class ModelFacts:
    """The small files of a model: config, tokenizer and image processor.

    Attributes:
        recipe: the recipe that config.yaml stores. `auto` in its model section is replaced,
            except for the dtype, which depends on the machine.
        run: the recipe for training, with all values adapted to the model.
        folder: the folder with the config and the tokenizer.
        support: how the layers of the model can be trained.
        vocab_rows: number of rows of the embedding.
        pictures: the image processor; None without `model.vision`.
    """

    rows: RowFacts
    recipe: Run
    run: Run
    folder: Path
    spec: ModelSpec
    support: Support
    tokenizer: "PreTrainedTokenizerBase"
    vocab_rows: int
    pictures: "PictureProcessor | None" = None


def read_model(
    rows: RowFacts,
    *,
    is_draft: bool = False,
    known: ModelFacts | None = None,
) -> ModelFacts:
    """Read the config and the tokenizer of the recipe's model. Download missing files.

    Args:
        is_draft: whether `data.seq_len` is not chosen yet, so that it is not compared with the
            model's context.
        known: facts of the model. They are used if they are from the same model.

    Raises:
        ModelError: the files are missing or damaged, or the model is not supported.
        RecipeError: the model does not support the recipe.
    """
    run = rows.run
    files = known
    if files is None or (files.rows.run.model, files.rows.run.data.image_max_pixels) != (
        run.model,
        run.data.image_max_pixels,
    ):
        files = _read_files(rows)
    recipe = replace(run, model=resolve_quantize(run.model, files.spec.quantized))
    fitted = fit_to_model(
        recipe,
        files.spec,
        files.support,
        where=f"{files.folder}/config.json",
        # The rows of a resumed run were already truncated to a length that the model supports.
        checks_length=not is_draft and rows.request.start.checkpoint is None,
    )
    return replace(files, rows=rows, recipe=recipe, run=fitted)


def _read_files(rows: RowFacts) -> ModelFacts:
    """Return the facts of the model, with the recipe as it is."""
    run = rows.run
    model = run.model
    folder = Path(model.name)
    # Report a missing folder of the tokenizer before the Hub is asked for the model.
    if model.tokenizer is not None and Path(model.tokenizer).is_absolute():
        fetch.fetch_tokenizer(model.tokenizer)
    if rows.request.weights == "stored":
        folder = fetch.fetch_for_tokens(model)
    # The support of these model types is known. It is measured for other types, which needs torch.
    stated = check_config(folder, model)
    if stated["model_type"] in ARCHITECTURES and not model.vision:
        facts = read_config_facts(folder, model, stated)
        where = f"{folder}/config.json"
        spec = model_spec(stated, where=where, trust_remote_code=model.trust_remote_code)
        spec = replace(spec, context=facts.positions or spec.context)
        tokenizer = load_tokenizer(fetch.tokenizer_folder(model, folder), model)
        size = vocab_rows(facts, tokenizer, model)
        return ModelFacts(rows, run, run, folder, spec, TUNED_SUPPORT, tokenizer, size)
    files = read_model_files(folder, model, image_max_pixels=run.data.image_max_pixels)
    return ModelFacts(
        rows,
        run,
        run,
        folder,
        files.spec,
        files.support,
        files.tokenizer,
        files.vocab_rows,
        files.pictures,
    )
