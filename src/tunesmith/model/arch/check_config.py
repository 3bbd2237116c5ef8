"""Check of a model's config.json without Transformers and torch."""

from pathlib import Path
from typing import Any

from tunesmith.config.schema import Model
from tunesmith.model.arch.spec import check_supported, read_spec
from tunesmith.model.known.architectures import ARCHITECTURES
from tunesmith.model.weights.safetensors_files import read_model_config
from tunesmith.model.weights.shipped import check_quantize


def check_config(folder: Path, model: Model) -> dict[str, Any]:
    """Check config.json without Transformers, and return its values.

    Raise ModelError if the config is missing or broken, if the model is not supported, or if the
    recipe's `model` section does not fit the model.
    """
    file = folder / "config.json"
    stated = read_model_config(folder)
    check_supported(stated, str(file), vision=model.vision)
    check_quantize(model.quantize, stated, str(file))
    runs_own_code = model.trust_remote_code and "auto_map" in stated
    if stated["model_type"] in ARCHITECTURES or runs_own_code:
        # Check the values of the file itself, before Transformers adds its defaults.
        read_spec(stated, where=str(file), trust_remote_code=model.trust_remote_code)
    return stated
