"""Loss curves with pictures beside Transformers' own processor and model, under PEFT.

    python benchmarks/parity/picture_curves.py --json out.json
    python benchmarks/parity/picture_curves.py qwen3_vl gemma3       # some families

Each family is a small random model (fp32) with its processor and a byte tokenizer: `tests/vision.py`.
Both sides begin with the same weights, take the same rows of drawn figures in the same order, at a
constant rate. The plain side renders a row's lists of parts by the tokenizer, opens the pictures,
has Transformers' processor make all inputs of them and computes one row a forward; ours packs.
Printed: the largest relative difference of the loss, that of what was trained in the end; and how far
the plain side's first losses of rows move with pictures in the opposite colours.

Transformers' `AutoProcessor` wants torchvision, and PixtralProcessor and SmolVLMProcessor cannot be
had without (and num2words). Where torchvision is not installed, the others are made without it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from families_curves import as_json
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from parity import compare, write_first_adapter

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import vision
from figures import draw_figures
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.training.run import train

STEPS, BATCH, ROWS = 20, 6, 24
RATES = {"lora": 2e-3, "none": 5e-4}
# Of what is added to each weight: a picture's positions of a text move the first loss by 3e-4.
SPREAD = 0.15
# Of an update by a gradient of nothing but rounding, AdamW makes one as large as of any other.
EPS = 1e-5

# Of the families here
PROJECTORS = (
    "multi_modal_projector",
    ".merger.",
    "deepstack_merger_list",
    "connector",
    "embed_vision",
)

Row = dict[str, Any]
Change = Callable[[Image.Image], Image.Image]


def write_model(family: str, folder: Path) -> Path:
    """A random model of a family with its processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision.write_processor(folder, family)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * SPREAD)
        for name, parameter in model.named_parameters():
            # As in families_curves.py.
            if config.model_type == "gemma4" and name.endswith("q_norm.weight"):
                parameter.mul_(parameter.numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def write_rows(folder: Path, count: int) -> Path:
    """Rows with no picture, one or two, of many sizes, some with a second turn; <image> in texts."""
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)

    def draw(name: str) -> str:
        image, text = draw_figures(rng)
        size = (rng.randint(30, 130), rng.randint(30, 130))
        image.resize(size).save(folder / name)
        images.append(name)
        return text

    lines = []
    for n in range(count):
        images: list[str] = []
        messages: list[dict[str, str]] = []

        def add(question: str, answer: str, messages: list[dict[str, str]] = messages) -> None:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})

        kind = n % 4
        if kind == 0:
            add(f"What is {n} + {n + 1}?", f"It is {2 * n + 1}.")
        elif kind == 1:
            add("<image>What is drawn?", draw(f"{n}.png"))
        elif kind == 2:
            both = f"{draw(f'{n}-0.png')}, and {draw(f'{n}-1.png')}"
            add(f"Here is <image>\nand here <image> ({n}). What is drawn?", both)
        else:
            add("What is drawn? <image>", draw(f"{n}-0.png"))
            add("<image> And here?", draw(f"{n}-1.png"))
        lines.append(json.dumps({"messages": messages, "images": images}) + "\n")
    file = folder / "figures.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def recipe(model: Path, folder: Path, rows: Path, kind: str, steps: int, *, projector: bool) -> Run:
    """Ours: fixed order, constant rate, packed rows, a row a micro batch."""
    adapter = {"kind": "lora", "rank": 4, "alpha": 8} if kind == "lora" else {"kind": "none"}
    return make_run(
        model,
        folder,
        held=False,
        model={"vision": True, "train_projector": projector},
        data={
            "train": {"source": str(rows), "format": "messages"},
            "shuffle": False,
            "seq_len": 512,
        },
        train={
            "duration": f"{steps} steps",
            "global_batch": f"{BATCH} examples",
            "micro_batch": "512 tokens",
            "schedule": "constant",
            "warmup": "0 steps",
            "learning_rate": RATES[kind],
            "eps": EPS,
        },
        checkpoint={"every": None},
        adapter=adapter,
    )


