"""Write a model of a true shape with random weights, so that `tunesmith train` itself can be timed without a download.

python benchmarks/random_model.py --shape llama3-8b --tokenizer DIR --output random-8b
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from tunesmith.bench.shape import write_shape
from tunesmith.config.schema import Model
from tunesmith.model import load, random_init
from tunesmith.model.shapes import SHAPES


def main() -> None:
    """Draw the weights on the device and save a Transformers folder."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", required=True, choices=list(SHAPES))
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--output", required=True, type=Path)
    p.add_argument("--layers", type=int, help="only so many decoder layers")
    a = p.parse_args()
    config = dict(SHAPES[a.shape].config) | ({"num_hidden_layers": a.layers} if a.layers else {})
    a.output.mkdir(parents=True)
    write_shape(a.output, config, a.tokenizer)
    recipe = Model(name=str(a.output))
    model = load.build_on_meta(load.load_config(a.output, recipe), recipe, rows=config["vocab_size"])
    stored = dict(model.state_dict())
    load.materialise(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    random_init.init_random_weights(model, stored, seed=0)
    save_torch_state_dict(model.state_dict(), a.output, max_shard_size="5GB", shared_tensors_to_discard=None)
    sizes = sum(f.stat().st_size for f in a.output.glob("*.safetensors"))
    print(json.dumps({"folder": str(a.output), "gib": round(sizes / 2**30, 2)}))


if __name__ == "__main__":
    main()
