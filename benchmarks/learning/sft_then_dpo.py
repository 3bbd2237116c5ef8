"""SFT, then DPO on its adapter, on SmolLM2 135M: is what is written the model that was trained?

    python benchmarks/learning/sft_then_dpo.py [--folder runs/sft-then-dpo]

SFT learns both answers of demo/pairs.py's pairs, DPO then which is better. The adapter is opened in
PEFT, the merge in Transformers; logits and greedy answers to held-out questions are compared with
the run's own, all in fp32. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "demo"))
sys.path.insert(0, str(Path(__file__).parent))

import pairs  # noqa: E402
from preferences import tunesmith  # noqa: E402
from run import find_model  # noqa: E402

import tunesmith as package  # noqa: E402
from tunesmith.data.source import from_list  # noqa: E402
from tunesmith.hub.fetch import fetch  # noqa: E402
from tunesmith.inference.generate import make_prompt  # noqa: E402

QUESTIONS = 8
NEW_TOKENS = 32


def train(folder: Path, model: str) -> Path:
    common = (
        f"model.name={model}",
        "model.dtype=fp32",
        "data.seq_len=128",
        "train.duration=5 steps",
        "train.micro_batch=832 tokens",
        "log.samples=0",
    )
    sft = folder / "sft"
    if not (sft / "final").is_dir():
        rows = f"data.train={{source: {folder}/answers.jsonl, format: prompt-completion}}"
        tunesmith(
            "train", "smollm2-135m-lora", *common, rows, "data.validation=[]",
            "train.global_batch=24 examples", "train.learning_rate=1e-3", f"output_dir={sft}",
        )  # fmt: skip
    dpo = folder / "dpo"
    if not (dpo / "final").is_dir():
        rows = f"data.train={{source: {folder}/pairs.jsonl, format: preference}}"
        tunesmith(
            "train", "smollm2-135m-dpo", *common, rows, "data.validation=[]",
            "train.global_batch=12 examples", "train.learning_rate=2e-4",
            f"adapter={{kind: lora, from: {sft}/final}}", f"output_dir={dpo}",
        )  # fmt: skip
    return dpo


@torch.no_grad()
def outputs(model: Any, prompts: list[list[int]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits of each prompt's last token, and the greedy tokens after it."""
    logits = []
    answers = []
    for ids in prompts:
        asked = torch.tensor([ids])
        logits.append(model(input_ids=asked, use_cache=False).logits[0])
        tokens = model.generate(
            input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False,
            max_new_tokens=NEW_TOKENS, pad_token_id=0,
        )  # fmt: skip
        answers.append(tokens[0, len(ids) :].tolist())
    return logits, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/sft-then-dpo"))
    folder = parser.parse_args().folder
    pairs.write(folder)
    run = train(folder, find_model())
    loaded = package.load_run(run)
    lines = (folder / "questions.jsonl").read_text().splitlines()[:QUESTIONS]
    rows = from_list([json.loads(line) for line in lines])
    prompts = [make_prompt(rows, i, loaded, "messages", None).ids for i in range(QUESTIONS)]
    ours, answers = outputs(loaded.model, prompts)
    scale = max(float(logits.abs().max()) for logits in ours)
    merged = folder / "merged"
    if not merged.is_dir():
        package.merge(run, merged)
    others = {}
    plain = AutoModelForCausalLM.from_pretrained(
        # The folder that a .gguf file was read into, or the checkpoint itself.
        fetch(loaded.location.base),
        dtype=torch.float32,
    )
    others["adapter in PEFT"] = PeftModel.from_pretrained(plain, run / "final").eval()
    others["merge in Transformers"] = AutoModelForCausalLM.from_pretrained(merged).eval()
    results: dict[str, Any] = {"questions": QUESTIONS, "new_tokens": NEW_TOKENS, "largest": scale}
    for name, model in others.items():
        theirs, their_answers = outputs(model, prompts)
        differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
        same = sum(a == b for a, b in zip(answers, their_answers, strict=True))
        results[name] = {"largest_difference": max(differences), "same_answers": same}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
