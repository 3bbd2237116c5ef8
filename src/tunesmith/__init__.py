"""tunesmith: fine-tune open-weight language models on the hardware that people have.

>>> import tunesmith
>>> changes = {"train.learning_rate": 2e-4, "output_dir": "runs/from-python"}
>>> result = tunesmith.train("my-recipe.yaml", changes)
>>> loaded = tunesmith.load_run(result.output_dir)
>>> next(tunesmith.generate(loaded, [{"prompt": "Hello"}]))["output"]
>>> tunesmith.evaluate(result.output_dir, "held-out.jsonl").scores["tuned"].loss
>>> tunesmith.merge(result.output_dir, "merged")

Rows of the program itself, such as a list of dicts or a data frame, need no file and no recipe:

>>> tunesmith.train(model="demo", rows=[{"prompt": "Hello", "completion": "Hi"}])

What a user can fix is raised as a `TunesmithError`, whose text says what, where, why and the fix;
`tunesmith.errors` has the whole tree.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tunesmith.errors import RunError, StoppedError, TunesmithError, UsageError

if TYPE_CHECKING:
    from tunesmith.export.merge import Merged, merge
    from tunesmith.inference.decoding import Decoding
    from tunesmith.inference.evaluate import Evaluation, evaluate
    from tunesmith.inference.generate import generate
    from tunesmith.inference.load_run import LoadedModel, load_run
    from tunesmith.metrics.record import StepRecord
    from tunesmith.training.result import Result
    from tunesmith.training.run import train

__all__ = [
    "Decoding",
    "Evaluation",
    "LoadedModel",
    "Merged",
    "Result",
    "RunError",
    "StepRecord",
    "StoppedError",
    "TunesmithError",
    "UsageError",
    "__version__",
    "evaluate",
    "generate",
    "load_run",
    "merge",
    "train",
]
__version__ = "0.1.0"

# Where each lies. No module of these names is directly below the package: importing one would
# replace the function.
_MODULES = {
    "train": "training.run",
    "Result": "training.result",
    "StepRecord": "metrics.record",
    "load_run": "inference.load_run",
    "LoadedModel": "inference.load_run",
    "generate": "inference.generate",
    "Decoding": "inference.decoding",
    "evaluate": "inference.evaluate",
    "Evaluation": "inference.evaluate",
    "merge": "export.merge",
    "Merged": "export.merge",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import tunesmith` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Both set variables that torch and its libraries read when they are loaded.
    host = import_module(f"{__name__}.runtime.host")
    host.bound_product_caches()
    host.prepare_threads()
    return vars(import_module(f"{__name__}.{_MODULES[name]}"))[name]


def __dir__() -> list[str]:
    return __all__
