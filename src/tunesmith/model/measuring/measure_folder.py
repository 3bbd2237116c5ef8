"""Measurement of how tunesmith trains the model of a folder, for `tunesmith models`."""

from pathlib import Path

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.arch.load import load_configs
from tunesmith.model.arch.text_config import has_own_class
from tunesmith.model.known.model_types import ModelType, Support
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.model.measuring.support import find_support


def measure_folder(folder: Path) -> ModelType:
    """Measure how tunesmith trains the model of a folder, using the model's own config."""
    model = Model(name=str(folder))
    config, full_config = load_configs(folder, model)
    text_type = config.get_text_config().model_type
    where = f"{folder}/config.json"
    try:
        support = find_support(config, model, where=where, full_config=full_config)
    except ModelError as error:
        return ModelType(text_type, Support("refused", f"{error.what}: {error.why}"))
    # `find_support` tests a tiny model with smaller sizes. Also build the model with its real
    # sizes, to detect invalid sizes.
    measured = config if full_config is None or has_own_class(config) else full_config
    model_spec(measured.to_dict(), where=where)
    return ModelType(text_type, support)
