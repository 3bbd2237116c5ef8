"""The methods that learn from preferences beside TRL: same rows, same order, fp32, no dropout.

    python benchmarks/parity/preferences.py --model DIR --data pairs.json --json out.json

Rows are LLaMA-Factory's `conversations, chosen, rejected`; the shortest pairs are taken, and of
their answers the first `--words`, so that 20 steps take minutes on a CPU;
`--layers N` takes the first N layers of the model alone. Each side
begins with the same weights (for LoRA the adapter that ours draws, read by PEFT) and takes AdamW at
a constant rate, clipped at 1.0. TRL gets the tokens that ours trains on, each answer up to its end
token: its own template would also train on the line break that some templates write behind it.
KTO's batch is the whole global batch, as TRL measures the KL within a batch; its rows are the
answers of the pairs, a good one and a bad one in turn. ORPO is compared with the cross-entropy of
the answer in TRL too, which takes it of prompt and answer.

Reported, over all steps: the largest relative difference of losses and gradient norms, the largest
absolute one of rewards and margins, which begin at 0, and of gradient tensors, before clipping, at
the first and the last step, the largest difference beside the largest value. With `--float64` also
how far each side's gradients of ORPO are from those of the same weights and rows in float64, and how
far these are from each other: the two sides' weights drift apart over the steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parity import load, recipe, write_first_adapter
from tunesmith.config.schema import Run
from tunesmith.data.batch import Example
from tunesmith.data.mismatched import mismatched_examples
from tunesmith.data.prepare import prepare_data
from tunesmith.hub.model_files import read_model_files
from tunesmith.model.tokenizer import eos_ids
from tunesmith.optim.optimizer import Optimizer
from tunesmith.training.run import train

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# Of a case: our method, TRL's trainer, and what its config has beside what all have.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "sigmoid": ({"name": "dpo"}, "DPO", {}),
    "ipo": ({"name": "dpo", "loss_type": "ipo"}, "DPO", {"loss_type": "ipo"}),
    "robust": (
        {"name": "dpo", "loss_type": "robust", "label_smoothing": 0.1},
        "DPO",
        {"loss_type": "robust", "label_smoothing": 0.1},
    ),
    "kto": ({"name": "kto"}, "KTO", {}),
    "orpo": ({"name": "orpo"}, "ORPO", {}),
    "simpo": (
        {"name": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
}
# Our names of what a step's record has, and TRL's.
REWARDS = {
    "rewards_chosen": "rewards/chosen",
    "rewards_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
}
Curves = dict[str, list[float]]  # by our names


class Kept(NamedTuple):
    """Of a step what is trained and its gradients before they are clipped, by our names."""

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


Steps = list[Kept]  # the first and the last


def shortest_pairs(a: argparse.Namespace) -> list[dict[str, Any]]:
    """As many pairs as the steps take, the shortest of the file, in its order.

    Both answers are cut to `a.words` words.
    """

    def size(row: dict[str, Any]) -> int:
        prompt = sum(len(message["value"]) for message in row["conversations"])
        return prompt + max(len(row["chosen"]["value"]), len(row["rejected"]["value"]))

    rows = json.loads(Path(a.data).read_text())
    for row in rows:
        for name in ("chosen", "rejected"):
            row[name]["value"] = " ".join(row[name]["value"].split()[: a.words])
    rows = [row for row in rows if row["chosen"]["value"] != row["rejected"]["value"]]
    shortest = sorted(range(len(rows)), key=lambda i: size(rows[i]))[: a.steps * a.batch]
    return [rows[i] for i in sorted(shortest)]


def first_layers(model: str, count: int, out: Path) -> str:
    """The folder of a model with the first `count` layers of `model`, its embeddings and head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, num_hidden_layers=count
    ).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return str(out)


