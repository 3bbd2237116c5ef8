"""The training methods, one file per method. A recipe's `method` is a key of `METHODS`."""

from tunesmith.config.schema import MethodConfig
from tunesmith.methods.dpo import DirectPreferenceOptimization
from tunesmith.methods.grpo.method import GroupRelativePolicyOptimization
from tunesmith.methods.kto import KahnemanTverskyOptimization
from tunesmith.methods.orpo import OddsRatioPreferenceOptimization
from tunesmith.methods.sft import SupervisedFineTuning
from tunesmith.methods.simpo import SimplePreferenceOptimization
from tunesmith.train_model import Method

METHODS: dict[str, type[Method]] = {
    "sft": SupervisedFineTuning,
    "dpo": DirectPreferenceOptimization,
    "orpo": OddsRatioPreferenceOptimization,
    "kto": KahnemanTverskyOptimization,
    "simpo": SimplePreferenceOptimization,
    "grpo": GroupRelativePolicyOptimization,
}


def make_method(config: MethodConfig) -> Method:
    """Create the method that a recipe selects, with its settings."""
    return METHODS[config.name](config)
