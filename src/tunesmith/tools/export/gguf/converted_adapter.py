"""A LoRA as a GGUF file, through llama.cpp's own script for adapters.

The script runs in a child process, as it has a package `gguf` of its own. It decides on names and
on the order of rows; the header is tunesmith's, because the script writes alpha without rsLoRA's
root. Its file is in memory only until the export has read it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from tunesmith.adapter.peft_files import ADAPTER_CONFIG, PREFIX
from tunesmith.errors import ModelError
from tunesmith.host.child_output import exit_text, last_line
from tunesmith.model.safetensors_files import ADAPTER_WEIGHTS
from tunesmith.tools.export.gguf.adapter import (
    WHOLE_MODEL_FIX,
    AdapterTarget,
    adapter_header,
    lora_matrices,
    refuse_unsupported,
)
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.plan import GgufPlan, GgufTensor, header_bytes, require_gguf
from tunesmith.tools.export.tuned_weights import LastRead, RowSource, WholeRows

if TYPE_CHECKING:
    from gguf import ReaderTensor

SCRIPT = "convert_lora_to_gguf.py"
# The text models whose adapters llama.cpp computes as PEFT does. In other architectures it
# multiplies by some weights without the adapter, and says nothing.
ADAPTED_TYPES = frozenset(
    """
    gemma4_text gemma4_unified_text glm4 gpt_oss llama4_text nemotron_h olmo3 qwen3_5_moe_text
    qwen3_5_text qwen3_moe
    """.split()
)
# The script reads Transformers' defaults in place of the keys of config.json.
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
    """Return the file of an adapter for a family that tunesmith does not write itself.

    Args:
        config: the base's config.json.
        text_config: Transformers' config of its text model.
        weights: as for `plan_adapter`.

    ModelError where more was trained than llama.cpp applies, or the script fails.
    """
    require_gguf()
    import gguf

    refuse_unsupported(weights, target, is_tied=bool(text_config.tie_word_embeddings))
    text_type = text_config.model_type
    if text_type not in ADAPTED_TYPES:
        raise ModelError(
            f"the adapter of a {text_type} model is not exported to GGUF",
            where="--adapter",
            why="llama.cpp may ignore parts of it, as it does in some architectures",
            fix=WHOLE_MODEL_FIX,
        )
    script = converter.folder / SCRIPT
    if not script.is_file():
        raise ModelError(
            "this converter has no script for adapters",
            where=str(converter.folder),
            why=f"there is no {SCRIPT}",
            fix="--converter with a whole llama.cpp checkout, or the sdist of llama-cpp-python",
        )
    with tempfile.TemporaryDirectory() as scratch:
        # Names of this folder are in the metadata, which is not used.
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings = {"r": target.adapter.rank, "lora_alpha": target.adapter.alpha}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        tensors = {}
        for (base_name, suffix), weight in lora_matrices(weights).items():
            layer = base_name.removesuffix(".weight")
            key = f"{PREFIX}{layer}.lora_{suffix[-1].upper()}.weight"
            tensors[key] = weight.rows(0, weight.shape[0]).contiguous()
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        del tensors
        file = folder / "adapter.gguf"
        _run_script(script, folder, file, converter, text_type)
        # The memory map stays readable after the folder is removed.
        reader = gguf.GGUFReader(file)
    planned = []
    last_read = LastRead()
    for tensor in reader.tensors:
        shape = torch.Size(tensor.data.shape)
        source = WholeRows(shape, partial(_read_values, tensor), last_read)
        planned.append(GgufTensor(tensor.name, tuple(shape), "F16", source))
    arch = reader.fields["general.architecture"].contents()
    writer = adapter_header(arch, target)
    return GgufPlan(header_bytes(writer, planned), tuple(planned))


def _run_script(
    script: Path, folder: Path, file: Path, converter: Converter, text_type: str
) -> None:
    # -P: a folder `gguf` in the working directory is not the converter's.
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
            f"llama.cpp's converter does not convert the adapter of this {text_type} model",
            where=str(script),
            why=last_line(done.stderr) or exit_text(done.returncode),
            fix=WHOLE_MODEL_FIX,
        )


def _read_values(tensor: "ReaderTensor") -> torch.Tensor:
    return torch.tensor(tensor.data)