def feedback_rows(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One answer of each pair, a good one and a bad one in turn."""
    rows = []
    for number, pair in enumerate(pairs):
        is_good = number % 2 == 0
        answer = pair["chosen" if is_good else "rejected"]["value"]
        prompt = [
            {"role": ROLES[message["from"]], "content": message["value"]}
            for message in pair["conversations"]
        ]
        completion = [{"role": "assistant", "content": answer}]
        rows.append({"prompt": prompt, "completion": completion, "label": is_good})
    return rows


def examples_of(run: Run) -> list[Example]:
    """The rows of a run as it trains on them."""
    folder = Path(run.model.name)
    files = read_model_files(folder, run.model)
    ends = eos_ids(folder, files.tokenizer)
    train_rows = prepare_data(run, files.tokenizer, ends, files.vocab_rows).train
    return [train_rows[i] for i in range(len(train_rows))]


@contextmanager
def first_and_last_of(steps: int) -> Iterator[Steps]:
    """Keep ours of `steps` steps."""
    kept: Steps = []
    step_of_optimizer = Optimizer.step

    def step(self: Optimizer) -> Tensor:
        if self.index in (0, steps - 1):
            kept.append(Kept(copies(self.params), copies(self.gradients())))
        return step_of_optimizer(self)

    Optimizer.step = step  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        Optimizer.step = step_of_optimizer  # type: ignore[method-assign]


def copies(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def our_curves(run: Run, steps: int) -> tuple[Curves, Steps]:
    with first_and_last_of(steps) as kept:
        records = train(run, quiet=True).records
    curves = {
        "loss": [record.loss for record in records],
        "grad_norm": [record.grad_norm for record in records],
    }
    for name in [*REWARDS, "kl"]:
        if name in records[0].extra:
            curves[name] = [record.extra[name] for record in records]
    return curves, kept


def answer_of(example: Example, number: int = 0) -> tuple[list[int], list[int]]:
    """Prompt and answer of one sequence of an example; what follows the end token is left out."""
    start = sum(example.sequences[:number])
    end = start + example.sequences[number] if example.sequences else len(example.ids)
    trained = example.trained[start:end].nonzero()[0]
    ids = example.ids[start:end].tolist()
    first, last = int(trained[0]), int(trained[-1])
    assert len(trained) == last - first + 1, "an answer with gaps"
    return ids[:first], ids[first : last + 1]


def dpo_rows(examples: list[Example]) -> list[dict[str, Any]]:
    rows = []
    for example in examples:
        prompt, chosen = answer_of(example, 0)
        _, rejected = answer_of(example, 1)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def kto_rows(examples: list[Example], batch: int) -> list[dict[str, Any]]:
    rows = []
    for first in range(0, len(examples), batch):
        together = examples[first : first + batch]
        # TRL's own rule, which it applies to the rows that it tokenizes itself: each answer goes
        # to the next prompt of its batch.
        answers = [answer_of(example)[1] for example in together]
        for number, example in enumerate(together):
            prompt, answer = answer_of(example)
            row = {"prompt_ids": prompt, "completion_ids": answer, "label": example.label}
            rows.append(row | {"KL_completion_ids": answers[number - 1]})
        # Ours pairs them up in the same way.
        for row, mixed in zip(rows[first:], mismatched_examples(together, 1 << 20), strict=True):
            assert answer_of(mixed) == (row["prompt_ids"], row["KL_completion_ids"])
    return rows


def padded_rows(examples: list[Example]) -> list[dict[str, Any]]:
    """As ORPO's and CPO's collator takes them."""
    rows = []
    for example in examples:
        prompt, _ = answer_of(example)
        # The texts are asked for, and not used.
        row: dict[str, Any] = {"prompt": "", "chosen": "", "rejected": ""}
        row |= {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for number, name in enumerate(("chosen", "rejected")):
            _, answer = answer_of(example, number)
            row[f"{name}_input_ids"] = [*prompt, *answer]
            row[f"{name}_attention_mask"] = [1] * len(prompt + answer)
            row[f"{name}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return rows


def trl_classes(trainer: str) -> tuple[type[Any], type[Any]]:
    """TRL's trainer and its config."""
    if trainer == "ORPO":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return of_answers(ORPOTrainer), ORPOConfig
    if trainer == "CPO":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig
    import trl

    return getattr(trl, f"{trainer}Trainer"), getattr(trl, f"{trainer}Config")


def of_answers(trainer: type[Any]) -> type[Any]:
    """TRL's ORPO with the cross-entropy of the chosen answers, without their prompts."""

    class OfAnswers(trainer):
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            chosen, rejected, logits, others, _ = super().concatenated_forward(model, batch)
            targets = batch["chosen_labels"][:, 1:]
            loss = F.cross_entropy(
                logits[:, : targets.shape[1]].flatten(0, 1), targets.flatten(), ignore_index=-100
            )
            return chosen, rejected, logits, others, loss

    return OfAnswers


def recorded(trainer: type[Any], steps: int) -> type[Any]:
    """A TRL trainer on rows that are tokens already, in their order, that keeps what is compared."""
    from torch.utils.data import SequentialSampler

    class Recorded(trainer):
        losses: list[float]
        kept: Steps

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def tokenize_row(self, feature: Any, *_: Any, **__: Any) -> Any:
            return feature

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kw: Any) -> Any:
            loss = super().training_step(*args, **kw)
            self.losses.append(float(loss.detach()))
            if self.state.global_step in (0, steps - 1):
                weights = trained_weights(self.model)
                grads = {name: weight.grad for name, weight in weights.items()}
                self.kept.append(Kept(copies(weights), copies(grads)))
            return loss

    return Recorded