def load_processor(folder: Path) -> Any:
    """Transformers' processor, with the image processor of PIL, as ours has it."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if find_spec("torchvision"):
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = image_processor
        return processor
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, settings.pop("processor_class"))
    changes = {"check_argument_for_proper_class": lambda *_: None}
    unchecked = type(kind.__name__, (kind,), changes)
    parts = {"image_processor": image_processor, "tokenizer": AutoTokenizer.from_pretrained(folder)}
    return unchecked(*[parts.get(name) for name in unchecked.get_attributes()], **settings)


@dataclass(frozen=True)
class Inputs:
    """One row as Transformers has it: all arguments of the model, and its labels, not shifted."""

    arguments: dict[str, Tensor]
    labels: Tensor


def read_row(row: Row, folder: Path, processor: Any, change: Change | None = None) -> Inputs:
    """Render, open and process a row; the answers with their end are learnt, and nothing else."""
    messages = []
    for message in row["messages"]:
        texts = message["content"].split("<image>")
        parts = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        messages.append(
            {"role": message["role"], "content": [p for p in parts if p.get("text", 1)]}
        )
    pictures = [ImageOps.exif_transpose(Image.open(folder / name)) for name in row["images"]]
    pictures = [change(picture) if change else picture for picture in pictures]

    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    arguments = dict(
        processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
    )
    ids = arguments["input_ids"][0]
    begin = tokenizer("<|im_start|>assistant\n", return_tensors="pt")["input_ids"][0]
    labels = torch.full_like(ids, -100)
    for start in range(len(begin), len(ids)):
        if torch.equal(ids[start - len(begin) : start], begin):
            length = int((ids[start:] == tokenizer.eos_token_id).nonzero()[0]) + 1
            labels[start : start + length] = ids[start : start + length]
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    learnt = "".join(answer + tokenizer.eos_token for answer in answers)
    assert tokenizer.decode(labels[labels != -100]) == learnt
    return Inputs(arguments, labels)


def sum_losses(model: torch.nn.Module, row: Inputs) -> Tensor:
    """Cross-entropy over the learnt tokens of a row, its softmax in float64 as in reference.py."""
    logits = model(**row.arguments, use_cache=False).logits[0].double()
    return F.cross_entropy(logits[:-1], row.labels[1:], ignore_index=-100, reduction="sum")


class Plain:
    """The plain side."""

    def __init__(
        self, folder: Path, adapter: Path | None, rows: Path, attention: str, *, projector: bool
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText

        self.folder = rows.parent
        self.processor = load_processor(folder)
        self.rows: list[Row] = [json.loads(line) for line in rows.read_text().splitlines()]
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        self.inputs = self.read_rows()
        self.is_adapted = adapter is not None
        if adapter is not None:
            model = PeftModel.from_pretrained(
                model, adapter, is_trainable=True, autocast_adapter_dtype=False
            )
        else:
            for name, parameter in model.named_parameters():
                is_text = "language_model" in name or "text_model" in name
                is_trained = is_text or (projector and any(part in name for part in PROJECTORS))
                parameter.requires_grad_(is_trained)
            model.get_output_embeddings().weight.requires_grad_(True)
        self.model: Any = model.train()

    def read_rows(self, change: Change | None = None) -> list[Inputs]:
        return [read_row(row, self.folder, self.processor, change) for row in self.rows]

    def first_losses(self, inputs: list[Inputs]) -> Tensor:
        """Compute the loss of each row before any update."""
        with torch.no_grad():
            return torch.stack([sum_losses(self.model, row) for row in inputs])

    def steps(self, steps: int, rate: float) -> Iterator[float]:
        """The loss of each step before its update."""
        rows = self.inputs
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, eps=EPS)
        for step in range(steps):
            batch = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
            tokens = sum(int((row.labels[1:] != -100).sum()) for row in batch)
            loss = 0.0
            for row in batch:
                part = sum_losses(self.model, row) / tokens
                part.backward()
                loss += float(part.detach())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    def weights(self) -> dict[str, Tensor]:
        """The adapter as PEFT names it in a file, or all weights."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model) if self.is_adapted else self.model.state_dict()


def read_weights(folder: Path, kind: str) -> dict[str, Tensor]:
    """Those that a run wrote, by the names of `Plain.weights`."""
    from transformers import AutoModelForImageTextToText

    if kind == "lora":
        return load_file(folder / "adapter_model.safetensors")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all values; an update moves one by the rate at most."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one side has {sorted(ours.keys() ^ theirs.keys())[:9]}")
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def compare_family(
    family: str,
    folder: Path,
    kind: str,
    steps: int,
    attention: str = "sdpa",
    *,
    projector: bool = False,
) -> dict[str, Any]:
    """Train on both sides; the losses and their differences, that of the weights, and how much
    pictures count.
    """
    model = write_model(family, folder / "model")
    rows = write_rows(folder / "rows", ROWS)
    run = recipe(model, folder, rows, kind, steps, projector=projector)
    adapter = write_first_adapter(run, folder / "first") if kind == "lora" else None
    plain = Plain(model, adapter, rows, attention, projector=projector)
    seen = plain.first_losses(plain.inputs)
    others = plain.first_losses(plain.read_rows(ImageOps.invert))
    ours = [record.loss for record in train(run, quiet=True).records]
    theirs = list(plain.steps(steps, RATES[kind]))
    written = read_weights(Path(run.output_dir) / "final", kind)
    return {
        "difference": compare(ours, theirs),
        "weights": largest_difference(written, plain.weights()),
        "pictures": float((others - seen).abs().sum() / seen.sum()),
        "ours": ours,
        "plain": theirs,
    }


def main() -> None:
    """LoRA and full, of each family."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    families = [*vision.FAMILIES, *vision.MORE_FAMILIES]
    p.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(families)}")
    p.add_argument("--kinds", nargs="+", default=["lora", "none"], choices=["lora", "none"])
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--attention", default="sdpa", help="of the plain side")
    p.add_argument("--projector", action="store_true", help="train it too, in full")
    p.add_argument("--json", help="write the figures to this file")
    options = p.parse_args()
    report: dict[str, Any] = {
        "command": [Path(word).name for word in sys.argv],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rows": [],
    }
    for family in options.families or families:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as name:
                result = compare_family(
                    family,
                    Path(name),
                    kind,
                    options.steps,
                    options.attention,
                    projector=options.projector,
                )
            difference = result["difference"]
            text = (
                f"{family:18}{kind:5} first {difference['first']:.1e}  all {difference['all']:.1e}"
            )
            text += f"  weights {result['weights']:.1e}  pictures {result['pictures']:.1e}"
            text += f"  loss {result['plain'][0]:.4f} -> {result['plain'][-1]:.4f}"
            print(text, flush=True)
            report["rows"].append({"family": family, "trained": kind, **result})
            if options.json:
                Path(options.json).write_text(as_json(report), encoding="utf-8")


if __name__ == "__main__":
    main()
