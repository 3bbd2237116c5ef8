"""tunesmith: fine-tune open-weight language models on the hardware that people have.

>>> import tunesmith
>>> tunesmith.train("my-recipe.yaml", ["output_dir=runs/from-python"])
>>> loaded = tunesmith.load_run("runs/from-python")
>>> next(tunesmith.generate(loaded, [{"prompt": "Hello"}]))["output"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.inference.evaluate import evaluate
    from tunesmith.inference.generate import generate
    from tunesmith.inference.load_run import load_run
    from tunesmith.inference.merge import merge
    from tunesmith.training.run import train

__all__ = ["__version__", "evaluate", "generate", "load_run", "merge", "train"]
__version__ = "0.1.0"

_MODULES = {"train": "training.run"} | {n: f"inference.{n}" for n in ("evaluate", "generate", "load_run", "merge")}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used, so that `import tunesmith` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(import_module(f"{__name__}.{_MODULES[name]}"))[name]


def __dir__() -> list[str]:
    return __all__