def trained_weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained of a model of Transformers or PEFT, by our names."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def orpo_in_float64(
    model: torch.nn.Module, weights: Mapping[str, Tensor], examples: list[Example]
) -> Mapping[str, Tensor]:
    """The gradients of ORPO with the default beta, an answer at a time, with `weights` in a float64
    model.
    """
    model.zero_grad()
    trained = trained_weights(model)
    with torch.no_grad():
        for name, weight in weights.items():
            trained[name].copy_(weight)
    tokens_of_chosen = sum(len(answer_of(example)[1]) for example in examples)
    for example in examples:
        sums, log_odds = [], []
        for number in (0, 1):
            prompt, answer = answer_of(example, number)
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
            logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            of_answer = logprobs.gather(-1, torch.tensor(answer)[:, None])
            sums.append(of_answer.sum())
            log_odds.append(of_answer.mean() - torch.log1p(-of_answer.mean().exp()))
        odds_loss = -0.1 * F.logsigmoid(log_odds[0] - log_odds[1]) / len(examples)
        (odds_loss - sums[0] / tokens_of_chosen).backward()
    return copies({name: trained[name].grad for name in weights})


def beside_float64(
    ours: Steps, theirs: Steps, model: torch.nn.Module, batches: list[list[Example]]
) -> dict[str, float]:
    """How far each is from float64, and how far that of our weights from that of theirs.

    `batches`: those of the first and the last step.
    """
    found = {}
    for when, mine, other, examples in zip(("first", "last"), ours, theirs, batches, strict=True):
        of_mine = orpo_in_float64(model, mine.weights, examples)
        of_other = orpo_in_float64(model, other.weights, examples)
        found[f"ours_from_float64_{when}"] = apart_of(mine.gradients, of_mine)
        found[f"trl_from_float64_{when}"] = apart_of(other.gradients, of_other)
        found[f"drift_in_float64_{when}"] = apart_of(of_mine, of_other)
    return found


