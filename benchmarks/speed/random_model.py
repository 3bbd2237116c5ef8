"""Writer of a model with a real shape and random weights.

    python benchmarks/speed/random_model.py --shape llama3-8b --tokenizer DIR --output random-8b

With this model, the speed of `tunesmith train` can be measured without a download.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from tunesmith.checkpoint.contents import weights_of
from tunesmith.config.schema import Model
from tunesmith.model.arch import load
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.weights import random_init
from tunesmith.tools.bench.shape import write_shape


def write_random_model(
    folder: Path, shape: str, tokenizer: str, layers: int | None, file_size: str = "5GB"
) -> int:
    """Draw the weights on the device and save a model folder of Transformers. Return the bytes of
    the weight files.

    Args:
        layers: number of decoder layers. None uses the number of the shape.
        file_size: maximum size of a weight file.
    """
    folder.mkdir(parents=True)
    write_shape(
        folder,
        dict(SHAPES[shape].config) | ({"num_hidden_layers": layers} if layers else {}),
        tokenizer,
    )
    recipe = Model(name=str(folder), dtype="bf16")
    model = load.build_on_meta(load.load_configs(folder, recipe)[0], recipe)
    stored = dict(model.state_dict())
    load.materialize(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    random_init.init_random_weights(model, stored, seed=0, convert={}, device=None)
    save_torch_state_dict(weights_of(model), folder, max_shard_size=file_size)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Write one model folder and print its size."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", required=True, choices=list(SHAPES))
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--output", required=True, type=Path)
    p.add_argument("--layers", type=int, help="number of decoder layers; default: as in the shape")
    a = p.parse_args()
    size = write_random_model(a.output, a.shape, a.tokenizer, a.layers)
    print(json.dumps({"folder": str(a.output), "gib": round(size / 2**30, 2)}))


if __name__ == "__main__":
    main()
