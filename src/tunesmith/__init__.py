"""tunesmith: fine-tune open-weight language models on the hardware that people have.

Start with these five functions. `help(tunesmith.train)` shows all options of a function.

train       train a recipe, or resume its run; `rows` can be a list of dicts or a data frame
            >>> result = tunesmith.train(model="demo", rows=[{"prompt": "Hi", "completion": "Ho"}])
            >>> result = tunesmith.train(recipe="my.yaml", overrides={"train.learning_rate": 2e-4})
load_run    load the model that a run has trained
            >>> loaded = tunesmith.load_run("runs/my-run")
generate    generate answers to rows
            >>> next(tunesmith.generate(loaded, [{"prompt": "Hello"}]))["output"]
evaluate    measure a run and its base model on held-out rows
            >>> tunesmith.evaluate("runs/my-run", "held-out.jsonl").scores["tuned"].loss
merge       merge an adapter into its base model and write a Transformers folder
            >>> tunesmith.merge("runs/my-run", "merged")

More functions:

plan        forecast the memory and hours of a recipe on given machines
            >>> tunesmith.plan("my.yaml", on="2x8xh100")["meshes"][0]["hours"]
inspect_data  return the rows of a recipe as tokens, with counts and warnings
            >>> tunesmith.inspect_data(model="demo", data="faq.csv")["warnings"]
sweep       train adapters for several values of a key on one base
            >>> tunesmith.sweep("my.yaml", {"train.learning_rate": [1e-4, 3e-4]})
compare     show recipes and measured values of several runs side by side
            >>> tunesmith.compare("runs/lr-1e-4", "runs/lr-1e-3")
export_gguf write the model of a run as one file for llama.cpp
            >>> tunesmith.export_gguf("runs/my-run", "my-model.gguf")

Results are printed as tables, also in a notebook. Errors that a user can fix are `TunesmithError`s,
see `tunesmith.errors`. They state the problem, its place, the reason and the fix. A fix names the
argument of the function. For a fix key=value, pass overrides={"key": value}.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tunesmith._version import __version__
from tunesmith.errors import (
    CheckpointError,
    DataError,
    MachineError,
    ModelError,
    NonFiniteError,
    RecipeError,
    RunError,
    StoppedError,
    TunesmithError,
    UsageError,
)

if TYPE_CHECKING:
    from tunesmith.answers.decoding import Decoding
    from tunesmith.answers.load_run import LoadedModel, load_run
    from tunesmith.cli.from_python import inspect_data, plan, sweep
    from tunesmith.metrics.record import StepRecord
    from tunesmith.start.run import train
    from tunesmith.tools.evaluate.evaluate import Evaluation, evaluate
    from tunesmith.tools.evaluate.generate import generate
    from tunesmith.tools.export.gguf.export import export_gguf
    from tunesmith.tools.export.merge import Merged, merge
    from tunesmith.tools.export.record import ExportedFile
    from tunesmith.tools.report.comparison import Comparison, compare
    from tunesmith.training.result import Result

__all__ = [
    "CheckpointError",
    "Comparison",
    "DataError",
    "Decoding",
    "Evaluation",
    "ExportedFile",
    "LoadedModel",
    "MachineError",
    "Merged",
    "ModelError",
    "NonFiniteError",
    "RecipeError",
    "Result",
    "RunError",
    "StepRecord",
    "StoppedError",
    "TunesmithError",
    "UsageError",
    "__version__",
    "compare",
    "evaluate",
    "export_gguf",
    "generate",
    "inspect_data",
    "load_run",
    "merge",
    "plan",
    "sweep",
    "train",
]

# Maps each public name to the module that defines it. No module directly in the package may have
# one of these names: importing such a module would replace the function of the same name.
_MODULES = {
    "train": "start.run",
    "load_run": "answers.load_run",
    "generate": "tools.evaluate.generate",
    "evaluate": "tools.evaluate.evaluate",
    "merge": "tools.export.merge",
    "compare": "tools.report.comparison",
    "export_gguf": "tools.export.gguf.export",
    "plan": "cli.from_python",
    "inspect_data": "cli.from_python",
    "sweep": "cli.from_python",
    "Decoding": "answers.decoding",
    "Result": "training.result",
    "StepRecord": "metrics.record",
    "LoadedModel": "answers.load_run",
    "Evaluation": "tools.evaluate.evaluate",
    "Merged": "tools.export.merge",
    "Comparison": "tools.report.comparison",
    "ExportedFile": "tools.export.record",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import tunesmith` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `bound_shape_caches` sets environment variables that torch and its libraries read when they
    # are loaded, so call it before the import.
    host = import_module(f"{__name__}.runtime.host")
    host.bound_shape_caches()
    host.prepare_threads()
    value = vars(import_module(f"{__name__}.{_MODULES[name]}"))[name]
    if not isinstance(value, type):
        value = import_module(f"{__name__}.errors").in_words_of_python(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