def trl_curves(
    a: argparse.Namespace,
    case: str,
    examples: list[Example],
    adapter: Path | None,
    out: Path,
) -> tuple[Curves, Steps]:
    from datasets import Dataset
    from transformers import AutoTokenizer

    _, name, options = CASES[case]
    trainer_class, config_class = trl_classes(name)
    rows = {
        "DPO": lambda: dpo_rows(examples),
        "KTO": lambda: kto_rows(examples, a.batch),
    }.get(name, lambda: padded_rows(examples))()
    config = config_class(
        output_dir=str(out), per_device_train_batch_size=a.batch, max_steps=a.steps, learning_rate=a.rate,
        lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none",
        disable_tqdm=True, max_length=a.seq, use_cpu=True, max_grad_norm=1.0, logging_steps=1, **options,
    )  # fmt: skip
    recorded_class = recorded(trainer_class, a.steps)
    recorded_class.losses = []
    recorded_class.kept = []
    trainer = recorded_class(
        model=load(Path(a.model), adapter, torch.float32),
        processing_class=AutoTokenizer.from_pretrained(a.model),
        train_dataset=Dataset.from_list(rows),
        args=config,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {"loss": trainer.losses, "grad_norm": [float(entry["grad_norm"]) for entry in logs]}
    for ours, theirs in {**REWARDS, "kl": "kl"}.items():
        if theirs in logs[0]:
            curves[ours] = [entry[theirs] for entry in logs]
    return curves, trainer.kept


def compare(ours: tuple[Curves, Steps], theirs: tuple[Curves, Steps]) -> dict[str, Any]:
    """The largest differences; see the module."""
    found: dict[str, Any] = {}
    assert ours[0].keys() == theirs[0].keys(), (ours[0].keys(), theirs[0].keys())
    for name, values in ours[0].items():
        apart = [abs(x - y) for x, y in zip(values, theirs[0][name], strict=True)]
        if name in ("loss", "grad_norm"):
            apart = [d / abs(y) for d, y in zip(apart, theirs[0][name], strict=True)]
        found[name] = max(apart)
        found[f"{name}_last"] = theirs[0][name][-1]
    for when, mine, other in zip(("first", "last"), ours[1], theirs[1], strict=True):
        found[f"gradients_{when}"] = apart_of(mine.gradients, other.gradients)
    return found


def apart_of(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """The largest difference beside the largest value."""
    assert ones.keys() == others.keys(), ones.keys() ^ others.keys()
    largest = max(float(grad.abs().max()) for grad in others.values())
    return max(float((ones[name] - grad).abs().max()) for name, grad in others.items()) / largest


def add_case(file: Path, named: str, figures: dict[str, Any]) -> None:
    """Write a case into the report, over what it said of it before."""
    report = json.loads(file.read_text()) if file.exists() else {}
    report[named] = {"command": sys.argv, **figures}
    file.write_text(json.dumps(report, indent=1))


def main() -> None:
    """Each case with an adapter, and DPO in full."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a Transformers folder")
    p.add_argument("--data", required=True, help="pairs as LLaMA-Factory has them, a JSON array")
    p.add_argument(
        "--cases",
        nargs="+",
        default=[*(f"{case} lora" for case in CASES), "sigmoid none"],
        help="of a loss and what is trained: lora or none, which trains the whole model",
    )
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--rate", type=float, default=1e-4)
    p.add_argument("--target", nargs="+", default="all-linear", help="of the adapter")
    p.add_argument("--layers", type=int, help="of the model, the first ones; the default is all")
    p.add_argument("--words", type=int, default=16, help="of an answer; the rest is cut off")
    p.add_argument("--float64", action="store_true", help="ORPO's gradients beside float64's")
    p.add_argument("--json", help="write the curves here, beside those of other cases")
    a = p.parse_args()
    pairs = shortest_pairs(a)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if a.layers is not None:
            a.model = first_layers(a.model, a.layers, folder / "model")
        for named in a.cases:
            case, kind = named.split()
            method = CASES[case][0]
            of_case = folder / named.replace(" ", "-")
            of_case.mkdir()
            rows = of_case / "rows.json"
            rows.write_text(json.dumps(feedback_rows(pairs) if case == "kto" else pairs))
            row_format = "feedback" if case == "kto" else "preference"
            data = {"train": {"source": str(rows), "format": row_format}}
            run = recipe(a, of_case / "run", kind, data=data, method=method)
            adapter = write_first_adapter(run, of_case / "first") if kind == "lora" else None
            ours = our_curves(run, a.steps)
            examples = examples_of(run)
            theirs = trl_curves(a, case, examples, adapter, of_case / "trl")
            apart = compare(ours, theirs)
            if a.float64 and case == "orpo":
                model = load(Path(a.model), adapter, torch.float64)
                batches = [examples[: a.batch], examples[-a.batch :]]
                apart |= beside_float64(ours[1], theirs[1], model, batches)
            figures = "  ".join(f"{key} {value:.1e}" for key, value in apart.items())
            print(f"{named:12} {figures}", flush=True)
            if a.json:
                curves = {"tunesmith": ours[0], "trl": theirs[0]}
                add_case(Path(a.json), named, {"difference": apart, "curves": curves})


if __name__ == "__main__":
    main()
