"""Export of a LoRA as a GGUF file with llama.cpp's script for adapters.

The script includes its own version of the package `gguf`, so it runs in a child process. The script
chooses the tensor names and the order of rows. tunesmith writes the header, because the script
ignores the factor sqrt(r) of rsLoRA. The script's file is temporary: its tensors are copied into
the exported file.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from tunesmith.adapter.peft_files import ADAPTER_CONFIG
from tunesmith.errors import ModelError
from tunesmith.host.child_output import exit_text, last_line
from tunesmith.model.weights.safetensors_files import ADAPTER_WEIGHTS
from tunesmith.tools.export.gguf.adapter import (
    BASE_COPY,
    WHOLE_MODEL_FIX,
    AdapterTarget,
    adapter_plan,
    lora_matrices,
)
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor, require_gguf
from tunesmith.tools.export.tuned_weights import RowSource, TensorCache, WholeRows

SCRIPT = "convert_lora_to_gguf.py"
# Types of text models for which llama.cpp applies an adapter to every weight. For other types
# llama.cpp silently ignores the adapter of some weights.
ADAPTED_TYPES = frozenset(
    """
    gemma4_text gemma4_unified_text glm4 gpt_oss llama4_text nemotron_h olmo3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe
    """.split()
)
# Program that runs the script and makes it read config.json directly. By default the script loads
# the config through Transformers, which adds default values.
_RUN_SCRIPT = """
import json, runpy, sys
from conversion.base import ModelBase
def load_hparams(folder, is_mistral_format):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
ModelBase.load_hparams = staticmethod(load_hparams)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def plan_converted_adapter(
    config: Mapping[str, object],
    text_config: PretrainedConfig,
    weights: Mapping[str, RowSource],
    target: AdapterTarget,
    converter: Converter,
) -> GgufPlan:
    """Plan the GGUF file of an adapter for a model type that needs llama.cpp's converter.

    Args:
        config: the content of the base's config.json.
        text_config: Transformers' config of the base's text model.
        weights: as for `plan_adapter`.

    Raise ModelError if the run trained weights that llama.cpp does not apply, or the script fails.
    """
    require_gguf()
    import gguf

    # Raise an error if there are other weights than LoRA matrices.
    lora_matrices(weights, target, is_tied=bool(text_config.tie_word_embeddings))
    text_type = text_config.model_type
    if text_type not in ADAPTED_TYPES:
        raise ModelError(
            f"the adapter of a {text_type} model cannot be exported to GGUF",
            where="--adapter",
            why="llama.cpp may ignore some weights of the adapter without an error",
            fix=WHOLE_MODEL_FIX,
        )
    script = converter.folder / SCRIPT
    if not script.is_file():
        raise ModelError(
            "this llama.cpp converter cannot convert adapters",
            where=converter.folder,
            why=f"there is no script {SCRIPT}",
            fix="use --converter with a complete llama.cpp checkout, or with the sdist of "
            "llama-cpp-python",
        )
    with tempfile.TemporaryDirectory() as scratch:
        # The script derives metadata from the path of this folder. tunesmith does not copy the
        # metadata, so the path does not matter.
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings = {"r": target.adapter.rank, "lora_alpha": target.adapter.alpha}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        save_file(
            {
                name: weight.rows(0, weight.shape[0]).contiguous()
                for name, weight in weights.items()
                if not name.endswith(BASE_COPY)
            },
            folder / ADAPTER_WEIGHTS,
        )
        file = folder / "adapter.gguf"
        _run_script(script, folder, file, converter, text_type)
        # The reader maps the file into memory, so the file can be deleted with its folder.
        reader = gguf.GGUFReader(file)
    planned = []
    cache = TensorCache()
    for tensor in reader.tensors:
        shape = torch.Size(tensor.data.shape)
        source = WholeRows(shape, partial(torch.tensor, tensor.data), cache)
        planned.append(GgufTensor(tensor.name, tuple(shape), "F16", source))
    arch = reader.fields["general.architecture"].contents()
    return adapter_plan(arch, target, planned)


def _run_script(
    script: Path, folder: Path, file: Path, converter: Converter, text_type: str
) -> None:
    # Remove the working directory from sys.path with -P, because it may contain a folder `gguf`.
    command = [sys.executable, "-P", "-c", _RUN_SCRIPT, str(script), "--outtype", "f32"]
    command += ["--base", str(folder), "--outfile", str(file), str(folder)]
    done = subprocess.run(
        command,
        env=converter.environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not file.is_file():
        raise ModelError(
            f"llama.cpp's converter cannot convert the adapter of this {text_type} model",
            where=script,
            why=last_line(done.stderr) or exit_text(done.returncode),
            fix=WHOLE_MODEL_FIX,
        )
