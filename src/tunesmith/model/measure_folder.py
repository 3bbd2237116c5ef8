"""Measure how the model of a folder trains, for `tunesmith models`."""

from pathlib import Path

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError
from tunesmith.model.load import load_configs
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.model_types import ModelType, Support
from tunesmith.model.names import has_own_class
from tunesmith.model.support import find_support


def measure_folder(folder: Path) -> ModelType:
    """Measure how the model of a folder trains, on its own config."""
    model = Model(name=str(folder))
    config, whole = load_configs(folder, model)
    text_type = config.get_text_config().model_type
    where = f"{folder}/config.json"
    try:
        support = find_support(config, model, where=where, whole=whole)
    except ModelError as error:
        return ModelType(text_type, Support("refused", f"{error.what}: {error.why}"))
    # The twin has other sizes: whether these make a model shows on the model itself.
    measured = config if whole is None or has_own_class(config) else whole
    model_spec(measured.to_dict(), where=where)
    return ModelType(text_type, support)
