"""Forward and backward of a small model with fused modules beside Transformers' own, in turns.

    OMP_NUM_THREADS=1 python benchmarks/speed/fused_modules.py --rounds 15 --json out.json

Random weights in fp32, LoRA on all linear layers, documents packed in one row, packed attention on
both sides. `speedup` is the median of the rounds' ratios, which have both sides one right after the
other, in turned order; its quartiles say how far it is to be trusted. Times are those of the process
on its cores, so that other processes disturb them little. `kept_mib`: what autograd keeps for the
backward, beside weights and adapters.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.metrics.hardware import describe_machine
from tunesmith.model import attention
from tunesmith.model.decoder import find_decoder
from tunesmith.model.documents import Documents, use_documents
from tunesmith.model.fused import fuse_modules
from tunesmith.model.recurrent import run_by_document

SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
# What Ministral 3 grows its queries by.
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# model_type -> what its config says beside SIZES
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "ministral3": {"rope_parameters": YARN},
    "olmo3": {},
    "olmo2": {},
    "qwen3_moe": EXPERTS,
    "glm4": {},
    "qwen3_5_text": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "gemma3_text": {},
    "granite": {},
    "phi3": {},
}
RECURRENT = {"qwen3_5_text": ["Qwen3_5GatedDeltaNet"]}
LENGTHS = (75, 210, 40, 130, 57)  # of the documents, in tokens


def build(name: str) -> nn.Module:
    """A model in training, with an adapter whose B is not zero."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    lora.attach_lora(model, Adapter(), seed=0)
    for _, layer in lora.loras(model):
        nn.init.normal_(layer.lora_B, std=0.02)
    model.set_attn_implementation(attention.register())
    run_by_document(model, RECURRENT.get(name, []))
    return model


class Step:
    """One forward and backward of a model's layers."""

    def __init__(self, model: nn.Module) -> None:
        self.decoder = find_decoder(model)
        edges = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        self.documents = Documents(edges, max(LENGTHS))
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        ids = torch.randint(SIZES["vocab_size"], (1, sum(LENGTHS)))
        self.inputs = {"input_ids": ids, "position_ids": positions.unsqueeze(0), "use_cache": False}

    def seconds(self) -> float:
        self.decoder.zero_grad()
        began = time.process_time()
        with use_documents(self.documents):
            self.hidden().square().mean().backward()
        return time.process_time() - began

    def hidden(self) -> torch.Tensor:
        return self.decoder(**self.inputs, documents=self.documents).last_hidden_state

    def kept_bytes(self) -> int:
        """Of all storages that autograd saves, parameters and buffers left out."""
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with use_documents(self.documents), saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = self.hidden()
        for tensor in (*self.decoder.parameters(), *self.decoder.buffers()):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        del hidden  # until here no storage is freed, and no address used twice
        return sum(sizes.values())


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Times and memory of both sides, and how far their hidden states are apart."""
    model = build(name)
    fused_model = copy.deepcopy(model)
    count = fuse_modules(fused_model, project=lora.project)
    own = Step(model)
    fused = Step(fused_model)
    fused.inputs = own.inputs
    with torch.no_grad(), use_documents(own.documents):
        expected = own.hidden()
        error = float((fused.hidden() - expected).abs().max() / expected.abs().max())
    times: dict[str, list[float]] = {"own": [], "fused": []}
    sides = [("own", own), ("fused", fused)]
    for index in range(rounds + 1):
        for side, step in sides:
            seconds = step.seconds()
            if index > 0:  # the first round warms up
                times[side].append(seconds)
        sides.reverse()
    ratios = [one / other for one, other in zip(times["own"], times["fused"], strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    return {
        "fused_modules": count,
        "speedup": round(middle, 3),
        "quartiles": [round(lower, 3), round(upper, 3)],
        "own_seconds": round(statistics.median(times["own"]), 4),
        "fused_seconds": round(statistics.median(times["fused"]), 4),
        "own_kept_mib": round(own.kept_bytes() / 2**20, 1),
        "fused_kept_mib": round(fused.kept_bytes() / 2**20, 1),
        "error_of_largest": float(f"{error:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = {}
    for name in args.only:
        models[name] = compare(name, args.rounds)
        print(name, json.dumps(models[name]), flush=True)
    described = describe_machine([])
    machine = {key: described[key] for key in ("cpu", "cpu_cores", "torch")}
    report = {
        "command": sys.argv,
        "threads": torch.get_num_threads(),
        "machine": {**machine, "transformers": version("transformers")},
        "sizes": SIZES,
        "documents": LENGTHS,
        "models": models,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
